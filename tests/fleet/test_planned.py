"""What the instances of a fleet are started with, and the router before them."""

from __future__ import annotations

from pathlib import Path

import pytest

from workbench.fleet.fleet_record import FleetRecord
from workbench.fleet.planned import FleetSettings, with_gpus
from workbench.scheduler.config import ConfigError
from workbench.settings.loading import settings_from
from workbench.settings.real import check_device_effects


def fleet(server=None, **flags) -> FleetSettings:
    return FleetSettings(settings_from(None, flags), {"backend": "simulated", **(server or {})})


def test_instances_are_numbered_over_the_pools_and_have_their_settings():
    planned = fleet(pool=("both:1", "small=both:2,gpu=l40s,chunk=512"), max_running=8).instances()
    assert [each.name for each in planned] == ["both.0", "small.0", "small.1"]
    assert [each.settings.run.gpu for each in planned] == ["h100", "l40s", "l40s"]
    assert [each.settings.run.chunk for each in planned] == [8192, 512, 512]
    for each in planned:
        run = each.settings.run
        assert (run.max_running, run.dp, run.pool, run.router) == (8, 1, None, "round_robin")
        assert (each.settings.host, each.settings.port, each.settings.loop) == ("127.0.0.1", 0, "overlap")


def test_each_instance_of_a_dp_is_a_server_of_the_run_alone():
    planned = fleet(dp=3, tp=2, gpu="l40s").instances()
    assert [each.name for each in planned] == ["both.0", "both.1", "both.2"]
    assert {(each.role, each.settings.run.tp, each.settings.run.dp) for each in planned} == {("both", 2, 1)}


def test_pairs_have_their_roles_their_loops_and_one_key():
    planned = fleet({"kv_transfer": "tcp"}, pool=("prefill:1,tp=2,pp=2", "decode:2")).instances()
    assert [(each.name, each.role, each.settings.loop) for each in planned] == [
        ("prefill.0", "prefill", "pipeline"),
        ("decode.0", "decode", "overlap"),
        ("decode.1", "decode", "overlap"),
    ]
    (key,) = {each.settings.peer_key for each in planned}
    assert key is not None and len(key) == 32
    assert {each.settings.kv_transfer for each in planned} == {"tcp"}


def test_the_router_listens_where_the_user_says_and_instances_want_the_same_key():
    made = fleet({"api_key": "hush", "host": "0.0.0.0", "port": 9000}, dp=2, router="least_requests")
    assert {(each.settings.api_key, each.settings.host) for each in made.instances()} == {("hush", "127.0.0.1")}
    route = made.route({"both": ["http://127.0.0.1:1"], "prefill": [], "decode": []})
    assert (route.host, route.port, route.api_key, route.worker_api_key) == ("0.0.0.0", 9000, "hush", "hush")
    assert route.router == "least_requests"
    assert route.admin_key is None
    made = fleet({"api_key": "hush", "admin_key": "admin"}, dp=2)
    assert made.route({"both": ["http://127.0.0.1:1"], "prefill": [], "decode": []}).admin_key == "admin"
    assert {each.settings.admin_key for each in made.instances()} == {None}
    assert fleet(dp=2).route({"both": ["http://127.0.0.1:1"], "prefill": [], "decode": []}).port == 8000


@pytest.mark.parametrize(
    ("server", "flags", "says"),
    [
        ({"role": "prefill"}, {"dp": 2}, "role: is of one server, and this starts 2 behind a router"),
        ({"node_rank": 1}, {"dp": 2}, "node_rank: is of one server, and this starts 2 behind a router"),
        ({"node_wait_s": 1.0}, {"dp": 2}, "node-wait: is of one server"),
        ({"profile_dir": Path("x")}, {"pool": ("both:2",)}, "profile_dir: a simulated model has neither"),
        ({}, {"dp": 2, "loop": "normal,overlap"}, "loop: a server runs one loop, not 'normal,overlap'"),
        ({}, {"dp": 2, "ep": 2, "model": "Qwen/Qwen3-30B-A3B"}, "ep: instances that share experts step together"),
        (
            {},
            {"pool": ("prefill:1", "decode:1"), "first_token": "prefill"},
            "pool prefill: first_token: prefill is for simulation",
        ),
        (
            {"backend": "cpu", "load_format": "dummy"},
            {"dp": 2, "tp": 2, "nodes": 2},
            "nodes: 2; instances that are started together are on this machine",
        ),
        ({"served_model_name": ""}, {"dp": 2}, "served_model_name: is empty"),
        ({"admin_key": " x"}, {"dp": 2}, "admin_key: is empty, not printable ASCII, or has a space around it"),
        ({"record_content": False}, {"dp": 2}, "record_content: there is no --record whose trace could go without"),
    ],
)
def test_what_several_servers_cannot_have_is_refused_in_one_line(server, flags, says):
    with pytest.raises(ConfigError) as caught:
        fleet(server, **flags).instances()
    assert str(caught.value).startswith(says)


def test_each_instance_leaves_its_part_of_the_record_as_the_user_wants_it(tmp_path):
    made = fleet({"record": tmp_path, "record_content": False}, dp=2)
    parts = [each.settings for each in FleetRecord(made, made.instances()).planned]
    assert [each.record for each in parts] == [tmp_path / ".instances.partial" / f"both.{i}" for i in (0, 1)]
    assert [each.record_content for each in parts] == [False, False]
    (part,) = {each.part for each in parts}
    assert part is not None and len(part.hash_key) == 32


def test_gpus_are_dealt_out_in_order_and_never_twice():
    planned = fleet({"backend": "cpu", "load_format": "dummy"}, pool=("both:2,tp=2", "cheap=both:1")).instances()
    assert [each.gpus for each in with_gpus(planned, ["0", "1", "GPU-ab", "3", "4", "5"])] == ["0,1", "GPU-ab,3", "4"]
    with pytest.raises(ConfigError, match=r"^pool: 3 instances take 2 \+ 2 \+ 1 = 5 GPUs, there are 4$"):
        with_gpus(planned, ["0", "1", "2", "3"])


def test_what_a_pool_says_of_modelled_gpus_is_nothing_to_real_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"^pool both: gpu: has no effect on a real cpu runner: the GPU is"):
        check_device_effects({"pool": ("both:2,gpu=h100",)}, None, "cpu")
    file = tmp_path / "run.toml"
    file.write_text('[[pool]]\ncount = 2\ngpu = "h100"\n')
    (note,) = check_device_effects({}, file, "cpu")
    assert note.startswith(f"{file}: pool both: gpu: has no effect on a real cpu runner")
    assert check_device_effects({"dp": 2}, file, "cpu") == []
