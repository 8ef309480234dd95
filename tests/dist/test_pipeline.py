"""Pipelines of real processes give the losses and gradients of the whole model on one device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from harness import run_on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from whalepod.models.attention import Attention
from whalepod.models.moe import routers
from whalepod.models.transformer import Block, MTPBlock, Transformer, init_weights, target_windows
from whalepod.parallel.comm import Axis, CountedGather, CountedSum, Traffic
from whalepod.parallel.pipeline import Hidden, Pipeline
from whalepod.parallel.recompute import apply_recompute
from whalepod.parallel.stage import Stage, make_stages, shared_parameters, tie_stages
from whalepod.spec.layout import Recompute
from whalepod.spec.model import ModelSpec
from whalepod.spec.presets import load_model_spec
from whalepod.spec.schedule import actions_of, schedule_actions, stages_per_rank
from whalepod.spec.stages import split_stages

V3: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "vocab_size": 96,
    "initializer_range": 0.1,
}
V2 = {k: v for k, v in V3.items() if k not in ("q_lora_rank", "n_group", "topk_group")}
LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 96,
    "initializer_range": 0.1,
    "tie_word_embeddings": True,
}
SOME = ("1f1b", "interleaved_zero_bubble", "dualpipev")
LENGTH, MICRO_BATCH = 12, 2
MTP_WEIGHT, BALANCE = 0.3, 0.01
# Enough micro-batches for every schedule, and not a multiple of what is convenient.
MICRO_BATCHES = {
    "gpipe": 3,
    "1f1b": 5,
    "interleaved": 4,
    "interleaved_zero_bubble": 4,
    "zbv": 5,
    "dualpipev": 9,
}


def tiny(kind: str, num_layers: int) -> ModelSpec:
    preset, changes = {
        "v3": ("v3-mini", V3),
        "v2": ("deepseek-v2-lite", V2),
        "llama": ("deepseek-llm-7b", LLAMA),
    }[kind]
    return load_model_spec(preset).with_(num_hidden_layers=num_layers, **changes)


def whole_model(spec: ModelSpec) -> Transformer:
    model = Transformer(spec)
    init_weights(model, seed=1)
    for router in routers(model):
        router.balance_weight = BALANCE
    return model


class Case:
    """A model and a step's data, and what one device makes of them."""

    def __init__(self, spec: ModelSpec, micro_batches: int) -> None:
        depths = spec.num_nextn_predict_layers
        generator = torch.Generator().manual_seed(7)
        rows = torch.randint(
            spec.vocab_size, (micro_batches * MICRO_BATCH, LENGTH + 1 + depths), generator=generator
        )
        self.spec, self.micro_batches = spec, micro_batches
        self.tokens, self.targets = rows[:, :LENGTH], target_windows(rows[:, 1:], depths)
        self.positions = torch.arange(LENGTH) + 3
        scale = 1.0 / self.tokens.numel()
        self.weights = torch.tensor([scale] + [scale * MTP_WEIGHT / max(depths, 1)] * depths)

    def single(self, steps: int = 1) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Summed losses of a step, gradients after `steps` equal ones, expert loads."""
        model = whole_model(self.spec)
        sums = torch.zeros(len(self.weights))
        for _ in range(steps):
            sums = torch.zeros(len(self.weights))
            cut = zip(self.tokens.split(MICRO_BATCH), self.targets.split(MICRO_BATCH), strict=True)
            for tokens, targets in cut:
                losses = model(tokens, targets, self.positions)
                stacked = torch.stack([losses.main, *losses.mtp])
                (stacked * self.weights).sum().backward()
                sums += stacked.detach()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return sums, gradients, {n: b for n, b in model.named_buffers() if n.endswith("load")}


def pipeline_axis() -> Axis:
    group = dist.group.WORLD
    return Axis("pp", dist.get_world_size(), dist.get_rank(), group, Traffic())


def close(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    error = (ours - theirs).norm() / theirs.norm().clamp_min(1e-12)
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


def check(
    case: Case, schedule: str, recompute: Recompute = "none", layers: tuple[int, ...] | None = None
) -> str:
    """Two training steps with an evaluation between, against one device. Returns what was checked."""
    what, stages, pp = (
        f"{case.spec.name} {schedule} {recompute} {layers}",
        stages_per_rank(schedule),
        pipeline_axis(),
    )
    expected, gradients, loads = case.single(steps=2)
    sums: dict[str, Tensor] = {}
    calls: list[int] = []

    def collect(stage: Stage) -> None:
        """What a trainer with FP32 sums does: takes every gradient away at once."""
        calls.append(stage.index)
        for name, parameter in stage.named_parameters():
            if parameter.grad is not None:
                sums[name] = sums[name] + parameter.grad if name in sums else parameter.grad.clone()
                parameter.grad = None

    split = split_stages(case.spec, pp.size * stages, LENGTH, layers)
    parts = make_stages(whole_model(case.spec), split, schedule, pp)
    tie_stages(parts)
    passes: list[int] = []
    for part in parts:
        apply_recompute(part, recompute, pp.traffic)
        for module in part.modules():
            if isinstance(module, Attention):
                module.register_forward_hook(lambda *_, index=part.index: passes.append(index))
    hidden = Hidden(MICRO_BATCH, LENGTH, torch.float32)
    pipeline = Pipeline(parts, schedule, case.micro_batches, pp, hidden, torch.device("cpu"), collect)
    data = (case.tokens, case.targets, case.positions)
    first = pipeline.step(*data, case.weights)
    assert len(calls) == case.micro_batches * stages
    check_traffic(case, schedule, stages, pp)
    if recompute != "none":
        check_passes(parts, schedule, case.micro_batches, passes)
    assert not buffers(pipeline), "a message's buffer outlives its use"
    for part in parts:
        part.eval()
    for count in (case.micro_batches, 1):
        few = count * MICRO_BATCH
        alone = pipeline.evaluate(case.tokens[:few], case.targets[:few], case.positions)
        if count == case.micro_batches:
            close(f"{what} evaluation", total(alone), expected, 1e-6)
    for part in parts:
        part.train()
    second = pipeline.step(*data, case.weights)
    close(f"{what} loss", total(first), expected, 1e-6)
    close(f"{what} second loss", total(second), expected, 1e-6)

    names = [name for part in parts for name, _ in part.named_parameters()]
    everywhere: list[Any] = [None] * pp.size
    dist.all_gather_object(everywhere, sorted(set(names)))
    assert set().union(*everywhere) == set(gradients), what
    for name in shared_parameters(case.spec):
        holders = [rank for rank in range(pp.size) if name in everywhere[rank]]
        assert len(holders) == (1 if schedule in ("zbv", "dualpipev") else 2)
        group = dist.new_group(holders)
        if pp.rank in holders:
            dist.all_reduce(sums[name], group=group)
    for name, ours in sums.items():
        close(f"{what} {name}", ours, gradients[name], 1e-4)
    assert set(sums) == set(names)
    for part in parts:
        for name, buffer in part.named_buffers():
            if name.endswith("load"):
                assert torch.equal(buffer, loads[name]), (what, name)
    return schedule


def check_passes(parts: list[Stage], schedule: str, micro_batches: int, passes: list[int]) -> None:
    """A block runs forward once, and once more for each pass back through it: for inputs and for weights
    where they are apart, which they are not on the first stage (torch leaves all of it to the weights)."""
    steps = schedule_actions(schedule, dist.get_world_size(), None, micro_batches)[dist.get_rank()]
    backward = Counter(a.stage for step in steps for a in actions_of(step) if a.kind in "BIW")
    for part in parts:
        blocks = sum(isinstance(m, Attention) for m in part.modules())
        split = sum(a.kind == "I" for step in steps for a in actions_of(step) if a.stage == part.index)
        back = backward[part.index] - (split if part.is_first else 0)
        assert passes.count(part.index) == blocks * (micro_batches + back), (schedule, part.index)


def buffers(pipeline: Pipeline) -> list[Tensor]:
    """What is kept for messages between steps."""
    schedule: Any = pipeline._schedule
    stages = schedule._stages if hasattr(schedule, "_stages") else [schedule._stage]
    infos = [i for s in stages for each in (s.args_recv_info, s.grad_recv_info) for i in each.values()]
    return [info.buffer for group in infos for info in group if info.buffer is not None]


def total(sums: Tensor) -> Tensor:
    sums = sums.clone()
    dist.all_reduce(sums)
    return sums


def check_traffic(case: Case, schedule: str, stages: int, pp: Axis) -> None:
    """One hidden state a message, forward and back over every edge between ranks."""
    sent = pp.traffic.calls["pp", "send"]
    counted = torch.tensor([float(sent)])
    dist.all_reduce(counted)
    edges = pp.size * stages - 1
    if schedule in ("zbv", "dualpipev"):
        edges -= 1  # the turn of the V
    assert counted.item() == 2 * edges * case.micro_batches
    assert pp.traffic.bytes["pp", "send"] == sent * MICRO_BATCH * LENGTH * case.spec.hidden_size * 4


def shard(part: Stage, fsdp: Axis, mesh: Any, dtype: torch.dtype) -> int:
    """FSDP2 around every block and the stage; returns how many groups of parameters that makes."""
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    inside = {id(m.block) for m in part.modules() if isinstance(m, MTPBlock)}
    units = [m for m in part.modules() if isinstance(m, Block | MTPBlock) and id(m) not in inside]
    for unit in (*units, part):
        wrapped: Any = fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        wrapped.set_custom_all_gather(CountedGather(fsdp))
        wrapped.set_custom_reduce_scatter(CountedSum(fsdp))
    own = any(not name.startswith(("layers", "mtp")) for name, _ in part.named_parameters())
    return len(units) + own


def check_sharded(schedule: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """One step of pp 2 x fsdp 2, every rank of a stage with its own sequences; returns whole gradients."""
    what, micro_batches = f"{schedule} {dtype} sharded", MICRO_BATCHES[schedule]
    stages = stages_per_rank(schedule)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "fsdp"))
    traffic = Traffic()
    pp, fsdp = (
        Axis(name, 2, mesh.get_local_rank(name), mesh.get_group(name), traffic) for name in ("pp", "fsdp")
    )
    case = Case(tiny("v3", 4), 2 * micro_batches)
    rows = slice(fsdp.rank * micro_batches * MICRO_BATCH, (fsdp.rank + 1) * micro_batches * MICRO_BATCH)
    parts = make_stages(whole_model(case.spec), split_stages(case.spec, 2 * stages, LENGTH), schedule, pp)
    groups = sum(shard(part, fsdp, mesh["fsdp"], dtype) for part in parts)
    left_over: list[str] = []

    def nothing_left(stage: Stage) -> None:
        left_over.extend(n for n, p in stage.named_parameters() if p.grad is not None)

    pipeline = Pipeline(
        parts,
        schedule,
        micro_batches,
        pp,
        Hidden(MICRO_BATCH, LENGTH, dtype),
        torch.device("cpu"),
        nothing_left,
    )
    data = (case.tokens[rows], case.targets[rows], case.positions)
    for _ in range(2):
        for part in parts:
            part.zero_grad()
        before = traffic.calls["fsdp", "reduce_scatter"]
        sums = total(pipeline.step(*data, case.weights))
        assert traffic.calls["fsdp", "reduce_scatter"] - before == groups, what
        evaluated = total(pipeline.evaluate(*data))
    if dtype != torch.float32:
        assert not left_over, (what, left_over)  # all of it is in sums of FP32

    expected, gradients, _ = case.single()
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    close(f"{what} loss", sums, expected, tolerance)
    close(f"{what} evaluation", evaluated, expected, tolerance)
    ours: dict[str, Tensor] = {}
    for part in parts:
        for name, parameter in part.named_parameters():
            grad: Any = parameter.grad
            assert grad.dtype == torch.float32
            ours[name] = ours.get(name, torch.zeros(())) + grad.full_tensor()
    shared = shared_parameters(case.spec)
    for name in shared:
        mine = ours.get(name, torch.zeros(gradients[name].shape)).contiguous()
        dist.all_reduce(mine, group=pp.group)
        ours[name] = mine
    if dtype == torch.float32:
        for name, gradient in ours.items():
            close(f"{what} {name}", gradient, gradients[name], 1e-4)
    return ours


def two_ranks() -> Counter[str]:
    checked: Counter[str] = Counter()
    for kind, names in (("v3", list(MICRO_BATCHES)), ("v2", SOME), ("llama", SOME)):
        for schedule in names:
            case = Case(tiny(kind, 4), MICRO_BATCHES[schedule])
            checked[check(case, schedule)] += 1
    case = Case(tiny("v3", 4), 4)
    for recompute in ("full", "selective"):
        for schedule in ("1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"):
            checked[check(case, schedule, recompute)] += 1
    # Nothing but the embedding first, nothing but head and MTP last.
    checked[check(case, "1f1b", layers=(0, 4))] += 1
    checked[check(case, "interleaved_zero_bubble", layers=(0, 2, 2, 0))] += 1
    checked[check(case, "dualpipev", layers=(1, 1, 2, 0))] += 1
    return checked


def four_ranks() -> Counter[str]:
    checked: Counter[str] = Counter()
    for kind, names in (("v3", list(MICRO_BATCHES)), ("llama", ["1f1b", "zbv"])):
        for schedule in names:
            case = Case(tiny(kind, 8), MICRO_BATCHES[schedule])
            checked[check(case, schedule)] += 1
    for schedule in MICRO_BATCHES:
        check_sharded(schedule, torch.float32)
        checked[schedule] += 1
    check_sharded("interleaved_zero_bubble", torch.bfloat16)
    return checked


def test_two_ranks_equal_one_device() -> None:
    checked = run_on_ranks(two_ranks, 2)
    assert checked[0] == checked[1]
    assert set(checked[0]) == set(MICRO_BATCHES)
    assert checked[0].total() == 6 + 2 * len(SOME) + 8 + 3


def test_four_ranks_equal_one_device_and_shard_their_stages() -> None:
    checked = run_on_ranks(four_ranks, 4)
    assert all(each == checked[0] for each in checked)
    assert all(checked[0][schedule] >= 2 for schedule in MICRO_BATCHES)
