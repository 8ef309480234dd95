"""Starting a run: checks, tokens, then this process alone, local workers, or a torchrun rank."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from whalepod.models.lora import add_adapters
from whalepod.models.transformer import Transformer
from whalepod.parallel import processes, shm
from whalepod.parallel.checkpoint_files import damage, path_of, steps_saved
from whalepod.parallel.mesh import world_size
from whalepod.parallel.watchdog import Hung
from whalepod.parallel.weights_files import copy_companions
from whalepod.parallel.weights_initial import StoredWeights
from whalepod.spec.errors import UserError
from whalepod.spec.model import ModelSpec, to_config
from whalepod.spec.run import RunConfig, dump_run, load_run
from whalepod.text.chat import ChatTemplate
from whalepod.text.sources import Progress
from whalepod.text.tokenizer import (
    Tokenizer,
    check_vocab,
    load_tokenizer,
    train_tokenizer,
    write_atomically,
)
from whalepod.train.data import PackedTokens, TokenFiles
from whalepod.train.loop import RunResult, run_rank
from whalepod.train.metrics import read_metrics
from whalepod.train.prepare import prepare
from whalepod.train.stop import passed_on

log = logging.getLogger(__name__)

_USER_MISTAKE = "user mistake: "
_CONSEQUENCE = re.compile(r"is gone|broken|Connection closed|Signal \d+ \(SIGTERM\)")


def train(
    config: RunConfig,
    *,
    restart: bool = False,
    until: int | None = None,
    quiet: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Runs a job to its end (or to step `until`) and returns what it brought.

    Under torchrun (RANK is set) this process joins as that rank. Otherwise a layout of one device
    runs here and a larger one on local workers. A folder that holds checkpoints of the same model
    is taken up where it stood, unless `restart`, which deletes it. Raises UserError for bad input, and
    `Stopped` when SIGTERM or Ctrl-C has ended it.
    """
    spec = config.model_spec()
    layout = config.make_layout()
    if config.data.sequence_length > spec.max_position_embeddings:
        raise UserError(
            f"data.sequence_length {config.data.sequence_length} exceeds the model's "
            f"{spec.max_position_embeddings} positions"
        )
    layout.check_model(spec, config.data.sequence_length)
    with torch.device("meta"):
        model = Transformer(spec)  # says now what cannot be run
    if config.lora.r:
        if config.train.start_from is None:
            raise UserError("lora.r needs weights to adapt: name their folder as train.start_from")
        add_adapters(model, config.lora)
    if config.train.start_from is not None:
        StoredWeights(config.train.start_from, spec)  # ... and what cannot be started from
    under_launcher = "RANK" in os.environ
    if under_launcher:
        layout.check_devices(world_size())
    is_first = is_first_rank()
    folder = Path(config.out)
    if is_first:
        again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        _check_folder(folder, spec, config, restart and not again)
    tokenizer, files = prepare_data(config, spec, progress)
    if is_first:
        write_run(folder, config, spec, tokenizer)
    if under_launcher or layout.num_devices == 1:
        with _threads(config.threads_per_worker):
            result = run_rank(config, files, until, quiet)
    else:
        compile_once(progress)
        result = _local_workers(config, files, until, quiet)
    if result.stopped_by is not None:
        raise Stopped(result)
    return result


class Stopped(KeyboardInterrupt):
    """A signal has ended a run, with a checkpoint; result: what it brought until then."""

    def __init__(self, result: RunResult) -> None:
        super().__init__(f"ended by {result.stopped_by}")
        self.result = result


