"""Settings of a server on the command line."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.handover.addresses import is_loopback
from workbench.handover.carrier_names import CarrierName
from workbench.scheduler.config import DEFAULT_MAX_NEW_TOKENS, ConfigError, Role
from workbench.scheduler.settings import RUN, setting, settings_of
from workbench.serving.backends.backend_spec import BACKEND_SETTINGS, BackendName, backend_spec
from workbench.serving.fleet_part import FleetPart
from workbench.serving.listen_settings import SERVER, ListenSettings
from workbench.serving.node_settings import NodeSettings
from workbench.serving.outputs.reasoning import REASONING
from workbench.serving.outputs.tool_formats import AUTO, FORMATS, NONE
from workbench.settings.run_settings import RunnerSettings, RunSettings

if TYPE_CHECKING:
    from workbench.serving.backends.live_backend import BackendSpec

PEERS, MODELLED = "Prefill and decode apart", "Simulated backend"
"""Groups of flags of a server's own."""


@dataclass(frozen=True)
class ServeSettings(RunnerSettings, ListenSettings, NodeSettings):
    """Everything beside the scheduler's own settings, which are in ``run`` under the names ``simulate`` has for them.

    Raises ConfigError for what cannot work.
    """

    run: RunSettings
    backend: BackendName = setting(
        "auto", group=SERVER, help="{choices}. Default {default}: cuda if there is a GPU, else cpu."
    )
    trust_request_chat_template: bool = setting(
        False,
        group=SERVER,
        no_flag=True,
        help="Let requests bring a chat template in chat_template_kwargs. Default: refused.",
    )
    profile_dir: Path | None = setting(
        None, group=SERVER, help="Folder below which /start_profile writes. Default: it is refused."
    )
    weights_dir: Path | None = setting(
        None, group=SERVER, help="Folder below which /update_weights_from_disk reads. Default: any."
    )
    served_model_name: str | None = setting(None, group=SERVER, help="Name of the model to clients. Default: MODEL.")
    tokenizer: str | None = setting(
        None,
        group=SERVER,
        help="Folder or id of the tokenizer. Default: the model's; a simulated model without one writes bytes.",
    )
    tool_parser: str = setting(
        AUTO,
        group=SERVER,
        choices=(AUTO, NONE, *FORMATS),
        help="How the model writes calls of tools: {choices}. Default {default}: as its chat template shows.",
    )
    reasoning_parser: str = setting(
        NONE,
        group=SERVER,
        choices=(NONE, *REASONING),
        help="How the model writes what it thinks before it answers, which is then apart from the answer: {choices}. "
        "Default {default}: it is part of the answer.",
    )
    max_queue: int = setting(
        1000,
        least=0,
        group=SERVER,
        help="Sequences that may queue; more are answered 503. Default {default}.",
    )
    """Sequences that may wait for their first token before new ones are refused."""
    stuck_after_s: float = setting(
        60.0,
        above=0,
        group=SERVER,
        flag="stuck-after",
        help="Seconds without a sign of life, or with work pending and nothing computed, after which /health fails; a node "
        "that is silent for so long ends the server. Default {default}.",
    )
    role: Role = setting(
        "both",
        group=PEERS,
        help="What the instance does: {choices}; whole requests, or one half of each, behind a router that knows instances "
        "of the other role. Default {default}.",
    )
    peer_host: str = setting(
        "127.0.0.1",
        group=PEERS,
        help="Address at which instances of the other role connect. Default {default}: this machine only.",
    )
    peer_port: int = setting(
        0, least=0, most=65535, group=PEERS, help="Port there; 0 takes a free one. Default {default}."
    )
    peer_key: str | None = setting(
        None,
        group=PEERS,
        envvar="WORKBENCH_PEER_KEY",
        help="Key that both sides of a connection between instances, or nodes, have to have. Default: none, and the other "
        "side is on this machine; nodes then have one that only you can read.",
    )
    peer_timeout_s: float = setting(
        15.0,
        above=0,
        group=PEERS,
        flag="peer-timeout",
        help="Seconds a peer may be silent before it counts as gone. Default {default}.",
    )
    kv_transfer: CarrierName = setting(
        "auto",
        group=PEERS,
        help="How KV gets to a decode instance: {choices}; auto: shared memory on one machine, else tcp. Default {default}.",
    )
    record: Path | None = setting(None, group=RUN, help="Folder for a run record and a trace of the traffic.")
    record_content: bool = setting(
        True,
        group=RUN,
        help="Token ids in the trace, or lengths and prefix hashes only. Default: ids.",
    )
    time_scale: float = setting(
        1.0,
        least=0,
        group=MODELLED,
        help="Real seconds per modelled second; 0 does not wait. Default {default}.",
    )
    simulated_output_tokens: str | None = setting(
        None,
        group=MODELLED,
        help="When answers end by themselves: N, A-B or lognormal:median=M,sigma=S (,max=N cuts its tail). Default: only "
        "at max_tokens.",
    )
    command: str = ""
    part: FleetPart | None = None
    """Of a server whose record is to be a part of its fleet's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.record_content and self.record is None:
            raise ConfigError("record_content: there is no --record whose trace could go without")
        if self.served_model_name == "":
            raise ConfigError("served_model_name: is empty")
        self.check_nodes(self.nodes, modelled=not self._backend.has_weights)
        spec = self.spec
        for name, folder in (("profile_dir", self.profile_dir), ("weights_dir", self.weights_dir)):
            if folder is not None and not spec.has_weights:
                raise ConfigError(f"{name}: a {spec.name} model has neither a profile nor weights")
        self._check_role()
        if self.run.pool or self.run.dp > 1:
            raise ConfigError(
                f"{'pool' if self.run.pool else 'dp'}: a server is one instance; a fleet starts one for each"
            )
        if len(self.run.loops) != 1:
            raise ConfigError(f"loop: a server runs one loop, not {self.run.loop!r}")
        if self.run.max_tokens is None:  # there is no trace that would say what a request writes
            object.__setattr__(self, "run", dataclasses.replace(self.run, max_tokens=DEFAULT_MAX_NEW_TOKENS))

    def _check_role(self) -> None:
        if self.role == "both":
            for name in ("peer_host", "peer_port", "peer_timeout_s", "kv_transfer"):
                declared = settings_of(ServeSettings)[name]
                if getattr(self, name) != declared.default:
                    raise ConfigError(f"{declared.said}: has no effect here: it needs role prefill or decode")
            return
        if self.nodes > 1:
            raise ConfigError(f"nodes: {self.nodes}; an instance of role {self.role} is on one machine")
        object.__setattr__(self, "run", self.run.as_role(self.role))
        if self.run.first_token == "prefill":
            raise ConfigError("first_token: prefill is for simulation; a live decode instance sends the first token")
        if self.peer_key is not None and not self.peer_key:
            raise ConfigError("peer_key: is empty")
        host = self.peer_host
        if host in ("0.0.0.0", "::", ""):
            raise ConfigError(f"peer_host: {host!r} is no address to connect to; say the one that peers reach")
        if self.peer_key is None and not is_loopback(host):
            raise ConfigError(f"peer_host: {host} is reached from elsewhere; that needs a --peer-key on both sides")

    @property
    def spec(self) -> BackendSpec:
        """Specification of the backend. Raises ConfigError for what is said of the other kind of backend."""
        if self.nodes == 1:
            return self._backend
        loading = {"backend": self.backend, "load_format": self.load_format}
        return self._backend.at(self.place(self.run, self.nodes, loading, self.peer_key, self.stuck_after_s))

    @property
    def _backend(self) -> BackendSpec:
        return backend_spec(**{name: getattr(self, name) for name in BACKEND_SETTINGS})

    @property
    def nodes(self) -> int:
        """How many machines hold the model; modelled ones are all here."""
        return self.run.nodes or 1 if self._backend.has_weights else 1

    @property
    def max_tokens(self) -> int:
        """The output bound of requests that give none."""
        return self.run.max_tokens or DEFAULT_MAX_NEW_TOKENS

    @property
    def loop(self) -> str:
        return self.run.loops[0]

    @property
    def model_name(self) -> str:
        """Name of the model to clients."""
        return self.served_model_name or self.run.model
