"""Weights of one byte: read block by block, and decoded as the dequantised weights would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from whalepod.models.transformer import Transformer, init_weights
from whalepod.parallel.inference import whole
from whalepod.parallel.mesh import make_mesh
from whalepod.parallel.weights import build_model, save_weights
from whalepod.precision.storage import FP8Storage, Int8, quantize_weight, storage_names
from whalepod.serve import native
from whalepod.serve.core import CoreConfig
from whalepod.serve.fleet import Fleet
from whalepod.serve.request import Request
from whalepod.serve.start import EngineConfig, open_engine, plan_memory
from whalepod.spec.errors import UserError
from whalepod.spec.layout import Layout
from whalepod.spec.presets import load_model_spec


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model, stored in BF16 and in FP8 blocks."""
    spec = load_model_spec("v3-mini").with_(
        num_hidden_layers=3, hidden_size=144, intermediate_size=272, vocab_size=64, initializer_range=0.1,
        moe_intermediate_size=136, n_routed_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = Transformer(spec)
    init_weights(model, 0)
    model.to(torch.bfloat16)
    out = {name: tmp_path_factory.mktemp(name) for name in ("bf16", "fp8")}
    for name, folder in out.items():
        save_weights(model, folder, name)  # type: ignore[arg-type]
    return out


def written(model: Transformer) -> list[list[int]]:
    fleet = Fleet(whole(model, make_mesh(Layout(), torch.device("cpu"))), CoreConfig(60, page_size=8))
    jobs = [fleet.add(Request(tuple((7 * i + 3 * j) % 64 for j in range(5 + 20 * i)), 16)) for i in range(4)]
    while not fleet.is_idle:
        fleet.step()
    return [job.sequence.tokens[job.sequence.num_prompt :] for job in jobs]


def stored(model: Transformer) -> list[FP8Storage]:
    return [m for m in model.modules() if isinstance(m, FP8Storage)]


@pytest.mark.parametrize("source", ["bf16", "fp8"])
@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_writes_what_the_dequantised_weights_write(folders: dict[str, Path], source: str, form: Any) -> None:
    """In FP32: the twin has the same numbers as ordinary parameters."""
    model = build_model(folders[source], form).float().requires_grad_(False)
    twin = Transformer(model.spec).eval().requires_grad_(False)
    with torch.no_grad():
        for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
            path, _, last = name.rpartition(".")
            tensor.copy_(getattr(model.get_submodule(path), last))
    expected = written(twin)
    assert written(model) == expected
    native.use(model)
    assert written(model) == expected
    assert len(stored(model)) > 20


def test_blocks_of_the_folder_bit_for_bit(folders: dict[str, Path]) -> None:
    for a, b in zip(
        stored(build_model(folders["fp8"], "fp8")), stored(build_model(folders["fp8"], "keep")), strict=True
    ):
        for name in (own for weight in a.stored for own in storage_names(weight)):
            assert torch.equal(
                a.get_parameter(name).view(torch.uint8), b.get_parameter(name).view(torch.uint8)
            )


def test_int8_is_within_half_a_step() -> None:
    torch.manual_seed(0)
    w = torch.randn(3, 70, 300)
    w[0, 5] = 0
    values, scale = quantize_weight(w, Int8())
    assert (values.dtype, scale.shape) == (torch.int8, (3, 70, 3))
    step = scale.repeat_interleave(128, -1)[..., :300]
    assert bool(((values * step - w).abs() <= 0.5001 * step).all())
    with pytest.raises(UserError, match="no INT8 form"):
        quantize_weight(torch.full((2, 2), float("nan")), Int8())


def test_plans_for_one_byte(folders: dict[str, Path]) -> None:
    spec = load_model_spec("v3-mini")
    bf16, fp8, int8 = (
        plan_memory(EngineConfig("", dtype=dtype, device="cpu"), spec).weights_gib
        for dtype in ("bf16", "fp8", "int8")
    )
    assert 0.5 * bf16 < fp8 < int8 < 0.8 * bf16
    for form in ("fp8", "int8"):
        model = build_model(folders["bf16"], form)
        held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        planned = plan_memory(EngineConfig("", dtype=form, device="cpu"), model.spec).weights_gib * 2**30
        assert held == pytest.approx(planned, rel=0.02)
    config = EngineConfig(str(folders["bf16"]), Layout(tp=2), "int8")
    with pytest.raises(UserError, match="for one device"), open_engine(config):
        pass
