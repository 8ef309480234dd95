"""Layout: its groups against a plain grid of ranks, its refusals, and its twin in run.yaml."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any, Literal, get_type_hints

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from whalepod.spec.errors import UserError
from whalepod.spec.layout import AXES, GROUPS, MAX_SIZE, Layout
from whalepod.spec.model import GQA, MLA, ModelSpec
from whalepod.spec.presets import load_model_spec
from whalepod.spec.run import LayoutConfig, make_run
from whalepod.spec.schedule import RULES
from whalepod.spec.stages import split_stages

V3 = load_model_spec("deepseek-v3")
MINI = load_model_spec("v3-mini")
QWEN = load_model_spec("deepseek-r1-distill-qwen-1.5b")


def layout(**fields: Any) -> Layout:
    """A layout whose batch fits, whatever its axes."""
    replicas = fields.get("dp_replicate", 1) * fields.get("dp_shard", 1)
    return Layout(**{"global_batch": replicas * fields.get("micro_batch", 1)} | fields)


@st.composite
def layouts(draw: st.DrawFn, largest: int = 4) -> Layout:
    axes = {axis: draw(st.integers(1, largest)) for axis in AXES}
    inner = axes["dp_shard"] * axes["cp"] * axes["tp"]
    ep = draw(st.sampled_from([d for d in range(1, inner + 1) if inner % d == 0]))
    return layout(**axes, ep=ep, devices_per_node=draw(st.integers(1, 9)))


# ------------------------------------------------------------------------------- ranks and groups


EXPERT_AXES = ("expert_shard", "ep_rail", "ep_node")


def grid(of: Layout, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """All ranks in an array with one dimension per axis, slowest first, and the axes' names."""
    if name.startswith("e") and name != "ends":
        rails = of.ep // of.ep_node
        shape: tuple[int, ...] = (of.pp, of.dp_replicate, of.expert_shard, rails, of.ep_node)
        axes: tuple[str, ...] = ("pp", "dp_replicate", *EXPERT_AXES)
    else:
        shape, axes = tuple(getattr(of, axis) for axis in AXES), AXES
    return np.arange(math.prod(shape)).reshape(shape), axes


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_groups_are_the_grids(of: Layout) -> None:
    """Every group is a line, plane ... of the grid; so all of a name partition the ranks."""
    for name, along in GROUPS.items():
        if name == "ends":
            continue
        ranks, axes = grid(of, name)
        last = [axes.index(axis) for axis in along]
        size = math.prod(ranks.shape[i] for i in last)
        others = [i for i in range(len(axes)) if i not in last]
        expected = ranks.transpose(*others, *last).reshape(-1, size).tolist()
        assert sorted(rank for group in expected for rank in group) == list(range(of.num_devices))
        for group in expected:
            for rank in group:
                assert of.group(name, rank) == group, (name, rank)


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_a_rank_stands_where_its_place_says(of: Layout) -> None:
    sizes = {axis: getattr(of, axis) for axis in (*AXES, "ep", "expert_shard", "ep_node")}
    sizes["ep_rail"] = of.ep // of.ep_node
    places = [of.place(rank) for rank in range(of.num_devices)]
    for rank, place in enumerate(places):
        assert all(0 <= place[axis] < size for axis, size in sizes.items())
        # The numbering of the docstring: tp fastest, pp slowest; ep fastest of what it is carved from.
        for order in (AXES, ("pp", "dp_replicate", "expert_shard", "ep"), (*AXES[:2], *EXPERT_AXES)):
            number = 0
            for axis in order:
                number = number * sizes[axis] + place[axis]
            assert number == rank
        for name, along in GROUPS.items():
            if name == "ends":
                continue
            index = 0
            for axis in along:
                index = index * sizes[axis] + place[axis]
            group = of.group(name, rank)
            assert group[index] == rank
            assert len(group) == math.prod(sizes[axis] for axis in along)
    assert len({tuple(place[axis] for axis in AXES) for place in places}) == of.num_devices


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_experts_lie_inside_what_ep_is_carved_from(of: Layout) -> None:
    inner = of.dp_shard * of.cp * of.tp
    rails = of.ep // of.ep_node
    assert of.ep == rails * of.ep_node
    assert of.ep * of.expert_shard == inner
    for rank in range(of.num_devices):
        block = rank // inner
        assert {other // inner for other in of.group("ep", rank)} == {block}
        assert {other // inner for other in of.group("expert_shard", rank)} == {block}
        near = of.group("ep_node", rank)
        assert len({other // of.devices_per_node for other in near}) == 1  # really one node
        assert set(near) | set(of.group("ep_rail", rank)) <= set(of.group("ep", rank))
        assert set(near) & set(of.group("ep_rail", rank)) == {rank}
        # Those that hold the same experts see, with the group itself, all of a stage's tokens.
        reached = {peer for other in of.group("expert_data", rank) for peer in of.group("ep", other)}
        assert reached == set(of.group("stage", rank))


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_ends_are_the_first_and_the_last_of_a_pipeline(of: Layout) -> None:
    seen: set[tuple[int, ...]] = set()
    for rank in range(of.num_devices):
        ends = of.group("ends", rank)
        stages = of.group("pp", rank)
        assert rank in ends
        assert ends == (sorted({stages[0], stages[-1]}) if rank in {stages[0], stages[-1]} else [rank])
        assert all(of.group("ends", other) == ends for other in ends)
        seen.add(tuple(ends))
    assert sorted(rank for group in seen for rank in group) == list(range(of.num_devices))


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_counts_are_products(of: Layout) -> None:
    assert len(of.group("world", 0)) == of.num_devices
    assert len(of.group("dp", 0)) == of.num_replicas
    assert len(of.group("fsdp", 0)) == of.fsdp
    assert len(of.group("expert_shard", 0)) == of.expert_shard
    assert of.expert_tp == (of.tp if of.ep == 1 else 1)


def test_deepseeks_own_layout() -> None:
    """V3's training: 16-way pipeline, 64-way experts over 8 nodes of 8, ZeRO-1 (section 3.2)."""
    own = layout(pp=16, dp_shard=128, ep=64, zero=1, schedule="dualpipev", micro_batch=1, global_batch=15360)
    own.check_model(V3, 4096)
    assert (own.num_devices, own.ep_node, own.expert_shard) == (2048, 8, 2)
    assert own.group("ep_rail", 3) == [3, 11, 19, 27, 35, 43, 51, 59]
    assert own.group("expert_shard", 130) == [130, 194]
    assert own.group("pp", 1) == [1 + 128 * stage for stage in range(16)]
    assert own.accumulation_steps == 120


def test_every_group_of_one_rank_by_hand() -> None:
    """What each name means, without the table: rank 21 of 2 x 2 x 2 x 2 x 2, experts over 2 nodes of 2."""
    of = layout(pp=2, dp_replicate=2, dp_shard=2, cp=2, tp=2, ep=4, devices_per_node=2)
    assert of.place(21) == {
        "pp": 1,
        "dp_replicate": 0,
        "dp_shard": 1,
        "cp": 0,
        "tp": 1,
        "expert_shard": 1,
        "ep": 1,
        "ep_rail": 0,
        "ep_node": 1,
    }
    assert {name: of.group(name, 21) for name in GROUPS} == {
        "pp": [5, 21],
        "ends": [5, 21],
        "dp": [17, 21, 25, 29],
        "dp_replicate": [21, 29],
        "fsdp": [17, 19, 21, 23],
        "cp": [21, 23],
        "tp": [20, 21],
        "sequence": [20, 21, 22, 23],
        "data": [17, 19, 21, 23, 25, 27, 29, 31],
        "stage": list(range(16, 32)),
        "replicas": [20, 21, 28, 29],
        "ep": [20, 21, 22, 23],
        "ep_node": [20, 21],
        "ep_rail": [21, 23],
        "expert_shard": [17, 21],
        "expert_data": [17, 21, 25, 29],
        "world": list(range(32)),
    }


# ------------------------------------------------------------------------------------- refusals


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        make()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def named(text: str) -> list[int]:
    """The nearest valid values that a message names."""
    found = re.search(r"nearest: ([\d, ]+)$", text)
    assert found, text
    return [int(number) for number in found.group(1).split(",")]


@pytest.mark.parametrize(
    ("spec", "fields", "message"),
    [
        (MINI, {"tp": 3}, "layout.tp 3 must divide num_attention_heads 4; nearest: 2, 4"),
        (QWEN, {"tp": 3}, "layout.tp 3 must divide vocab_size 151936; nearest: 2"),
        (QWEN, {"tp": 4}, "layout.tp 4 must divide num_key_value_heads 2; nearest: 2"),
        (
            QWEN.with_(vocab_size=151937 * 2, num_attention_heads=8),
            {"tp": 4},
            "layout.tp 4 must divide vocab_size 303874; nearest: 2",
        ),
        (
            MINI.with_(intermediate_size=770),
            {"tp": 4},
            "layout.tp 4 must divide intermediate_size 770; nearest: 2",
        ),
        (
            MINI.with_(num_attention_heads=6, vocab_size=3 * 512),
            {"tp": 3},
            "layout.tp 3 must divide n_shared_experts x moe_intermediate_size 128; nearest: 2",
        ),
        (
            MINI.with_(num_attention_heads=6, vocab_size=3 * 512, n_shared_experts=3),
            {"tp": 3},
            "layout.tp 3 must divide moe_intermediate_size 128; nearest: 2",
        ),
        (
            MINI.with_(moe_intermediate_size=24),
            {"tp": 2},
            "layout.tp 2 cuts moe_intermediate_size 24 into 12, which is no multiple of 8, as grouped "
            "products need (16 bytes); nearest: 1",
        ),
        (
            MINI.with_(moe_intermediate_size=126),
            {},
            "moe_intermediate_size 126 is no multiple of 8, as grouped products need (16 bytes)",
        ),
        (MINI, {"stage_layers": (3, 3)}, "layout.stage_layers has no effect with pp 1: leave it out"),
        (MINI, {"stages_per_rank": 2}, "layout.stages_per_rank has no effect with pp 1: leave it out"),
        (MINI, {"wire": "fp8"}, "layout.wire fp8 has no effect with ep 1"),
        (MINI, {"exchange": "two_hop"}, "layout.exchange two_hop has no effect with ep 1"),
        (
            V3,
            {"tp": 32, "precision": "fp8"},
            "layout.tp 32 cuts intermediate_size 18432 into 576, which is no multiple of the 128-wide FP8 "
            "blocks; nearest: 16",
        ),
        (
            MINI,
            {"tp": 3, "precision": "fp8"},
            "num_attention_heads x qk_head_dim 192 is no multiple of the 128-wide FP8 blocks: use "
            "layout.precision bf16, or tp 1",
        ),
        (QWEN, {"dp_shard": 2, "ep": 2}, "has no experts to share out; use ep 1"),
        (
            V3,
            {"dp_shard": 96, "ep": 48},
            "layout.ep 48 must divide the 256 routed experts, as well as dp_shard x cp x tp = 96; "
            "nearest: 32",
        ),
        (
            MINI,
            {"dp_shard": 8, "tp": 2, "ep": 16},
            "layout.ep 16 must divide the 40 routed experts, as well as dp_shard x cp x tp = 16; nearest: 8",
        ),
        (
            MINI.with_(hidden_size=192),
            {"dp_shard": 2, "ep": 2, "wire": "fp8"},
            "layout.wire fp8 sends 1 x 128 tiles, and hidden_size 192 is no multiple of 128: use bf16",
        ),
        (MINI, {"pp": 7, "global_batch": 7}, "6 layers for 7 pipeline stages .* nearest: 6"),
        (MINI, {"pp": 4, "schedule": "zbv"}, "6 layers for 8 pipeline stages .* nearest: 6"),
        (MINI, {"pp": 2}, "schedule 1f1b over pp 2 needs at least pp micro-batches .* not 1; nearest: 2"),
        (
            MINI,
            {"pp": 2, "schedule": "dualpipev", "global_batch": 3},
            "schedule dualpipev over pp 2 needs at least 2 x pp micro-batches .* not 3; nearest: 4",
        ),
        (
            MINI,
            {"pp": 2, "schedule": "interleaved", "global_batch": 5},
            "schedule interleaved over pp 2 needs micro-batches in equal rounds .* not 5; nearest: 4, 6",
        ),
        (
            MINI,
            {"pp": 2, "stages_per_rank": 2, "global_batch": 2},
            "schedule 1f1b puts exactly 1 stage on each rank, not 2",
        ),
        (
            MINI,
            {"pp": 2, "schedule": "interleaved", "stages_per_rank": 0, "global_batch": 2},
            "stages per rank must be at least 1, not 0",
        ),
        (MINI, {"pp": 2, "stage_layers": (3, 3, 0), "global_batch": 2}, "lists 3 stages"),
        (MINI, {"pp": 2, "stage_layers": (3, 2), "global_batch": 2}, "add up to 5"),
    ],
)
def test_what_a_model_cannot_bear(spec: ModelSpec, fields: dict[str, Any], message: str) -> None:
    text = refusal(lambda: layout(**fields).check_model(spec, 4096))
    assert re.search(message if ".*" in message else re.escape(message), text), text


@pytest.mark.parametrize(
    ("fields", "length", "message"),
    [
        ({"tp": 4}, 30, "cp x tp = 4 parts between matrices: it must be a multiple of 4; nearest: 28, 32"),
        ({"cp": 2}, 31, "2 x cp = 4 causally balanced chunks: it must be a multiple of 4; nearest: 28, 32"),
        ({"cp": 2, "tp": 4}, 4, "2 x cp = 4 .* and cp x tp = 8 .* multiple of 8; nearest: 8$"),
        ({"cp": 3, "tp": 4}, 18, "multiple of 12; nearest: 12, 24$"),
    ],
)
def test_what_a_sequence_cannot_bear(fields: dict[str, int], length: int, message: str) -> None:
    text = refusal(lambda: layout(**fields).check_model(MINI, length))
    assert text.startswith(f"sequence_length {length} is cut into ")
    assert re.search(message, text), text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *[({axis: 0}, f"layout.{axis} must be at least 1 and at most {MAX_SIZE}, not 0") for axis in AXES],
        *[
            ({name: -3}, f"layout.{name} must be at least 1")
            for name in ("ep", "devices_per_node", "micro_batch", "global_batch")
        ],
        ({"tp": 10**9}, "not 1000000000"),
        ({"zero": 4}, "layout.zero: unknown 4 (allowed: 1, 2, 3)"),
        ({"zero": 0}, "layout.zero: unknown 0 (allowed: 1, 2, 3)"),
        ({"schedule": "1f2b"}, "layout.schedule: unknown '1f2b' (did you mean '1f1b'?)"),
        ({"recompute": "ful"}, "layout.recompute: unknown 'ful' (did you mean 'full'?)"),
        ({"exchange": "twohop"}, "layout.exchange: unknown 'twohop' (did you mean 'two_hop'?)"),
        ({"wire": "fp4"}, "layout.wire: unknown 'fp4' (did you mean 'fp8'?)"),
        ({"precision": "half"}, "layout.precision: unknown 'half' (allowed: bf16, fp32, fp8)"),
        (
            {"dp_shard": 2, "cp": 2, "tp": 3, "ep": 8, "global_batch": 2},
            "layout.ep 8 must divide dp_shard x cp x tp = 2 x 2 x 3 = 12, whose devices share the experts "
            "out; nearest: 6, 12",
        ),
        (
            {"dp_replicate": 2, "dp_shard": 3, "micro_batch": 2, "global_batch": 16},
            "layout.global_batch 16 must be a multiple of micro_batch x devices = 2 x 6 = 12; "
            "nearest: 12, 24",
        ),
        (
            {"dp_shard": 4, "tp": 2, "global_batch": 3},
            "layout.global_batch 3 must be a multiple of micro_batch x dp_replicate x dp_shard = 1 x 4 = 4; "
            "nearest: 4",
        ),
    ],
)
def test_what_no_model_can_have(fields: dict[str, Any], message: str) -> None:
    assert message in refusal(lambda: Layout(**fields))


def test_workers_are_as_many_as_the_layout_needs() -> None:
    text = refusal(lambda: layout(tp=2, pp=3).check_devices(4))
    assert text == "the layout needs pp x tp = 3 x 2 = 6 workers, but 4 were started"
    text = refusal(lambda: layout().check_devices(2))
    assert text == "the layout needs dp_replicate x dp_shard = 1 x 1 = 1 workers, but 2 were started"
    layout(tp=2, pp=3).check_devices(6)


def test_absurd_sizes_are_refused_at_once() -> None:
    """Two primes near the bound: the next divisor is a trillion away."""
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"nearest: 1048573$"):
        Layout(dp_shard=1048573, cp=1048571, ep=1048574, global_batch=1048573)
    with pytest.raises(UserError, match="nearest: 2"):
        layout(tp=MAX_SIZE).check_model(QWEN, MAX_SIZE)
    assert time.perf_counter() - start < 2


# -------------------------------------------------------------- the nearest values really are valid


def widths(spec: ModelSpec, fp8: bool, ep: int) -> list[tuple[int, int]]:
    """Of each width that tp splits: its size and what each part must be a multiple of. Written anew."""
    a, block = spec.attention, 128 if fp8 else 1
    found = [(spec.num_attention_heads, 1), (spec.vocab_size, 1)]
    if isinstance(a, MLA):
        found += [(spec.num_attention_heads * n, block) for n in (a.qk_head_dim, a.v_head_dim)]
    else:
        assert isinstance(a, GQA)
        found += [(a.num_key_value_heads, 1), (a.num_key_value_heads * a.head_dim, block)]
    if spec.moe is None or spec.moe.first_k_dense_replace:
        found.append((spec.intermediate_size, block))
    if spec.moe is not None:
        found += [(spec.moe.n_shared_experts * spec.moe.moe_intermediate_size, block)]
        # Grouped products want 16 bytes, here of two each.
        found += [(spec.moe.moe_intermediate_size, max(block, 8))] if ep == 1 else []
    return found


SIZES = st.sampled_from([64, 96, 128, 192, 256, 384, 512, 768, 1024, 1152, 1536, 2048, 4608])


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    heads = draw(st.sampled_from([1, 2, 4, 6, 8, 12, 16, 24, 48]))
    common = {
        "num_attention_heads": heads,
        "vocab_size": draw(SIZES) * draw(st.sampled_from([1, 3, 8])),
        "intermediate_size": draw(SIZES),
        "num_hidden_layers": draw(st.integers(1, 9)),
    }
    if draw(st.booleans()):
        kv = draw(st.sampled_from([d for d in (1, 2, 3, 4, 6, 8) if heads % d == 0]))
        return QWEN.with_(**common, num_key_value_heads=kv, head_dim=draw(st.sampled_from([16, 64, 128])))
    experts = draw(st.sampled_from([8, 16, 24, 40, 64]))
    return MINI.with_(
        **common,
        qk_nope_head_dim=draw(st.sampled_from([16, 64, 128])),
        qk_rope_head_dim=draw(st.sampled_from([16, 64])),
        v_head_dim=draw(st.sampled_from([16, 128])),
        n_routed_experts=experts,
        moe_intermediate_size=draw(SIZES),
        first_k_dense_replace=draw(st.integers(0, 1)),
        num_experts_per_tok=2,
    )


@settings(max_examples=300, deadline=None)
@given(specs(), st.integers(1, 24), st.booleans())
def test_tp_is_refused_when_and_only_when_a_part_does_not_come_out(
    spec: ModelSpec, tp: int, fp8: bool
) -> None:
    def fits(size: int) -> bool:
        return all(width % (size * block) == 0 for width, block in widths(spec, fp8, 1))

    of = layout(tp=tp, precision="fp8" if fp8 else "bf16")
    if fits(tp) or tp == 1:  # whole matrices may end within a block
        of.check_model(spec, 4096 * tp)
        return
    text = refusal(lambda: of.check_model(spec, 4096 * tp))
    if not fits(1):
        assert "use layout.precision bf16, or tp 1" in text
        return
    valid = [size for size in range(1, 100) if fits(size)]
    below, above = [v for v in valid if v < tp], [v for v in valid if v > tp]
    assert named(text) == below[-1:] + above[:1]
    for near in named(text):
        dataclasses.replace(of, tp=near).check_model(spec, 4096 * near)


@settings(max_examples=200, deadline=None)
@given(layouts(6), st.integers(1, 200))
def test_nearest_ep_divides_the_devices(of: Layout, ep: int) -> None:
    inner = of.dp_shard * of.cp * of.tp
    if inner % ep == 0:
        assert dataclasses.replace(of, ep=ep).expert_shard == inner // ep
        return
    near = named(refusal(lambda: dataclasses.replace(of, ep=ep)))
    divisors = [d for d in range(1, inner + 1) if inner % d == 0]
    assert near == [d for d in divisors if d < ep][-1:] + [d for d in divisors if d > ep][:1]
    for value in near:
        dataclasses.replace(of, ep=value)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([8, 24, 40, 60, 64, 256]), layouts(6))
