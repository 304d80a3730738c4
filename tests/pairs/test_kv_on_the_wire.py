"""Bytes of KV between instances, and the links that carry them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from backends.simulated.catalogue.model_specs import load_model
from backends.simulated.clock import Clock
from backends.simulated.kv_layout import KVOnTheWire, kv_between, lanes
from backends.simulated.kv_network import KVNetwork, Port
from tests.test_pools import SAMPLE, workbench
from workbench.cluster.kv_wires import SimulatedWires
from workbench.scheduler.disaggregated.letters import KVArrived, KVSent, Letter, SendPages, StopSending

LLAMA = load_model("meta-llama/Llama-3.1-8B")
"""32 layers of 8 KV heads, 128 wide."""
DEEPSEEK = load_model("deepseek-ai/DeepSeek-V3")
"""61 layers, each of which keeps 512 + 64 elements of a token."""


@pytest.mark.parametrize(
    ("tp", "copies"),
    [(1, 1), (2, 1), (8, 1), (16, 2), (32, 4)],
)
def test_kv_heads_go_to_every_gpu_that_holds_them(tp, copies):
    kv = kv_between(LLAMA, "bf16", tp, False)
    assert kv.token_bytes == 32 * 8 * (128 + 128) * 2 * copies
    assert kv.pages_bytes(3, 16) == 3 * 16 * kv.token_bytes
    assert kv.rest_bytes(1000) == 0
    assert kv_between(LLAMA, "fp8", tp, False).token_bytes == kv.token_bytes / 2


@pytest.mark.parametrize("tp", [1, 8, 16])
def test_a_latent_is_sent_once_over_one_link(tp):
    assert kv_between(DEEPSEEK, "bf16", tp, False).token_bytes == 61 * (512 + 64) * 2
    assert (lanes(DEEPSEEK, tp, 1), lanes(DEEPSEEK, tp, 2)) == (1, 2)


def test_an_instance_has_as_many_links_as_gpus_that_hold_different_heads():
    assert [lanes(LLAMA, tp, 1) for tp in (1, 2, 8, 16)] == [1, 2, 8, 8]
    assert lanes(LLAMA, 4, 2) == 8


def test_of_layers_with_windows_the_last_tokens_go_with_the_last_pages_where_only_these_are_kept():
    model = load_model("openai/gpt-oss-20b")
    # Half of its 24 layers see 128 tokens; 8 heads of 64.
    every, windows = kv_between(model, "bf16", 1, False), kv_between(model, "bf16", 1, True)
    layer = 8 * (64 + 64) * 2
    assert every.token_bytes == 24 * layer and every.rest_bytes(1000) == 0
    assert windows.token_bytes == 12 * layer
    assert windows.rest_bytes(1000) == 128 * 12 * layer and windows.rest_bytes(10) == 10 * 12 * layer


def test_states_of_recurrent_layers_go_once_a_request():
    model = load_model("Qwen/Qwen3-Next-80B-A3B-Instruct")
    assert kv_between(model, "bf16", 2, False).rest_bytes(1) == model.state_bytes() > 0


# -- links ---------------------------------------------------------------------------------------------------------------


@dataclass
class Links:
    """A network of links, and when pieces have left."""

    ports: Sequence[float]
    """Bytes/s of each instance."""
    clock: Clock = field(default_factory=Clock)
    left_s: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.network = KVNetwork(self.clock)
        for number, bytes_s in enumerate(self.ports):
            self.network.connect(number, Port(bytes_s, 0.0))

    def send(self, name: str, source: int, target: int, size: float, at_s: float = 0.0) -> None:
        """Send a piece of the transfer that is called as the first letter of its name."""

        def left() -> None:
            self.left_s[name] = round(self.clock.now, 9)

        self.do(at_s, lambda: self.network.send(name[0], source, target, size, left))

    def do(self, at_s: float, act) -> None:
        self.clock.after(at_s, act)


def test_a_transfer_has_the_link_for_itself_and_its_pieces_go_one_behind_the_other():
    links = Links([10, 10])
    links.send("a1", 0, 1, 20)
    links.send("a2", 0, 1, 10, at_s=1)
    links.send("a3", 0, 1, 10, at_s=5)
    links.clock.run()
    assert links.left_s == {"a1": 2, "a2": 3, "a3": 6}


def test_transfers_through_one_port_share_it_and_both_ways_are_free_of_each_other():
    links = Links([10, 10, 10])
    links.send("a", 0, 1, 20)
    links.send("b", 0, 2, 20, at_s=1)
    links.send("c", 1, 0, 20)  # the other way
    links.clock.run()
    # a has sent 10 when b comes; both have 5 a second until a is done at 3; b's last 10 go in one more.
    assert links.left_s == {"a": 3, "b": 4, "c": 2}


def test_what_a_transfer_cannot_use_goes_to_the_others():
    links = Links([2, 10, 10, 10])
    links.send("a", 0, 2, 1)
    links.send("b", 0, 3, 1)
    links.send("c", 1, 3, 9)
    links.clock.run()
    # The first port has 1 for each of a and b; so c has 9 of the 10 that the last one takes in.
    assert links.left_s == {"a": 1, "b": 1, "c": 1}


def test_a_transfer_that_is_stopped_leaves_the_link_to_the_others():
    links = Links([10, 10, 10])
    links.send("a", 0, 1, 100)
    links.send("b", 0, 2, 20)
    links.do(2, lambda: links.network.stop("a"))
    links.clock.run()
    assert links.left_s == {"b": 3}
    assert links.clock.now == 3, "the run goes on for nobody's sake"


def test_an_infinitely_fast_link_takes_no_time():
    links = Links([float("inf")] * 3)
    links.send("a", 0, 1, 100, at_s=1)
    links.send("b", 0, 2, 1e12, at_s=1)
    links.clock.run()
    assert links.left_s == {"a": 1, "b": 1}


class Told:
    """An inbox, and a listener to transfers: what it was told, and when."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.heard: list[tuple[float, object]] = []

    def put(self, message: object) -> None:
        self.heard.append((self.clock.now, message))

    transfer_started = transfer_ended = put


