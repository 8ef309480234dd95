"""The training loop: one process of a run, from a RunConfig to a RunResult."""

from __future__ import annotations

import json
import logging
import math
import signal
import socket
import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from whalepod.models.lora import is_adapter
from whalepod.parallel import checkpoint
from whalepod.parallel.checkpoint_files import Progress, newest_whole
from whalepod.parallel.checkpoint_writer import Checkpointer
from whalepod.parallel.mesh import Mesh, local_device, open_mesh
from whalepod.parallel.parallelize import DTYPES, Initial, seeded
from whalepod.parallel.watchdog import Watchdog
from whalepod.parallel.weights_initial import StoredWeights
from whalepod.spec.counts import train_flops
from whalepod.spec.errors import UserError
from whalepod.spec.layout import Layout
from whalepod.spec.model import ModelSpec
from whalepod.spec.run import RunConfig
from whalepod.train.balance import Load
from whalepod.train.counted import counted as counted_step
from whalepod.train.data import PackedTokens, TokenFiles, validation_batches
from whalepod.train.metrics import (
    GIB,
    Reporter,
    StepMetrics,
    measure_peak_flops,
    peak_memory_gib,
)
from whalepod.train.predict import Prediction, predict
from whalepod.train.schedule import Course
from whalepod.train.step import TrainStep
from whalepod.train.stop import StopRequest
from whalepod.train.stragglers import Stragglers

log = logging.getLogger(__name__)

WARMUP_TIMED_STEPS = 2
COUNTED_STEP = 2


@dataclass(frozen=True)
class RunResult:
    """What a run brought. Memory lists have one entry per worker.

    traffic_bytes_per_step: what the first handed to collectives in the last step, by axis/operation.
    counted_gib: allocated at the peak of a step; empty after a run of fewer than four. predicted: the
    planner's figures from before the run. stopped_by: the signal that ended it, a checkpoint saved, if one
    did. failed_checkpoints: that could not be written.
    """

    folder: str
    steps: int
    tokens: int
    loss: float
    validation_loss: float | None
    tokens_per_s: float
    step_s: float
    mfu: float
    peak_tflops: float
    memory_gib: list[float]
    state_gib: list[float]
    traffic_bytes_per_step: dict[str, int] = field(default_factory=dict)
    counted_gib: list[float] = field(default_factory=list)
    predicted: Prediction | None = None
    stopped_by: str | None = None
    failed_checkpoints: int = 0

    @property
    def bytes_by_axis(self) -> dict[str, int]:
        """`traffic_bytes_per_step` of all operations together."""
        out: Counter[str] = Counter()
        for name, count in self.traffic_bytes_per_step.items():
            out[name.split("/")[0]] += count
        return dict(out)


