"""The commands: parse, call, print. What a command does is one Python call elsewhere.

Exit codes: 0 success, 2 bad usage or bad input (one line on stderr), 130 interrupted, 141 reader gone.
A command imports what it needs inside its function, so that `whalepod models` never waits for torch.
A mistake of the user is a UserError wherever it is found; `main` alone turns it into a line and a code.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
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


class _Commands(TyperGroup):
    """Names the nearest command when there is none of the given name."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise UserError(f"unknown command {args[0][:100]!r}{nearest(args[0][:100], self.commands)}")
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=_Commands, add_completion=False, pretty_exceptions_enable=False)


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


@app.command()
def models(
    name: Annotated[
        str | None,
        typer.Argument(help="A model's name, a checkpoint folder or a config.json.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The model family: parameters, KV cache, FLOPs, memory, licence; or one model in detail."""
    from whalepod.report import family

    if as_json:
        print_json(family.models_json(name))
        return
    console = make_console()
    if name is None:
        console.print(family.family_table(family.models_json(), console.width))
    else:
        console.print(family.model_view(name))


def print_json(value: Any) -> None:
    """The `--json` form of a command's answer, on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False))


def make_console() -> Console:
    """The console for tables: as wide as the terminal, and wide when piped."""
    from rich.console import Console

    class _Console(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # main() answers for it; rich would exit 1

    # Names of models and files are not markup.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    return _Console(width=width, markup=False, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code; `argv` defaults to the process's arguments."""
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    command = typer.main.get_command(app)
    try:
        # Not command.main(): it would print usage errors in a box, and exit 1 when a pipe breaks.
        with command.make_context("whalepod", args) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as stop:
        return stop.exit_code
    except UserError as error:
        return _fail(str(error))
    except typer.TyperException as error:
        return _fail(_usage(error))
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        _drop_stdout()
        return 141
    except SystemExit as stop:  # rich's own console, when nobody reads the help
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def run() -> None:
    """The console script."""
    sys.exit(main())


def _usage(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    help_ = f"; see: {context.command_path} --help" if context is not None else ""
    message = error.format_message().rstrip(".")
    return f"{message[:1].lower()}{message[1:]}{help_}"


def _fail(message: str) -> int:
    # One line, whatever the message quotes.
    print(f"whalepod: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _drop_stdout() -> None:
    """Nobody reads stdout any more: the interpreter's last flush must not complain either."""
    with suppress(OSError, ValueError):  # stdout may be something without a descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