def test_nearest_ep_divides_experts_and_devices(experts: int, of: Layout) -> None:
    assume(of.ep > 1)
    spec = MINI.with_(n_routed_experts=experts, num_attention_heads=60, vocab_size=60 * 64)
    spec = spec.with_(intermediate_size=60 * 8, moe_intermediate_size=60 * 8, num_hidden_layers=8)
    of = dataclasses.replace(of, pp=1)
    length = 4 * of.cp * of.tp * 2
    if experts % of.ep == 0:
        of.check_model(spec, length)
        return
    near = named(refusal(lambda: of.check_model(spec, length)))
    assert near
    for value in near:
        dataclasses.replace(of, ep=value).check_model(spec, length)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 500))
def test_nearest_batches_are_valid(replicate: int, shard: int, micro: int, batch: int) -> None:
    def make(size: int) -> Layout:
        return Layout(dp_replicate=replicate, dp_shard=shard, micro_batch=micro, global_batch=size)

    unit = replicate * shard * micro
    if batch % unit == 0:
        assert make(batch).accumulation_steps * unit == batch
        return
    near = named(refusal(lambda: make(batch)))
    assert all(abs(value - batch) < unit for value in near)
    for value in near:
        make(value)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.sampled_from([1, 2, 4]), st.integers(1, 300))
