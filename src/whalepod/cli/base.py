"""What all commands share: the app itself, consoles, progress, JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from whalepod import __version__
from whalepod.spec.errors import UserError, nearest

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 160
"""Columns of tables that do not go to a terminal."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON with stable keys instead of a table.")]


def option(help_: str, *names: str, panel: str | None = None) -> Any:
    return typer.Option(*names, help=help_, show_default=False, rich_help_panel=panel)


# What `plan` and `scale` both ask; each is the field of report.question.Question that has its name.


class Commands(TyperGroup):
    """Names the nearest command when there is none of the given name."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise UserError(f"unknown command {args[0][:100]!r}{nearest(args[0][:100], self.commands)}")
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"whalepod {__version__}")
        raise typer.Exit


@app.callback()
def _whalepod(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Plans, proves, trains and serves DeepSeek models over many GPUs."""


def print_files(console: Console, **written: Path | None) -> None:
    for name, path in written.items():
        if path is not None:
            console.print(f"{name}: {path}")


@contextmanager
def text_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr for (stage, done, total) reports; silent without a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total or None)
                bar.start()  # the stage before may have stopped it
            bar.update(tasks[stage], completed=done, total=total or None)
            if total and done >= total:
                bar.stop()  # a training bar may follow

        yield report


def print_json(value: Any) -> None:
    """The `--json` form of a command's answer, on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False))


def make_console(stderr: bool = False) -> Console:
    """The console for tables: as wide as the terminal, and wide when piped."""
    from rich.console import Console

    class _Console(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # main() answers for it; rich would exit 1

    # Names of models and files are not markup.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    return _Console(width=width, markup=False, highlight=False, stderr=stderr)
