"""The detokenizer process: token ids to text, and stop strings."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import zmq

from workbench.serving.child import begin_child
from workbench.serving.chunks import Chunk, LogprobText
from workbench.serving.text.text_stream import StopMatcher
from workbench.serving.text.tokenizer import Decoder, load_decoder
from workbench.serving.wire import (
    Addresses,
    Chunks,
    Ended,
    Opened,
    Pulse,
    Shutdown,
    Step,
    StopFound,
    TokenLogprob,
    decode_to_detokenizer,
    encode,
    pull_socket,
    push_socket,
)

LEAST_LOGPROB = -9999.0
"""Of a token that cannot come, as a grammar forbids it: OpenAI's, for JSON has no infinity."""


class _Sequence:
    """One sequence on its way to text."""

    __slots__ = ("cached_tokens", "matcher", "opened", "prompt_tokens", "text", "tokens")

    def __init__(self, opened: Opened, decoder: Decoder) -> None:
        self.opened = opened
        self.text = decoder.stream(opened.skip_special_tokens)
        self.matcher = StopMatcher(opened.stop, opened.include_stop)
        self.tokens = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0


class Detokenizer:
    """The work of the process, without its sockets."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._sequences: dict[int, _Sequence] = {}

    @property
    def open_sequences(self) -> int:
        return len(self._sequences)

    def open(self, message: Opened) -> None:
        """Begin a sequence, whose tokens will follow."""
        self._sequences[message.sequence] = _Sequence(message, self._decoder)

    def step(self, message: Step) -> tuple[list[Chunk], list[StopFound]]:
        """Return the text of a step, and the sequences that the scheduler should stop.

        Tokens of a sequence that has ended here already, by a stop string, are dropped.
        """
        chunks: list[Chunk] = []
        found: list[StopFound] = []
        for number, prompt_tokens, cached_tokens in message.first:
            if number in self._sequences:
                self._sequences[number].prompt_tokens = prompt_tokens
                self._sequences[number].cached_tokens = cached_tokens
        for told in message.prompts or ():
            if told.sequence in self._sequences:
                spelled = [self._spell(t, one, 0) for t, one in zip(told.token_ids, told.logprobs, strict=True)]
                chunks.append(Chunk(told.sequence, "", [], prompt_logprobs=spelled, prompt_first=told.first))
        ended = {end.sequence: end for end in message.ended}
        sequences = np.frombuffer(message.sequences, np.int64).tolist()
        tokens = np.frombuffer(message.tokens, np.int32).tolist()
        logprobs = message.logprobs or {}
        last = {number: i for i, number in enumerate(sequences)} if ended else {}
        for i, (number, token) in enumerate(zip(sequences, tokens, strict=True)):
            sequence = self._sequences.get(number)
            if sequence is None:
                continue
            end = ended.pop(number, None) if last.get(number) == i else None
            asked = logprobs[number].pop(0) if number in logprobs else None
            offset = sequence.text.offset(token) if asked is not None else 0
            chunk = self._take(sequence, token, end)
            if asked is not None:
                chunk.logprobs = [self._spell(token, asked, offset)]
            chunks.append(chunk)
            if chunk.kind:
                del self._sequences[number]
                if end is None:
                    found.append(StopFound(sequence.opened.sequence_id, sequence.tokens))
        for end in ended.values():
            sequence = self._sequences.pop(end.sequence, None)
            if sequence is not None:
                chunks.append(self._end(sequence, end, "", []))
        return chunks, found

    def _take(self, sequence: _Sequence, token: int, end: Ended | None) -> Chunk:
        opened = sequence.opened
        sequence.tokens += 1
        if end is not None and end.kind == "stop" and token in end.stop_ids and not opened.include_stop:
            return self._end(sequence, end, "", [token])
        text = sequence.text.push((token,))
        if end is not None:
            return self._end(sequence, end, text, [token])
        if sequence.tokens <= opened.min_new_tokens:
            # Text before the least length ends nothing, so it is not looked at.
            return Chunk(opened.sequence, text, [token], "", "", None, sequence.prompt_tokens, sequence.cached_tokens)
        text, stop = sequence.matcher.push(text)
        kind = "" if stop is None else "stop"
        return Chunk(opened.sequence, text, [token], kind, "", stop, sequence.prompt_tokens, sequence.cached_tokens)

    def _end(self, sequence: _Sequence, end: Ended, text: str, tokens: list[int]) -> Chunk:
        opened = sequence.opened
        text, stop = text + sequence.text.finish(), None
        counts = end.prompt_tokens, max(end.cached_tokens, sequence.cached_tokens)
        if sequence.tokens > opened.min_new_tokens:
            text, stop = sequence.matcher.push(text)
        if stop is not None:
            return Chunk(opened.sequence, text, tokens, "stop", "", stop, *counts)
        text += sequence.matcher.finish()
        reason = tokens[-1] if end.kind == "stop" and tokens and tokens[-1] in end.stop_ids else None
        return Chunk(opened.sequence, text, tokens, end.kind, end.detail, reason, *counts)

    def _spell(self, token: int, logprob: TokenLogprob, offset: int) -> LogprobText:
        values = [max(value, LEAST_LOGPROB) for value in (logprob.logprob, *logprob.top_logprobs)]
        top = [(*self._decoder.token(i), value) for i, value in zip(logprob.top_ids, values[1:], strict=True)]
        return LogprobText(*self._decoder.token(token), values[0], top, token, logprob.top_ids, offset)


def run_detokenizer(addresses: Addresses, serialised: str | None) -> None:
    """Run the process: from the first token to :class:`Shutdown`."""
    begin_child()
    context: Any = zmq.Context()
    inbox = pull_socket(context, addresses.detokenizer)
    http = push_socket(context, addresses.http)
    scheduler = push_socket(context, addresses.scheduler)
    detokenizer = Detokenizer(load_decoder(serialised))
    while True:
        message = decode_to_detokenizer(inbox.recv())
        if isinstance(message, Opened):
            detokenizer.open(message)
        elif isinstance(message, Step):
            chunks, found = detokenizer.step(message)
            for stop in found:
                scheduler.send(encode(stop))
            if chunks:
                http.send(encode(Chunks(chunks, detokenizer.open_sequences)))
        elif isinstance(message, Pulse):
            message.detokenizer_cpu_s = time.process_time()
            http.send(encode(message))
        else:
            assert isinstance(message, Shutdown)
            break
    context.destroy(linger=1000)
