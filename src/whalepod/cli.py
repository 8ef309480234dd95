"""The commands: parse, call, print. What a command does is one Python call elsewhere.

Exit codes: 0 success, 2 bad usage or bad input (one line on stderr), 130 interrupted, 141 reader gone.
A command imports what it needs inside its function, so that `whalepod models` never waits for torch.
A mistake of the user is a UserError wherever it is found; `main` alone turns it into a line and a code.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the picture; overwritten.")] = Path(
        "runs/demo"
    ),
    as_json: JsonOption = False,
) -> None:
    """The main job on this machine: trains a small DeepSeek on 1 and on all workers, then writes text."""
    from whalepod import demo as demo_

    console = make_console(stderr=as_json)
    with text_progress() as progress:
        result = demo_.run_demo(out, console.print, progress)
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    console.print()
    console.print(demo_.demo_table(result))
    console.print(f"picture: {result.picture}")
    console.print(f"\n{result.closing}", soft_wrap=True)


@app.command()
def train(
    run: Annotated[Path, typer.Argument(help="The job: a run.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="section.key=value, over what the file says.", show_default=False),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Delete what the run's folder holds.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Trains. Alone it starts local workers; under torchrun it joins. Takes up a run where it stood."""
    from whalepod.spec.run import load_run

    config = load_run(run, overrides or [])
    config.model_spec()
    from whalepod.train.start import is_first_rank
    from whalepod.train.start import train as train_

    with text_progress() as progress:
        result = train_(config, restart=restart, progress=progress)
    if not is_first_rank():
        return
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    held_out = "" if result.validation_loss is None else f", held-out {result.validation_loss:.4f}"
    make_console().print(
        f"step {result.steps}: loss {result.loss:.4f}{held_out}; {result.tokens_per_s:,.0f} tokens/s, "
        f"MFU {result.mfu:.1%} of {result.peak_tflops:.3g} measured TFLOP/s; "
        f"{max(result.memory_gib):.2f} GiB per worker\n{result.folder}"
    )


@app.command()
def schedule(
    name: Annotated[
        str, typer.Argument(help="gpipe, 1f1b, interleaved, interleaved_zero_bubble, zbv or dualpipev.")
    ],
    model: Annotated[
        str | None,
        typer.Argument(help="A model: stages then take as long as its layers cost.", show_default=False),
    ] = None,
    pp: Annotated[int, typer.Option(help="Pipeline ranks.")] = 4,
    micro_batches: Annotated[int, typer.Option(help="Micro-batches in a step.")] = 8,
    stages_per_rank: Annotated[
        int | None,
        typer.Option(help="Stages on each rank; the schedule's own number if left out.", show_default=False),
    ] = None,
    times: Annotated[
        str, typer.Option(help="Of F, B, I and W of a micro-batch over a rank's layers, in any unit.")
    ] = "1,2,1,1",
    p2p: Annotated[float, typer.Option(help="Of a message from a rank to the next, in that unit.")] = 0.0,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence, for the costs of MODEL.")] = 4096,
    out: Annotated[Path | None, typer.Option(help="Write a picture (PNG) here.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """A pipeline schedule: what each rank does when, its bubble and the activations it holds."""
    from whalepod.report import schedule as report
    from whalepod.spec.presets import load_model_spec

    spec = None if model is None else load_model_spec(model)
    timed = report.time_schedule(
        name, pp, micro_batches, stages_per_rank, report.parse_times(times), p2p, spec, sequence_length
    )
    if out is not None:
        report.draw_schedule(timed, out)
    if as_json:
        print_json(report.schedule_json(timed))
        return
    console = make_console()
    console.print(report.schedule_table(timed, console.width))
    if out is not None:
        console.print(f"picture: {out}")


@app.command()
def generate(
    path: Annotated[str, typer.Argument(help="A run's folder or a Hugging Face checkpoint folder.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this joint probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.", show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Writes text: latent cache, absorbed decode, streamed to the terminal."""
    from whalepod.serve import generate as generate_
    from whalepod.serve.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed)
    model, tokenizer = generate_.load_model(path, dtype)

    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    if not as_json:
        show(prompt)
    result = generate_.generate(model, tokenizer, prompt, max_new_tokens, sampling, None if as_json else show)
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    print()
    make_console(stderr=True).print(
        f"[{result.prompt_tokens} prompt tokens at {result.prefill_tokens_per_s:,.0f}/s, "
        f"{result.new_tokens} new at {result.decode_tokens_per_s:,.0f}/s, "
        f"cache {result.cache_bytes_per_token:,} bytes per token]"
    )


@app.command()
def convert(
    src: Annotated[Path, typer.Argument(help="A run's folder or a Hugging Face checkpoint folder.")],
    dst: Annotated[Path, typer.Argument(help="The Hugging Face checkpoint folder to write.")],
    to: Annotated[str, typer.Option(help="bf16, fp32, fp8 (128 x 128 blocks), or keep.")] = "keep",
) -> None:
    """Writes Hugging Face safetensors from a run or from another checkpoint, tensor by tensor."""
    from whalepod.parallel.export import export

    with text_progress() as progress:
        export(src, dst, to, lambda done, total: progress("writing", done, total))
    make_console().print(str(dst))


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
