"""What each pipeline rank holds of a model: counts of layers by kind, and the two ends.

The cut itself is `spec.stages.split_stages`, where stages lie is `spec.schedule`; here both become small
integer arrays, one row a rank, for formulas over many layouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from whalepod.spec.model import ModelSpec
from whalepod.spec.schedule import stages_of_rank
from whalepod.spec.stages import split_stages


@dataclass(frozen=True, eq=False)
class Cut:
    """Arrays of int64, [pp, stages per rank], a rank's stages in the model's order; not to be written to.

    `dense`, `moe`: main layers without and with experts. `embedding`: 1 where the first stage is, `head`: 1
    where the last is, which has the final norm, the head and the multi-token-prediction (MTP) blocks.
    """

    dense: np.ndarray
    moe: np.ndarray
    embedding: np.ndarray
    head: np.ndarray


@lru_cache(maxsize=1024)
def cut(
    spec: ModelSpec,
    pp: int,
    stages_per_rank: int,
    schedule: str,
    sequence_length: int,
    stage_layers: tuple[int, ...] | None = None,
) -> Cut:
    """The split of `spec` into pp x stages_per_rank stages, and each where `schedule` puts it.

    stage_layers: layers in each stage, else they are split by cost (for sequences of `sequence_length`).
    Raises UserError where there are more stages than layers or `stage_layers` does not add up.
    """
    split = split_stages(spec, pp * stages_per_rank, sequence_length, stage_layers)
    moe = [sum(spec.is_moe_layer(layer) for layer in range(*layers)) for layers in split.layers]
    dense = [end - start - moe[stage] for stage, (start, end) in enumerate(split.layers)]
    last = split.num_stages - 1
    # One stage needs no schedule, and some schedules cannot have just one.
    homes = [stages_of_rank(schedule, rank, pp, stages_per_rank) for rank in range(pp)] if last else [(0,)]
    ends = {
        "embedding": [int(s == 0) for s in range(last + 1)],
        "head": [int(s == last) for s in range(last + 1)],
    }
    arrays = {
        name: np.array([[counts[stage] for stage in home] for home in homes], dtype=np.int64)
        for name, counts in {"dense": dense, "moe": moe, **ends}.items()
    }
    for array in arrays.values():
        array.flags.writeable = False
    return Cut(**arrays)