class Trainer:
    """Model, optimiser and data of one rank. `run` trains to the end; `step` is one step of it."""

    def __init__(
        self,
        config: RunConfig,
        spec: ModelSpec,
        files: TokenFiles,
        mesh: Mesh,
        stop: StopRequest | None = None,
    ) -> None:
        self.config, self.spec, self.mesh = config, spec, mesh
        self.layout: Layout = config.make_layout()
        self.folder = Path(config.out)
        self.progress = Progress(text=files.sha256)
        self.stop = stop or StopRequest()
        self._skipped_in_a_row = 0
        _check_text(files.sha256, mesh)
        length = config.data.sequence_length
        self.extra = 1 + spec.num_nextn_predict_layers
        self.data = PackedTokens(files.train.path, length, config.train.seed, self.extra)
        self._files = files
        start = config.train.start_from
        initial = seeded(spec, config.train.seed)
        if start is not None:
            initial = _started(StoredWeights(start, spec), initial)
        self.work = TrainStep(config, spec, mesh, initial, files.train.eos_id)
        self.parallel, self.optimizer = self.work.parallel, self.work.optimizer
        self.course = Course(config)
        self.checkpoints = Checkpointer(
            self.folder / "checkpoints",
            self.parallel,
            self.optimizer,
            config.train.keep_checkpoints,
            config.train.keep_checkpoint_every,
        )

    @property
    def _sequences_seen(self) -> int:
        """Not the step times the batch: another layout may have had another batch."""
        return self.progress.tokens // self.config.data.sequence_length

    def restore(self) -> None:
        """Takes up the newest whole checkpoint of the run's folder, if there is one."""
        path = newest_whole(self.folder / "checkpoints", self.mesh.world)
        if path is None:
            return
        progress = checkpoint.load(path, self.parallel, self.optimizer)
        if progress.text and progress.text != self.progress.text:
            raise UserError(
                f"the text has changed since checkpoint {path}, so its data order is lost: bring it back, "
                "choose another folder as out, or --restart"
            )
        self.progress = replace(progress, text=self.progress.text)

    def save(self) -> Path:
        """A checkpoint, now. Raises UserError where it cannot be written."""
        return self.checkpoints.save(self.progress)

    def step(self) -> tuple[Tensor, Tensor, float]:
        """One optimiser step. Returns the global sums of main and MTP loss per token, and the norm."""
        dp, step, course = self.mesh["dp"], self.progress.step, self.course
        rows = torch.from_numpy(
            self.data.batch_at(self._sequences_seen, course.batch(step), dp.rank, dp.size)
        ).to(self.mesh.device)
        losses, norm = self.work.step(rows, course.learning_rate(step), course.mtp_weight(step))
        if math.isfinite(norm):
            self._skipped_in_a_row = 0
        else:
            self.progress = replace(self.progress, skipped=self.progress.skipped + 1)
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row == self.config.train.max_skipped:
                self.checkpoints.finish()
                raise UserError(
                    f"{self._skipped_in_a_row} steps in a row, the last {self.progress.step}, had NaN or "
                    "infinite gradients; a lower optimizer.learning_rate or a longer "
                    "schedule.warmup_steps may help"
                )
        return losses[0], losses[1], norm

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Held-out loss in nats per token; None without held-out text."""
        config, dp = self.config, self.mesh["dp"]
        length, batch = config.data.sequence_length, self.layout.micro_batch * dp.size
        if self._files.validation.count < length + self.extra:
            return None
        batches = validation_batches(
            self._files.validation.path,
            length,
            batch,
            config.train.evaluate_sequences,
            extra=self.extra,
            rank=dp.rank,
            num_ranks=dp.size,
        )
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        tokens = torch.zeros_like(total)
        self.parallel.train(False)
        for rows, counted in batches:
            total += self.parallel.loss(torch.from_numpy(rows).to(self.mesh.device), counted)
            tokens += int((rows[:counted, 1 : 1 + length] >= 0).sum())
        self.parallel.train()
        return (self.parallel.total(total) / dp.all_reduce(tokens)).item()

    def run(self, until: int | None = None, quiet: bool = False) -> RunResult:
        """Trains from where the run stands to its last step, or to step `until`."""
        config, axis = self.config, self.mesh.world
        end = config.train.steps if until is None else min(until, config.train.steps)
        dtype = DTYPES[self.layout.precision]
        axis.barrier()
        mine = measure_peak_flops(self.mesh.device, dtype)
        peak = sum(row[0] for row in axis.all_gather_floats([mine]))
        length = config.data.sequence_length
        trains_all = config.lora.r == 0
        flops = train_flops(self.spec, length, mtp=self.spec.num_nextn_predict_layers > 0, weights=trains_all)
        reporter = None
        if self.mesh.is_first:
            label = f"{self.spec.name} on {axis.size} worker" + "s" * (axis.size > 1)
            reporter = Reporter(self.folder, end, self.progress.step, label, quiet)
        predicted = self._predict() if self.mesh.is_first else None
        timed: list[tuple[float, float]] = []  # seconds of a step, tokens a second
        peak_bytes: int | None = None
        moved: Counter[tuple[str, str]] = Counter()
        loss, validation = float("nan"), None
        first_step = self.progress.step
        stopped: str | None = None
        stragglers = self._stragglers()
        watchdog = Watchdog(self.mesh, self.parallel.parts, config.train.hang_after_s)
        try:
            watchdog.start()
            while self.progress.step < end and stopped is None:
                watchdog.step = self.progress.step + 1
                # By the third step all that stays has been made; it is counted, if another can be timed.
                counts = self.progress.step == first_step + COUNTED_STEP < end - 1
                tokens_in_step = self.course.batch(self.progress.step) * length
                bytes_before, waited_before = Counter(self.mesh.traffic.bytes), self.mesh.traffic.waited_s
                start = time.perf_counter()
                if counts:
                    (loss, mtp, norm, load), peak_bytes = counted_step(self.work, self._balanced_step)
                else:
                    loss, mtp, norm, load = self._balanced_step()
                seconds = time.perf_counter() - start
                moved = self.mesh.traffic.bytes - bytes_before
                own_s = seconds - (self.mesh.traffic.waited_s - waited_before)
                if not counts:
                    timed.append((seconds, tokens_in_step / seconds))
                rate = self.optimizer.param_groups[0]["lr"]
                self.progress = replace(
                    self.progress,
                    step=self.progress.step + 1,
                    tokens=self.progress.tokens + tokens_in_step,
                    seconds=self.progress.seconds + seconds,
                )
                step = self.progress.step
                last = step == end
                validation = self.evaluate() if last or _due(step, config.train.evaluate_every) else None
                mine = [peak_memory_gib(self.mesh.device), own_s, self.stop.number, self.checkpoints.status]
                memories, own_times, signals, written = zip(*axis.all_gather_floats(mine), strict=True)
                self.checkpoints.settle(written)
                slowest, slow = stragglers.add(step, own_times)
                if asked := int(max(signals)):
                    stopped = signal.Signals(asked).name
                if reporter is not None:
                    for line in slow:
                        log.warning(line)
                    reporter.step(
                        StepMetrics(
                            step=step,
                            tokens=self.progress.tokens,
                            loss=loss,
                            mtp_loss=mtp.item() if self.extra > 1 else None,
                            gradient_norm=norm,
                            learning_rate=rate,
                            step_s=seconds,
                            tokens_per_s=tokens_in_step / seconds,
                            mfu=flops.total * tokens_in_step / seconds / peak,
                            memory_gib=max(memories),
                            expert_load_worst=load.worst if load else None,
                            expert_load_mean=load.mean if load else None,
                            skipped_steps=self.progress.skipped,
                            validation_loss=validation,
                            slowest_over_median=slowest,
                        )
                    )
                if last or stopped is not None:
                    self.save()
                elif _due(step, config.train.checkpoint_every):
                    self.checkpoints.start(self.progress, config.train.checkpoint_async)
                    if not config.train.checkpoint_async:
                        self.checkpoints.finish()
        finally:
            watchdog.end()
            if reporter is not None:
                reporter.close()
        timed = timed[WARMUP_TIMED_STEPS:] or timed or [(float("nan"), float("nan"))]
        step_s, tokens_per_s = (statistics.median(values) for values in zip(*timed, strict=True))
        state_gib = self.parallel.held_bytes(self.optimizer) / GIB
        memory_rows = axis.all_gather_floats(
            [peak_memory_gib(self.mesh.device), state_gib, (peak_bytes or 0) / GIB]
        )
        result = RunResult(
            folder=str(self.folder),
            steps=self.progress.step,
            tokens=self.progress.tokens,
            loss=loss,
            validation_loss=validation,
            tokens_per_s=tokens_per_s,
            step_s=step_s,
            mfu=flops.total * tokens_per_s / peak,
            peak_tflops=peak / 1e12,
            memory_gib=[row[0] for row in memory_rows],
            state_gib=[row[1] for row in memory_rows],
            traffic_bytes_per_step={f"{name}/{op}": count for (name, op), count in moved.items()},
            counted_gib=[] if peak_bytes is None else [row[2] for row in memory_rows],
            predicted=predicted,
            stopped_by=stopped,
            failed_checkpoints=self.checkpoints.failures,
        )
        if self.mesh.is_first:
            (self.folder / "result.json").write_text(json.dumps(asdict(result), indent=1))
        return result

    def _balanced_step(self) -> tuple[float, Tensor, float, Load | None]:
        main, mtp, norm = self.step()
        load = self.work.balance(norm, self.course.bias_speed(self.progress.step))
        return main.item(), mtp, norm, load

    def _stragglers(self) -> Stragglers:
        stages = {tuple(self.layout.group("stage", rank)) for rank in range(self.mesh.world.size)}
        names = [name.decode() for name in self.mesh.world.share(socket.gethostname().encode())]
        return Stragglers(sorted(stages), names)

    def _predict(self) -> Prediction | None:
        """The planner's figures, written into the run's folder too; it knows of no frozen weights."""
        if self.config.lora.r:
            return None
        found = predict(
            *(self.spec, self.layout, self.config.data.sequence_length, self.mesh.device),
            threads=torch.get_num_threads(),
            optimizer=self.config.optimizer,
        )
        if found is not None:
            (self.folder / "prediction.json").write_text(json.dumps(asdict(found), indent=1))
        return found


def _started(stored: Initial, fresh: Initial) -> Initial:
    """Values of a folder; of adapters, which it has none of, fresh ones."""
    return lambda name, box: (fresh if is_adapter(name) else stored)(name, box)


def run_rank(config: RunConfig, files: TokenFiles, until: int | None, quiet: bool) -> RunResult:
    """The whole life of one rank: mesh, trainer, the newest checkpoint if there is one, run."""
    device = local_device(config.device)
    stop = StopRequest()
    with stop.listening(), open_mesh(config.make_layout(), device) as mesh:
        trainer = Trainer(config, config.model_spec(), files, mesh, stop)
        trainer.restore()
        return trainer.run(until, quiet)


def _check_text(sha256: str, mesh: Mesh) -> None:
    """Raises UserError where hosts have prepared different tokens."""
    told = mesh.world.share(f"{sha256} {socket.gethostname()}".encode())
    for rank, each in enumerate(told):
        other, host = each.decode().split(" ", 1)
        if other != told[0].decode().split(" ", 1)[0]:
            raise UserError(
                f"the tokens of rank {rank} (host {host}) are not those of rank 0: every host must have the "
                "same text and tokenizer"
            )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
