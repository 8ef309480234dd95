"""Decoding on CPUs in C++ (`native/`): products that read weights as fast as memory gives them, and a whole
step of an MLA model in one call.

A step of a few tokens is hundreds of small operations, and as operations of torch they take longer than to
read the weights. So `use` puts two things in place, both with the plain modules as their twins
(`tests/serve/test_native.py`):

* products of linear layers and experts, under any layout;
* `Decoder`: steps in which every sequence writes go through all layers of this device at once, activations in
  FP32 from end to end. Steps that read prompts in, and layouts that split layers, keep to the modules.

A token's numbers do not depend on what else is in its batch. Where nothing can be compiled, plain torch does
all of it.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from ctypes import POINTER, Structure, byref, c_float, c_int64, c_void_p
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from whalepod.models.attention import Attend, Attention, MLAttention, Tables
from whalepod.models.mlp import SwiGLU
from whalepod.models.moe import GroupedExperts, LocalDispatcher, MoELayer, Rows
from whalepod.models.transformer import Transformer
from whalepod.parallel.native import Library, Unavailable
from whalepod.precision.storage import FP8Linear, FP8Storage, storage_names
from whalepod.serve.paged import Step, multiplies_bf16

log = logging.getLogger(__name__)
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.float8_e4m3fn: 3}
MANY = 64  # rows from which a CPU that multiplies BF16 by itself is faster with torch's own products
LARGE_PAGE, MADV_COLLAPSE = 1 << 21, 25  # asm-generic/mman-common.h, from Linux 6.1 on
FLAGS = ("-fopenmp", "-ffp-contract=fast")  # torch has loaded the OpenMP that this then finds


class _Weight(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("scale", c_void_p),
        ("kind", c_int64),
        ("rows", c_int64),
        ("cols", c_int64),
        ("block", c_int64),
    ]


class _Mlp(Structure):
    _fields_ = [(name, _Weight) for name in ("gate", "up", "down")]


class _Layer(Structure):
    _fields_ = [
        *((name, _Weight) for name in ("q_a", "q", "kv_a", "uk", "uv", "o", "router")),
        *((name, c_void_p) for name in ("input_norm", "q_norm", "kv_norm", "post_norm", "bias")),
        ("mlps", POINTER(_Mlp)),
        ("num_mlps", c_int64),
        ("shared", _Mlp),
        ("cache", c_void_p),
    ]


_SIZES = ("hidden", "heads", "nope", "rope", "value", "latent", "interleaved")
_PICKING = ("picks", "groups", "top_groups", "by_two", "softmax", "normalised")


class _Shape(Structure):
    _fields_ = [
        *((name, c_int64) for name in (*_SIZES, *_PICKING)),
        *((name, c_float) for name in ("eps", "softmax_scale", "routed_scale")),
    ]


class _Step(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("tokens", "pages", "page_size", "kind")),
        *((name, c_void_p) for name in ("cos", "sin", "slots", "positions", "owners", "table")),
    ]


@cache
def library() -> Any:
    """The compiled part (about ten seconds the first time), or None where it cannot be had: why is logged."""
    try:
        found = ctypes.CDLL(str(Library("whalepod_decode", Path(__file__).parent / "native", FLAGS).file()))
    except (Unavailable, OSError) as problem:
        log.warning("decoding on this CPU is slower than it could be: %s", problem)
        return None
    for name in ("linear", "experts", "decode"):
        getattr(found, f"whalepod_{name}").restype = None
    return found


def _call(name: str, *args: Any) -> None:
    as_c = {Tensor: lambda t: c_void_p(t.data_ptr()), int: c_int64}
    getattr(library(), f"whalepod_{name}")(*(as_c.get(type(a), lambda a: a)(a) for a in args))


def use(model: nn.Module) -> None:
    """Puts native products into a model on a CPU that is to be read only, in place, and native steps where
    nothing of it is split; nothing where they cannot be had."""
    if library() is None:
        return
    for module in list(model.modules()):
        base: Any = type(module)
        if base in (nn.Linear, FP8Linear):
            module.__class__ = _native(NativeLinear, base)  # hooks and attributes stay
            module.held = _weight(*_stored(module, "weight"))  # type: ignore[assignment]
        elif isinstance(module, Attention) and not multiplies_bf16():
            module.compute_dtype = torch.float32  # a hundred times as fast there
        elif isinstance(module, GroupedExperts) and not isinstance(module, NativeExperts):
            module.__class__ = _native(NativeExperts, base)
            module.held = _experts(module)
    if isinstance(model, Transformer) and _is_whole(model):
        model._blocks = partial(_blocks, model, Decoder(model))  # type: ignore[method-assign]
    for weight in model.parameters():
        _take_large_pages(weight.data)


def _take_large_pages(weight: Tensor) -> None:
    """Puts what lies in pages of 4 KiB into pages of 2 MiB, where Linux has some: a step that reads all
    weights looks up fewer addresses then. What the kernel does not do is no loss."""
    first = -(-weight.data_ptr() // LARGE_PAGE) * LARGE_PAGE
    length = (weight.data_ptr() + weight.nbytes - first) // LARGE_PAGE * LARGE_PAGE
    if length > 0 and sys.platform == "linux":
        ctypes.CDLL(None).madvise(c_void_p(first), ctypes.c_size_t(length), MADV_COLLAPSE)


class NativeLinear(nn.Module):
    """Before `nn.Linear`, or one of a byte: x [..., in] -> [..., out]."""

    held: _Weight
    bias: Any

    def forward(self, x: Tensor) -> Tensor:
        count = x.numel() // self.held.cols
        if not count or _is_torchs(self, x, count):
            return super().forward(x)
        x, out = x.contiguous(), x.new_empty(*x.shape[:-1], self.held.rows)
        library().whalepod_linear(
            byref(self.held),
            c_void_p(x.data_ptr()),
            c_int64(KINDS[x.dtype]),
            c_int64(count),
            c_void_p(out.data_ptr()),
        )
        return out if self.bias is None else out + self.bias


class NativeExperts(nn.Module):
    """Before `GroupedExperts`: rows of all experts that are here, each times its own weights."""

    held: Any

    def forward(self, rows: Rows) -> Tensor:
        count = len(rows.x_ND)
        if not count:
            return torch.empty_like(rows.x_ND)
        if _is_torchs(self, rows.x_ND, count // len(self.held)):
            return super().forward(rows)
        x, weights = rows.x_ND.contiguous(), rows.weights_N.float().contiguous()
        ends, out = rows.ends_E.to(torch.int32).contiguous(), torch.empty_like(x)
        _call("experts", self.held, len(self.held), x, KINDS[x.dtype], count, ends, weights, out)
        return out


@cache
def _native(mixin: type[nn.Module], base: type[nn.Module]) -> Any:
    return type(f"Native{base.__name__}", (mixin, base), {})


def _is_torchs(module: nn.Module, x: Tensor, count: int) -> bool:
    large = count >= MANY and x.dtype == torch.bfloat16 and not isinstance(module, FP8Storage)
    return large and multiplies_bf16()


def _stored(module: Any, name: str) -> tuple[Any, Any]:
    """A weight as it is in memory, and the scales of one of a byte."""
    if isinstance(module, FP8Storage):
        return tuple(module.get_parameter(each).data for each in storage_names(name))  # type: ignore[return-value]
    return module.get_parameter(name).data, None


def _weight(values: Tensor, scale: Tensor | None = None) -> _Weight:
    assert values.is_contiguous()
    rows, cols = values[..., 0].numel(), values.shape[-1]
    if scale is None:
        return _Weight(values.data_ptr(), None, KINDS[values.dtype], rows, cols, 1)
    # Blocks are of one row, or of 128, of which the last may be cut short.
    block = 1 if scale.shape[-2] == values.shape[-2] else 128
    return _Weight(values.data_ptr(), scale.data_ptr(), KINDS[values.dtype], rows, cols, block)


def _experts(module: GroupedExperts) -> Any:
    (up, up_scale), (down, down_scale) = _stored(module, "gate_up"), _stored(module, "down")

    def part(values: Tensor, scale: Tensor | None, *index: int) -> _Weight:
        return _weight(values[index], None if scale is None else scale[index])

    each = range(len(down))
    mlps = (_Mlp(*(part(up, up_scale, e, i) for i in (0, 1)), part(down, down_scale, e)) for e in each)
    return (_Mlp * len(down))(*mlps)


def _dense(module: SwiGLU) -> _Mlp:
    return _Mlp(*(_held(m) for m in (module.gate_proj, module.up_proj, module.down_proj)))


def _held(module: Any) -> _Weight:
    return module.held


def _layers(part: Transformer) -> list[Any]:
    """Those of a model, or of a pipeline stage."""
    return [*(part.layers.values() if isinstance(part.layers, nn.ModuleDict) else part.layers)]


def _is_whole(part: Transformer) -> bool:
    def has_moves(module: nn.Module) -> bool:
        return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)

    return bool(_layers(part)) and all(  # a pipeline's last stage may be the head alone
        isinstance(layer.self_attn, MLAttention)
        and not (isinstance(layer.mlp, MoELayer) and type(layer.mlp.dispatcher) is not LocalDispatcher)
        and not any(has_moves(m) for m in layer.modules())
        and all(isinstance(m, NativeLinear) for m in layer.modules() if isinstance(m, nn.Linear))
        for layer in _layers(part)
    )


def _blocks(part: Transformer, decoder: Decoder, x: Tensor, tables: Tables, attend: Attend) -> Tensor:
    """`Transformer._blocks`, by the decoder where it can."""
    if not (isinstance(attend, Step) and attend.only_few and x.shape[1] == len(attend.slots)):
        return type(part)._blocks(part, x, tables, attend)
    x = x.clone() if x.is_floating_point() else part.embed_tokens(x)
    decoder(x, tables, attend)
    return x if part.norm is None else part.norm(x)


class Decoder:
    """All layers of a part of a model, as the native code wants to see them."""

    def __init__(self, part: Transformer) -> None:
        spec, layers = part.spec, _layers(part)
        first: MLAttention = layers[0].self_attn
        a, moe = first.config, spec.moe
        grouped = moe is not None and moe.topk_method != "greedy" and moe.n_group > 1
        self._kept: list[Any] = []
        self._shape = _Shape(
            spec.hidden_size, spec.num_attention_heads, a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim,
            a.kv_lora_rank, first.interleaved,
            *((0, 1, 1, 0, 0, 0) if moe is None else (
                moe.num_experts_per_tok, moe.n_group if grouped else 1, moe.topk_group if grouped else 1,
                moe.selection_bias, moe.scoring_func == "softmax", moe.norm_topk_prob,
            )),
            spec.rms_norm_eps, first.scale, moe.routed_scaling_factor if moe else 1.0,
        )  # fmt: skip
        self._numbers = [layer.self_attn.layer for layer in layers]
        self._layers = (_Layer * len(layers))(*(self._layer(layer) for layer in layers))

    def _layer(self, block: Any) -> _Layer:
        attention, mlp = block.self_attn, block.mlp
        out = _Layer()
        if attention.config.q_lora_rank is None:
            out.q = _held(attention.q_proj)
        else:
            out.q_a, out.q = _held(attention.q_a_proj), _held(attention.q_b_proj)
            out.q_norm = self._floats(attention.q_a_layernorm.weight)
        out.kv_a = _held(attention.kv_a_proj_with_mqa)
        out.uk, out.uv = _weight(self._turned(attention)), _held(attention.kv_b_proj)
        out.o = _held(attention.o_proj)
        out.input_norm = self._floats(block.input_layernorm.weight)
        out.kv_norm = self._floats(attention.kv_a_layernorm.weight)
        out.post_norm = self._floats(block.post_attention_layernorm.weight)
        if isinstance(mlp, MoELayer):
            out.router = _weight(mlp.gate.weight.data)
            bias = mlp.gate.e_score_correction_bias
            out.bias = None if bias is None else self._floats(bias)
            experts: Any = mlp.experts
            out.mlps, out.num_mlps = experts.held, len(experts.held)
            if mlp.shared_experts is not None:
                out.shared = _dense(mlp.shared_experts)
        else:
            out.mlps, out.num_mlps = (_Mlp * 1)(_dense(mlp)), 1
        return out

    def _turned(self, attention: MLAttention) -> Tensor:
        """W_UK as [H, C, N], which the modules then use as well."""
        w_uk, w_uv = attention.up_projection()
        turned = w_uk.transpose(1, 2).contiguous()
        attention._split = (turned.transpose(1, 2), w_uv)
        self._kept.append(turned)
        return turned

    def _floats(self, tensor: Tensor) -> int:
        self._kept.append(tensor.detach().float().contiguous())
        return self._kept[-1].data_ptr()

    def __call__(self, x_1TD: Tensor, tables: Tables, step: Step) -> None:
        """Hidden states through all layers, in place."""
        for layer, number in zip(self._layers, self._numbers, strict=True):
            layer.cache = step.cache.rows[number].data_ptr()
        few = step.few
        assert few is not None
        tensors = [*(t.float().contiguous() for t in tables), step.slots, few.last, few.owners, few.table_RP]
        given = _Step(
            x_1TD.shape[1], few.table_RP.shape[1], step.cache.page_size, KINDS[x_1TD.dtype],
            *(t.data_ptr() for t in tensors),
        )  # fmt: skip
        _call("decode", self._layers, len(self._layers), byref(self._shape), byref(given), x_1TD)
