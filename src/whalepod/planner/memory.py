"""Memory of training, by category and pipeline rank, for many layouts at once.

Four things add up on a device:

* state: weights, gradients, masters and moments. ZeRO shares them over dp_shard x cp devices (those of
  experts over `expert_shard`), stage by stage: 1 masters and moments, 2 gradients too, 3 weights too.
* activations of every micro-batch between its forward and its backward pass (`planner.in_flight` says how
  many, `planner.activations` how large).
* what is there only for a moment. At the peak one of three: the loss (logits and the gradient of the head's
  weight), the backward pass of a block (gradients, rows that travel, what is recomputed), or the gradient of
  the embedding; the largest counts and the others are 0.
* what the libraries take: workspaces, the allocator's holes, CUDA context, communicators.

Checked against peaks that SimuMax measured with Megatron on B200s (`tests/unit/test_planner_memory.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from whalepod.planner.activations import MEGATRON, PARTS, Activations, Framework
from whalepod.planner.candidates import RECOMPUTED, Candidates, Column
from whalepod.planner.cut import Cut, cut
from whalepod.planner.in_flight import held, representative
from whalepod.planner.state import MEGATRON_STATE, Counts, State, StateTypes, unit_counts
from whalepod.spec.counts import GIB
from whalepod.spec.model import ModelSpec

MIB = 2**20
CATEGORIES = (
    *("weights", "gradients", "optimizer", "activations", "logits", "exchange", "working", "gathered"),
    *("workspace", "fragmentation", "overhead"),
)
"""What a device's memory holds; they add up to `Memory.total`. `working`: gradients of activations, and
recomputed ones. `exchange`: rows on their way to experts. `gathered`: whole blocks of sharded weights, and
gradients before they are. `overhead`: outside the framework's allocator (context and communicators)."""


@dataclass(frozen=True)
class Overhead:
    """What the libraries take, in bytes.

    workspace: cuBLAS's, of 32 MiB each on Hopper and later: one for torch and one for Transformer Engine;
    grouped_workspace: one for each of four streams of its grouped products.
    fragmentation: reserved over allocated, less 1. SimuMax's 19 layouts on B200 measured 1.03 to 1.09; this
    is their median.
    context: CUDA context and the code of loaded kernels, and per_communicator NCCL's: each of about 24
    channels has buffers of 4 MiB (NCCL_BUFFSIZE) and 6 MiB for its other two protocols. Estimates, not
    measured here; one communicator for each axis in use, and one for all.
    """

    workspace: float = 2 * 32 * MIB
    grouped_workspace: float = 4 * 32 * MIB
    fragmentation: float = 0.053
    context: float = 512 * MIB
    per_communicator: float = 240 * MIB


OVERHEAD = Overhead()
NO_OVERHEAD = Overhead(0, 0, 0, 0, 0)


@dataclass(frozen=True, eq=False)
class Memory:
    """Bytes, float64 [rows, ranks]: a row for each candidate, a column for each pipeline rank, zeros beyond
    a candidate's last. `categories` by CATEGORIES, `activations` by `activations.PARTS`."""

    categories: Mapping[str, np.ndarray]
    activations: Mapping[str, np.ndarray]

    @cached_property
    def allocated(self) -> np.ndarray:
        """[rows, ranks]: what the framework's allocator has given out at the peak."""
        outside = ("fragmentation", "overhead")
        return sum((v for k, v in self.categories.items() if k not in outside), np.zeros(()))

    @cached_property
    def reserved(self) -> np.ndarray:
        """[rows, ranks]: what the allocator holds."""
        return self.allocated + self.categories["fragmentation"]

    @cached_property
    def total(self) -> np.ndarray:
        """[rows, ranks]: what the device must have."""
        return self.reserved + self.categories["overhead"]

    @cached_property
    def peak_rank(self) -> np.ndarray:
        """[rows]: the pipeline rank that needs most."""
        return self.total.argmax(1)

    @cached_property
    def peak_gib(self) -> np.ndarray:
        """[rows]: what that one needs, in GiB."""
        return self.total.max(1) / GIB

    def by_category(self, row: int, rank: int | None = None) -> dict[str, float]:
        """GiB of a row's fullest rank, or of the one given, by category."""
        rank = int(self.peak_rank[row]) if rank is None else rank
        return {name: float(values[row, rank]) / GIB for name, values in self.categories.items()}


