"""The training loop on one worker: it learns, resumes exactly, and refuses what cannot be."""

from __future__ import annotations

import copy
import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from whalepod.parallel import checkpoint, checkpoint_files
from whalepod.parallel.mesh import Mesh, open_mesh
from whalepod.spec.counts import train_flops
from whalepod.spec.errors import UserError
from whalepod.spec.run import make_run
from whalepod.train.loop import Trainer
from whalepod.train.metrics import read_metrics
from whalepod.train.start import prepare_data, train


def trainer(config) -> Trainer:
    with open_mesh(config.make_layout(), torch.device("cpu")) as mesh:
        assert isinstance(mesh, Mesh)
        return Trainer(config, config.model_spec(), prepare_data(config, config.model_spec())[1], mesh)


def test_it_learns_and_writes_everything_down(run_values) -> None:
    run_values["train"] = {"steps": 40, "evaluate_every": 20, "checkpoint_every": 0}
    run_values["layout"]["precision"] = "bf16"
    config = make_run(run_values)
    result = train(config, quiet=True)
    out = Path(config.out)
    rows = read_metrics(out / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(6.24, abs=0.15)  # ln 512: knows nothing yet
    assert result.loss < rows[0]["loss"] - 2
    assert result.validation_loss is not None
    assert result.validation_loss < rows[0]["loss"] - 2
    assert result.tokens == 40 * 4 * 32
    flops = train_flops(config.model_spec(), 32, mtp=True).total
    assert result.mfu == pytest.approx(flops * result.tokens_per_s / (result.peak_tflops * 1e12))
    assert [row["step"] for row in rows if row["validation_loss"] is not None] == [20, 40]
    assert all(row["expert_load_worst"] >= row["expert_load_mean"] >= 1 for row in rows)
    assert json.loads((out / "result.json").read_text())["loss"] == result.loss
    assert {"config.json", "tokenizer.json", "run.yaml"} <= {p.name for p in out.iterdir()}
    assert any((out / "tensorboard").iterdir())
    assert checkpoint_files.steps_saved(out / "checkpoints") == [40]


RECIPES = [
    {},
    {"optimizer": {"learning_rate": 1e-2, "moments": "bf16"}},
    {"schedule": {"warmup_steps": 2, "batch_start": 2, "batch_until": 0.4}},
    {"layout": {"micro_batch": 2, "global_batch": 4, "precision": "fp8"}},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=["fp32", "moments", "ramp", "fp8"])
def test_resume_is_exact(run_values, tmp_path, recipe) -> None:
    """Interrupted after a checkpoint and after two more steps: the same losses to the last bit."""
    run_values |= recipe
    whole = make_run(run_values | {"out": str(tmp_path / "whole")})
    train(whole, quiet=True)
    broken = make_run(run_values | {"out": str(tmp_path / "broken")})
    train(broken, until=3, quiet=True)  # checkpoints at 2 and, on leaving, at 3
    shutil.rmtree(checkpoint_files.path_of(tmp_path / "broken" / "checkpoints", 3))  # as if killed in step 3
    train(broken, quiet=True)
    a, b = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "broken"))
    keys = ("step", "tokens", "loss", "mtp_loss", "gradient_norm", "learning_rate", "validation_loss")
    assert [[row[k] for k in keys] for row in a if row["step"] != 3] == [
        [row[k] for k in keys] for row in b if row["step"] != 3
    ]
    # Step 3 was the broken run's last once, and has a held-out loss for that: the rest is equal.
    assert [r["loss"] for r in a] == [r["loss"] for r in b]
    if "schedule" in recipe:
        sizes = [after["tokens"] - before["tokens"] for before, after in pairwise(a)]
        assert sizes == sorted(sizes)
        assert {sizes[0], sizes[-1]} == {2 * 32, 4 * 32}


def test_old_checkpoints_go_and_unfinished_ones_do_not_count(run_values) -> None:
    config = make_run(run_values)
    out = Path(config.out) / "checkpoints"
    train(config, until=4, quiet=True)
    assert checkpoint_files.steps_saved(out) == [2, 4]
    (out / "step_00000099").mkdir()  # no state.json: not whole
    assert checkpoint_files.steps_saved(out) == [2, 4]
    train(config, quiet=True)
    assert checkpoint_files.steps_saved(out) == [4, 6]


def test_no_pickle_in_a_checkpoint(run_values) -> None:
    config = make_run(run_values)
    train(config, until=2, quiet=True)
    names = {p.suffix for p in (Path(config.out) / "checkpoints").rglob("*") if p.is_file()}
    assert names == {".safetensors", ".json"}


