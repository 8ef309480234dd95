"""Calibration: what is fitted from measured tables, the profile's file, and what it changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from whalepod import cli
from whalepod.calibrate import profile, serving
from whalepod.calibrate.kernels import Sizes
from whalepod.calibrate.run import calibrate
from whalepod.parallel.mesh import make_mesh
from whalepod.planner.measured import collective_curves, collective_seconds, fitted_shares
from whalepod.planner.plan import time_layout
from whalepod.planner.search import TrainingJob
from whalepod.planner.software import load_software
from whalepod.planner.training import STEP_OVERHEAD_S
from whalepod.serve.predict import predict
from whalepod.serve.start import EngineConfig, serving_layout
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import Cluster, Gpu, load_gpu, override_gpu, parse_gpus, spelled_gpu
from whalepod.spec.layout import Layout
from whalepod.spec.measured import (
    COLLECTIVES,
    Attended,
    Collective,
    Grouped,
    Measured,
    Product,
    profile_folder,
)
from whalepod.spec.presets import load_model_spec

TINY = Sizes(
    products=((32, 32, 32), (64, 16, 64)),
    grouped=((2, 8, 16, 16), (2, 32, 16, 16)),
    attention=((1, 2, 32, 16), (1, 2, 64, 16)),
    stream=2**18,
    cold=2**18,
    collectives=(),
    budget_s=0.001,
)


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHALEPOD_HOME", str(tmp_path))


def synthetic(share: float = 0.8, half_k: float = 100.0, half_rows: float = 30.0) -> Measured:
    """Tables of a device that follows the planner's formulas exactly; peaks of 1 TFLOP/s and 100 GB/s."""

    def product(k: int) -> float:
        return share * 1e12 * k / (k + half_k)

    def grouped(rows: int, k: int) -> float:
        return 0.5 * 1e12 * k / (k + half_k) * rows / (rows + half_rows)

    return Measured(
        date="2026-01-01",
        machine="a machine",
        torch="2.13.0",
        peak_tflops={"bf16": 1.0},
        peak_gb_s=100.0,
        stream_gb_s=90.0,
        gather_gb_s=20.0,
        optimizer_gb_s=70.0,
        dispatch_us=2.0,
        operation_us=5.0,
        products=tuple(Product("bf16", 512, k, 512, product(k)) for k in (64, 256, 1024)),
        grouped=tuple(
            Grouped("bf16", 4, rows, k, 64, grouped(rows, k)) for rows in (8, 64) for k in (64, 512)
        ),
        attention=tuple(
            Attended("bf16", t, w, 3e11 / (1 + 200 / t + 50 / w), 2e11) for t in (128, 512) for w in (64, 192)
        ),
        collectives=tuple(
            Collective(op, ranks, size, 1e-5 + size / 1e9)
            for op in COLLECTIVES
            for ranks in (2, 4)
            for size in (2**10, 2**20)
        ),
    )


def test_shares_are_recovered_from_tables_that_follow_the_formulas() -> None:
    found = fitted_shares(synthetic(share=0.8, half_k=100, half_rows=30))
    assert found["gemm"]["bf16"] == pytest.approx(0.8, rel=1e-6)
    assert found["half_k"] == pytest.approx(100, rel=1e-6)
    assert found["grouped"]["bf16"] == pytest.approx(0.5, rel=1e-6)
    assert found["half_rows"] == pytest.approx(30, rel=1e-6)
    assert found["attention"] == pytest.approx((0.3, 0.2))
    assert found["half_attention"][0] == pytest.approx((200, 50))
    assert found["half_attention"][1] == pytest.approx((0, 0), abs=1e-6)
    assert (found["memory"], found["permute"], found["optimizer"]) == pytest.approx((0.9, 0.2, 0.7))


def test_collectives_take_what_was_measured_and_grow_with_size_beyond() -> None:
    curves = collective_curves(synthetic().collectives, "all_gather")
    assert collective_seconds(curves, 2**20, 2) == pytest.approx(1e-5 + 2**20 / 1e9)
    assert collective_seconds(curves, 2**10, 4) == pytest.approx(1e-5 + 2**10 / 1e9)
    assert collective_seconds(curves, 2**22, 2) == pytest.approx(4 * (1e-5 + 2**20 / 1e9))
    assert collective_seconds(curves, 1, 2) == collective_seconds(curves, 2**10, 2)
    assert collective_seconds(curves, 2**20, 1) == 0
    # Eight go by the nearest number measured, four: each moves 7/8 instead of 3/4.
    ratio = collective_seconds(curves, 2**20, 8) / collective_seconds(curves, 2**20, 4)
    assert ratio == pytest.approx((7 / 8) / (3 / 4))
    between = collective_seconds(curves, np.array([2**12, 2**14, 2**16]), np.array([2, 2, 2]))
    assert (np.diff(between) > 0).all()


