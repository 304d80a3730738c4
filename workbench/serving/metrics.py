"""Metrics of a server, for Prometheus, under names in the style of vLLM and SGLang."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from workbench.serving.chunks import FINISH_WORDS
from workbench.serving.wire import Beat, Ready

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_ITL = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_E2E = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
_TOKENS = tuple(2**i for i in range(0, 18))
PHASES = ("receive", "schedule", "launch", "process")


class Metrics:
    """Histograms and counters of the service, and what the scheduler process last said of itself."""

    def __init__(self, model_name: str) -> None:
        disable_created_metrics()  # a second series for every first one, which nobody reads
        self.registry = CollectorRegistry()
        self.model = model_name

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"workbench:{name}", text, ["model_name"], buckets=buckets, registry=self.registry)
            return made.labels(model_name)

        self.ttft_s = histogram("time_to_first_token_seconds", "From arrival to the first token, as sent.", _TTFT)
        self.itl_s = histogram("inter_token_latency_seconds", "Between two tokens of a sequence.", _ITL)
        self.e2e_s = histogram("e2e_request_latency_seconds", "From arrival to the end of a sequence.", _E2E)
        self.prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a sequence.", _TOKENS)
        self.output_tokens = histogram("request_generation_tokens", "Output tokens of a sequence.", _TOKENS)
        self._finished = Counter(
            "workbench:request_success",
            "Sequences ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        for reason in ("length", "stop", "abort", "rejected"):
            self._finished.labels(model_name, reason)  # there from the start, at 0
        self.beat: Beat | None = None
        self.ready: Ready | None = None
        self.open_sequences = 0
        self.detokenizer_sequences = 0
        self.child_cpu_s: dict[str, float] = {}
        """CPU time of the other processes that answers pass, by their last pulse."""
        self.registry.register(_Scheduler(self, model_name))

    def finished(self, kind: str) -> None:
        self._finished.labels(self.model, FINISH_WORDS.get(kind, kind)).inc()


class _Scheduler(Collector):
    """The last heartbeat as metrics."""

    def __init__(self, metrics: Metrics, model_name: str) -> None:
        self._metrics = metrics
        self._model = model_name

    def collect(self) -> Iterator[Any]:
        beat, ready = self._metrics.beat, self._metrics.ready
        streams = GaugeMetricFamily(
            "workbench:open_streams", "Sequences a process holds state for.", labels=["model_name", "process"]
        )
        streams.add_metric([self._model, "http"], self._metrics.open_sequences)
        streams.add_metric([self._model, "detokenizer"], self._metrics.detokenizer_sequences)
        yield streams
        spent = CounterMetricFamily(
            "workbench:process_cpu_seconds", "CPU time of a process of the server.", labels=["model_name", "process"]
        )
        for process, cpu_s in {"http": time.process_time(), **self._metrics.child_cpu_s}.items():
            spent.add_metric([self._model, process], cpu_s)
        yield spent
        if beat is None or ready is None:
            return
        capacity = ready.kv_tokens
        queried = beat.prompt_tokens
        for name, text, value in (
            ("num_requests_running", "Sequences that hold KV.", beat.running),
            ("num_requests_waiting", "Sequences in the waiting queue.", beat.waiting),
            (
                "kv_cache_usage_perc",
                "Share of the KV pool held by sequences, 1 is all.",
                beat.kv_used_tokens / capacity,
            ),
            ("kv_used_tokens", "KV tokens held by sequences.", beat.kv_used_tokens),
            ("kv_cached_tokens", "KV tokens of the prefix cache that could be evicted.", beat.kv_cached_tokens),
            ("kv_capacity_tokens", "KV tokens in all.", capacity),
            (
                "cache_hit_rate",
                "Share of prompt tokens found in the prefix cache, since the start.",
                beat.cached_prompt_tokens / queried if queried else 0.0,
            ),
            ("scheduler_paused", "1 while paused.", int(beat.paused)),
        ):
            gauge = GaugeMetricFamily(f"workbench:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens of sequences that got a first token.", beat.prompt_tokens),
            ("generation_tokens", "Output tokens.", beat.generated_tokens),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", beat.prompt_tokens),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", beat.cached_prompt_tokens),
            ("num_preemptions", "Sequences that lost their KV and were put back into the queue.", beat.retractions),
            ("iterations", "Batches run.", beat.iterations),
            ("grammar_tokens", "Tokens sampled under a grammar.", beat.grammar_tokens),
            ("grammar_seconds", "Time of the loop that masks of grammars took.", beat.grammar_s),
            ("grammars_compiled", "Grammars compiled.", beat.grammars_compiled),
            ("grammar_compile_seconds", "Time of the thread that compiles grammars.", beat.grammar_compile_s),
        ):
            counter = CounterMetricFamily(f"workbench:{name}", text, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter
        phases = CounterMetricFamily(
            "workbench:host_phase_seconds",
            "CPU time of the scheduler process by phase.",
            labels=["model_name", "phase"],
        )
        for phase, spent_s in zip(PHASES, beat.phase_s, strict=True):
            phases.add_metric([self._model, phase], spent_s)
        yield phases