def test_masters_stay_fp32_and_compute_is_bf16(run_values) -> None:
    run_values["layout"]["precision"] = "bf16"
    t = trainer(make_run(run_values))
    model = t.parallel.parts[0]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {w.tensor.dtype for w in t.parallel.state.weights().values()} == {torch.float32}
    before = {k: v.tensor.clone() for k, v in t.parallel.state.weights().items()}
    t.step()
    assert any(not torch.equal(before[k], v.tensor) for k, v in t.parallel.state.weights().items())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, t.parallel.state.weights()[name].tensor.bfloat16())
    for router in t.parallel.routers:
        assert router.load.dtype == torch.float32


def test_accumulation_is_one_big_batch(run_values) -> None:
    def first_step(micro_batch: int):
        run_values["layout"]["micro_batch"] = micro_batch
        t = trainer(make_run(copy.deepcopy(run_values)))
        main, mtp, norm = t.step()
        return main.item(), mtp.item(), norm

    assert first_step(1) == pytest.approx(first_step(4), rel=1e-6)


def test_bias_balancing_evens_the_load(run_values) -> None:
    """With a fixed model only the biases move: the busiest expert's lead must shrink."""
    from whalepod.train.balance import balance_step

    t = trainer(make_run(run_values))
    rows = torch.from_numpy(t.data.batch(0, 32))
    worst = []
    for _ in range(100):
        with torch.no_grad():
            t.parallel.loss(rows)
        load = balance_step(t.parallel.routers, 2e-4, t.mesh)
        assert load is not None
        worst.append(load.mean)
    assert worst[-1] < 1 + 0.5 * (worst[0] - 1)


def test_nan_gradients_skip_the_step_and_stop_after_a_limit(run_values) -> None:
    t = trainer(make_run(run_values))
    # A NaN in one weight makes every loss NaN; the weights must stay as they are.
    t.parallel.state.weights()["norm.weight"].tensor[0] = float("nan")
    t.parallel.state.write_back()
    before = {k: v.tensor.clone() for k, v in t.parallel.state.weights().items()}
    for _ in range(9):
        t.step()
    with pytest.raises(UserError, match="10 steps in a row"):
        t.step()
    assert t.progress.skipped == 10
    after = t.parallel.state.weights()
    assert all(torch.equal(before[k].nan_to_num(7), after[k].tensor.nan_to_num(7)) for k in before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"preset": "v3-mini", "vocab_size": 100}}, "100"),
        ({"data": {"source": "no/such/file.txt"}}, "no/such/file.txt"),
        ({"data": {"sequence_length": 10**6}}, "4096 positions"),
        ({"out": __file__}, "is a file"),
    ],
)
def test_bad_input_is_one_line(run_values, change, message) -> None:
    for key, value in change.items():
        run_values[key] = run_values[key] | value if isinstance(run_values[key], dict) else value
    with pytest.raises(UserError, match=message) as caught:
        train(make_run(run_values), quiet=True)
    assert "\n" not in str(caught.value)


def test_a_folder_of_another_run_is_refused(run_values, tmp_path) -> None:
    train(make_run(run_values), until=2, quiet=True)
    other = copy.deepcopy(run_values)
    other["model"]["hidden_size"] = 64
    with pytest.raises(UserError, match="another model"):
        train(make_run(other), quiet=True)
    other = copy.deepcopy(run_values)
    other["train"]["seed"] = 5
    with pytest.raises(UserError, match="another seed"):
        train(make_run(other), quiet=True)
    train(make_run(run_values), quiet=True)
    with pytest.raises(UserError, match="already trained"):
        train(make_run(run_values), quiet=True)
    assert train(make_run(run_values), restart=True, until=1, quiet=True).steps == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not the folder of a run"):
        train(make_run(run_values | {"out": str(tmp_path / "mine")}), restart=True, quiet=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_checkpoint_of_another_model_names_the_tensor(run_values) -> None:
    config = make_run(run_values)
    train(config, until=2, quiet=True)
    path = checkpoint_files.path_of(Path(config.out) / "checkpoints", 2)
    with pytest.raises(UserError, match=r"no 'model/missing'"):
        checkpoint.read_tensors(path, {"model/missing": torch.zeros(2)})
    with pytest.raises(UserError, match=r"'model/norm.weight' has shape \[32\] there, \[5\] here"):
        checkpoint.read_tensors(path, {"model/norm.weight": torch.zeros(5)})
