"""The end of the way: rows that arrived on a rank become rows sorted by expert, and back.

    R  rows that arrived        M  places for picks in each row     N  rows sorted by expert, padding included

An arrived row serves one pick (`flat`) or all picks of its token here, so it may become several sorted rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from whalepod.models.moe import group_by_expert
from whalepod.parallel.exchange.fan import Fan, starts


class Landing(NamedTuple):
    fan: Fan  # sorted rows as copies of arrived ones
    cell_P: Tensor  # of the R x M places, the one each pick has
    ends_E: Tensor  # int32, row after each expert's last
    places: tuple[int, int]  # R, M

    def sort(self, x_RD: Tensor, weights_RM: Tensor) -> tuple[Tensor, Tensor]:
        """[N, D] and weights [N], 0 for padding."""
        weights_P = weights_RM.flatten()[self.cell_P]
        weights_N = weights_P.new_zeros(self.fan.source_N.shape).scatter(0, self.fan.copies, weights_P)
        return _some(self.fan.spread(x_RD)), _some(weights_N)

    def sort_back(self, grad_ND: Tensor, grad_weights_N: Tensor) -> tuple[Tensor, Tensor]:
        """The transpose of `sort`: gradients [R, D] and [R, M]."""
        grad_M = grad_weights_N.new_zeros(self.places).flatten()
        grad_M.scatter_(0, self.cell_P, grad_weights_N[self.fan.copies])
        return self.collect(grad_ND), grad_M.view(self.places)

    def collect(self, y_ND: Tensor) -> Tensor:
        """The sum of each arrived row's results [R, D]."""
        return self.fan.collect(y_ND)

    def spread(self, grad_RD: Tensor) -> Tensor:
        """The transpose of `collect`. Padding gets some row's gradient, which its weight 0 removes."""
        return _some(self.fan.spread(grad_RD))


def land(ids_RM: Tensor, num_local: int, num_picks: int) -> Landing:
    """ids: experts counted from the first one here; those below 0 or from `num_local` on are elsewhere.

    `num_picks`: how many are here.
    """
    here_RM = (ids_RM >= 0) & (ids_RM < num_local)
    row_P, column_P = torch.nonzero_static(here_RM, size=num_picks).unbind(1)
    groups = group_by_expert(ids_RM[row_P, column_P], num_local)
    fan = Fan(row_P[groups.pick_N], groups.row_P, starts(here_RM.sum(1)))
    rows, columns = ids_RM.shape
    return Landing(fan, row_P * columns + column_P, groups.ends_E, (rows, columns))


def _some(rows: Tensor) -> Tensor:
    """Grouped products have no form for no rows at all: a rank that received nothing has one idle row."""
    return rows if len(rows) else rows.new_zeros(1, *rows.shape[1:])
