# What a type checker knows of the package: at run time each name is loaded when it is first asked for.
from backends.simulated.cost import CostModel as CostModel
from backends.simulated.cost.cost_request import CostRequest as CostRequest
from reports.record.run_record import RunRecord as RunRecord
from traces import Trace as Trace
from traces import TraceRequest as TraceRequest
from workbench.api import load_record as load_record
from workbench.api import simulate as simulate
from workbench.backend import Backend as Backend
from workbench.clients.trace_input import open_trace as open_trace
from workbench.loops import Loop as Loop
from workbench.scheduler.policy import Policy as Policy
from workbench.scheduler.policy import PolicyView as PolicyView
from workbench.scheduler.settings import ConfigError as ConfigError

__version__: str
__all__ = [
    "Backend",
    "ConfigError",
    "CostModel",
    "CostRequest",
    "Loop",
    "Policy",
    "PolicyView",
    "RunRecord",
    "Trace",
    "TraceRequest",
    "load_record",
    "open_trace",
    "simulate",
]
