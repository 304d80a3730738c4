"""Messages between the processes of a server, as msgpack over ZeroMQ.

    HTTP ──Submit, Cancel, Control, Ask,──> scheduler ──Opened, Step, Pulse──> detokenizer ──Chunks, Pulse──> HTTP
           Change, Shutdown,                    ^ │ <──────StopFound────────────────┘
           SessionControl, LoadWeights,           │
           StartProfile, StopProfile              └──Ready, Beat, Done, Failed──> HTTP

Every process owns one PULL socket. A client's request is answered by one or more *sequences*; to the scheduler, and in a
record, each of them is a request of its own, by its ``sequence_id``. Between processes a sequence is a number: what a step
says about 256 of them is then two small arrays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import zmq

from workbench.scheduler.capacity import Capacity
from workbench.scheduler.config import Role
from workbench.scheduler.request import SamplingParams
from workbench.serving.chunks import Chunk
from workbench.serving.requests import ControlAction, SessionAction


class Submit(msgspec.Struct, tag="submit", array_like=True):
    """A new sequence."""

    sequence: int
    sequence_id: str
    prompt: bytes
    """int32 token ids."""
    params: SamplingParams
    arrival_s: float
    """``time.monotonic()`` when the HTTP process took the request: the same clock in every process of a machine."""
    priority: int
    stop: tuple[str, ...]
    """Texts that end it. The scheduler does not look at them; the detokenizer does."""
    skip_special_tokens: bool
    session: str = ""
    bos_tokens: int = 0
    """As in :class:`~workbench.scheduler.messages.Generate`, and so is the next one."""
    namespace: str = ""
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    """The request's own objectives. Nothing is scheduled by the second; the record and its report have it."""
    grammar: str = ""
    """What it may write, as :mod:`workbench.serving.structured` has made it; empty: anything."""
    include_stop: bool = False
    """The stop string or stop token that ends it is part of its text."""
    router: str = ""
    room: int = 0
    peer: str = ""
    """The other half of it (:class:`~workbench.serving.requests.Shared`), if it has one."""


class Vocabulary(msgspec.Struct, tag="vocabulary", array_like=True):
    """The tokenizer, as ``Tokenizer.serialised`` has it: sent once, before the first sequence that has a grammar."""

    serialised: str | None


class Compiled(msgspec.Struct, tag="compiled", array_like=True):
    """Word of the scheduler process to itself: the grammar that a sequence waits for is there."""

    sequence_id: str


class Cancel(msgspec.Struct, tag="cancel", array_like=True):
    """End a sequence: its client has gone, or somebody asked."""

    sequence_id: str
    why: str


class Control(msgspec.Struct, tag="control", array_like=True):
    """Something to do to the scheduler as a whole; answered by :class:`Done` with the same number."""

    number: int
    action: ControlAction


class Ask(msgspec.Struct, tag="ask", array_like=True):
    """Question for the state of the scheduler; answered by :class:`Done` with the same number and its state."""

    number: int


class Change(msgspec.Struct, tag="change", array_like=True):
    """Other settings for the scheduler; answered by :class:`Done` with the same number, and why not if so."""

    number: int
    settings: dict[str, Any]


class SessionControl(msgspec.Struct, tag="session", array_like=True):
    """A session to begin or to forget; answered by :class:`Done` with the same number, and why not if so."""

    number: int
    session: str
    action: SessionAction


class LoadWeights(msgspec.Struct, tag="load_weights", array_like=True):
    """Other weights for the model, from a folder; answered by :class:`Done` with the same number, and why not if so."""

    number: int
    folder: str


class StartProfile(msgspec.Struct, tag="start_profile", array_like=True):
    """Profile what runs the batches; answered by :class:`Done` with the same number, and why not if so."""

    number: int
    folder: str
    steps: int | None
    """None: until :class:`StopProfile`."""


class StopProfile(msgspec.Struct, tag="stop_profile", array_like=True):
    """Write the profile; answered by :class:`Done` with the same number and the ``files``, or why not."""

    number: int


class Shutdown(msgspec.Struct, tag="shutdown", array_like=True):
    """Finish at once and in order."""


class Broken(msgspec.Struct, tag="broken", array_like=True):
    """Word of the scheduler process to itself, from a thread: what runs its batches has ended."""

    line: str


class StopFound(msgspec.Struct, tag="stop_found", array_like=True):
    """Word that the text of a sequence holds one of its stop strings."""

    sequence_id: str
    output_tokens: int
    """Its tokens up to the one that completed the string."""


ToScheduler = (
    Submit
    | Vocabulary
    | Compiled
    | Cancel
    | Control
    | Ask
    | Change
    | SessionControl
    | LoadWeights
    | StartProfile
    | StopProfile
    | Shutdown
    | Broken
    | StopFound
)


class Opened(msgspec.Struct, tag="opened", array_like=True):
    """A sequence whose tokens will follow."""

    sequence: int
    sequence_id: str
    stop: tuple[str, ...]
    min_new_tokens: int
    skip_special_tokens: bool
    include_stop: bool = False