def test_a_profile_is_written_read_back_and_taken_by_name() -> None:
    before = load_gpu("cpu")
    found = calibrate(sizes=TINY, device="cpu")
    assert found.measured is not None
    assert len(found.measured.products) == 4
    served = found.measured.served
    assert served is not None
    assert len(served.products) == 20
    config = EngineConfig("", device="cpu", dtype=served.precision, threads_per_worker=1)
    expected = predict(config, load_model_spec("v3-mini"), [(32, 8)] * 2, 1, found)
    assert expected.output_tokens_per_s == pytest.approx(16 / expected.seconds)
    path = profile.write_profile(found)
    assert path == profile_folder() / "cpu.yaml"
    again = load_gpu("CPU")
    assert again == found
    assert again != before
    assert parse_gpus("2xcpu").gpu == found
    path.unlink()
    assert load_gpu("cpu") == before


def test_the_plan_goes_by_the_profile(tmp_path: Path) -> None:
    """Twice as fast everywhere: half the time. Slow collectives: that time alone."""
    base = replace(load_gpu("cpu"), tflops={"bf16": 1.0}, memory_tb_s=0.1, measured=synthetic())
    spec, layout = load_model_spec("v3-mini"), Layout(dp_shard=2, zero=3, micro_batch=4, global_batch=8)

    def seconds(gpu: Gpu) -> float:
        job = TrainingJob(spec, Cluster(gpu, 2, 2), load_software("whalepod"), 8, 256, "bf16")
        return time_layout(job, layout).step.seconds - STEP_OVERHEAD_S

    def scaled(m: Measured, factor: float) -> Measured:
        rates = {"stream_gb_s", "gather_gb_s", "optimizer_gb_s"}
        return replace(
            m,
            **{name: getattr(m, name) * factor for name in rates},
            dispatch_us=m.dispatch_us / factor,
            operation_us=(m.operation_us or 0) / factor,
            products=tuple(row._replace(flop_s=row.flop_s * factor) for row in m.products),
            grouped=tuple(row._replace(flop_s=row.flop_s * factor) for row in m.grouped),
            attention=tuple(
                r._replace(
                    forward_flop_s=factor * r.forward_flop_s, backward_flop_s=factor * r.backward_flop_s
                )
                for r in m.attention
            ),
            collectives=tuple(row._replace(seconds=row.seconds / factor) for row in m.collectives),
        )

    assert base.measured is not None
    twice = replace(base, measured=scaled(base.measured, 2.0))
    assert seconds(twice) == pytest.approx(seconds(base) / 2, rel=0.02)
    slow = tuple(row._replace(seconds=row.seconds * 100) for row in base.measured.collectives)
    assert seconds(replace(base, measured=replace(base.measured, collectives=slow))) > 1.5 * seconds(base)


def test_another_link_is_not_the_measured_one() -> None:
    gpu = replace(load_gpu("h100"), measured=synthetic())
    assert override_gpu(gpu, scale_up_gb_s=100.0).measured.collectives == ()  # pyright: ignore
    assert override_gpu(gpu, nic_gb_s=10.0).measured == gpu.measured


@pytest.mark.parametrize(
    ("device", "name"),
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("NVIDIA B200", "B200"), ("AMD EPYC", None)],
)
def test_the_database_knows_a_device_by_its_own_name(device: str, name: str | None) -> None:
    found = spelled_gpu(device)
    assert (found.name if found else None) == name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"products": []}, "products"),
        ({"stream_gb_s": -1.0}, "stream_gb_s"),
        ({"stream_gb_s": "fast"}, "stream_gb_s"),
        ({"streams": 1.0}, "streams"),
        ({"products": [["bf16", 1, 2]]}, "products"),
        ({"products": [["bf16", 1, 2, 3, 1e20]]}, "products"),
        ({"collectives": [["all_red", 2, 1, 1.0]]}, "collectives"),
        ({"dispatch_us": float("nan")}, "dispatch_us"),
    ],
)
def test_a_spoilt_profile_is_one_line(change: dict, words: str) -> None:
    gpu = replace(load_gpu("cpu"), name="spoilt", measured=synthetic())
    path = profile.write_profile(gpu)
    values = yaml.safe_load(path.read_text())
    values["measured"].update(change)
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=words) as error:
        load_gpu("spoilt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--name", "../up"], "name"),
        (["--name", ""], "name"),
        (["--out", "profile.json"], ".yaml"),
        (["--out", "/proc/nowhere/x.yaml", "--quick"], "cannot write"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from whalepod.calibrate import run

    monkeypatch.setattr(run, "QUICK", TINY)
    result = CliRunner().invoke(cli.app, ["calibrate", *arguments])
    assert isinstance(result.exception, UserError) or result.exit_code == 2
    assert words in str(result.exception) + result.output


def test_the_command_prints_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    from whalepod.calibrate import run

    monkeypatch.setattr(run, "QUICK", TINY)
    result = CliRunner().invoke(cli.app, ["calibrate", "--quick", "--name", "desk"])
    assert result.exit_code == 0, result.output
    assert "memory, GB/s" in result.output
    assert "desk.yaml" in result.output
    assert load_gpu("desk").measured is not None


def test_the_engines_steps_have_room_for_all_that_the_full_budget_writes() -> None:
    alone = make_mesh(serving_layout(), torch.device("cpu"))
    found = serving._step(alone, 1, 0, 1, requests=2, budget_s=Sizes().budget_s)
    assert found.seconds > 0
