"""GET /metrics, and the one number on it that only HTTP has."""

from __future__ import annotations

from prometheus_client import Counter, generate_latest

from workbench.serving.metrics import Metrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class MetricsPage:
    """Page of the service's metrics, in Prometheus' text form."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._refused = Counter(
            "workbench:request_refused",
            "Requests answered with an error, by HTTP status.",
            ["model_name", "status"],
            registry=metrics.registry,
        )

    def refused(self, status: int) -> None:
        """Count an error that was an answer."""
        self._refused.labels(self._metrics.model, str(status)).inc()

    def text(self) -> bytes:
        """Return the page."""
        return generate_latest(self._metrics.registry)