def training_memory(
    spec: ModelSpec,
    candidates: Candidates,
    sequence_length: int,
    *,
    state: StateTypes = MEGATRON_STATE,
    framework: Framework = MEGATRON,
    overhead: Overhead = OVERHEAD,
    mtp: bool = True,
    imbalance: float = 1.0,
) -> Memory:
    """The peak memory of training `spec` under each of `candidates`.

    mtp: multi-token prediction is trained too, where the model has it. imbalance: rows that the busiest
    rank's experts get, over the mean. Raises UserError where a candidate has more stages than layers.
    """
    if not mtp:
        spec = spec.with_(num_nextn_predict_layers=0)
    work = _Work(spec, candidates, sequence_length, state, framework, overhead, imbalance)
    shape = (len(candidates), int(candidates.pp.max(initial=1)))
    categories = {name: np.zeros(shape) for name in CATEGORIES}
    activations = {name: np.zeros(shape) for name in PARTS}
    for (schedule, pp, stages, stage_layers), rows in candidates.pipelines():
        layers = cut(spec, pp, stages, schedule, sequence_length, stage_layers)
        accumulation = np.maximum(1, candidates.accumulation[rows])
        alike = np.array([representative(schedule, pp, int(m)) for m in accumulation])
        for micro_batches in np.unique(alike):
            some = rows[alike == micro_batches]
            in_flight = held(schedule, pp, stages, int(micro_batches), framework.waits_with_gradients)
            found, parts = work.pipeline(layers, in_flight, some)
            for name, values in found.items():
                categories[name][some, :pp] = values
            for name, values in parts.items():
                activations[name][some, :pp] = values
    return Memory(categories, activations)


