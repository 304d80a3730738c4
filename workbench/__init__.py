"""workbench: one LLM-serving scheduler, run against a modelled GPU or a real one.

    import workbench

    record = workbench.simulate("trace.jsonl", loop="overlap", gpu="h100")

Everything here is loaded when it is first asked for: a server, which imports this package too, loads no simulator.
docs/api.md tells what there is; the types are in __init__.pyi.
"""

from __future__ import annotations

__version__ = "0.1.0"

_PLACES = {
    "Backend": "workbench.backend",
    "ConfigError": "workbench.scheduler.settings",
    "CostModel": "backends.simulated.cost",
    "CostRequest": "backends.simulated.cost.cost_request",
    "Loop": "workbench.loops",
    "Policy": "workbench.scheduler.policy",
    "PolicyView": "workbench.scheduler.policy",
    "RunRecord": "reports.record.run_record",
    "Trace": "traces",
    "TraceRequest": "traces",
    "load_record": "workbench.api",
    "open_trace": "workbench.clients.trace_input",
    "simulate": "workbench.api",
}
__all__ = [*_PLACES]


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found: object = getattr(import_module(_PLACES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
