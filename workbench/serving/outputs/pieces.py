"""Parts of an output, as they come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Content:
    """Text for whoever asked."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Text that a model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """A call of a tool, whose arguments follow."""

    index: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """More of a call's arguments, as JSON text."""

    index: int
    text: str


Part = Content | Reasoning | CallBegun | Arguments
