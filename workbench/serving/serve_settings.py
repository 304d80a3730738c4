"""What a server is told on the command line."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from workbench.scheduler.config import ConfigError
from workbench.scheduler.request import DEFAULT_MAX_NEW_TOKENS
from workbench.settings.run_settings import RunSettings

BACKENDS = ("auto", "cpu", "cuda", "simulated")


@dataclass(frozen=True)
class ServeSettings:
    """Everything beside the scheduler's own settings, which are in ``run`` under the names ``simulate`` has for them.

    Raises ConfigError for what cannot work.
    """

    run: RunSettings
    backend: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allow_origin: tuple[str, ...] = ()
    """Origins whose pages may use the server; ``*``: every page."""
    allow_host: tuple[str, ...] = ()
    """Names that the server answers to beside those of the loopback, where it checks them."""
    trust_request_chat_template: bool = False
    """Whether a request may bring a chat template of its own."""
    profile_dir: Path | None = None
    """Where /start_profile writes; None: it is refused."""
    weights_dir: Path | None = None
    """Where /update_weights_from_disk reads; None: any folder."""
    served_model_name: str | None = None
    tokenizer: str | None = None
    load_format: str = "auto"
    """auto, safetensors, gguf or dummy."""
    time_scale: float = 1.0
    """Real seconds per modelled second (simulated)."""
    simulated_output_tokens: str | None = None
    """Distribution of output lengths (simulated); None: as long as the client allows."""
    max_queue: int = 1000
    """Sequences that may wait for their first token before new ones are refused."""
    max_body_bytes: int = 16 << 20
    stuck_after_s: float = 60.0
    """No sign of life, or no progress with work pending, for so long means unhealthy."""
    drain_timeout_s: float = 300.0
    record: Path | None = None
    record_content: bool = True
    command: str = ""

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend: {self.backend!r} is not one of {', '.join(BACKENDS)}")
        if self.backend == "simulated" and self.load_format != "auto":
            raise ConfigError("load_format: a simulated model has no weights to load")
        if not self.record_content and self.record is None:
            raise ConfigError("record_content: there is no --record whose trace could go without")
        if self.served_model_name == "":
            raise ConfigError("served_model_name: is empty")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port: {self.port} is not between 0 and 65535")
        for name, value in (("time_scale", self.time_scale), ("drain_timeout", self.drain_timeout_s)):
            if not 0 <= value < float("inf"):
                raise ConfigError(f"{name}: {value} is negative or not finite")
        if not 0 < self.stuck_after_s < float("inf"):
            raise ConfigError(f"stuck_after: {self.stuck_after_s} is not positive and finite")
        if self.max_queue < 0:
            raise ConfigError(f"max_queue: {self.max_queue} is less than 0")
        if self.max_body_bytes < 1:
            raise ConfigError(f"max_body_bytes: {self.max_body_bytes} is less than 1")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii()):
            raise ConfigError("api_key: is empty or not ASCII")
        if self.backend != "simulated":
            for name, given in (
                ("time_scale", self.time_scale != 1.0),
                ("simulated_output_tokens", self.simulated_output_tokens is not None),
            ):
                if given:
                    raise ConfigError(f"{name}: is for --backend simulated")
        else:
            for name, folder in (("profile_dir", self.profile_dir), ("weights_dir", self.weights_dir)):
                if folder is not None:
                    raise ConfigError(f"{name}: a simulated model has neither a profile nor weights")
        if self.run.dp != 1:
            raise ConfigError(
                f"dp: {self.run.dp}; a server is one instance, so start one for each and a router before them"
            )
        if len(self.run.loops) != 1:
            raise ConfigError(f"loop: a server runs one loop, not {self.run.loop!r}")

        if self.run.max_tokens is None:  # there is no trace that would say what a request writes
            object.__setattr__(self, "run", dataclasses.replace(self.run, max_tokens=DEFAULT_MAX_NEW_TOKENS))

    @property
    def max_tokens(self) -> int:
        """The output bound of requests that give none."""
        return self.run.max_tokens or DEFAULT_MAX_NEW_TOKENS

    @property
    def loop(self) -> str:
        return self.run.loops[0]

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.served_model_name or self.run.model
