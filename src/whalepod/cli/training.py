"""Commands that train, and bring weights in and out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from whalepod.cli.base import JsonOption, app, make_console, print_json, text_progress


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
    from whalepod.dryrun.auto import choice_rows, choose, write_choice
    from whalepod.train.start import Stopped, WorkerFailed, is_first_rank
    from whalepod.train.start import train as train_

    choice = None
    with text_progress() as progress:
        if config.is_open:
            choice = choose(config, progress=progress, restart=restart)
            config = choice.config
    if choice is not None and choice.tried and is_first_rank():
        from whalepod.report.prediction import choice_table

        make_console(stderr=True).print(choice_table(choice_rows(choice), choice.memory_gib))
    try:
        with text_progress() as progress:
            result = train_(config, restart=restart, progress=progress)
    except Stopped as stopped:
        result = stopped.result
    except WorkerFailed as failed:
        if not failed.killed:
            raise
        make_console(stderr=True).print(f"whalepod: {failed}", soft_wrap=True)
        raise typer.Exit(1) from None
    finally:
        if choice is not None and is_first_rank():
            write_choice(choice)
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
    if result.stopped_by is not None:
        make_console().print(f"ended by {result.stopped_by} with a checkpoint; the same command goes on")
    from whalepod.report.prediction import prediction_table

    if (table := prediction_table(result)) is not None:
        make_console().print(table)


@app.command()
def convert(
    src: Annotated[Path, typer.Argument(help="A run's folder or a Hugging Face checkpoint folder.")],
    dst: Annotated[Path, typer.Argument(help="The Hugging Face checkpoint folder to write.")],
    to: Annotated[
        str, typer.Option(help="bf16, fp32, fp8 (128 x 128 blocks), keep, or lora: adapters alone.")
    ] = "keep",
) -> None:
    """Writes Hugging Face safetensors from a run or from another checkpoint, tensor by tensor."""
    from whalepod.parallel.export import export

    with text_progress() as progress:
        export(src, dst, to, lambda done, total: progress("writing", done, total))
    make_console().print(str(dst))
