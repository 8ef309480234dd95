"""Expert parallelism's exchange against one device that holds all experts, on real gloo ranks."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_on_ranks, run_ranks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from whalepod.models.moe import LocalDispatcher, MoELayer
from whalepod.parallel.comm import SAVED_BY_RECOMPUTE
from whalepod.parallel.exchange import Flat, TwoHop, deepep, make_dispatcher
from whalepod.parallel.mesh import Mesh, make_mesh, open_mesh
from whalepod.precision.fp8 import quantize_blocks
from whalepod.precision.tiles import ROW, dequantize, quantize
from whalepod.spec.layout import Exchange, Layout, Wire
from whalepod.spec.model import ModelSpec
from whalepod.spec.presets import load_model_spec

RANKS = 4
HIDDEN = 128
EXPERTS, K = 16, 4
PROTOCOLS: tuple[Exchange, ...] = ("flat", "two_hop")
# Ranks that share the experts out, and how many of them are in a node.
PLACES = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]

V3 = load_model_spec("v3-mini").with_(
    hidden_size=HIDDEN,
    moe_intermediate_size=16,
    n_routed_experts=EXPERTS,
    num_experts_per_tok=K,
    n_group=4,
    topk_group=2,
)
V2 = V3.with_(
    scoring_func="softmax",
    topk_method="greedy",
    n_group=1,
    topk_group=1,
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
)
UNEVEN = (9, 0, 70, 21)  # tokens of each rank


_groups: dict[tuple[int, ...], Any] = {}


def mesh_of(ep: int, node: int, exchange: Exchange, wire: Wire = "bf16") -> Mesh:
    """All ranks read different tokens; groups of `ep` share experts out."""
    layout = Layout(
        dp_shard=RANKS, ep=ep, devices_per_node=node, exchange=exchange, wire=wire, global_batch=RANKS
    )
    return make_mesh(layout, torch.device("cpu"), _groups)


@torch.no_grad()
def whole_layer(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> MoELayer:
    layer = MoELayer(spec)
    generator = torch.Generator().manual_seed(1)
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.normal_(generator=generator).mul_(1.5 * tensor.shape[-1] ** -0.5)
    return layer.to(dtype)


def shared_out(layer: MoELayer, mesh: Mesh) -> MoELayer:
    """The same layer with only this rank's experts."""
    part, ep = deepcopy(layer), mesh["ep"]
    for name, weight in list(part.experts.named_parameters()):
        mine = weight.detach().chunk(ep.size)[ep.rank].clone()
        setattr(part.experts, name, nn.Parameter(mine))
    part.dispatcher = make_dispatcher(mesh)
    return part