def test_nearest_lengths_are_valid(cp: int, tp: int, length: int) -> None:
    of = layout(cp=cp, tp=tp)
    chunks = 2 * cp if cp > 1 else 1  # cut so by context parallelism, and cp x tp ways between matrices
    if length % chunks == 0 and length % (cp * tp) == 0:
        of.check_model(MINI, length)
        return
    near = named(refusal(lambda: of.check_model(MINI, length)))
    assert near
    for value in near:
        of.check_model(MINI, value)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(RULES)), st.integers(2, 4), st.integers(1, 20))
def test_nearest_micro_batches_are_valid(schedule: str, pp: int, micro_batches: int) -> None:
    spec = MINI.with_(num_hidden_layers=8)
    of = Layout(pp=pp, schedule=schedule, global_batch=micro_batches)  # type: ignore[arg-type]
    try:
        of.check_model(spec, 64)
    except UserError as error:
        near = named(str(error))
        assert near
        for value in near:
            dataclasses.replace(of, global_batch=value).check_model(spec, 64)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 12), st.integers(1, 12))
def test_nearest_stages_are_valid(pp: int, layers: int) -> None:
    spec = MINI.with_(num_hidden_layers=layers)
    of = Layout(pp=pp, schedule="gpipe", global_batch=1)
    if layers >= pp:
        of.check_model(spec, 64)
        assert of.num_stages == pp
        return
    (near,) = named(refusal(lambda: of.check_model(spec, 64)))
    split_stages(spec, near, 64)
    dataclasses.replace(of, pp=near).check_model(spec, 64)


