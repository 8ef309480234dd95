"""The command that hands a job to another program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whalepod.cli.base import JsonOption, app, make_console, option, print_json


@app.command()
def launch(
    run: Annotated[Path, typer.Argument(help="The job: a run.yaml, such as `whalepod plan --emit` writes.")],
    on: Annotated[
        str,
        option(
            "Training: torchrun, slurm, jobset, pytorchjob, trainjob, ray, skypilot, megatron. Serving: "
            "vllm, sglang, slurm, lws. kubernetes is jobset or lws."
        ),
    ],
    out: Annotated[Path, option("The folder to write into.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="section.key=value, over what the file says.", show_default=False),
    ] = None,
    gpus: Annotated[str | None, option("A count and a name, like 64xH100; the file's own.")] = None,
    gpus_per_node: Annotated[int | None, option("GPUs in a node; the hardware's usual number.")] = None,
    image: Annotated[str | None, option("The container to run in; the engine's own.")] = None,
    shared: Annotated[
        str, typer.Option(help="The folder that all nodes see, in containers and clouds.")
    ] = "/shared",
    as_json: JsonOption = False,
) -> None:
    """Writes a job as files for a launcher, a cluster or a serving engine, with what to expect."""
    from whalepod.launch.launch import launch as launch_

    done = launch_(
        run,
        on,
        out,
        gpus=gpus,
        gpus_per_node=gpus_per_node,
        image=image,
        shared=shared,
        overrides=tuple(overrides or ()),
    )
    if as_json:
        print_json(done.as_dict())
        return
    console = make_console()
    for file in done.files:
        console.print(str(file), soft_wrap=True)
    console.print(f"start: {done.start}", soft_wrap=True)
    console.print(f"expect: {done.expected.words}", soft_wrap=True)
    for note in done.notes:
        console.print(f"note: {note}", soft_wrap=True)