def tokens_of(counts: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Tokens of all ranks [1, T, D], and a gradient for the output."""
    generator = torch.Generator().manual_seed(2)
    shape = (1, sum(counts), HIDDEN)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(2))  # type: ignore


def relative(ours: Tensor, expected: Tensor) -> float:
    difference = (ours.float() - expected.float()).norm()
    return float(difference / expected.float().norm()) if expected.norm() else float(difference)


def grad_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def check_against_one_device(
    layer: MoELayer,
    mesh: Mesh,
    counts: tuple[int, ...] = UNEVEN,
    tolerance: float = 1e-5,
    dtype: torch.dtype = torch.float32,
    forward: Any = lambda layer, x: layer(x),
) -> None:
    """Output and all gradients, for the tokens of the ranks of this `ep` group."""
    ep = mesh["ep"]
    members = mesh.layout.group("ep", dist.get_rank())
    x_all, pull_all = (t.split(counts, dim=1) for t in tokens_of(counts, dtype))
    x_whole = torch.cat([x_all[r] for r in members], dim=1).requires_grad_()
    if x_whole.numel() == 0:  # grouped products need a row, of weight 0 here
        x_whole = x_all[members[0]].new_zeros(1, 1, HIDDEN).requires_grad_()
    expected = layer(x_whole)
    layer.zero_grad()
    pull = torch.cat([pull_all[r] for r in members], dim=1)
    (expected[:, : pull.shape[1]] * pull).sum().backward()
    expected = expected.detach()

    part = shared_out(layer, mesh)
    part.zero_grad()
    x = x_all[dist.get_rank()].clone().requires_grad_()
    out = forward(part, x)
    out.backward(pull_all[dist.get_rank()])

    mine = slice(sum(counts[r] for r in members[: ep.rank]), sum(counts[r] for r in members[: ep.rank + 1]))
    checks = {
        "output": (out.detach(), expected[:, mine]),
        "tokens": (grad_of(x), grad_of(x_whole)[:, mine]),
        "router": (ep.all_reduce(grad_of(part.gate.weight)), grad_of(layer.gate.weight)),
    }
    for name, weight in part.experts.named_parameters():
        whole = grad_of(layer.experts.get_parameter(name))
        checks[name] = grad_of(weight), whole.chunk(ep.size)[ep.rank]
    for name, (ours, wanted) in checks.items():
        assert ours.dtype == wanted.dtype
        assert ours.shape == wanted.shape
        error = relative(ours, wanted)
        assert error < tolerance, f"{name} is off by {error:.2e}"


def all_on(layer: MoELayer, experts: list[int]) -> MoELayer:
    """The layer with a router that sends every token to the same K experts."""
    bias = layer.gate.e_score_correction_bias
    assert bias is not None
    bias[experts] += 100.0
    return layer


# ------------------------------------------------------------------------------------ on the ranks


def equal_to_one_device() -> None:
    for (ep, node), exchange in itertools.product(PLACES, PROTOCOLS):
        mesh = mesh_of(ep, node, exchange)
        for spec in (V3, V2, V2.with_(num_experts_per_tok=1)):
            check_against_one_device(whole_layer(spec), mesh)


def corners() -> None:
    for (ep, node), exchange in itertools.product(PLACES, PROTOCOLS):
        mesh = mesh_of(ep, node, exchange)
        one_group = whole_layer(V3.with_(n_group=1, topk_group=1))
        for experts in ([0, 1, 2, 3], [EXPERTS - 1, 0, 1, EXPERTS - 2]):
            check_against_one_device(all_on(one_group, experts), mesh)  # most ranks receive nothing
        one_expert = V3.with_(n_group=1, topk_group=1, num_experts_per_tok=1)
        check_against_one_device(all_on(whole_layer(one_expert), [5]), mesh)
        check_against_one_device(whole_layer(V3), mesh, (1, 0, 0, 0))
        check_against_one_device(whole_layer(V3), mesh, (0, 0, 0, 33))
        bf16 = whole_layer(V2, torch.bfloat16)
        check_against_one_device(bf16, mesh, tolerance=0.02, dtype=torch.bfloat16)


def pick(mesh: Mesh, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, ids and weights of this rank."""
    generator = torch.Generator().manual_seed(10 + dist.get_rank())
    tokens = UNEVEN[dist.get_rank()]
    x = (torch.randn(tokens, HIDDEN, generator=generator) * 3).to(dtype)
    ids = torch.rand(tokens, EXPERTS, generator=generator).topk(K).indices
    return x, ids, torch.rand(tokens, K, generator=generator)


def fp8_rounds_once_and_halves() -> None:
    for (ep, node), exchange in itertools.product(PLACES, PROTOCOLS):
        for dtype in (torch.float32, torch.bfloat16):
            exact, fp8 = (
                make_dispatcher(mesh)
                for mesh in (mesh_of(ep, node, exchange, wire) for wire in ("bf16", "fp8"))
            )
            x, ids, weights = pick(mesh_of(ep, node, exchange), dtype)
            rows, plan = exact.finish(exact.start(x, ids, weights, EXPERTS))
            x.requires_grad_()
            rounded, fp8_plan = fp8.finish(fp8.start(x, ids, weights, EXPERTS))
            assert rounded.x_ND.dtype == dtype
            wanted = dequantize(quantize(rows.x_ND, ROW, "float32"), dtype)
            assert torch.equal(rounded.x_ND, wanted)
            assert torch.equal(rounded.weights_N, rows.weights_N)
            assert torch.equal(rounded.ends_E, rows.ends_E)
            # Combine is not rounded, and the gradient passes the rounding straight through.
            y = rows.x_ND * rows.weights_N.unsqueeze(1).to(dtype)
            assert torch.equal(exact.combine(y, plan), fp8.combine(y, fp8_plan))
            rounded.x_ND.backward((rounded.weights_N > 0).unsqueeze(1).expand_as(wanted).to(dtype))
            assert torch.equal(grad_of(x), torch.full_like(x, K))
            assert isinstance(exact, Flat | TwoHop)
            assert isinstance(fp8, Flat | TwoHop)
            sent, saved = exact.crossed["dispatch"], fp8.crossed["dispatch"]
            assert not sent or saved < (0.31 if dtype == torch.float32 else 0.6) * sent
            assert exact.crossed["combine"] == fp8.crossed["combine"]


def bytes_are_those_of_the_picks() -> None:
    for (ep, node), wire in itertools.product(PLACES, ("bf16", "fp8")):
        crossed: dict[str, Counter[str]] = {}
        for exchange in PROTOCOLS:
            mesh = mesh_of(ep, node, exchange, wire)
            part = shared_out(whole_layer(V2, torch.bfloat16), mesh)
            x = torch.randn(1, UNEVEN[dist.get_rank()], HIDDEN, dtype=torch.bfloat16, requires_grad=True)
            part(x).sum().backward()
            dispatcher = part.dispatcher
            assert isinstance(dispatcher, Flat | TwoHop)
            crossed[exchange] = dispatcher.crossed

            ids, _ = part.gate(x)
            rank_TK = ids // (EXPERTS // ep)
            node_TK, own = rank_TK // node, mesh["ep"].rank // node
            nodes = [set(row) for row in node_TK.tolist()]
            hops = {"flat": ids.numel(), "two_hop": sum(map(len, nodes))}[exchange]
            leaving = {
                "flat": int((node_TK != own).sum()),
                "two_hop": sum(len(reached - {own}) for reached in nodes),
            }[exchange]
            picks = {"flat": 1, "two_hop": K}[exchange]
            parcel = (HIDDEN + HIDDEN // 128 * 4 if wire == "fp8" else 2 * HIDDEN) + 8 * picks
            assert crossed[exchange]["dispatch"] == leaving * parcel
            assert crossed[exchange]["combine_backward"] == leaving * 2 * HIDDEN
            # What comes back is sent by the others: their sums are equal.
            back = torch.tensor([crossed[exchange][d] for d in ("combine", "dispatch_backward")])
            sums = mesh["ep"].all_reduce(torch.cat([back, torch.tensor([leaving])]))
            assert sums[0] == sums[2] * 2 * HIDDEN
            assert sums[1] == sums[2] * (2 * HIDDEN + 4 * picks)

            axis = {"flat": "ep", "two_hop": "ep_rail"}[exchange]
            if mesh[axis].size > 1:
                splits = 8 * mesh[axis].size * (1 if exchange == "flat" else 1 + 2 * node)
                grads = 2 * HIDDEN + 4 * picks
                sent = mesh.traffic.bytes[axis, "all_to_all"]
                total = mesh[axis].all_reduce(torch.tensor([sent, hops]))
                assert total[0] == mesh[axis].size * splits + total[1] * (parcel + 4 * HIDDEN + grads)
        if crossed["flat"]["dispatch"] and wire == "bf16" and node > 1:
            assert crossed["two_hop"]["dispatch"] < 0.8 * crossed["flat"]["dispatch"]


class Events(TorchDispatchMode):
    """Collectives as they start and end, and matrix products with the shared expert's width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "all_to_all_single":
            self.seen.append("start" if args[0].dtype != torch.int64 else "counts")
        elif name == "wait_tensor" and args[0].dtype != torch.int64:
            self.seen.append("wait")
        elif name in ("mm", "addmm") and any(self.width in t.shape for t in args if isinstance(t, Tensor)):
            self.seen.append("shared")
        elif name == "_grouped_mm":
            self.seen.append("experts")
        return out


def shared_expert_runs_while_rows_travel() -> None:
    spec = V3.with_(n_shared_experts=3)  # a width that nothing else has
    for exchange in PROTOCOLS:
        hops = PROTOCOLS.index(exchange) + 1
        mesh = mesh_of(4, 2, exchange)
        part = shared_out(whole_layer(spec), mesh)
        x = torch.randn(1, 12, HIDDEN, requires_grad=True)
        with Events(3 * 16) as forward:
            out = part(x)
        with Events(3 * 16) as backward:
            out.sum().backward()
        hop = ["start", "wait"]
        assert [e for e, _ in itertools.groupby(forward.seen) if e != "counts"] == [
            "start", "shared", "wait", *hop * (hops - 1), "experts", *hop * hops,
        ]  # fmt: skip
        # Combine's gradients, the experts, and then the shared expert while the last hop is under way.
        assert [e for e, _ in itertools.groupby(backward.seen)] == [
            *hop * hops, "experts", *hop * (hops - 1), "start", "shared", "wait",
        ]  # fmt: skip


def recomputation_keeps_or_repeats_the_exchange() -> None:
    kept = {*SAVED_BY_RECOMPUTE, torch.ops.aten.topk.default}

    def policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    def selective(layer: MoELayer, x: Tensor) -> Any:
        contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
        return checkpoint(layer, x, use_reentrant=False, context_fn=contexts)

    def full(layer: MoELayer, x: Tensor) -> Any:
        return checkpoint(layer, x, use_reentrant=False)

    for exchange, (forward, repeats) in itertools.product(PROTOCOLS, ((selective, False), (full, True))):
        mesh = mesh_of(4, 2, exchange)
        check_against_one_device(whole_layer(V3), mesh, forward=forward)
        part = shared_out(whole_layer(V3), mesh)
        counts = []
        for run in (forward, lambda layer, x: layer(x)):
            with Events(-1) as events:
                run(part, torch.randn(1, 12, HIDDEN, requires_grad=True)).sum().backward()
            counts.append(events.seen.count("start"))
        assert (counts[0] > counts[1]) == repeats, (exchange, counts)


# ------------------------------------------------------------------------------------------- tests


def checks(*names: str) -> None:
    for name in names:
        globals()[name]()
    _groups.clear()


def test_equals_one_device() -> None:
    run_on_ranks(checks, RANKS, "equal_to_one_device")


def test_corners() -> None:
    run_on_ranks(checks, RANKS, "corners")


def test_wire_bytes_overlap_and_recomputation() -> None:
    run_on_ranks(
        checks,
        RANKS,
        "fp8_rounds_once_and_halves",
        "bytes_are_those_of_the_picks",
        "shared_expert_runs_while_rows_travel",
        "recomputation_keeps_or_repeats_the_exchange",
    )


def test_tiles_are_blocks_of_one_row() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(7, 384, generator=generator) * torch.logspace(-30, 30, 7).unsqueeze(1)
    x[2, 128:256] = 0
    x[3] = 448.0 * (1 + 2**-20)
    for tiles, blocks in zip(quantize(x, ROW, "float32"), quantize_blocks(x, (1, 128)), strict=True):
        assert torch.equal(tiles.float(), blocks.float())
    assert dequantize(quantize(x[:0], ROW, "float32"), torch.bfloat16).shape == (0, 384)
    x[4, 5], x[5, 6] = float("nan"), float("inf")
    back = dequantize(quantize(x, ROW, "float32"), torch.bfloat16)
    assert back[4, :128].isnan().all()
    assert back[5, :128].isnan().any()
    assert back[4:6, 128:].isfinite().all()


def test_one_device_needs_no_exchange() -> None:
    mesh = Mesh(torch.device("cpu"), Layout(), {})
    assert isinstance(make_dispatcher(mesh), LocalDispatcher)
    assert not deepep.is_installed()


@pytest.mark.gpu
@pytest.mark.parametrize("wire", ["bf16", "fp8"])
def test_deepep_equals_flat(wire: Wire) -> None:
    """On two GPUs with DeepEP installed: never run yet."""
    if torch.cuda.device_count() < 2 or not deepep.is_installed():
        pytest.skip("needs two GPUs and deep_ep")
    run_ranks(deepep_against_flat, 2, wire)


def deepep_against_flat(wire: Wire) -> None:
    layout = Layout(dp_shard=2, ep=2, wire=wire, global_batch=2)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    with open_mesh(layout, device) as mesh:
        assert isinstance(make_dispatcher(mesh), deepep.DeepEP)
        generator = torch.Generator().manual_seed(mesh.world.rank)
        x, pull = (torch.randn(1, 256, 1024, generator=generator).to(device, torch.bfloat16) for _ in "ab")
        part = shared_out(whole_layer(V3.with_(hidden_size=1024), torch.bfloat16).to(device), mesh)
        results = []
        for dispatcher in (Flat(mesh["ep"], 2, wire), deepep.DeepEP(mesh["ep"], wire)):
            part.dispatcher = dispatcher
            part.zero_grad()
            leaf = x.clone().requires_grad_()
            out = part(leaf)
            out.backward(pull)
            grads = [grad_of(p) for p in (part.gate.weight, *part.experts.parameters())]
            results.append([out.detach(), grad_of(leaf), *(g.clone() for g in grads)])
        for flat, other in zip(*results, strict=True):
            assert relative(other, flat) < 0.02
