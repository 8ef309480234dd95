"""The sharding table and its boxes, with a mesh that is only numbers: no process anywhere."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from whalepod.models import transformer
from whalepod.models.transformer import Transformer, init_weights, initial_value
from whalepod.parallel.comm import Axis
from whalepod.parallel.context import context_attend, positions
from whalepod.parallel.mesh import Mesh
from whalepod.parallel.parallelize import Parallel, parallelize, seeded
from whalepod.parallel.sharding import TABLE, Held, cut, shard_parameters
from whalepod.parallel.stage import make_stages
from whalepod.spec.layout import GROUPS, Layout
from whalepod.spec.model import GQA, MLA, ModelSpec
from whalepod.spec.presets import load_model_spec
from whalepod.spec.stages import split_stages

_SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 40,
}
_EXPERTS = {"moe_intermediate_size": 12, "n_routed_experts": 8, "num_experts_per_tok": 2}
_LATENT = {"kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3}
V3 = load_model_spec("v3-mini").with_(**_SMALL, **_EXPERTS, **_LATENT, q_lora_rank=5)
V2 = load_model_spec("deepseek-v2-lite").with_(**_SMALL, **_EXPERTS, **_LATENT)
QWEN = load_model_spec("deepseek-r1-distill-qwen-1.5b").with_(**_SMALL, num_key_value_heads=4, head_dim=4)
TIED = replace(QWEN, tie_word_embeddings=True)
LLAMA = load_model_spec("deepseek-r1-distill-llama-8b").with_(**_SMALL, num_key_value_heads=4, head_dim=4)
MODELS = {"V3": V3, "V2": V2, "Qwen": QWEN, "Qwen, tied": TIED, "Llama": LLAMA}

# What is intended, one line for every parameter there is: the dimension that tp cuts, or None.
ATTENTION_MLA: dict[str, int | None] = {
    "kv_a_proj_with_mqa.weight": None,
    "kv_a_layernorm.weight": None,
    "kv_b_proj.weight": 0,
    "o_proj.weight": 1,
}
ATTENTION = {
    "V3": ATTENTION_MLA | {"q_a_proj.weight": None, "q_a_layernorm.weight": None, "q_b_proj.weight": 0},
    "V2": ATTENTION_MLA | {"q_proj.weight": 0},
    "Llama": {"q_proj.weight": 0, "k_proj.weight": 0, "v_proj.weight": 0, "o_proj.weight": 1},
}
ATTENTION["Qwen"] = ATTENTION["Llama"] | {"q_proj.bias": 0, "k_proj.bias": 0, "v_proj.bias": 0}
DENSE = {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1}


def intended(name: str, spec: ModelSpec, ep: bool) -> dict[str, tuple[str, int] | None]:
    """Every parameter of a small model by its full name, and where it is cut."""
    experts: dict[str, tuple[str, int] | None] = {"gate.weight": None}
    experts |= {f"experts.{w}": ("ep", 0) if ep else ("tp", 2) for w in ("gate_up", "down")}
    experts |= {f"shared_experts.{k}": ("tp", dim) for k, dim in DENSE.items()}

    def tp(dims: dict[str, Any]) -> dict[str, tuple[str, int] | None]:
        return {key: None if dim is None else ("tp", dim) for key, dim in dims.items()}

    def block(path: str, layer: int) -> dict[str, tuple[str, int] | None]:
        found = {f"{path}self_attn.{k}": where for k, where in tp(ATTENTION[name]).items()}
        found |= {f"{path}{norm}.weight": None for norm in ("input_layernorm", "post_attention_layernorm")}
        mlp = experts if spec.is_moe_layer(layer) else tp(DENSE)
        return found | {f"{path}mlp.{k}": where for k, where in mlp.items()}

    every = {"embed_tokens.weight": ("tp", 0), "norm.weight": None, "lm_head.weight": ("tp", 0)}
    if spec.tie_word_embeddings:
        del every["lm_head.weight"]
    for layer in range(spec.num_hidden_layers):
        every |= block(f"layers.{layer}.", layer)
    for depth in range(spec.num_nextn_predict_layers):
        path = f"mtp.{depth}."
        every |= {
            f"{path}{k}": None for k in ("enorm.weight", "hnorm.weight", "norm.weight", "eh_proj.weight")
        }
        every |= block(f"{path}block.", spec.num_hidden_layers + depth)
    return every


def meta(spec: ModelSpec) -> Transformer:
    with torch.device("meta"):
        return Transformer(spec)


def mesh_of(layout: Layout, rank: int) -> Mesh:
    """A rank's place in a layout without any process group."""
    axes = {}
    for name in GROUPS:
        ranks = layout.group(name, rank)
        axes[name] = Axis(name, len(ranks), ranks.index(rank))
    return Mesh(torch.device("cpu"), layout, axes)


