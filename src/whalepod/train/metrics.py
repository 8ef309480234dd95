"""What a run tells: a progress bar or plain lines, JSON lines, TensorBoard."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from whalepod.precision.widened import widen_products

GIB = 2.0**30
PAUSE_S = 60
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepMetrics:
    """One line of `metrics.jsonl`. Losses are nats per token; memory is the largest of all workers'.

    slowest_over_median: time of the slowest worker's own work over that of its pipeline stage's median."""

    step: int
    tokens: int
    loss: float
    mtp_loss: float | None
    gradient_norm: float
    learning_rate: float
    step_s: float
    tokens_per_s: float
    mfu: float
    memory_gib: float
    expert_load_worst: float | None
    expert_load_mean: float | None
    skipped_steps: int
    validation_loss: float | None = None
    slowest_over_median: float = 1.0


def measure_peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """FLOP/s of the best 2048-cubed matrix product within `seconds`: this worker's reachable peak."""
    if device.type == "cpu":
        widen_products()
    n = 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    repeats = 1 if device.type == "cpu" else 20
    while True:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b)
        synchronize(device)
        now = time.perf_counter()
        best = min(best, (now - start) / repeats)
        if now > end:
            return 2 * n**3 / best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory this process ever held: allocated on CUDA, resident elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count what the parent held when it started this worker
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


class Reporter:
    """Writes metrics of the first rank into the run's folder and shows progress on stderr."""

    def __init__(self, folder: Path, steps: int, start_step: int, label: str, quiet: bool) -> None:
        self._lines = _Lines(folder / "metrics.jsonl", start_step)
        self._board = _Board(folder / "tensorboard", start_step)
        self._console = Console(stderr=True)
        self._quiet, self._steps, self._last_line = quiet, steps, 0.0
        self._bar: Progress | None = None
        if not quiet and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(label, total=steps, completed=start_step, note="")
            self._bar.start()

    def step(self, metrics: StepMetrics) -> None:
        values = asdict(metrics)
        self._lines.write(json.dumps(values) + "\n")
        self._board.step(metrics.step, {key: values[key] for key in values if key not in ("step", "tokens")})
        note = (
            f"loss {metrics.loss:.3f}  {metrics.tokens_per_s:,.0f} tokens/s  "
            f"MFU {metrics.mfu:.0%}  {metrics.memory_gib:.2f} GiB"
        )
        if metrics.validation_loss is not None:
            note += f"  held-out {metrics.validation_loss:.3f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=metrics.step, note=note)
        elif not self._quiet and self._due(metrics):
            self._console.print(f"step {metrics.step}/{self._steps}  {note}", highlight=False)

    def _due(self, metrics: StepMetrics) -> bool:
        """Without a terminal: a line every ten seconds, and where there is something to see."""
        now = time.monotonic()
        due = now - self._last_line > 10 or metrics.step == self._steps or metrics.validation_loss is not None
        self._last_line = now if due else self._last_line
        return due

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._lines.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a torn last line is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class _Lines:
    """`metrics.jsonl`, without what an earlier run wrote after `step`: a resumed run writes that again. Lines
    that a full disk refuses wait, and go with later ones: no run ends for its log."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= step] if path.exists() else []
        self._path, self._waiting = path, b""
        self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        for _ in kept:
            self._file.readline()
        self._file.truncate(self._file.tell())

    def write(self, line: str) -> None:
        waited, self._waiting = bool(self._waiting), self._waiting + line.encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not waited:
                log.warning("%s cannot be written now, its lines wait: %s", self._path, error.strerror)

    def close(self) -> None:
        self.write("")
        self._file.close()


class _Board:
    """TensorBoard's file. What cannot be written is left out, and another file begun after a while: its
    thread tells of every attempt that fails, at length."""

    def __init__(self, folder: Path, start_step: int) -> None:
        self._folder, self._open = folder, self._new(folder, start_step)
        self._closed_at = time.monotonic()

    @staticmethod
    def _new(folder: Path, start_step: int) -> Any:
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        from torch.utils.tensorboard import SummaryWriter

        # purge_step makes TensorBoard forget what an interrupted run wrote after its last checkpoint.
        try:
            return SummaryWriter(str(folder), purge_step=start_step + 1)
        except OSError:
            return None

    def step(self, step: int, values: dict[str, Any]) -> None:
        if self._open is None and time.monotonic() > self._closed_at + PAUSE_S:
            self._open, self._closed_at = self._new(self._folder, step - 1), time.monotonic()
        try:
            for key, value in values.items():
                if value is not None and self._open is not None:
                    self._open.add_scalar(key, value, step)
        except OSError:  # of an earlier step: a thread writes
            self._open, self._closed_at = None, time.monotonic()

    def close(self) -> None:
        with suppress(OSError):
            if self._open is not None:
                self._open.close()
