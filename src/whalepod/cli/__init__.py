"""The commands: parse, call, print. What a command does is one Python call elsewhere.

Exit codes: 0 success, 2 bad usage or bad input (one line on stderr), 130 interrupted, 141 reader gone.
A command imports what it needs inside its function, so that `whalepod models` never waits for torch.
A mistake of the user is a UserError wherever it is found; `main` alone turns it into a line and a code.

    base       what all share: the app, consoles, progress, JSON
    planning, machine, training, serving, launching   the commands
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

import typer

from whalepod.cli import (  # each adds its commands to the app, in this order
    launching,
    machine,
    planning,
    serving,
    training,
)
from whalepod.cli.base import app
from whalepod.spec.errors import UserError

__all__ = ["launching", "machine", "main", "planning", "run", "serving", "training"]


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
