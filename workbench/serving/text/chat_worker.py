"""The process that renders chat templates: one at a time, within a processor time and a memory that it cannot exceed.

A template is a program: :mod:`workbench.serving.bounded` says how it is held. The environment is that of transformers: a
template renders here as it does everywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from workbench.serving.bounded import run_worker

MEMORY_BYTES = 256 << 20
"""Memory beyond the worker's own that a rendering may take, and for each byte that it is given, MEMORY_FACTOR more."""
MEMORY_FACTOR = 16
_TEXT, _REFUSED = b"t", b"r"


@dataclass(frozen=True)
class Rendering:
    """A chat to be rendered, and how long it may become."""

    template: str
    messages: list[dict[str, Any]]
    variables: dict[str, Any]
    special_tokens: dict[str, str]
    max_characters: int
    tools: list[Any] | None = None


class TemplateRefused(ValueError):
    """Reason for which there is no text, in one line that goes on after the template's name."""


def run_renderer(connection: Connection) -> None:
    """Run the process. Its tasks are Renderings, its answers what :func:`text_of` reads."""
    import transformers.utils.chat_template_utils  # noqa: F401  (no part of any rendering)

    run_worker(connection, _answer, MEMORY_BYTES, MEMORY_FACTOR)


def _answer(rendering: Rendering) -> bytes:
    try:
        return _TEXT + _render(rendering).encode()
    except UnicodeEncodeError:
        return _REFUSED + b"writes what is not text"
    except TemplateRefused as refusal:
        return _REFUSED + str(refusal).encode("utf-8", "replace")


def text_of(answer: bytes) -> str:
    """Return what a worker has answered. Raises TemplateRefused."""
    text = answer[1:].decode()
    if answer[:1] != _TEXT:
        raise TemplateRefused(text)
    return text


def _render(rendering: Rendering) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    variables: dict[str, Any] = {**rendering.special_tokens, **rendering.variables}
    try:
        text: str = render_jinja_template(
            [rendering.messages],
            tools=rendering.tools,
            chat_template=rendering.template,
            add_generation_prompt=True,
            **variables,
        )[0][0]
    except Exception as fault:  # templates raise what they like
        raise TemplateRefused(_why(fault)) from None
    if len(text) > rendering.max_characters:
        raise TemplateRefused(f"writes more than {rendering.max_characters} characters")
    return text


def _why(fault: Exception) -> str:
    """Say what is wrong in the words of the template's author, or by its line: who sends a chat need not know Python."""
    from jinja2 import exceptions

    at = _line_of(fault)
    if isinstance(fault, exceptions.TemplateSyntaxError):
        return f"is not valid in line {fault.lineno}: {_one_line(fault.message)}"
    if type(fault) is exceptions.TemplateError:  # raise_exception()
        return f"refuses these messages: {_one_line(fault.message)}"
    if isinstance(fault, MemoryError):
        return f"needs too much memory{at}"
    if isinstance(fault, RecursionError):
        return f"is nested too deeply{at}"
    if isinstance(fault, exceptions.UndefinedError):
        return f"fails{at}: it uses what is not defined there"
    if isinstance(fault, exceptions.SecurityError):
        return f"fails{at}: it does what a template may not"
    if isinstance(fault, OverflowError):
        return f"fails{at}: a range or a number is too large"
    return f"fails{at} for these messages and variables"


def _line_of(fault: Exception) -> str:
    line, step = None, fault.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<template>":
            line = step.tb_lineno
        step = step.tb_next
    return "" if line is None else f" in line {line}"


def _one_line(text: object) -> str:
    lines = str(text or "").strip().splitlines()
    return lines[0][:500] if lines else "no reason given"
