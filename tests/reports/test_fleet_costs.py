"""What instances cost that come and go: GPU-hours, energy and money, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reports.metrics.coming_and_going import counts_over_time
from reports.metrics.instances import pools_of
from reports.metrics.pool_use import pool_numbers
from reports.metrics.report_numbers import make_report
from reports.metrics.summary import summarise
from reports.metrics.sweep_metrics import sweep_summary
from reports.metrics.time_use import time_use
from reports.page.report_page import page_html
from reports.record.run_record import RunRecord
from tests.reports.test_handovers import by_hand, pool

POWER_W = {"idle": 100.0, "prefill": 700.0, "decode": 400.0}
FLEET = [
    {"instance": 0, "state": "up", "begin_s": 0.0, "end_s": 20.0},
    {"instance": 1, "state": "starting", "begin_s": 0.0, "end_s": 5.0},
    {"instance": 1, "state": "up", "begin_s": 5.0, "end_s": 20.0},
    {"instance": 2, "state": "starting", "begin_s": 6.0, "end_s": 10.0},
    {"instance": 2, "state": "up", "begin_s": 10.0, "end_s": 12.0},
    {"instance": 2, "state": "down", "begin_s": 12.0, "end_s": 14.0},
    {"instance": 2, "state": "up", "begin_s": 14.0, "end_s": 15.0},
    {"instance": 2, "state": "draining", "begin_s": 15.0, "end_s": 16.0},
]


def run(**more: object) -> RunRecord:
    """20 s of one instance that prefills, on one GPU, and up to two that decode, on two GPUs each."""
    pools = [pool("prefill", 0, power_w=POWER_W), pool("decode", 1, count=2, tp=2, gpus=2, power_w=POWER_W)]
    record = by_hand()
    hardware = {"gpu": "h100", "gpus": 5, "simulated": True}
    return replace(record, meta={**record.meta, "pools": pools, "hardware": hardware, **more})


def test_without_changes_every_gpu_counts_for_the_whole_run():
    assert summarise(run())["gpu_hours"] == pytest.approx(5 * 20 / 3600)


def test_instances_count_from_their_start_to_the_end_of_their_draining():
    found = summarise(run(fleet=FLEET))
    # The prefill GPU 20 s; of two GPUs each, 20 s of the first and 10 s of the second decode instance.
    assert found["gpu_hours"] == pytest.approx((20 + 2 * (20 + 10)) / 3600)
    # They compute 7 s on one GPU and 11 s on two of those 80 s.
    assert found["gpu_busy_share"] == pytest.approx((7 + 2 * 11) / 80)
    assert found["gpu_busy_share"] + found["cpu_exposed_share"] + found["no_work_share"] == pytest.approx(1)


def test_time_out_of_service_is_idle_as_far_as_it_is_paid_for():
    use = time_use(run(fleet=FLEET), [1, 2])
    assert use is not None and use.gpu_s == pytest.approx(2 * 30)
    # 5 s and 4 s of starting and 2 s of being lost; what is not paid for is no idle time.
    assert use.idle_s["off"] == pytest.approx(2 * 11)
    assert sum(use.busy_s.values()) + sum(use.idle_s.values()) == pytest.approx(use.gpu_s)


def test_energy_is_drawn_by_what_gpus_do():
    found = summarise(run(fleet=FLEET))
    prefill_j = 7 * 700 + 13 * 100
    decode_j = 2 * (11 * 400 + 19 * 100)
    assert found["energy_kwh"] == pytest.approx((prefill_j + decode_j) / 3.6e6)
    assert found["energy_per_output_token_j"] == pytest.approx((prefill_j + decode_j) / 16)
    unknown = summarise(run(pools=[pool("prefill", 0, power_w=POWER_W), pool("decode", 1)]))
    assert unknown["energy_kwh"] is None and unknown["gpu_hours"] == pytest.approx(40 / 3600)


def test_money_is_gpu_hours_at_the_prices_of_the_record():
    prices = {"currency": "USD", "source": "by hand", "gpu_hour": {"h100": 3.6}}
    found = summarise(run(fleet=FLEET, prices=prices))
    assert found["cost"] == pytest.approx(80 * 0.001)
    assert found["cost_per_million_output_tokens"] == pytest.approx(0.08 / 16 * 1e6)
    assert sweep_summary(run(fleet=FLEET, prices=prices), None, None, 18.0)["cost_per_hour"] == pytest.approx(14.4)
    assert sweep_summary(run(prices=prices), None, None, 18.0)["cost_per_hour"] == 18.0
    assert summarise(run(prices={**prices, "gpu_hour": {"h200": 4}}))["cost"] is None


def test_the_number_of_instances_is_that_of_those_that_serve():
    record = run(fleet=FLEET)
    decode = pools_of(record)[1]
    assert counts_over_time(record, decode, 0.0, 20.0) == [
        (0.0, 0),
        (5.0, 1),
        (10.0, 2),
        (12.0, 1),
        (14.0, 2),
        (16.0, 1),
    ]
    numbers = pool_numbers(record)[1]
    assert (numbers["instances_least"], numbers["instances_most"], numbers["started"], numbers["lost"]) == (0, 2, 2, 1)
    assert numbers["instances_mean"] == pytest.approx((5 + 2 * 2 + 2 + 2 * 2 + 4) / 20)


def test_the_page_draws_instances_where_they_change():
    page = page_html(make_report({"run": run(fleet=FLEET)}), "t")
    assert 'data-pool="decode"' in page and "0 to 2 instances" in page and "2 started, 1 lost" in page
    assert 'id="instances"' not in page_html(make_report({"run": run()}), "t")
