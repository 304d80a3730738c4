"""What becomes of requests whose instances die, whose transfers are lost, and whose clients go away."""

from __future__ import annotations

import pytest

from tests.loops.test_golden_timelines import A_PROMPT, B_PROMPT, job
from tests.pairs.pair_world import Kinds, PairWorld
from workbench.scheduler.disaggregated.decode_scheduler import DecodeScheduler


def world(alone: bool = False, **settings: object) -> PairWorld:
    """Two instances of each role; a prompt takes 20 ms, its KV 100 ms more on the wire, and each token 10 ms."""
    return PairWorld(
        [job("a", A_PROMPT, 4), *([] if alone else [job("b", B_PROMPT[:100], 4)])],
        Kinds(2),
        Kinds(2),
        link_bytes_s=1e6,
        latency_s=0.001,
        **settings,
    )


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_request_whose_instance_dies_before_a_token_was_sent_is_sent_once_more(role):
    run = world()
    number = 0 if role == "prefill" else 2
    run.run([(0.05, lambda: run.kill(number))])
    # In the middle of its transfer: everything is done again, beside the instance that is left.
    row = run.row("a")
    assert row.status == "finished" and row.output_tokens == 4 and row.first_token_s > 0.05 + 0.1
    assert row.handover is not None
    assert getattr(row.handover, f"{role}_instance") == number + 1
    assert run.row("b").status == "finished"


def test_a_request_whose_decode_instance_dies_after_a_token_was_sent_ends():
    run = world()
    run.run([(0.14, lambda: run.kill(2))])
    assert (run.row("a").status, run.row("a").output_tokens) == ("aborted:decode_gone", len(run.outputs["a"]))
    assert run.row("b").status == "finished"


def test_a_request_that_only_decodes_any_more_does_not_mind_that_its_prefill_instance_dies():
    run = world()
    run.run([(0.14, lambda: run.kill(0))])
    assert run.row("a").status == "finished" and run.row("a").output_tokens == 4


def test_a_second_loss_ends_a_request():
    run = world()
    run.run([(0.05, lambda: run.lose("a")), (0.2, lambda: run.lose("a"))])
    assert run.row("a").status == "aborted:transfer_failed"


def test_one_lost_transfer_costs_a_request_what_it_took_until_then():
    run = world(alone=True)
    run.run([(0.05, lambda: run.lose("a"))])
    other = world(alone=True).run()
    assert run.row("a").status == "finished"
    # Known at once where it is sent, 1 ms later where it should arrive; from there on as if it had just come.
    assert run.row("a").first_token_s == pytest.approx(0.05 + 0.001 + other.row("a").first_token_s)


def test_pages_of_an_aborted_request_are_nobody_elses_until_nothing_more_is_written_there():
    run = world()
    seen: list[tuple[int, int]] = []

    def look() -> None:
        decode = run.decode[0].scheduler
        assert isinstance(decode, DecodeScheduler)
        seen.append((len(decode.draining), decode.kv.used_tokens))

    moments = (0.0504, 0.0525)
    run.run([(0.05, lambda: run.abort("a")), *((at_s, look) for at_s in moments)])
    # Its prefill instance, 1 ms away, is told at once by the client, and says that it has stopped: until then they are held.
    assert seen == [(1, 100), (0, 0)]
    assert run.row("a").status == "aborted:client"


def test_a_handshake_that_is_late_ends_a_request_with_the_reason():
    run = world(handshake_timeout=0.001)
    run.run()
    assert {row.status for row in run.recorder.rows} == {"aborted:handshake_timeout"}


def test_a_transfer_that_is_late_is_made_once_more_and_then_given_up():
    run = world(transfer_timeout=0.06)
    run.run()
    for rid in "ab":
        row = run.row(rid)
        assert row.status == "aborted:transfer_timeout" and row.finish_s == pytest.approx(2 * 0.064, abs=0.01)