def held_by_all(spec: ModelSpec, layout: Layout) -> list[dict[str, Held]]:
    return [shard_parameters(meta(spec), mesh_of(layout, rank)) for rank in range(layout.num_devices)]


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_cut_as_intended(name: str, ep: int) -> None:
    spec = MODELS[name]
    layout = Layout(tp=2, ep=ep)
    wanted = intended(name.partition(",")[0], spec, ep > 1)
    held = shard_parameters(meta(spec), mesh_of(layout, 0))
    assert set(held) == set(wanted)
    assert {key: cut(key, layout) for key in held} == wanted
    for key, part in held.items():
        where = wanted[key]
        expected = list(part.box.whole)
        if where is not None:
            expected[where[1]] //= 2
        assert list(part.box.shape) == expected, key
        assert part.reduce == ("stage" if where is None else "expert_data" if where[0] == "ep" else "data"), (
            key
        )
    assert all(cut(key, Layout()) is None for key in held)


def test_no_line_of_the_table_is_idle() -> None:
    names = [key for spec in MODELS.values() for key in shard_parameters(meta(spec), mesh_of(Layout(), 0))]
    first = {next((end for end, *_ in TABLE if key.endswith(end)), None) for key in names}
    assert first - {None} == {end for end, *_ in TABLE}


@pytest.mark.parametrize("spec", [V3, V2, QWEN], ids=["V3", "V2", "Qwen"])
def test_heads_stay_whole(spec: ModelSpec) -> None:
    """What a rank has of the attention's matrices are rows (columns of the last) of its own heads only."""
    model = Transformer(spec)
    tp, attention = 2, model.layers[0].self_attn
    a, heads = spec.attention, spec.num_attention_heads
    owners: dict[str, Tensor] = {}
    if isinstance(a, MLA):
        queries = "q_proj" if a.q_lora_rank is None else "q_b_proj"
        widths = {
            queries: a.qk_head_dim,
            "kv_b_proj": a.qk_nope_head_dim + a.v_head_dim,
            "o_proj": a.v_head_dim,
        }
    else:
        assert isinstance(a, GQA)
        widths = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), a.head_dim)
    with torch.no_grad():
        for key, width in widths.items():
            # Every number says which head it belongs to: rows by head, as the model unflattens them.
            weight = attention.get_submodule(key).weight
            head = torch.arange(heads).repeat_interleave(width).float()
            weight.copy_(head.expand_as(weight) if key == "o_proj" else head[:, None].expand_as(weight))
    for rank in range(tp):
        part = Transformer(spec)
        part.load_state_dict(model.state_dict())
        shard_parameters(part, mesh_of(Layout(tp=tp), rank))
        for key, width in widths.items():
            weight = part.layers[0].self_attn.get_submodule(key).weight
            owners[f"{key}/{rank}"] = weight.unique()
            assert weight.shape[1 if key == "o_proj" else 0] == heads // tp * width
    for key in widths:
        assert owners[f"{key}/0"].tolist() == [0, 1]
        assert owners[f"{key}/1"].tolist() == [2, 3]


