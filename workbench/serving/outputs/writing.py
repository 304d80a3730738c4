"""How a server's model writes calls of tools and reasoning: set at its start, or told by its chat template."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.serving.outputs.parser import OutputParser
from workbench.serving.outputs.reasoning import REASONING, thinking
from workbench.serving.outputs.tool_formats import (
    AUTO,
    FORMATS,
    NONE,
    Parser,
    format_of_template,
    listed_calls,
    no_tools,
    one_call,
)
from workbench.serving.outputs.tools import ToolUse


@dataclass(frozen=True)
class Writing:
    """The formats of one model."""

    tools: str | None
    """One of ``FORMATS``, or None: nobody knows."""
    reasoning: str | None
    """One of ``REASONING``, or None: it does not think, or nobody wants to know."""

    @staticmethod
    def of(tool_parser: str, reasoning_parser: str, template: str | None) -> Writing:
        """Return what two settings say, the first of which may leave it to the chat template."""
        tools = format_of_template(template) if tool_parser == AUTO else tool_parser
        reasoning = None if reasoning_parser == NONE else reasoning_parser
        return Writing(None if tools == NONE else tools, reasoning)

    @property
    def id_characters(self) -> int:
        """Of the ids of calls."""
        return FORMATS[self.tools].id_characters if self.tools else 24

    def reads(self, use: ToolUse | None, reasoning: bool, form: bool) -> Reads:
        """Return how an output is told apart. ``reasoning``: that is wanted; ``form``: a grammar says what the output is."""
        if use is not None and use.choice == "named":
            return Reads(one_call(use.named))
        if use is not None and use.choice == "required":
            return Reads(listed_calls)
        if form:
            return Reads(None)
        calls = use is not None and self.tools is not None
        channels = calls and self.tools == "gpt-oss"
        if reasoning and self.reasoning == "gpt-oss":
            return Reads(FORMATS["gpt-oss"].parser, special=True)
        found: Parser | None = FORMATS[self.tools].parser if calls and self.tools else None
        special = calls and self.tools is not None and FORMATS[self.tools].special
        thinks = REASONING[self.reasoning] if reasoning and self.reasoning and not channels else None
        if thinks is None:
            return Reads(found, special=special, apart=reasoning)
        return Reads(found or no_tools, self.reasoning, special or thinks.special)


@dataclass(frozen=True)
class Reads:
    """How the outputs of one request are told apart."""

    parser: Parser | None
    """None: all of it is content."""
    reasoning: str | None = None
    special: bool = False
    """The text needs its special tokens for it."""
    apart: bool = True
    """Reasoning is no content."""

    def parser_for(self, use: ToolUse | None, prompt: str) -> OutputParser | None:
        """Return the parser of one output, which goes on after ``prompt``, a rendered conversation or its end."""
        if self.parser is None:
            return None
        thinks = REASONING[self.reasoning] if self.reasoning else None
        parser = self.parser if thinks is None else thinking(thinks, thinks.begun(prompt), self.parser)
        return OutputParser(parser, use.names if use is not None else (), self.apart)
