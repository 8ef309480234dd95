"""Time of a training step: layers into stages, stages into a played pipeline, what is left into the open.

`estimate` is a formula over thousands of layouts at once; `time_step` plays one layout's pipeline as the
event graph of its own actions (spec/timeline), so bubbles, uneven stages and exposed messages come out of
it and are not put in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from whalepod.planner.balance import balanced_layers
from whalepod.planner.candidates import Candidates, Pipeline, objects
from whalepod.planner.cut import cut
from whalepod.planner.data_parallel import DataParallel
from whalepod.planner.kernels import Kernels
from whalepod.planner.layers import F, I, Layer, LayerCosts, R, W, together
from whalepod.planner.network import Network
from whalepod.planner.software import Software
from whalepod.spec.hardware import Cluster
from whalepod.spec.model import ModelSpec
from whalepod.spec.schedule import schedule_actions, stages_of_rank
from whalepod.spec.timeline import StageTimes, Timeline, simulate

OVERLAPPING = ("1f1b", "interleaved", "dualpipev")
"""Schedules whose steady state alternates forward and backward passes, so that one's exchange can run while
the other computes (Megatron's 1F1B with overlapped exchange, DeepSeek's DualPipe)."""
STEP_OVERHEAD_S = 0.02  # reading a batch, norms, metrics, launching the optimiser: host work once a step


@dataclass(frozen=True)
class Stages:
    """Seconds of each pipeline stage for one micro-batch, [pp, stages per rank, rows].

    `forward`, `input`, `weight` with all that is exposed of communication; `pair`: a forward and a
    backward together, as DualPipeV runs them; `hidden`: the exchange that runs behind computation; `host`:
    launches that show.
    """

    forward: np.ndarray
    input: np.ndarray
    weight: np.ndarray
    pair: np.ndarray
    exposed: dict[str, np.ndarray]
    hidden: np.ndarray
    host: np.ndarray

    @property
    def whole(self) -> np.ndarray:
        return self.forward + self.input + self.weight


@dataclass(frozen=True)
class TrainingTimes:
    """Times of candidates on a cluster under a software generation. imbalance: tokens of the busiest
    rank's experts over the mean. mtp: whether MTP blocks are trained."""

    spec: ModelSpec
    candidates: Candidates
    cluster: Cluster
    software: Software
    sequence_length: int = 4096
    imbalance: float = 1.0
    mtp: bool = True

    @cached_property
    def costs(self) -> LayerCosts:
        gpu = self.cluster.gpu
        kernels = Kernels(gpu, self.software.of(gpu))
        return LayerCosts(
            *(self.spec, self.candidates, self.sequence_length, kernels, Network(self.cluster)),
            *(self.software.on(self.cluster), self.imbalance),
        )

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """One layer of each kind that the model has; layouts that differ in nothing a layer sees share it."""
        spec, c = self.spec, self.candidates
        names = [np.unique(x.astype(str), return_inverse=True)[1] for x in (c.precision, c.wire)]
        seen = np.stack([c.micro_batch, c.cp, c.tp, c.ep, *names, *c.recompute.values()])
        _, first, same = np.unique(seen, axis=1, return_index=True, return_inverse=True)
        costs = replace(self.costs, c=c.take(first))
        kinds = ["embedding", "head"]
        kinds += ["moe"] if spec.num_moe_layers else []
        kinds += ["dense"] if spec.num_moe_layers < spec.num_hidden_layers else []
        kinds += ["mtp"] if self.mtp and spec.num_nextn_predict_layers else []
        return {kind: costs.layer(kind).take(same.ravel()) for kind in kinds}

    def stages(self, rows: np.ndarray, pipeline: Pipeline) -> Stages:
        """The stages of candidates `rows`, which share a pipeline."""
        counts, pp, stages = self._counts(pipeline), pipeline.pp, pipeline.stages

        def over(values: dict[str, np.ndarray]) -> np.ndarray:
            return sum(
                (counts[kind][..., None] * value[rows] for kind, value in values.items()),
                np.zeros((pp, stages, len(rows))),
            )

        device = [over({k: x.device[each] for k, x in self.layers.items()}) for each in (F, I, W, R)]
        host = [over({k: x.host[each] for k, x in self.layers.items()}) for each in (F, I, W, R)]
        axes = sorted({axis for layer in self.layers.values() for axis in layer.moves})
        moves = {
            axis: [
                over({k: x.moves[axis][way] for k, x in self.layers.items() if axis in x.moves})
                for way in (0, 1)
            ]
            for axis in axes
        }
        # Recomputing whole blocks sends again what they send.
        whole = self.candidates.recompute["all"][rows]
        blocks = {k: x for k, x in self.layers.items() if k not in ("embedding", "head")}
        again = {
            axis: whole * over({k: x.moves[axis][0] for k, x in blocks.items() if axis in x.moves})
            for axis in axes
        }
        soft = self.software
        ep = self.candidates.ep[rows]
        overlap = (
            ep > self.costs.network.inner(ep) if soft.overlap is None else np.full(len(rows), soft.overlap)
        )
        overlap = overlap & (pp > 1 and pipeline.schedule in OVERLAPPING)
        slower = 1 + soft.overlap_cost * overlap
        sharpness = self.costs.software.host_sharpness
        forward = together(device[F], host[F], sharpness)
        inputs = together(device[I] + device[R], host[I] + host[R], sharpness)
        weights = together(device[W], host[W], sharpness)
        none = np.zeros_like(forward)
        ep_there, ep_back = moves.get("ep", [none, none])
        ep_back = ep_back + again.get("ep", none)
        # Hidden behind the other direction's computation, the exchange shows where it is longer.
        computed = (forward + inputs + weights) * slower
        shown = np.maximum(ep_there + ep_back - computed * overlap * soft.hides, 0.0)
        total = np.maximum(ep_there + ep_back, 1e-30)
        exposed = {"ep": shown}
        others = [none, none]
        for axis in axes:
            if axis != "ep":
                others = [others[0] + moves[axis][0], others[1] + moves[axis][1] + again[axis]]
                exposed[axis] = moves[axis][0] + moves[axis][1] + again[axis]
        pair = computed + shown
        return Stages(
            forward * slower + shown * ep_there / total + others[0],
            inputs * slower + shown * ep_back / total + others[1],
            weights * slower,
            pair + others[0] + others[1],
            exposed,
            ep_there + ep_back - shown,
            (forward + inputs + weights) - sum(device),
        )

    def parts(self, row: int, pipeline: Pipeline) -> dict[str, np.ndarray]:
        """Seconds of the kernels of one micro-batch by part, [pp, stages per rank]."""
        counts = self._counts(pipeline)
        out: dict[str, np.ndarray] = {}
        for kind, layer in self.layers.items():
            for part, table in layer.parts.items():
                out[part] = out.get(part, 0.0) + counts[kind] * table[[F, I, W], row].sum()
            out["recompute"] = out.get("recompute", 0.0) + counts[kind] * layer.device[R, row]
        return out

    def _counts(self, pipeline: Pipeline) -> dict[str, np.ndarray]:
        schedule, pp, stages, layers = pipeline
        found = cut(self.spec, pp, stages, schedule, self.sequence_length, layers)
        extra = self.spec.num_nextn_predict_layers if "mtp" in self.layers else 0
        return {
            "dense": found.dense,
            "moe": found.moe,
            "mtp": found.head * extra,
            "embedding": found.embedding + found.head * extra,
            "head": found.head * (1 + extra),
        }

    def balanced(self) -> TrainingTimes:
        """The same with every pipeline's layers spread by time, where nothing says how."""
        c, spec = self.candidates, self.spec
        sharpness = self.costs.software.host_sharpness
        seconds = {
            k: together(x.device, x.host, sharpness).sum(0) + sum(m.sum(0) for m in x.moves.values())
            for k, x in self.layers.items()
        }
        layers = c.stage_layers.copy()
        zero = np.zeros(len(c))
        last = seconds["head"] * (1 + ("mtp" in seconds) * spec.num_nextn_predict_layers)
        last = last + seconds.get("mtp", zero) * spec.num_nextn_predict_layers
        for pipeline, rows in c.pipelines():
            if pipeline.pp == 1 or pipeline.stage_layers is not None:
                continue
            # One cut for all that share a pipeline, by the first of them, in units that make like ones equal.
            row = rows[0]
            unit = seconds.get("moe", seconds.get("dense", zero))[row] / 20
            costs = tuple(
                float(round(seconds["moe" if spec.is_moe_layer(i) else "dense"][row] / unit))
                for i in range(spec.num_hidden_layers)
            )
            layers[rows] = objects(
                [balanced_layers(costs, float(round(last[row] / unit)), *pipeline[:3])] * len(rows)
            )
        found = replace(self, candidates=replace(c, stage_layers=layers))
        found.__dict__["layers"] = self.layers  # what a layer takes does not depend on where it lies
        return found

    # --------------------------------------------------------------------------------------- a step

    @cached_property
    def data_parallel(self) -> DataParallel:
        spec = self.spec if self.mtp else self.spec.with_(num_nextn_predict_layers=0)
        return DataParallel(
            *(spec, self.candidates, self.sequence_length, self.costs.network),
            *(self.software.state, self.costs.kernels.optimizer_bandwidth),
        )

    def message(self) -> np.ndarray:
        """Seconds of a micro-batch's activations from one pipeline rank to the next."""
        c = self.candidates
        sent = self.costs.shard * self.spec.hidden_size * self.costs.b
        return self.costs.network.send(sent, c.devices // c.pp >= self.cluster.domain)

    @cached_property
    def estimate(self) -> np.ndarray:
        """Seconds a step of every candidate, the pipeline by formula: for ranking."""
        c = self.candidates
        out, *work = (np.zeros(len(c)) for _ in range(4))
        message = self.message()
        for pipeline, rows in c.pipelines():
            schedule, pp, stages, _ = pipeline
            s = self.stages(rows, pipeline)
            m = c.accumulation[rows]
            paired = schedule == "dualpipev" and pp > 1
            rank = (s.pair if paired else s.whole).sum(1)
            slowest, mean = rank.max(0), rank.mean(0)
            forward, inputs, weights = (x.sum(1).mean(0) for x in (s.forward, s.input, s.weight))
            bubble = (pp - 1) * _bubble(schedule, stages, forward, inputs, weights, mean)
            hops = 2 * (pp * stages - 1) * message[rows] if pp > 1 else 0.0
            fill = m * slowest + bubble + hops
            # However few micro-batches: one goes through all ranks.
            out[rows] = np.maximum(fill, pp * mean + hops)
            for whole, x in zip(work, (s.input + s.weight, s.forward, s.hidden), strict=True):
                whole[rows] = x.sum(1).max(0) * m
        return out + self.data_parallel.shown(*work) + self.data_parallel.optimizer + STEP_OVERHEAD_S

    def time_step(self, row: int) -> Step:
        """Plays the pipeline of candidate `row`."""
        c = self.candidates
        pipeline = Pipeline(*(str(c.schedule[row]), int(c.pp[row]), int(c.stages[row]), c.stage_layers[row]))
        schedule, pp, stages, _ = pipeline
        s = self.stages(np.array([row]), pipeline)
        m = int(c.accumulation[row])
        if pp == 1:
            makespan, timeline = float(s.whole.sum()) * m, None
        else:
            times: list[StageTimes] = []
            order: dict[int, StageTimes] = {}
            for rank in range(pp):
                for place, stage in enumerate(stages_of_rank(schedule, rank, pp, stages)):
                    f, i, w, both = (float(x[rank, place, 0]) for x in (s.forward, s.input, s.weight, s.pair))
                    order[stage] = StageTimes(f, i, w, i + w, both if schedule == "dualpipev" else None)
            times = [order[stage] for stage in range(pp * stages)]
            message = float(self.message()[row])
            makespan, timeline = play(schedule, pp, stages, m, tuple(times), message)
        work = (
            np.full(len(c), x[..., 0].sum(1).max() * m) for x in (s.input + s.weight, s.forward, s.hidden)
        )
        shown = float(self.data_parallel.shown(*work)[row])
        busiest = int((s.pair if schedule == "dualpipev" and pp > 1 else s.whole)[..., 0].sum(1).argmax())
        # Where forward and backward hide each other's exchange, nothing of it shows on its own.
        parts = {part: float(x[busiest].sum()) * m for part, x in self.parts(row, pipeline).items()}
        parts["launching"] = float(s.host[busiest, :, 0].sum()) * m
        exposed = {axis: float(x[busiest, :, 0].sum()) * m for axis, x in s.exposed.items()}
        own = float((s.pair if schedule == "dualpipev" and pp > 1 else s.whole)[busiest, :, 0].sum()) * m
        optimizer = float(self.data_parallel.optimizer[row])
        return Step(
            seconds=makespan + shown + optimizer + STEP_OVERHEAD_S,
            parts=parts,
            exposed={axis: t for axis, t in exposed.items() if t > 0} | {"dp": shown},
            bubble=max(makespan - own, 0.0),
            optimizer=optimizer,
            timeline=timeline,
            interference=max(own - sum(parts.values()) - sum(exposed.values()), 0.0),
        )


@dataclass(frozen=True)
class Step:
    """Seconds of a step, on the busiest pipeline rank: computation by part, communication that shows by
    axis, the pipeline's bubble, the optimiser. `timeline` is of the first micro-batches where there are
    many. interference: computation slowed by the exchange that it hides."""

    seconds: float
    parts: dict[str, float]
    exposed: dict[str, float]
    bubble: float
    optimizer: float
    timeline: Timeline | None
    interference: float


def _bubble(schedule: str, stages: int, f, i, w, mean):
    """Idle time of a rank for each other rank of the pipeline (spec/schedule; DeepSeek-V3, table 2)."""
    if schedule in ("gpipe", "1f1b"):
        return mean
    if schedule == "interleaved":
        return mean / stages
    if schedule == "interleaved_zero_bubble":
        return np.maximum(f + i - w, 0.0) / stages
    if schedule == "zbv":
        return np.maximum(f + i - 2 * w, 0.1 * mean) / 2
    return np.maximum(mean + i - 2 * w, 0.1 * mean) / 2


ROUNDS = 4


@lru_cache(maxsize=512)
def play(
    schedule: str, pp: int, stages: int, micro_batches: int, times: tuple[StageTimes, ...], message: float
) -> tuple[float, Timeline]:
    """(seconds, timeline) of a pipeline. Of very many micro-batches the first rounds are played, and the
    rest go on at the pace of the last of them: a full pipeline repeats itself."""
    # In whole rounds of pp: interleaved schedules want those.
    first = ROUNDS * pp
    if micro_batches <= first + 2 * pp or (micro_batches - first) % pp:
        timeline = simulate(schedule_actions(schedule, pp, stages, micro_batches), times, message)
        return timeline.makespan, timeline
    some = simulate(schedule_actions(schedule, pp, stages, first), times, message)
    more = simulate(schedule_actions(schedule, pp, stages, first + pp), times, message)
    pace = more.makespan - some.makespan
    return some.makespan + pace * (micro_batches - first) / pp, some