@dataclass(frozen=True)
class _Work:
    spec: ModelSpec
    c: Candidates
    sequence_length: int
    types: StateTypes
    framework: Framework
    overhead: Overhead
    imbalance: float

    def pipeline(
        self, layers: Cut, in_flight: np.ndarray, rows: np.ndarray
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Categories and activations' parts, [rows, pp], of candidates with one pipeline."""
        counts = unit_counts(self.spec, layers)
        out = self._state.of(counts, rows)
        # [rows, pp, stages]: bytes per micro-batch; then the moment at which they add up to most.
        parts = {
            part: sum(
                (
                    counts[unit] * saved[part][rows, None, None]
                    for unit, saved in self._saved.items()
                    if part in saved
                ),
                np.zeros((len(rows), *layers.dense.shape)),
            )
            for part in PARTS
        }
        size = sum(parts.values(), np.zeros(()))
        sizes, stages = size, layers.dense.shape[-1]
        if self.framework.waits_with_gradients:
            zeros = np.zeros(size.shape)
            per = {kind: self._a.waiting(kind) + self._waits_again[kind] for kind in self._state.block_kinds}
            waits = sum((counts[kind] * per[kind][rows, None, None] for kind in per), zeros)
            sizes = np.concatenate([size, waits], axis=-1)
        # [pp, rows, moments]
        moments = in_flight.transpose(0, 2, 1).astype(float)
        sums = np.matmul(sizes.transpose(1, 0, 2), moments)
        without = np.matmul(size.transpose(1, 0, 2), moments[:, :stages])
        out["activations"] = np.take_along_axis(without, sums.argmax(-1)[..., None], -1)[..., 0].T
        more = sums.max(-1).T - without.max(-1).T
        at_loss = self._moment(out, layers, counts, size, in_flight[..., :stages], more, rows)
        # When the loss is made nothing of its stage waits.
        best = np.where(at_loss.T, without.argmax(-1), sums.argmax(-1))
        now = in_flight[np.arange(len(best))[:, None], best].transpose(1, 0, 2)  # [rows, pp, stages]
        activations = {part: (now[..., :stages] * of_stages).sum(-1) for part, of_stages in parts.items()}
        out["activations"] = sum(activations.values(), np.zeros(()))
        stashed = (now * sizes).sum(-1) - out["activations"]
        out["working"] = out["working"] + np.where(at_loss, 0, stashed)
        grouped = 0 if self.spec.moe is None else self.overhead.grouped_workspace
        out["workspace"] = np.full_like(out["weights"], self.overhead.workspace + grouped)
        if self.framework.dummy_gradients:
            out["workspace"] = out["workspace"] + self._state.dummies(counts, rows)
        allocated = sum(out.values(), np.zeros(()))
        out["fragmentation"] = self.overhead.fragmentation * allocated
        c = self.c
        axes = sum(
            (axis[rows] > 1).astype(float) for axis in (c.pp, c.fsdp, c.dp_replicate, c.cp, c.tp, c.ep)
        )
        fixed = self.overhead.context + self.overhead.per_communicator * (axes + (c.devices[rows] > 1))
        out["overhead"] = np.broadcast_to(fixed[:, None], allocated.shape)
        return out, activations

    # ----------------------------------------------------------------------------------- the moment

    def _moment(
        self,
        out: dict[str, np.ndarray],
        layers: Cut,
        counts: Counts,
        size: np.ndarray,
        in_flight: np.ndarray,
        more: np.ndarray,
        rows: np.ndarray,
    ) -> np.ndarray:
        """Adds what the largest of the passing needs takes: `logits`, or `exchange` and `working`; returns
        where that is the loss. more: what activations and waiting gradients are, over activations alone."""
        spec, c = self.spec, self.c
        vocabulary = (spec.vocab_size / c.tp)[rows, None]
        ends = vocabulary * spec.hidden_size * self._a.b[rows, None]  # a gradient of head or embedding
        has = {name: (count.sum(1) > 0)[None, :] for name, count in counts.items()}
        depths = spec.num_nextn_predict_layers
        logits = (1 + depths) * self._a.t[rows, None] * vocabulary * self.framework.logits
        if self.framework.logits:
            # ... beside the gradient of the head's input, and that input where it must be gathered again.
            loss = logits + ends + (self._a.t * (1 + (c.tp > 1)) * spec.hidden_size * self._a.b)[rows, None]
        else:  # one FP32 sum of the head's gradient, rounded when whole and kept, as the input's is
            logits = (1 + depths) * (ends + (self._a.t * spec.hidden_size * self._a.b)[rows, None])
            # ... beside one slice's logits and gradient of the head.
            tokens = np.clip(self.framework.loss_slice // vocabulary, 1, self._a.t[rows, None])
            slices = tokens * vocabulary * (4.0 + self._a.b[rows, None])
            loss = logits + vocabulary * spec.hidden_size * 4.0 + ends + slices
        # A schedule that runs every forward pass first keeps every loss; others go back at once.
        waiting = (in_flight * layers.head[:, None]).max((1, 2)) if self._all_first(rows) else has["head"]
        out["logits"] = np.maximum(waiting - 1, 0) * logits
        loss = np.where(has["head"], loss, 0)
        exchange, working = (np.zeros_like(loss) for _ in range(2))
        for kind in ("dense", "moe"):
            if has[kind].any():
                travels, others = (x[rows, None] for x in self._a.working(kind))
                others = others + self._again[kind][rows, None]
                larger = has[kind] & (travels + others > exchange + working)
                exchange = np.where(larger, travels, exchange)
                working = np.where(larger, others, working)
        if not self.framework.dummy_gradients:
            working = working + self._state.largest_gradient(counts, rows)
        # The embedding's gradient comes last, when its micro-batch has left everything else behind.
        first = np.where(has["embedding"], ends - (size * layers.embedding).sum(-1), 0)
        block = exchange + working
        # Of blocks' gradients nothing is on its way yet when the loss is there, nor, with one micro-batch,
        # has any arrived.
        sent, kept = out.pop("sent"), out.pop("kept")
        late = np.broadcast_to(self.framework.late_gradients, sent.shape)
        kept = np.where(late & (c.accumulation > 1)[rows, None], kept, 0)
        alone = late & ((c.accumulation <= 1) & (c.fsdp > 1))[rows, None]
        sent = np.maximum(sent, kept)
        passing = np.where(late, sent - kept + out.pop("passing"), 0)
        # One micro-batch's activations go as its blocks' gradients come.
        rest = np.maximum(out["gradients"] - out["activations"], 0)
        loss_alone = loss - passing - np.where(alone, rest, 0) - more
        at_loss = (loss_alone >= block) & (loss_alone >= first)
        at_block = ~at_loss & (block >= first)
        # Weights come one by one while what a micro-batch of the stage left goes.
        left = size.sum(-1) if size.shape[-1] == 1 else 0
        stays = np.maximum(out.pop("stays") - out["gathered"] - left, 0)
        out["gathered"] = out["gathered"] + stays + sent - np.where(at_loss, passing, 0)
        out["gradients"] = np.where(alone, np.where(at_loss, 0, rest), out["gradients"])
        out["logits"] = out["logits"] + np.where(at_loss, loss, 0)
        out["exchange"] = np.where(at_block, exchange, 0)
        out["working"] = np.where(at_block, working, np.where(at_loss, 0, first))
        return at_loss

    def _all_first(self, rows: np.ndarray) -> bool:
        return bool(self.c.schedule[rows[0]] == "gpipe") and bool(self.c.pp[rows[0]] > 1)

    @cached_property
    def _state(self) -> State:
        return State(self.spec, self.c, self.types)

    @cached_property
    def _a(self) -> Activations:
        return Activations(self.spec, self.c, self.sequence_length, self.framework, self.imbalance)

    @cached_property
    def _saved(self) -> dict[str, dict[str, Column]]:
        """Bytes a micro-batch leaves behind, by unit and part."""
        blocks = {kind: self._a.block(kind, self.c.recompute) for kind in self._state.block_kinds}
        return {**blocks, "embedding": self._a.embedding, "head": self._a.head, "joint": self._a.joint}

    @cached_property
    def _again(self) -> dict[str, Column]:
        """What recomputation brings back of a block, all at once (torch's checkpoint does), by its kind."""
        return {kind: self._made_again(kind, self.c.recompute) for kind in self._state.block_kinds}

    @cached_property
    def _waits_again(self) -> dict[str, Column]:
        """What of it a split backward pass leaves to its second half: all but what SwiGLU's derivative reads.
        Blocks of which nothing was kept are made once more there, and leave nothing."""
        made = {**self.c.recompute, "moe_act": np.zeros(len(self.c), dtype=bool)}
        kinds = self._state.block_kinds
        return {kind: np.where(self.c.recompute["all"], 0, self._made_again(kind, made)) for kind in kinds}

    def _made_again(self, kind: str, recompute: Mapping[str, Column]) -> Column:
        nothing = {part: np.zeros(len(self.c), dtype=bool) for part in RECOMPUTED}
        whole, kept = (self._a.block(kind, policy).values() for policy in (nothing, recompute))
        return sum(whole, np.zeros(())) - sum(kept, np.zeros(()))
