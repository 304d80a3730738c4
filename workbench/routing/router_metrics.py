"""Metrics of a router, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from workbench.routing.circuit import STATES, CircuitState
from workbench.routing.dispatch import Dispatch
from workbench.routing.roster import Roster
from workbench.routing.worker import Worker

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 320)
NO_ANSWER = "none"
"""Stands for a status where a worker has not answered."""


class RouterMetrics:
    """What has happened, by worker; :meth:`shows` adds how things stand."""

    def __init__(self) -> None:
        disable_created_metrics()
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"workbench:router_{name}", text, labels, registry=self._registry)

        self._answers = counter("answers", "Answers of workers, by HTTP status.", "worker", "role", "status")
        self._retries = counter("retries", "Requests sent again, by the worker that failed them.", "worker", "role")
        self._cut_off = counter("cut_off", "Answers that a worker did not end.", "worker", "role")
        self._changes = counter("breaker_changes", "New states of breakers.", "worker", "role", "state")
        self._refused = counter("refused", "Requests that the router answered with an error.", "status")
        self._gone = counter("clients_gone", "Requests whose client went before their end.")
        self.first_byte_s = Histogram(
            "workbench:router_first_byte_seconds",
            "From a request's arrival to the first byte of its answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def shows(self, roster: Roster, dispatch: Dispatch) -> None:
        """Show the workers and who waits, too."""
        self._registry.register(_Standing(roster, dispatch))

    def answered(self, worker: Worker, status: int | None) -> None:
        """A worker has answered; None: it has not."""
        self._answers.labels(worker.url, worker.role, NO_ANSWER if status is None else str(status)).inc()

    def retried(self, worker: Worker) -> None:
        self._retries.labels(worker.url, worker.role).inc()

    def cut_off(self, worker: Worker) -> None:
        self._cut_off.labels(worker.url, worker.role).inc()

    def circuit_changed(self, worker: Worker, state: CircuitState) -> None:
        self._changes.labels(worker.url, worker.role, state).inc()

    def refused(self, status: int) -> None:
        """Count an error that was an answer."""
        self._refused.labels(str(status)).inc()

    def client_gone(self) -> None:
        self._gone.inc()

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self._registry)


class _Standing(Collector):
    def __init__(self, roster: Roster, dispatch: Dispatch) -> None:
        self._roster = roster
        self._dispatch = dispatch

    def collect(self) -> Iterator[Any]:
        by_worker = [
            ("healthy", "1 where the last looks at a worker found it well.", lambda w: int(bool(w.healthy))),
            ("draining", "1 where a worker gets nothing new and goes.", lambda w: int(w.draining)),
            ("breaker_state", "0 closed, 1 open, 2 half open.", lambda w: STATES.index(w.circuit.state)),
            ("running", "Requests under way.", lambda w: w.running),
        ]
        for name, text, value in by_worker:
            gauge = GaugeMetricFamily(f"workbench:router_{name}", text, labels=["worker", "role"])
            for worker in self._roster.workers.values():
                gauge.add_metric([worker.url, worker.role], value(worker))
            yield gauge
        yield GaugeMetricFamily(
            "workbench:router_waiting", "Requests that wait for a worker.", value=self._dispatch.room.waiting
        )
