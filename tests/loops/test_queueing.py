"""Queueing theory as a witness."""

from __future__ import annotations

import numpy as np
import pytest

from tests.world import Job, LinearCost, simulate


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_a_server_of_one_request_at_a_time_waits_as_long_as_an_m_d_1_queue(load):
    service_s = 0.010
    rng = np.random.default_rng(1)
    arrivals = np.cumsum(rng.exponential(service_s / load, 6000))
    jobs = [Job(f"r{i}", [i % 97 + 10], 1, arrival_s=float(at)) for i, at in enumerate(arrivals)]
    run = simulate(jobs, "normal", cost=LinearCost(step_s=service_s, prefill_token_s=0.0), max_running=1, check=False)
    waits = [run.end_s[job.rid] - job.arrival_s - service_s for job in jobs]
    # Pollaczek-Khinchine for deterministic service: load * service / (2 (1 - load)).
    assert np.mean(waits) == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.1)
