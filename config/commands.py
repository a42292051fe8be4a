"""Groups of commands whose commands live in modules of their own, loaded when they are called, so that help answers at
once. Both programs, `headgate` and `headgate-cloud`, are made of one.
"""

from __future__ import annotations

import importlib
import importlib.util
import keyword
from collections.abc import Mapping

import click


class _Lazy(click.Command):
    """Stands for a command of another module: its help line is known here, the rest is loaded when it is called."""

    def __init__(self, name: str, module: str, short_help: str) -> None:
        super().__init__(name, short_help=short_help, add_help_option=False)
        self._module = module

    def real(self) -> click.Command:
        word = str(self.name).replace("-", "_")
        found = getattr(
            importlib.import_module(self._module), f"{word}_" if keyword.iskeyword(word) else word
        )
        if not isinstance(found, click.Command):
            raise TypeError(f"{self._module} has no command {self.name!r}")
        return found


class LazyGroup(click.Group):
    """A group that also knows commands by the module they live in: name -> (module, one line of help). A module that
    is not installed has no command. It holds a click command of the same name (dashes as underscores, and `import_`
    for a word that is Python's own)."""

    elsewhere: Mapping[str, tuple[str, str]] = {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *(name for name in self.elsewhere if self._here(name))])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.elsewhere and self._here(cmd_name):
            module, text = self.elsewhere[cmd_name]
            return _Lazy(cmd_name, module, text)
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command.real() if isinstance(command, _Lazy) else command, rest

    def _here(self, name: str) -> bool:
        return importlib.util.find_spec(self.elsewhere[name][0]) is not None
