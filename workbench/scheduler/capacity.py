"""Limits beyond which a request can never be served: what a context and a KV pool hold of one sequence."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.scheduler.config import SchedulerConfig


@dataclass(frozen=True, slots=True)
class Capacity:
    """The longest sequence, in tokens.

    The context holds the prompt, the tokens that are written and the position after them; the KV pool the prompt and, where
    more than one token is written, at least one more.
    """

    max_context: int
    kv_tokens: int
    """In whole pages."""
    spare_page_tokens: int = 0
    """Where prompts are charged in pages: the size of the one that is charged beside a request's own."""

    @classmethod
    def of(cls, config: SchedulerConfig) -> Capacity:
        """The capacity of a scheduler."""
        spare = config.page_size if config.charge == "pages" else 0
        return cls(config.max_context, config.pages * config.page_size, spare)

    def output_bound(self, prompt_tokens: int, max_new_tokens: int) -> int:
        """Return how many tokens a request may write in the end: what it asks for, cut to the context and, where a page
        beside its own is charged, to what admission can ever find room for. An output of none is not made of that."""
        bound = min(max_new_tokens, self.max_context - prompt_tokens - 1)
        if self.spare_page_tokens:
            paged = -(-prompt_tokens // self.spare_page_tokens) * self.spare_page_tokens
            room = self.kv_tokens - paged - self.spare_page_tokens - 1
            bound = min(bound, room) if room > 0 else bound
        return bound

    def rejection(self, prompt_tokens: int, max_new_tokens: int) -> str | None:
        """Return why a request can never be served, in the words of a rejection, or None."""
        bound = self.output_bound(prompt_tokens, max_new_tokens)
        if prompt_tokens > self.kv_tokens:
            return "prompt_exceeds_kv"
        if bound < min(max_new_tokens, 1):
            return "prompt_exceeds_context"
        if prompt_tokens + (bound > 1) > self.kv_tokens:
            return "prompt_exceeds_kv"
        return None

    def longest_prompt(self, max_new_tokens: int) -> int:
        """Return the tokens of the longest prompt that is not rejected; 0 where every one is."""
        longest = min(self.max_context - 1 - min(max_new_tokens, 1), self.kv_tokens)
        return max(longest - (self.rejection(longest, max_new_tokens) is not None), 0)