class TokenLogprob(msgspec.Struct, array_like=True):
    """Log probability of a sampled token, and of what else might have come."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class PromptLogprobs(msgspec.Struct, array_like=True):
    """Log probabilities of a piece of a prompt."""

    sequence: int
    first: int
    """Place in the prompt of the first."""
    token_ids: list[int]
    logprobs: list[TokenLogprob]


class Ended(msgspec.Struct, array_like=True):
    """A sequence that has ended in the scheduler."""

    sequence: int
    kind: str
    """``length``, ``stop``, ``aborted``, ``rejected`` or ``handed_over``."""
    detail: str
    prompt_tokens: int = 0
    """Those of its session included."""
    cached_tokens: int = 0
    """How many of them were found in the cache."""
    stop_ids: tuple[int, ...] = ()
    """The tokens any of which ended it, as the scheduler has them: such a token is not part of its text."""


class Step(msgspec.Struct, tag="step", array_like=True):
    """Outcome of a processed batch: ``tokens[i]`` is the next token of ``sequences[i]``; one may get several."""

    sequences: bytes
    """int64."""
    tokens: bytes
    """int32."""
    first: list[tuple[int, int, int]]
    """(sequence, prompt tokens, how many of them were found in the cache) of those that got their first token."""
    ended: list[Ended]
    logprobs: dict[int, list[TokenLogprob]] | None = None
    """By sequence, one for each of its tokens, for those that asked."""
    prompts: list[PromptLogprobs] | None = None
    """Of prompts that were computed in it, for those that asked."""


class Pulse(msgspec.Struct, tag="pulse", array_like=True):
    """A sign of life that goes the way of an answer, through the detokenizer: while it comes, answers can."""

    sent_s: float
    """``time.monotonic()`` when the scheduler process sent it."""
    scheduler_cpu_s: float
    """CPU time of the scheduler process by then."""
    detokenizer_cpu_s: float = 0.0
    """That of the detokenizer process, which puts it in."""


ToDetokenizer = Opened | Step | Pulse | Shutdown


class Chunks(msgspec.Struct, tag="chunks", array_like=True):
    """Outcome of a step, as text."""

    chunks: list[Chunk]
    open_sequences: int
    """Sequences the detokenizer holds state for."""


class Beat(msgspec.Struct, tag="beat", array_like=True):
    """A sign of life of the scheduler process, and how it stands. Counts are since its start; moments are monotonic."""

    sent_s: float
    heard_s: float
    """When the process of the model that is silent longest was last heard of."""
    progress_s: float
    """When the loop last moved, or the batch that it waits for did."""
    pending: bool
    """The loop has something to do."""
    paused: bool
    waiting: int
    running: int
    kv_used_tokens: int
    kv_cached_tokens: int
    kv_full: bool
    """Admission has failed for want of KV or rows since something was last given back."""
    iterations: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    retractions: int
    phase_s: tuple[float, float, float, float]
    """CPU seconds of receive, schedule, launch and process."""
    grammar_tokens: int = 0
    """Masks made."""
    grammar_s: float = 0.0
    """Seconds that the loop spent on them."""
    grammars_compiled: int = 0
    grammar_compile_s: float = 0.0
    """Seconds of the thread that compiles."""


class Ready(msgspec.Struct, tag="ready", array_like=True):
    """Word that the scheduler process can take requests."""

    capacity: Capacity
    """What a sequence may take of the context and of the KV pool."""
    kv_tokens: int
    max_running: int
    vocab: int
    logprobs: bool
    """The backend can report log probabilities."""
    profiles: bool
    """The backend has something that a profiler can see."""
    backend: str
    device: str
    loop: str
    beat: Beat
    """How it stands at the start, so that a scheduler which is never heard of again is seen to be stuck."""
    no_grammars: str = ""
    """Why nobody's output can be constrained, in one line; empty: it can."""
    page_size: int = 1
    kv_dtype: str = ""
    role: Role = "both"
    peer: str | None = None
    """``host:port`` at which it takes connections of its peers; None: it has none."""
    instance_id: str = ""


class Done(msgspec.Struct, tag="done", array_like=True):
    """The answer to what had this number (:class:`Control`, :class:`Ask`, ...): it is done, or ``refused`` in one line."""

    number: int
    state: dict[str, Any] | None = None
    refused: str | None = None


class Failed(msgspec.Struct, tag="failed", array_like=True):
    """The last word of a process that cannot go on, in one line."""

    line: str
    bad_input: bool
    """The settings are at fault, not the program."""


class EndAsked(msgspec.Struct, tag="end_asked", array_like=True):
    """Another machine of the server was told to end: it ends as if this one had been."""

    who: str


ToHttp = Chunks | Ready | Beat | Pulse | Done | Failed | EndAsked

encode: Any = msgspec.msgpack.Encoder().encode
decode_to_scheduler: Any = msgspec.msgpack.Decoder(ToScheduler).decode
decode_to_detokenizer: Any = msgspec.msgpack.Decoder(ToDetokenizer).decode
decode_to_http: Any = msgspec.msgpack.Decoder(ToHttp).decode


class Addresses(msgspec.Struct, frozen=True):
    """Address of each process: sockets in a private folder."""

    scheduler: str
    detokenizer: str
    http: str

    @staticmethod
    def within(folder: Path) -> Addresses:
        return Addresses(*(f"ipc://{folder}/{name}" for name in ("scheduler", "detokenizer", "http")))


def pull_socket(context: zmq.Context[Any], address: str) -> Any:
    """The socket a process listens on. Nothing is ever dropped: what may pile up is bounded by ``--max-queue``."""
    socket = context.socket(zmq.PULL)
    socket.set_hwm(0)
    socket.bind(address)
    return socket


def push_socket(context: zmq.Context[Any], address: str, most: int = 0) -> Any:
    """A socket to another process; sending never blocks. Not to be shared between threads.

    With ``most``, no more messages than that wait for a process that does not read: beyond it, sending without waiting
    raises ``zmq.Again``.
    """
    socket = context.socket(zmq.PUSH)
    socket.set_hwm(most)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.connect(address)
    return socket
