"""What context parallelism sends, in DeepSeek-V3's own head widths, and what recomputation does not.

Both are counted on two real ranks. Of MLA only the latent travels, 576 numbers a token; keys and values
of 128 heads would be 40,960.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from harness import run_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from whalepod.models.attention import Attend, MLAttention
from whalepod.models.rope import tables
from whalepod.models.transformer import Transformer
from whalepod.parallel.comm import Axis
from whalepod.parallel.context import context_attend, positions
from whalepod.parallel.mesh import Mesh, make_mesh, open_world
from whalepod.parallel.parallelize import parallelize, seeded
from whalepod.spec.layout import Layout, Recompute
from whalepod.spec.model import MLA
from whalepod.spec.presets import load_model_spec

RANKS, LENGTH, FP32 = 2, 32, 4
# V3's attention itself; what stands before and after its heads is made small.
V3 = load_model_spec("deepseek-v3").with_(hidden_size=32, q_lora_rank=16)
SMALL = load_model_spec("v3-mini").with_(
    num_hidden_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    intermediate_size=128,
    vocab_size=256,
    moe_intermediate_size=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
)


def widths() -> MLA:
    assert isinstance(V3.attention, MLA)
    return V3.attention


def expanded_attend(cp: Axis) -> Attend:
    """Context parallelism as it would be without the latent: every rank expands its own tokens, and keys
    and values of all heads are exchanged. For the count; sequences are cut plainly in two halves."""

    def attend(attention: Any, q: Tensor, kv: Tensor) -> Tensor:
        a = widths()
        c, k_rope = kv.split((a.kv_lora_rank, a.qk_rope_head_dim), dim=-1)
        keys_values = attention.kv_b_proj(c).unflatten(-1, (-1, a.qk_nope_head_dim + a.v_head_dim))
        k_nope, v = keys_values.split((a.qk_nope_head_dim, a.v_head_dim), dim=-1)
        k = torch.cat((k_nope, k_rope.unsqueeze(-2).expand(*k_nope.shape[:-1], -1)), dim=-1)
        k, v = cp.gather(k, 1), cp.gather(v, 1)
        seen = (cp.rank + 1) * q.shape[1]
        scores = torch.einsum("bshx,blhx->bhsl", q, k[:, :seen]) * attention.scale
        mask = torch.ones(q.shape[1], seen, dtype=torch.bool).tril(seen - q.shape[1])
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return torch.einsum("bhsl,blhv->bshv", weights, v[:, :seen]).flatten(-2)

    return attend


def attention_layer() -> MLAttention:
    layer = MLAttention(V3, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 1.0
            parameter.normal_(generator=generator).mul_(scale)
    return layer


def run(
    layer: MLAttention, x: Tensor, where: Tensor, pull: Tensor, *attend: Attend
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, gradient of the input, gradients of the parameters."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = layer(x, tables(V3.rope, widths().qk_rope_head_dim, where), *attend)
    out.backward(pull)
    assert x.grad is not None
    grads = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}  # type: ignore
    return out.detach(), x.grad, grads


def context_bytes(mesh: Mesh) -> dict[str, int]:
    cp, layer = mesh["cp"], attention_layer()
    generator = torch.Generator().manual_seed(2)
    x, pull = (torch.randn(1, LENGTH, V3.hidden_size, generator=generator) for _ in range(2))
    everywhere = torch.arange(LENGTH)
    out, x_grad, grads = run(layer, x, everywhere, pull)
    sent = {}
    halves = everywhere.chunk(cp.size)[cp.rank]
    for name, where, attend in (
        ("latent", positions(LENGTH, cp, mesh.device), context_attend(cp)),
        ("expanded", halves, expanded_attend(cp)),
    ):
        before = Counter(mesh.traffic.bytes)
        ours = run(layer, x[:, where], where, pull[:, where], attend)
        for op in ("all_gather", "reduce_scatter"):
            sent[f"{name}/{op}"] = mesh.traffic.bytes["cp", op] - before["cp", op]
        # The result of one device; parameters' gradients are sums over the ranks.
        torch.testing.assert_close(ours[0], out[:, where], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours[1], x_grad[:, where], rtol=1e-3, atol=1e-3)
        for key, grad in ours[2].items():
            whole = cp.all_reduce(grad)
            assert (whole - grads[key]).norm() < 1e-4 * grads[key].norm(), (name, key)
    return sent


class Calls(TorchDispatchMode):
    """Counts the collectives that are really executed, whatever Traffic says."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("_c10d_functional", "c10d"):
            self.made[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def collectives(mesh: Mesh) -> tuple[Counter[str], Counter[tuple[str, str]], float]:
    """Of a step's forward and backward pass: calls executed, calls counted, and the loss."""
    with torch.device("meta"):
        model = Transformer(SMALL)
    p = parallelize(model, mesh, LENGTH, seeded(model.spec, 3))
    p.train()
    rows = torch.randint(0, 256, (2, LENGTH + 2), generator=torch.Generator().manual_seed(1))
    before = Counter(mesh.traffic.calls)
    p.state.start_step()
    with Calls() as calls:
        losses = p.parts[0](*p.batch(rows), p.attend)  # type: ignore[operator]
        (losses.main + losses.mtp[0]).backward()
    return calls.made, mesh.traffic.calls - before, float(losses.main.detach())


def on_rank() -> dict[str, Any]:
    device, groups = torch.device("cpu"), {}
    found: dict[str, Any] = {}
    with open_world(device):
        found["bytes"] = context_bytes(make_mesh(Layout(cp=RANKS, precision="fp32"), device, groups))
        for axes in ({"tp": RANKS}, {"tp": RANKS, "ep": RANKS}):
            for policy in ("none", "selective", "full"):
                layout = Layout(**axes, recompute=policy, precision="fp32")  # type: ignore[arg-type]
                found[f"{axes}/{policy}"] = collectives(make_mesh(layout, device, groups))
    return found


@pytest.mark.slow
def test_what_travels() -> None:
    per_token = V3.num_attention_heads * (192 + 128)
    for found in run_ranks(on_rank, RANKS):
        sent = found.pop("bytes")
        # Forward, an all-gather's result; backward, a reduce-scatter's input: each the whole sequence's.
        assert sent["latent/all_gather"] == sent["latent/reduce_scatter"] == LENGTH * 576 * FP32
        assert sent["expanded/all_gather"] == sent["expanded/reduce_scatter"] == LENGTH * per_token * FP32
        assert sent["expanded/all_gather"] >= 50 * sent["latent/all_gather"]
        check_policies(found)


def check_policies(found: dict[str, Any]) -> None:
    """`selective` sends nothing twice, `full` does, and what Traffic counts is what was executed."""
    layouts = {key.split("/")[0] for key in found}
    assert len(layouts) == 2
    for axes in layouts:
        policies: tuple[Recompute, ...] = ("none", "selective", "full")
        executed, counted, losses = zip(*(found[f"{axes}/{policy}"] for policy in policies), strict=True)
        assert losses[0] == losses[1] == losses[2]
        assert executed[0] == executed[1], axes
        assert counted[0] == counted[1], axes
        assert executed[2]["all_gather_into_tensor"] > executed[0]["all_gather_into_tensor"], axes
        for calls, counts in zip(executed, counted, strict=True):
            for op, name in (
                ("all_gather", "all_gather_into_tensor"),
                ("reduce_scatter", "reduce_scatter_tensor"),
                ("all_to_all", "all_to_all_single"),
            ):
                assert sum(n for (_, which), n in counts.items() if which == op) == calls[name], (axes, op)
