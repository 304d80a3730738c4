"""One request of a trace."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from traces.requests.content import Content, Synthetic, TokenIds, explicit_tokens, synthetic_tokens, unique

_UNSET = Synthetic(spans=())


@dataclass(slots=True)
class TraceRequest:
    """One request as a trace has it. Tokens are made when asked for and not kept."""

    request_id: str
    arrival_s: float | None
    """Seconds since the trace began. None: a session's later turn, which starts when the turn before it has finished and
    `think_time_s` has passed."""
    input_length: int
    """Prompt tokens, at least 1."""
    output_length: int
    """Output tokens, at least 1."""
    max_tokens: int | None = None
    """The bound the client asked for; None where the trace does not say."""
    session_id: str | None = None
    turn: int = 0
    """0-based place in the session."""
    think_time_s: float = 0.0
    """Seconds between the end of the turn before and the start of this one."""
    priority: int = 0
    adapter: str | None = None
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    content: Content = field(default=_UNSET, repr=False)
    """Source of the tokens; by default they are synthetic and no other request's."""
    line: int = 0
    """1-based line of the file it was read from; 0 if it was not."""
    constrained: bool = False
    """Its output was held to a form: each token costs a mask."""

    def __post_init__(self) -> None:
        if self.content is _UNSET:
            self.content = unique(self.request_id)

    def tokens(self, vocab_size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """`prompt_tokens` and `output_tokens`; made together they cost little more than one of them.

        Raises TraceError when the trace holds an id the vocabulary lacks.
        """
        if isinstance(self.content, TokenIds):
            return self.prompt_tokens(vocab_size, seed), self.output_tokens(vocab_size, seed)
        sequence = synthetic_tokens(self.content, 0, self.input_length + self.output_length, vocab_size, seed)
        return sequence[: self.input_length], sequence[self.input_length :]

    def prompt_tokens(self, vocab_size: int, seed: int = 0) -> np.ndarray:
        """The prompt: int32[input_length]. Treat it as read-only.

        Raises TraceError when the trace holds an id the vocabulary lacks.
        """
        content = self.content
        if isinstance(content, TokenIds):
            return explicit_tokens(content.prompt, vocab_size, content.path, self.line, content.prompt_field)
        return synthetic_tokens(content, 0, self.input_length, vocab_size, seed)

    def output_tokens(self, vocab_size: int, seed: int = 0) -> np.ndarray:
        """The output: int32[output_length]. Treat it as read-only.

        Where a later turn of the session extends this one, these are the tokens that turn's prompt holds.

        Raises TraceError when the trace holds an id the vocabulary lacks.
        """
        content = self.content
        end = self.input_length + self.output_length
        if isinstance(content, TokenIds):
            if content.output is not None:
                return explicit_tokens(content.output, vocab_size, content.path, self.line, content.output_field)
            content = unique(self.request_id)
        return synthetic_tokens(content, self.input_length, end, vocab_size, seed)
