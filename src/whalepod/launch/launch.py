"""`whalepod launch` in one call: a run.yaml in, files for an engine out, with what to expect of them.

launched = launch("run.yaml", "slurm", Path("job"), gpus="64xH100")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from whalepod import __version__
from whalepod.launch import megatron, serving, training
from whalepod.launch.job import Expectation, Job
from whalepod.launch.render import comment
from whalepod.planner.software import Software, load_software, own_software, usual_software
from whalepod.spec.errors import UserError, nearest
from whalepod.spec.hardware import parse_gpus
from whalepod.spec.run import RunConfig, load_run

TRAINERS: dict[str, tuple[str, Callable[[Job, str, str], dict[str, str]]]] = {
    "torchrun": ("bash node.sh on every node", lambda job, text, _: training.torchrun(job, text)),
    "slurm": ("sbatch job.sbatch", training.slurm),
    "jobset": ("kubectl apply -f jobset.yaml", lambda job, text, _: training.kubernetes("jobset", job, text)),
    "pytorchjob": (
        "kubectl apply -f pytorchjob.yaml",
        lambda job, text, _: training.kubernetes("pytorchjob", job, text),
    ),
    "trainjob": (
        "kubectl apply -f trainjob.yaml",
        lambda job, text, _: training.kubernetes("trainjob", job, text),
    ),
    "ray": (
        "ray job submit --working-dir . -- python3 on_ray.py",
        lambda job, text, _: training.ray(job, text),
    ),
    "skypilot": ("sky launch sky.yaml", training.skypilot),
    "megatron": ("sbatch job.sbatch", megatron.megatron),
}
SERVERS = ("vllm", "sglang", "slurm", "lws")
ALSO = {"kubernetes": {"train": "jobset", "serve": "lws"}, "k8s": {"train": "jobset", "serve": "lws"}}


@dataclass(frozen=True)
class Launched:
    """files: written, in the order of use. start: the command that starts the job from their folder."""

    engine: str
    folder: Path
    files: tuple[Path, ...]
    start: str
    expected: Expectation
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        expected = {key: value for key, value in asdict(self.expected).items() if value is not None}
        return {
            "engine": self.engine,
            "files": [str(file) for file in self.files],
            "start": self.start,
            "expectation": expected,
            "notes": list(self.notes),
        }


def launch(
    run: Path | str | RunConfig,
    on: str,
    out: Path,
    *,
    gpus: str | None = None,
    gpus_per_node: int | None = None,
    image: str | None = None,
    shared: str = "/shared",
    overrides: tuple[str, ...] = (),
) -> Launched:
    """Writes the files of a job for the engine `on` into `out`.

    gpus, gpus_per_node: over the file's own. image, shared: see Job. Raises UserError with one line for bad
    input, for a layout that the engine cannot express, and for a folder that holds other files.
    """
    config = run if isinstance(run, RunConfig) else load_run(run, overrides)
    goal = "train" if config.serve is None else "serve"
    engine = _engine(on, goal)
    where = gpus or config.gpus
    if where is None:
        raise UserError("the file does not say for which GPUs it is: give --gpus, like 64xH100")
    cluster = parse_gpus(where, gpus_per_node or config.gpus_per_node)
    source = "a RunConfig" if isinstance(run, RunConfig) else Path(run).name
    job = Job(config, source, cluster, image, shared)
    if goal == "train":
        expected, texts, start, notes = _train(job, engine, out)
    else:
        expected, texts, start, notes = _serve(job, engine, out)
    return Launched(engine, out, _write(out, texts), start, expected, tuple(notes))


def _engine(on: str, goal: str) -> str:
    """The engine's name, right for the goal."""
    known = {"train": tuple(TRAINERS), "serve": SERVERS}
    if on in ALSO:
        return ALSO[on][goal]
    if on in known[goal]:
        return on
    other = {"train": "serve", "serve": "train"}[goal]
    if on in known[other]:
        what = {"train": "trains", "serve": "is a deployment (`serve`)"}[goal]
        raise UserError(f"--on {on} is for --for {other}, and this job {what}: use {', '.join(known[goal])}")
    raise UserError(f"unknown --on {on[:100]!r}{nearest(on[:100], (*known[goal], 'kubernetes'))}")


Parts = tuple[Expectation, dict[str, str], str, list[str]]


def _train(job: Job, engine: str, out: Path) -> Parts:
    software: Software = own_software(job.config.optimizer)
    if engine == "megatron":
        megatron.recipe(job)
        megatron.check(job.layout)
        usual = usual_software(job.cluster.gpu)
        software = load_software(usual if usual.startswith("megatron") else "megatron-26.02")
    expected = job.training(software)
    start, write = TRAINERS[engine]
    texts = write(job, comment(job.header(expected, __version__)), str(out))
    notes = []
    if expected.memory_gib > expected.gpu_memory_gib:
        notes.append(f"{expected.memory_gib:.1f} GiB do not fit: expect to run out of memory")
    source = job.config.data.source
    if engine == "megatron":
        notes.append("Megatron trains on made-up data unless DATA names its own indexed files")
    elif source != "stdlib" and not source.startswith("hf:"):
        notes.append(f"data.source {source} must be there on every node")
    return expected, texts, start, notes


def _serve(job: Job, on: str, out: Path) -> Parts:
    planned = job.serve.engine
    name = on if on in ("vllm", "sglang") else {"sglang-wide-ep": "sglang"}.get(planned, planned)
    if name not in serving.IMAGES:
        own = planned == "whalepod"
        how = "start it with whalepod serve" if own else "plan again with --engine sglang or vllm"
        raise UserError(f"there are no files for the engine {planned}: {how}, or set serve.engine")
    engine = job.engine(planned if planned.startswith(name) else name)
    expected, found = job.serving(engine)
    text = comment(job.header(expected, __version__))
    scripts = serving.scripts(job, name, engine, found, text)
    notes = serving.notes(job)
    if not planned.startswith(name):
        notes.append(f"it was planned for {planned}; what to expect is of {name}")
    write = {"slurm": partial(serving.slurm, folder=str(out)), "lws": serving.lws}.get(on)
    files = scripts if write is None else write(job, text, texts=scripts, engine=name)
    first = [pool.name for pool in serving.pools(job)]
    start = {
        "slurm": " && ".join(f"sbatch {pool}.sbatch" for pool in first),
        "lws": "kubectl apply -f lws.yaml",
    }.get(on, "; ".join(f"bash {pool}.sh on every node of each worker" for pool in first))
    return expected, files, start, notes


def _write(out: Path, texts: dict[str, str]) -> tuple[Path, ...]:
    """Writes all files, or none into a folder that holds others."""
    try:
        if out.is_dir():
            others = sorted(path.name for path in out.iterdir() if path.name not in texts)
            if others:
                raise UserError(
                    f"--out: {str(out)!r} holds other files ({others[0]}, ...): choose an empty folder"
                )
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (out / name).write_text(text, encoding="utf-8")
            if name.endswith(".sh"):
                (out / name).chmod(0o755)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--out: cannot write into {str(out)!r}: {reason}") from None
    return tuple(out / name for name in texts)