def test_orders_are_carried_out_one_after_the_other_once_the_cpu_is_that_far():
    clock = Clock()
    inboxes, transfers = [Told(clock), Told(clock)], Told(clock)
    wires = SimulatedWires(clock, inboxes, transfers)
    kv = KVOnTheWire(10.0, (), 0.0)
    here = wires.wire(0, Port(10.0, 0.0), 1, lambda to: kv, lambda: clock.now + 0.5)
    wires.wire(1, Port(10.0, 0.0), 1, lambda to: kv, lambda: clock.now)
    pages = np.arange(4, dtype=np.int32)
    sends = [SendPages((number, 0), f"r{number}", 1, pages, pages, True, True, 4) for number in (0, 1)]
    here.post([*sends, StopSending((0, 0)), Letter(1, "over")])
    clock.run()
    assert transfers.heard == [(0.5, "r0"), (0.5, "r1"), (4.5, "r1")]
    assert inboxes[1].heard == [(0.5, "over"), (4.5, KVArrived((1, 0), None, 0))]
    assert inboxes[0].heard == [(4.5, KVSent((1, 0)))]


# -- runs ----------------------------------------------------------------------------------------------------------------


def rows(out: Path, *words: object, loop: str = "overlap") -> list[dict[str, str]]:
    ran = workbench("simulate", SAMPLE, "--out", out, *words)
    assert ran.exit_code == 0, ran.output
    return list(csv.DictReader((out / loop / "requests.csv").open()))


def transfer_s(row: dict[str, str]) -> float:
    return float(row["transfer_end_s"]) - float(row["transfer_start_s"])


@pytest.mark.parametrize(
    ("pools", "flags", "links"),
    [
        (("prefill:1", "decode:1"), (), 1),
        (("prefill:1,tp=4", "decode:1"), (), 1),  # the one GPU on the other side takes in all of it
        (("prefill:1,tp=4", "decode:1,tp=2"), (), 2),
        (("prefill:1,tp=4", "decode:1,tp=2"), ("--kv-link-per", "instance"), 1),
        (("prefill:1,kv-link=10GB/s", "decode:1"), (), 0.2),
    ],
)
def test_a_transfer_takes_its_bytes_at_the_slower_side_and_the_latency(tmp_path, pools, flags, links):
    words = [word for pool in pools for word in ("--pool", pool)]
    (row,) = rows(tmp_path / "o", "--requests", 1, "--kv-link", "50GB/s", "--kv-link-latency", "100us", *words, *flags)
    kv_bytes = int(row["input_tokens"]) * 131072
    assert transfer_s(row) == pytest.approx(kv_bytes / (links * 50e9) + 100e-6, abs=2e-9)


def test_whole_pages_are_sent(tmp_path):
    pools = ("--pool", "prefill:1", "--pool", "decode:1")
    words = ("--requests", 1, "--page-size", 64, "--kv-link-latency", "0us")
    (row,) = rows(tmp_path / "o", *words, *pools)
    pages = -(-int(row["input_tokens"]) // 64)
    assert transfer_s(row) == pytest.approx(pages * 64 * 131072 / 50e9, abs=2e-9)


def test_what_the_decode_instance_has_cached_is_not_sent(tmp_path):
    pools = ("--pool", "prefill:1", "--pool", "decode:1")
    words = ("--requests", 40, "--concurrency", 1, *pools)
    plain, cached = rows(tmp_path / "a", *words), rows(tmp_path / "b", *words, "--decode-cache")
    shorter = [transfer_s(two) / transfer_s(one) for one, two in zip(plain, cached, strict=True)]
    assert max(shorter) < 1 + 1e-6 and min(shorter) < 0.5
    # What a conversation wrote stays on the decode instance, and is not in the prefill instance's cache.
    assert [row["cached_tokens"] for row in cached] == [row["cached_tokens"] for row in plain]


def test_a_prefill_pool_of_several_stages_hands_over_what_a_decode_pool_of_one_takes_in(tmp_path):
    pools = ("--pool", "prefill:1,pp=2", "--pool", "decode:1,tp=2")
    found = rows(tmp_path / "o", "--requests", 30, "--rate", 20, *pools, loop="pipeline")
    assert {row["status"] for row in found} == {"finished"}
    stages = {row["stage"] for row in csv.DictReader((tmp_path / "o/pipeline/iterations.csv").open())}
    assert stages == {"0", "1"}


def test_loops_that_are_compared_are_those_of_pools_of_one_stage(tmp_path):
    pools = ("--pool", "prefill:1,pp=2", "--pool", "decode:1")
    rows(tmp_path / "o", "--requests", 20, "--loop", "normal,overlap", *pools)
    for loop in ("normal", "overlap"):
        text = (tmp_path / "o" / loop / "meta.json").read_text()
        assert '"loop": "pipeline"' in text and f'"loop": "{loop}"' in text
