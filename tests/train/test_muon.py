from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from whalepod.parallel.mesh import open_mesh
from whalepod.spec.run import make_run
from whalepod.train.loop import Trainer
from whalepod.train.metrics import read_metrics
from whalepod.train.muon import COEFFICIENTS, UPDATE_RMS, Muon, orthogonal
from whalepod.train.start import prepare_data, train


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (5, 16, 24), (1, 8)])
def test_singular_values_become_one_and_vectors_stay(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = orthogonal(x)
    assert float((torch.linalg.svdvals(y) - 1).abs().max()) < 0.02
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    assert float((y - u @ v).norm() / (u @ v).norm()) < 0.02


def test_iteration_is_torchs() -> None:
    """Five steps of the same coefficients as torch.optim.Muon, which works in BF16."""
    weight = torch.nn.Parameter(torch.zeros(24, 40))
    weight.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    theirs = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, ns_steps=5)
    theirs.step()
    ours = -orthogonal(weight.grad, COEFFICIENTS[:1] * 5)
    assert float((weight.detach() - ours).norm() / ours.norm()) < 0.02


def test_it_trains_resumes_exactly_and_moves_matrices_alike(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    run_values["optimizer"] = {"name": "muon", "learning_rate": 3e-3}
    run_values["train"] = {"steps": 12, "evaluate_every": 0, "checkpoint_every": 6}
    whole = train(make_run(run_values | {"out": str(tmp_path / "whole")}), quiet=True)
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert whole.loss < rows[0]["loss"] - 0.5
    half = make_run(run_values | {"out": str(tmp_path / "half")})
    train(half, until=6, quiet=True)
    train(half, quiet=True)
    assert [r["loss"] for r in read_metrics(tmp_path / "half" / "metrics.jsonl")] == [r["loss"] for r in rows]


def test_size_of_an_update(run_values: dict[str, Any]) -> None:
    run_values["optimizer"] = {"name": "muon", "learning_rate": 1e-2, "weight_decay": 0.0}
    config = make_run(run_values)
    files = prepare_data(config, config.model_spec())[1]
    with open_mesh(config.make_layout(), torch.device("cpu")) as mesh:
        t = Trainer(config, config.model_spec(), files, mesh)
    assert isinstance(t.optimizer, Muon)
    before = {n: p.tensor.clone() for n, p in t.parallel.state.weights().items()}
    t.step()
    matrices = 0
    for name, piece in t.parallel.state.weights().items():
        moved = (piece.tensor - before[name]) / t.course.learning_rate(0)
        if t.optimizer.is_matrix(name):
            matrices += 1
            # Of each matrix of a stack. An expert that saw few tokens has fewer directions to move in.
            rms = moved.square().mean((-2, -1)).sqrt()
            low = 0.1 if rms.dim() else UPDATE_RMS - 0.03
            assert torch.all(((rms > low) | (rms == 0)) & (rms < UPDATE_RMS + 0.03)), name
    assert matrices > 10
    assert not t.optimizer.is_matrix("lm_head.weight")
    assert set(t.optimizer.by_name["lm_head.weight"]) == {"exp_avg", "exp_avg_sq"}
