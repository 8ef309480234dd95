"""Commands about the machines themselves: what they can do, and whether they are well."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whalepod.cli.base import JsonOption, app, make_console, option, print_json, text_progress


@app.command()
def calibrate(
    name: Annotated[
        str | None, option("The profile's name; `cpu` without CUDA, else the device's with `-here`.")
    ] = None,
    out: Annotated[Path | None, option("Write this YAML file, not the one of that name.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and repeats: seconds.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measures this machine and writes a hardware profile that `plan`, `scale` and `dryrun` take by name."""
    from whalepod.calibrate import profile, run

    profile.check_out(out)
    with text_progress() as progress:
        gpu = run.calibrate(name=name, quick=quick, progress=progress)
    path = profile.write_profile(gpu, out)
    if as_json:
        print_json({"path": str(path), "profile": profile.profile_values(gpu)})
        return
    console = make_console()
    console.print(profile.profile_table(gpu))
    console.print(f"profile: {path}", soft_wrap=True)


@app.command()
def doctor(
    run: Annotated[
        Path | None,
        typer.Argument(help="The job to check for: a run.yaml.", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="section.key=value, over what the file says.", show_default=False),
    ] = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout-s", min=1, help="A rank that waits longer in one step gives up.")
    ] = 120,
    as_json: JsonOption = False,
) -> None:
    """Checks a cluster before a job: versions, links, collectives, memory, disk, clocks, limits, speed, FP8.

    Alone it starts local workers, under torchrun it joins. Exits 0 when no check failed, else 1."""
    from whalepod.spec.run import load_run

    config = None if run is None else load_run(run, overrides or [])
    from whalepod.doctor.run import doctor as doctor_
    from whalepod.train.start import is_first_rank

    found = doctor_(config, timeout_s=timeout_s)
    if not is_first_rank():
        return
    if as_json:
        print_json(found.as_json())
    else:
        from whalepod.report.doctor import doctor_view

        make_console().print(doctor_view(found.as_json()))
    if found.status == "failed":
        raise typer.Exit(1)
