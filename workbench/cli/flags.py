"""Flags that commands share: made when a command is looked at, from what is declared elsewhere, and handed on together.

A command says which it has with ``cls=command_with(...)`` and finds their values with :func:`given`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, make_dataclass
from typing import Annotated, Any, ClassVar, Optional, Protocol, get_origin

import typer
from typer.core import TyperCommand

from workbench.scheduler.settings import GROUPS, Place, Setting, settings_of

_META = "workbench.flags"


class Flags(Protocol):
    """A group of flags."""

    @property
    def name(self) -> str:
        """Name under which :func:`given` finds the group."""

    def declared(self) -> Mapping[str, tuple[Any, Any]]:
        """Type (``Annotated`` with a ``typer.Option``) and default of each, by name."""

    def leading(self) -> Collection[str]:
        """Those that come first in their panel of ``--help``."""

    def taken(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return what the command gets of the values on the command line."""


class FlaggedCommand(TyperCommand):
    """A command with groups of flags behind its own parameters; on its help page, panels of its own come before those of
    settings. A flag that it has itself, for it means more there, is its own."""

    groups: ClassVar[tuple[Flags, ...]] = ()
    _names: dict[str, list[str]] | None = None

    def get_params(self, ctx: Any) -> list[Any]:
        """Its own parameters and those of its groups, which are made now: other commands need not wait for them."""
        if self._names is None:
            own = {parameter.name for parameter in self.params}
            self._names = {}
            for group in self.groups:
                made = _parameters({name: flag for name, flag in group.declared().items() if name not in own})
                self._names[group.name] = [parameter.name for parameter in made]
                self.params += made
            first = {name for group in self.groups for name in group.leading()}
            self.params.sort(key=lambda parameter: (_place(parameter), parameter.name not in first))
        return super().get_params(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, and put the values of the groups where :func:`given` finds them."""
        rest = super().parse_args(ctx, args)
        found = ctx.meta.setdefault(_META, {})
        for group in self.groups:
            found[group.name] = group.taken({name: ctx.params.pop(name) for name in (self._names or {})[group.name]})
        return rest


def command_with(*groups: Flags) -> type[FlaggedCommand]:
    """The class of a command with these groups of flags."""
    return type("FlaggedCommand", (FlaggedCommand,), {"groups": groups})


def given(ctx: typer.Context, group: str) -> dict[str, Any]:
    """Return what the command line says of a group of flags, by name."""
    return dict(ctx.meta[_META][group])


def _place(parameter: Any) -> int:
    """Return the place of its panel on the help page."""
    return GROUPS.index(parameter.rich_help_panel) if parameter.rich_help_panel in GROUPS else -1


def _parameters(flags: Mapping[str, tuple[Any, Any]]) -> list[Any]:
    """Parameters of a command, as typer makes them of the fields of a dataclass."""
    fields = [(name, kind, field(default=default)) for name, (kind, default) in flags.items()]
    reader = typer.Typer(add_completion=False)
    reader.command()(make_dataclass("Flags", fields))
    return list(typer.main.get_command(reader).params)


@dataclass(frozen=True)
class SettingFlags:
    """Flags of the settings that a dataclass declares; those that are not given are None."""

    owner: str
    """``module:Class``, imported when the flags are needed."""
    without: Collection[str] = ()
    """Settings that the command does not have."""
    idle: Collection[Place] = ()
    """Where it runs, so that it does not have the settings that do nothing there."""
    only: Collection[str] | None = None
    """The settings that it has; None: all."""
    name: str = "settings"

    def settings(self) -> dict[str, Setting]:
        """The settings by name."""
        module, _, name = self.owner.partition(":")
        found = settings_of(getattr(importlib.import_module(module), name))
        return {
            name: declared
            for name, declared in found.items()
            if name not in self.without
            and not declared.idle.keys() & set(self.idle)
            and (self.only is None or name in self.only)
        }

    def declared(self) -> dict[str, tuple[Any, Any]]:
        flags: dict[str, tuple[Any, Any]] = {}
        for name, setting in self.settings().items():
            kind: Any = list[str] if get_origin(setting.kind) is tuple else setting.kind
            flags[name] = (Annotated[Optional[kind], _option(setting, setting.option)], None)
            for alias in setting.aliases:
                former = _option(setting, "--" + alias.replace("_", "-"), hidden=True)
                flags[alias] = (Annotated[Optional[kind], former], None)
        return flags

    def leading(self) -> list[str]:
        return [name for name, setting in self.settings().items() if setting.first]

    def taken(self, values: dict[str, Any]) -> dict[str, Any]:
        for name, setting in self.settings().items():
            for alias in setting.aliases:
                value = values.pop(alias, None)
                if value is None:
                    continue
                if values[name] is not None:
                    raise typer.BadParameter(f"--{alias.replace('_', '-')} is what {setting.option} was: give one")
                values[name] = value
                print(
                    f"note: --{alias.replace('_', '-')} is called {setting.option} now; the next version no longer knows it",
                    file=sys.stderr,
                )
        # A flag that may be repeated is a tuple in what declares it; none is one that was not given.
        return {
            name: (tuple(value) or None) if isinstance(value, list | tuple) else value for name, value in values.items()
        }


def _option(setting: Setting, flag: str, hidden: bool = False) -> Any:
    if setting.kind is bool and not setting.no_flag:
        flag = f"{flag}/--no-{flag[2:]}"
    return typer.Option(
        flag,
        help=setting.described,
        rich_help_panel=setting.group,
        envvar=setting.envvar,
        show_envvar=setting.envvar is not None,
        show_default=False,
        hidden=hidden,
    )


RUN_SETTINGS = "workbench.settings.run_settings:RunSettings"
RUNNER_FLAGS = SettingFlags("workbench.settings.run_settings:RunnerSettings", name="runner")


def load_format(ctx: typer.Context) -> str:
    """Return what the command line says of the files of a model, in :data:`RUNNER_FLAGS`."""
    from workbench.settings.run_settings import RunnerSettings

    return given(ctx, RUNNER_FLAGS.name)["load_format"] or RunnerSettings.load_format