LAYOUTS = [
    {"tp": 2},
    {"tp": 4},
    {"dp_shard": 2, "ep": 2},
    {"dp_shard": 2, "cp": 2, "tp": 2, "ep": 4},
    {"dp_replicate": 2, "dp_shard": 4, "ep": 2},
    {"dp_replicate": 2, "tp": 2, "ep": 2},
    {"cp": 2, "tp": 2},
]


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_boxes_tile_every_parameter(name: str, axes: dict[str, int]) -> None:
    """Each number of each whole is held equally often: by as many ranks as do not cut it."""
    spec = MODELS[name]
    if spec.moe is None:
        axes = {**axes, "ep": 1}
    layout = Layout(**axes, global_batch=axes.get("dp_replicate", 1) * axes.get("dp_shard", 1))
    ranks = held_by_all(spec, layout)
    wanted = intended(name.partition(",")[0], spec, layout.ep > 1)
    shapes = {key: tuple(parameter.shape) for key, parameter in meta(spec).named_parameters()}
    for key, shape in shapes.items():
        times = np.zeros(shape, int)
        for held in ranks:
            box = held[key].box
            assert box.whole == shape
            times[box.slices] += 1
        where = wanted[key]
        pieces = 1 if where is None else getattr(layout, where[0])
        assert set(times.flat) == {layout.num_devices // pieces}, key


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_ranks_that_sum_gradients_hold_the_same(axes: dict[str, int]) -> None:
    """The axis of a parameter's gradient sum joins exactly the ranks that hold the same box of it,
    and, of what tp splits, saw other tokens; together with the ep group they cover the stage."""
    layout = Layout(**axes, global_batch=axes.get("dp_replicate", 1) * axes.get("dp_shard", 1))
    ranks = held_by_all(V3, layout)
    for key in ranks[0]:
        for rank, held in enumerate(ranks):
            same = {other for other in range(layout.num_devices) if ranks[other][key].box == held[key].box}
            assert set(layout.group(held[key].reduce, rank)) == same, (key, rank)


def test_tied_weights_stay_one() -> None:
    for tp in (1, 2):
        model = meta(TIED)
        held = shard_parameters(model, mesh_of(Layout(tp=tp), 0))
        assert model.lm_head.weight is model.embed_tokens.weight
        assert "lm_head.weight" not in held
        parallel = spread(TIED, mesh_of(Layout(tp=tp, precision="fp32"), tp - 1), 0)
        part = parallel.parts[0]
        assert part.lm_head.weight is part.embed_tokens.weight
        assert part.lm_head.weight.shape == (40 // tp, 16)
        assert "lm_head.weight" not in parallel.state.weights()
    apart = meta(QWEN)
    shard_parameters(apart, mesh_of(Layout(tp=2), 0))
    assert apart.lm_head.weight is not apart.embed_tokens.weight


def spread(spec: ModelSpec, mesh: Mesh, seed: int) -> Parallel:
    return parallelize(meta(spec), mesh, 32, seeded(spec, seed))


@pytest.mark.parametrize("name", MODELS)
def test_initial_values_are_those_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filled part by part, all ranks together are the model that one device would start from."""
    monkeypatch.setattr(transformer, "INITIAL_CHUNK", 48)  # so that parts begin within chunks
    spec = MODELS[name]
    whole = Transformer(spec)
    init_weights(whole, 7)
    expected = dict(whole.named_parameters())
    layout = Layout(tp=2, ep=2 if spec.moe else 1, precision="fp32")
    for rank in range(2):
        parallel = spread(spec, mesh_of(layout, rank), 7)
        weights = parallel.state.weights()
        assert set(weights) == set(expected)
        for key, piece in weights.items():
            assert torch.equal(piece.tensor, expected[key][piece.box.slices]), key
        for key, parameter in parallel.parts[0].named_parameters():
            assert torch.equal(parameter, weights[key].tensor)
        assert not any(buffer.is_meta for buffer in parallel.parts[0].buffers())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv"])
def test_stages_hold_each_parameter_once_and_copies_at_the_ends(name: str, schedule: Any) -> None:
    spec = MODELS[name].with_(num_hidden_layers=4)
    layout = Layout(pp=2, tp=2, schedule=schedule, global_batch=4)
    split = split_stages(spec, layout.num_stages, 32)
    times: dict[str, np.ndarray] = {
        key: np.zeros(tuple(parameter.shape), int) for key, parameter in meta(spec).named_parameters()
    }
    for rank in range(layout.num_devices):
        mesh = mesh_of(layout, rank)
        for stage in make_stages(meta(spec), split, schedule, mesh["pp"]):
            for key, held in shard_parameters(stage, mesh).items():
                times[key][held.box.slices] += 1
    copied = bool(spec.tie_word_embeddings or spec.num_nextn_predict_layers)
    for key, counted in times.items():
        repeated = 2 if cut(key, layout) is None else 1
        twice = 2 if key == "embed_tokens.weight" and copied else 1
        assert set(counted.flat) == {repeated * twice}, key


# ---------------------------------------------------------------------------- sequences over cp


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 16))
def test_positions_are_a_balanced_permutation(cp: int, chunk: int) -> None:
    length = 2 * cp * chunk
    parts = [positions(length, Axis("cp", cp, rank), torch.device("cpu")) for rank in range(cp)]
    assert sorted(torch.cat(parts).tolist()) == list(range(length))
    assert all(len(part) == length // cp for part in parts)
    assert all((part.diff() > 0).all() for part in parts)  # causal within a rank too
    # A query at position i sees i + 1 keys. Exactly equal, not only nearly.
    assert len({int((part + 1).sum()) for part in parts}) == 1


class _Pretend:
    """An axis whose other ranks are known: `gather` returns what all of them would have sent."""

    def __init__(self, size: int, rank: int, everyones: list[Tensor]) -> None:
        self.size, self.rank, self._everyones = size, rank, everyones

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        assert torch.equal(tensor, self._everyones[self.rank])
        return torch.cat(self._everyones, dim=dim)


class _Watch(nn.Module):
    """Notes what attention is asked: positions of queries and of the keys in front of them."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[list[int], list[int]]] = []

    def expanded(self, q: Tensor, kv: Tensor, mask: None) -> Tensor:
        self.asked.append((q.flatten().tolist(), kv.flatten().tolist()))
        return q


@pytest.mark.parametrize("cp", [2, 3, 4])
def test_queries_see_exactly_what_came_before_and_ranks_work_alike(cp: int) -> None:
    chunk, work = 4, []
    length = 2 * cp * chunk
    parts = [positions(length, Axis("cp", cp, rank), torch.device("cpu")) for rank in range(cp)]
    sent = [part.view(1, -1, 1) for part in parts]
    for rank in range(cp):
        watch = _Watch()
        axis: Any = _Pretend(cp, rank, sent)
        out = context_attend(axis)(watch, sent[rank].unsqueeze(-1), sent[rank])  # type: ignore[arg-type]
        assert out.flatten().tolist() == parts[rank].tolist()
        for queries, keys in watch.asked:
            # Attention's own mask is causal for the last queries of the keys: so both must end together.
            assert keys == list(range(queries[-1] + 1))
            assert queries == keys[-chunk:]
        assert [len(queries) for queries, _ in watch.asked] == [chunk, chunk]
        work.append(sum(len(keys) for _, keys in watch.asked))
    assert set(work) == {(2 * cp + 1) * chunk}


def test_initial_values_depend_on_names_alone() -> None:
    name, shape = "layers.1.self_attn.o_proj.weight", torch.Size((16, 12))
    torch.manual_seed(1)
    first = initial_value(name, shape, V3, 3)
    torch.manual_seed(2)
    assert torch.equal(first, initial_value(name, shape, V3, 3))
    assert not torch.equal(first, initial_value(name, shape, V3, 4))
    assert not torch.equal(first, initial_value("layers.0.self_attn.o_proj.weight", shape, V3, 3))
    assert abs(float(first.std()) / V3.initializer_range - 1) < 0.2
    assert math.isclose(float(initial_value("norm.weight", torch.Size((4,)), V3, 3).sum()), 4)
