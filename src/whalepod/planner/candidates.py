"""Layouts as columns: what the planner computes with, thousands at a time.

Every quantity of the planner is a formula over these columns (numpy arrays of one length), so the search
over all layouts and the close look at one run the same lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np

from whalepod.spec.layout import Layout, Precision, Schedule
from whalepod.spec.schedule import stages_per_rank

Column = np.ndarray

RECOMPUTED = ("norms", "mla_up_proj", "moe_act", "mlp", "all")
"""What a backward pass may recompute: normalisations, MLA's up-projections, the activation function of
experts (SwiGLU), the whole MLP of dense layers, every block."""

POLICIES: Mapping[str, frozenset[str]] = {
    "none": frozenset(),
    "selective": frozenset(("norms", "mla_up_proj", "moe_act")),
    "full": frozenset(("all",)),
}
"""Layout.recompute as the parts it stands for (DeepSeek-V3, section 3.2.3)."""


class Pipeline(NamedTuple):
    """What decides which layers a rank holds, and in which order it works."""

    schedule: str
    pp: int
    stages: int  # on each rank
    stage_layers: tuple[int, ...] | None  # of each stage; None: cut by FLOPs


def objects(values: Sequence[Any]) -> Column:
    """A column of arbitrary values (numpy would make a matrix of equally long tuples)."""
    column = np.empty(len(values), dtype=object)
    for row, value in enumerate(values):
        column[row] = value
    return column


@dataclass(frozen=True)
class Candidates:
    """Columns of int64; `schedule`, `precision` and `wire` hold strings, `stage_layers` tuples or None,
    `recompute` one boolean column a part.

    `stages`: pipeline stages on each rank. `zero`: 1, 2 or 3.
    """

    pp: Column
    stages: Column
    dp_replicate: Column
    dp_shard: Column
    cp: Column
    tp: Column
    ep: Column
    zero: Column
    micro_batch: Column
    global_batch: Column
    schedule: Column
    precision: Column
    wire: Column
    stage_layers: Column
    recompute: Mapping[str, Column]

    @classmethod
    def of(cls, layouts: Sequence[Layout], recompute: Sequence[frozenset[str]] | None = None) -> Candidates:
        """The columns of `layouts`; `recompute` names parts where a policy of Layout is too coarse."""
        parts = recompute or [POLICIES[layout.recompute] for layout in layouts]

        def column(get: Any, dtype: Any = np.int64) -> Column:
            return np.array([get(layout) for layout in layouts], dtype=dtype)

        return cls(
            stages=column(lambda x: stages_per_rank(x.schedule, x.stages_per_rank) if x.pp > 1 else 1),
            schedule=column(lambda x: x.schedule, object),
            precision=column(lambda x: x.precision, object),
            wire=column(lambda x: x.wire, object),
            stage_layers=objects([x.stage_layers for x in layouts]),
            recompute={part: np.array([part in chosen for chosen in parts]) for part in RECOMPUTED},
            **{
                name: column(lambda x, name=name: getattr(x, name))
                for name in (
                    *("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "zero"),
                    *("micro_batch", "global_batch"),
                )
            },
        )

    def __len__(self) -> int:
        return len(self.pp)

    def take(self, index: Column | Sequence[int]) -> Candidates:
        """The rows of a mask or of indices."""
        index = np.asarray(index)
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "recompute"}
        return Candidates(
            **{name: column[index] for name, column in columns.items()},
            recompute={part: column[index] for part, column in self.recompute.items()},
        )

    def layout(self, row: int, **more: Any) -> Layout:
        """Row `row` as a Layout; raises UserError where it is none."""
        several = self.pp[row] > 1
        policy = next((n for n, parts in POLICIES.items() if parts == self.recomputed(row)), "selective")
        values = {
            name: int(getattr(self, name)[row])
            for name in (
                *("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "zero"),
                *("micro_batch", "global_batch"),
            )
        }
        return Layout(
            schedule=cast(Schedule, str(self.schedule[row])) if several else "1f1b",
            stages_per_rank=int(self.stages[row]) if several else None,
            precision=cast(Precision, str(self.precision[row])),
            wire=str(self.wire[row]),  # type: ignore[arg-type]
            stage_layers=self.stage_layers[row] if several else None,
            recompute=policy,  # type: ignore[arg-type]
            **{**values, **more},
        )

    def recomputed(self, row: int) -> frozenset[str]:
        """The parts that row `row` recomputes."""
        return frozenset(part for part, column in self.recompute.items() if column[row])

    def pipelines(self) -> Iterator[tuple[Pipeline, Column]]:
        """Each pipeline there is, and the rows that have it."""
        columns = (self.schedule, self.pp, self.stages, self.stage_layers)
        rows: dict[Pipeline, list[int]] = {}
        for row, key in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
            rows.setdefault(Pipeline(*key), []).append(row)
        for pipeline, found in rows.items():
            yield pipeline, np.array(found)

    @cached_property
    def devices(self) -> Column:
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @cached_property
    def replicas(self) -> Column:
        """Groups of devices that read different sequences."""
        return self.dp_replicate * self.dp_shard

    @cached_property
    def accumulation(self) -> Column:
        """Micro-batches per device and step."""
        return self.global_batch // (self.micro_batch * self.replicas)

    @cached_property
    def fsdp(self) -> Column:
        """Devices that share the state of what is not an expert."""
        return self.dp_shard * self.cp

    @cached_property
    def expert_shard(self) -> Column:
        """Devices that share the state of one expert."""
        return self.dp_shard * self.cp * self.tp // self.ep

    @cached_property
    def expert_tp(self) -> Column:
        """Ways that each expert's width is split: without expert parallelism `tp` cuts experts too."""
        return np.where(self.ep == 1, self.tp, 1)