def is_first_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def prepare_data(
    config: RunConfig, spec: ModelSpec, progress: Progress | None = None
) -> tuple[Tokenizer, TokenFiles]:
    """Tokenizer and token files of a run, from the cache when they are there."""
    data = config.data
    chat = None
    if data.chat:
        folder = data.tokenizer or config.train.start_from
        if folder is None:
            raise UserError("data.chat needs a model's own tokenizer: name its folder as data.tokenizer")
        chat = ChatTemplate(folder)
    if data.tokenizer is None and config.train.start_from is not None:
        tokenizer = load_tokenizer(config.train.start_from)
    elif data.tokenizer is None:
        tokenizer = train_tokenizer(data.source, spec.vocab_size, fim=data.fim_rate > 0, progress=progress)
    else:
        tokenizer = load_tokenizer(data.tokenizer)
    check_vocab(tokenizer, spec.vocab_size)
    max_bytes = None if data.max_mib is None else int(data.max_mib * 2**20)
    files = prepare(
        data.source,
        tokenizer,
        None,
        data.validation_fraction,
        max_bytes=max_bytes,
        fim_rate=data.fim_rate,
        chat=chat,
        progress=progress,
    )
    # Says now, in one line and one process, when the text is too short for a sequence.
    PackedTokens(files.train.path, data.sequence_length, 0, 1 + spec.num_nextn_predict_layers)
    return tokenizer, files


