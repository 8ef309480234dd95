"""Copies of rows in another order, and the sums over each row's copies: both directions of every hop.

    R  rows            N  copies of them, in the order they travel or are worked on

A row may have any number of copies, none included. Sending is a gather, and its transpose, which brings
results or gradients home, is a sum over bags of copies: autograd's own would be a scatter-add, serial on
CPUs and unordered on GPUs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Fan(NamedTuple):
    source_N: Tensor  # the row that each copy is of
    copies: Tensor  # the copies of row 0, then those of row 1, ...: padding is in no row's list
    starts_R: Tensor  # where in `copies` each row's begin

    def spread(self, x_RD: Tensor) -> Tensor:
        """[R, D] to copies [N, D]."""
        return x_RD.index_select(0, self.source_N)

    def collect(self, y_ND: Tensor) -> Tensor:
        """[N, D] to the sums over each row's copies [R, D]; a row without copies gets 0."""
        return F.embedding_bag(self.copies, y_ND.contiguous(), self.starts_R, mode="sum")


def starts(counts_R: Tensor) -> Tensor:
    """Where each row's list begins when lists of these lengths follow each other."""
    return counts_R.cumsum(0) - counts_R


def fan_to_columns(mask_RM: Tensor, num_copies: int) -> Fan:
    """A copy of row r for every column m with mask[r, m]: those of column 0 first, by row.

    `num_copies` is the number of true cells. It is passed because on a device only the splits know it.

    >>> fan_to_columns(torch.tensor([[True, True], [False, True]]), 3)
    Fan(source_N=tensor([0, 0, 1]), copies=tensor([0, 1, 2]), starts_R=tensor([0, 2]))
    """
    mask_MR = mask_RM.T.contiguous()
    place_MR = mask_MR.flatten().cumsum(0).view_as(mask_MR) - 1
    source_N = torch.nonzero_static(mask_MR, size=num_copies)[:, 1]
    row, column = torch.nonzero_static(mask_RM, size=num_copies).unbind(1)
    return Fan(source_N, place_MR[column, row], starts(mask_RM.sum(1)))


def fan_to_picks(ids_TK: Tensor) -> tuple[Fan, Tensor]:
    """A copy of token t for each of its picks, by expert; and the pick (t x K + k) that each copy serves."""
    tokens, k = ids_TK.shape
    pick_N = ids_TK.flatten().argsort(stable=True)
    place = torch.arange(tokens * k, device=ids_TK.device)
    copies = torch.empty_like(pick_N).scatter_(0, pick_N, place)
    return Fan(pick_N // k, copies, place[: tokens * k : k]), pick_N
