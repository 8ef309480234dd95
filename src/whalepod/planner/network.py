"""Times of collectives on a cluster of two levels: a fast domain (NVLink, or PCIe) and the network.

A group of ranks is `size` ranks, `inner` of which share a domain. What crosses domains is spread over the
network cards of the ranks in a domain (rails); both levels work at once, so the slower one counts.
Latency grows with the number of ranks, bandwidth is a share of the link (NCCL on H100: 74 % for
all-gather, 99 % for all-reduce in the switch; facts of ai-dynamo/aiconfigurator's nccl tables). Within a
domain of calibrated hardware, collectives take as long as they were measured to take.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from whalepod.planner.measured import Curves, collective_curves, collective_seconds
from whalepod.spec.hardware import Cluster, Gpu
from whalepod.spec.measured import COLLECTIVES

Times = np.ndarray

SHARES = {"all_gather": 0.72, "reduce_scatter": 0.72, "all_reduce": 0.85, "p2p": 0.80}
NETWORK_SHARE = 0.88  # of the card's rate, for large messages: DeepEP and NCCL both reach 43 to 45 of 50 GB/s
HOST_GB_S = 10.0  # between workers that have no link but their host's memory
UNREACHABLE_S = 1e6  # without a network; finite, so that formulas go through
INNER_LATENCY_S = 10e-6
INNER_HOP_S = 0.5e-6
NETWORK_LATENCY_S = 14e-6
NETWORK_HOP_S = 2e-6


def fast_gb_s(gpu: Gpu, ranks: np.ndarray | int, share: float = 1.0) -> np.ndarray:
    """GB/s in one direction that a GPU has to `ranks` of its domain, itself among them, at a share of the
    link: no more than the links to these ranks have, or than is published as usable, and half where all goes
    through the host's memory."""
    link = gpu.scale_up
    rate = (link.gb_s if link else gpu.pcie_gb_s or HOST_GB_S) * share * (1.0 if gpu.peer_to_peer else 0.5)
    if link and link.peer_gb_s:
        rate = np.minimum(rate, link.peer_gb_s * share * np.maximum(np.asarray(ranks) - 1, 1))
    return np.minimum(rate, gpu.usable_scale_up_gb_s or np.inf)


@dataclass(frozen=True)
class Network:
    """Seconds of collectives. Bytes are those of the whole result (all-gather), of the whole input
    (reduce-scatter, all-reduce), or what each rank sends in all (all-to-all, point to point)."""

    cluster: Cluster
    shares: dict[str, float] = field(default_factory=lambda: dict(SHARES))

    def link(self, ranks: np.ndarray | int, share: float) -> np.ndarray:
        """Bytes per second and direction of one GPU to `ranks` in its domain, itself among them."""
        return fast_gb_s(self.cluster.gpu, ranks, share) * 1e9

    @property
    def card(self) -> float:
        """Bytes per second and direction of one GPU's part of the network."""
        return (self.cluster.nic_gb_s or 0.0) * 1e9

    def inner(self, size: np.ndarray, stride: np.ndarray | int = 1) -> np.ndarray:
        """Ranks of a group of `size`, `stride` apart, that share a domain."""
        size, stride = np.asarray(size), np.asarray(stride)
        domain, span = self.cluster.aligned, size * stride
        # A group that fits into domains, or fills them, lies so. Others are cut where a domain ends, and the
        # one that is cut most keeps the rest waiting.
        lies = (domain % span == 0) | (span % domain == 0)
        touched = 1 + -(-(span - np.gcd(domain, span)) // domain)
        return np.where(lies, np.clip(domain // stride, 1, size), -(-size // np.minimum(touched, size)))

    @cached_property
    def curves(self) -> dict[str, Curves]:
        """Measured times by operation, of those that were measured."""
        measured = self.cluster.gpu.measured
        table = () if measured is None else measured.collectives
        return {op: found for op in COLLECTIVES if (found := collective_curves(table, op))}

    def _time(
        self, op: str, total: np.ndarray, local: np.ndarray, crossing: np.ndarray, size, inner
    ) -> Times:
        crosses = size > inner
        if op in self.curves:
            seconds = collective_seconds(self.curves[op], total, inner)
        else:
            seconds = local / self.link(inner, self.shares[op]) + np.where(
                size > 1, INNER_LATENCY_S + INNER_HOP_S * inner, 0.0
            )
        rate = self.card * NETWORK_SHARE
        over = np.where(crosses, crossing / rate if rate else UNREACHABLE_S, 0.0)
        over = over + np.where(crosses, NETWORK_LATENCY_S + NETWORK_HOP_S * (size // inner), 0.0)
        return np.where(size > 1, np.maximum(seconds, over), 0.0)

    def all_gather(self, total: np.ndarray, size, inner, op: str = "all_gather") -> Times:
        local = total * (inner - 1) / inner
        return self._time(op, total, local, total * (1 - inner / size) / inner, size, inner)

    def reduce_scatter(self, total: np.ndarray, size, inner) -> Times:
        return self.all_gather(total, size, inner, "reduce_scatter")

    def all_reduce(self, total: np.ndarray, size, inner) -> Times:
        local = 2 * total * (inner - 1) / inner
        return self._time("all_reduce", total, local, 2 * total * (1 - inner / size) / inner, size, inner)

    def send(self, sent: np.ndarray, crosses: np.ndarray) -> Times:
        """From one rank to another, which is in another domain where `crosses`."""
        if "send" in self.curves:
            inside = collective_seconds(self.curves["send"], sent, 2)
        else:
            inside = sent / self.link(2, self.shares["p2p"]) + INNER_LATENCY_S
        rate = self.card * NETWORK_SHARE
        outside = (sent / rate if rate else UNREACHABLE_S) + NETWORK_LATENCY_S
        return np.where(crosses, outside, inside)

    def all_to_all(self, sent: np.ndarray, ranks: int) -> Times | None:
        """Of `ranks` that share a domain, each of which sends so many bytes to the others in all; None where
        that was not measured."""
        if "all_to_all" not in self.curves:
            return None
        return collective_seconds(self.curves["all_to_all"], sent * ranks / (ranks - 1), ranks)