def write_run(folder: Path, config: RunConfig, spec: ModelSpec, tokenizer: Tokenizer) -> None:
    """What makes a run's folder a model: config.json, tokenizer.json and the run.yaml itself."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if config.train.start_from is not None:
            copy_companions(Path(config.train.start_from), folder)
        write_atomically(folder / "config.json", json.dumps(to_config(spec), indent=1))
        write_atomically(folder / "run.yaml", dump_run(_found_from_anywhere(config)))
    except OSError as error:
        raise UserError(f"cannot write the run's folder {folder}: {error.strerror}") from None
    tokenizer.save(folder)


def _found_from_anywhere(config: RunConfig) -> RunConfig:
    """With the folder that it starts from by its whole path: adapters are merged into what is there."""
    start = config.train.start_from
    changes = {"start_from": start and str(Path(start).absolute())}
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def _check_folder(folder: Path, spec: ModelSpec, config: RunConfig, restart: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out: {folder} is a file, not a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / "run.yaml").is_file():
        raise UserError(f"out: {folder} is not empty and not the folder of a run; choose another")
    if restart:
        shutil.rmtree(folder)
        return
    saved = steps_saved(folder / "checkpoints")
    if not saved:
        return
    before = load_run(folder / "run.yaml")
    if replace(before.model_spec(), name="") != replace(spec, name=""):
        raise UserError(
            f"out: {folder} holds checkpoints of another model; choose another folder or --restart"
        )
    if before.lora != config.lora:
        raise UserError(
            f"out: {folder} holds checkpoints of a run with another `lora`; choose another or --restart"
        )
    if config.lora.r and before.train.start_from != _found_from_anywhere(config).train.start_from:
        raise UserError(
            f"out: {folder} holds adapters of {before.train.start_from}, not of {config.train.start_from}; "
            "choose another folder or --restart"
        )
    if before.data != config.data or before.train.seed != config.train.seed:
        raise UserError(
            f"out: {folder} holds checkpoints of a run with other data or another seed; "
            "choose another folder or --restart"
        )
    if saved[-1] >= config.train.steps and damage(path_of(folder / "checkpoints", saved[-1])) is None:
        raise UserError(
            f"out: {folder} is already trained to step {saved[-1]} of {config.train.steps}; "
            "raise train.steps, choose another folder, or --restart"
        )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compile_once(progress: Progress | None) -> None:
    """Workers on CPUs speak through shared memory; its native part is compiled before they start."""
    if torch.cuda.is_available() or not shm.will_compile():
        return
    stage = "compiling the shared-memory backend, once"
    if progress is not None:
        progress(stage, 0, 1)
    shm.register()
    if progress is not None:
        progress(stage, 1, 1)


def _local_workers(config: RunConfig, files: TokenFiles, until: int | None, quiet: bool) -> RunResult:
    """Starts them again, from the newest checkpoint, when one has died."""
    num_workers, threads = config.make_layout().num_devices, worker_threads(config)
    most = config.train.max_restarts
    for restart in range(1, most + 2):
        try:
            job = config.model_dump_json(), files, until, quiet
            return start_workers(num_workers, threads, _worker, *job)[0]
        except WorkerFailed as error:
            if restart > most or not (error.killed or _steps_done(config)):
                raise
            reason = str(error).splitlines()[0]
            log.warning("%s; the workers start again, %d of %d times", reason, restart, most)
    raise AssertionError


def _steps_done(config: RunConfig) -> bool:
    """Whether the run has come further than its newest checkpoint: else an exception will come again."""
    metrics, folder = Path(config.out) / "metrics.jsonl", Path(config.out) / "checkpoints"
    rows = read_metrics(metrics) if metrics.exists() else []
    return bool(rows) and rows[-1]["step"] > max(steps_saved(folder), default=0)


def worker_threads(config: RunConfig) -> int | None:
    """Threads of each local worker: on a CPU its share of the cores. Raises UserError without enough GPUs."""
    num_workers = config.make_layout().num_devices
    if config.device != "cpu" and torch.cuda.is_available():
        if torch.cuda.device_count() < num_workers:
            raise UserError(
                f"the layout needs {num_workers} GPUs, this machine has {torch.cuda.device_count()}; "
                "choose a smaller layout, or start it under torchrun on more machines"
            )
        return config.threads_per_worker
    return config.threads_per_worker or max(1, len(os.sched_getaffinity(0)) // num_workers)


def start_workers(num_workers: int, threads: int | None, worker: Callable[..., Any], *args: Any) -> list[Any]:
    """What `worker(*args, threads)` returns in each of so many local processes, by rank.

    `worker` is a module's function under `record`; it should begin with `take_cores(threads)`.
    """
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_workers,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method=processes.START_METHOD,
        signals_to_handle="SIGHUP,SIGQUIT",  # `passed_on` has the others
    )
    processes.context()
    with _environment("OMP_NUM_THREADS", None if threads is None else str(threads)), passed_on() as asked:
        function, arguments = processes.as_here(worker, *args, threads)
        try:
            with _quiet_launcher():
                results = elastic_launch(launch, function)(*arguments)
        except ChildFailedError as error:
            if asked.number:
                raise UserError(f"ended by {signal.Signals(asked.number).name}") from None
            raise _explain(error) from None
    return [results[rank] for rank in range(num_workers)]


@record
def _worker(
    config_json: str, files: TokenFiles, until: int | None, quiet: bool, threads: int | None
) -> RunResult:
    take_cores(threads)
    try:
        return run_rank(RunConfig.model_validate_json(config_json), files, until, quiet)
    except UserError as error:
        raise RuntimeError(_USER_MISTAKE + str(error)) from None


def take_cores(threads: int | None) -> None:
    """Binds a local CPU worker to cores of its own when there are enough for all."""
    if threads is None:
        return
    torch.set_num_threads(threads)
    cores = sorted(os.sched_getaffinity(0))
    rank, count = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if threads * count <= len(cores):
        os.sched_setaffinity(0, cores[rank * threads : (rank + 1) * threads])


@contextmanager
def _quiet_launcher() -> Iterator[None]:
    """Without the launcher's own report of a worker's failure, a page long: `_explain` says it in a line."""
    names = ("torch.distributed.elastic.multiprocessing.api", "torch.multiprocessing.spawn")
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


class WorkerFailed(RuntimeError):
    """A local worker raised an exception; killed: or was ended by a signal, or hung."""

    killed: bool = False


def _explain(error: ChildFailedError) -> Exception:
    """What went wrong first: not a worker that lost its peer, or was ended for its sake."""
    told: list[tuple[int, int, str, str]] = []
    for rank, failure in error.failures.items():
        message: Any = failure.message
        details: dict[str, Any] = message if isinstance(message, dict) else {"message": str(message)}
        text = str(details.get("message", details))
        if _USER_MISTAKE in text:
            return UserError(text.split(_USER_MISTAKE, 1)[1].splitlines()[0])
        trace = str(details.get("extraInfo", {}).get("py_callstack", ""))
        told.append((bool(_CONSEQUENCE.search(text)), rank, f"exit code {failure.exitcode}): {text}", trace))
    _, rank, text, trace = min(told)
    problem = WorkerFailed(f"worker {rank} failed ({text}")
    consequence = bool(_CONSEQUENCE.search(text))
    problem.killed = text.startswith("exit code -") or Hung.__name__ in text or consequence
    problem.add_note(trace)
    return problem


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