# --------------------------------------------------------------------------------- its twin in run.yaml


def test_run_yaml_has_the_same_fields() -> None:
    """Names, order, types, but for what may be `auto`; defaults too, but for the batch, which a first run
    wants larger."""
    hints, keys = get_type_hints(Layout), LayoutConfig.model_fields
    for name in ("micro_batch", "recompute"):
        hints[name] |= Literal["auto"]
    assert [field.name for field in dataclasses.fields(Layout)] == list(keys)
    assert get_type_hints(LayoutConfig) | hints == get_type_hints(LayoutConfig)
    for field in dataclasses.fields(Layout):
        if field.name not in ("micro_batch", "global_batch"):
            assert keys[field.name].default == field.default, field.name


def test_every_field_arrives() -> None:
    other: dict[str, Any] = {
        "pp": 2,
        "dp_replicate": 2,
        "dp_shard": 2,
        "cp": 2,
        "tp": 2,
        "ep": 2,
        "zero": 1,
        "schedule": "interleaved",
        "stages_per_rank": 3,
        "stage_layers": (1, 2, 1, 1, 1, 0),
        "recompute": "full",
        "exchange": "two_hop",
        "wire": "fp8",
        "devices_per_node": 4,
        "micro_batch": 3,
        "global_batch": 24,
        "precision": "fp32",
    }
    made = make_run({"layout": {**other, "stage_layers": list(other["stage_layers"])}}).make_layout()
    assert dataclasses.asdict(made) == other
    for field in dataclasses.fields(Layout):
        assert getattr(made, field.name) != field.default, f"{field.name}: not tested"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dp_shrad", 2, "unknown key 'layout.dp_shrad' (did you mean 'dp_shard'?)"),
        ("tp", "two", "layout.tp: "),
        ("tp", 2.5, "layout.tp: "),
        ("schedule", "dualpipe", "layout.schedule: "),
        ("stage_layers", "3,1", "layout.stage_layers: "),
        ("cp", 0, "layout.cp must be at least 1"),
    ],
)
def test_run_yaml_refuses_in_one_line(key: str, value: Any, message: str) -> None:
    assert message in refusal(lambda: make_run({"layout": {key: value}}))
