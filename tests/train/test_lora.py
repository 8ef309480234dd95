"""Adapters to PEFT's form, and merged into weights: `peft` and `transformers` read what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from test_fine_tuning import folder_of, values_from

from whalepod.cli import main
from whalepod.models.lora import is_adapter
from whalepod.parallel import checkpoint
from whalepod.parallel.export import export
from whalepod.parallel.mesh import open_mesh
from whalepod.parallel.trained import read_model
from whalepod.parallel.weights import build_model
from whalepod.spec.errors import UserError
from whalepod.spec.model import read_config
from whalepod.spec.run import RunConfig, make_run
from whalepod.train.loop import Trainer
from whalepod.train.start import prepare_data, train


def job(source: Path, run_values: dict[str, Any], **lora: Any) -> RunConfig:
    values = values_from(source, run_values)
    values["optimizer"] = {"learning_rate": 1e-2}
    return make_run(values | {"lora": {"r": 4, "alpha": 8} | lora})


def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model.eval()(tokens)
    return out if isinstance(out, torch.Tensor) else out.logits


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return float((ours - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())


@pytest.mark.parametrize("kind", ["v3", "qwen2"])
def test_round_trip(kind: str, run_values: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    source = folder_of(kind, corpus, tmp_path / "source")
    config = job(source, run_values)
    train(config, quiet=True)
    run = Path(config.out)
    merged = read_model(run, read_config(run))
    original = build_model(source, torch.float32)
    adapted = {name for name, _ in merged.named_parameters() if "_proj" in name and name.endswith(".weight")}
    adapted -= {name for name in adapted if kind == "v3" and "self_attn" not in name}
    for name, weight in merged.named_parameters():
        assert torch.equal(weight, original.get_parameter(name)) == (name not in adapted), name
    for name, buffer in checkpoint.saved_buffers(merged).items():
        assert torch.equal(buffer, original.get_buffer(name)), name

    tokens = torch.randint(0, 512, (2, 17), generator=torch.Generator().manual_seed(1))
    logits, before = logits_of(merged, tokens), logits_of(original, tokens)
    assert float((logits - before).abs().max()) > 1e-2 * float(before.abs().max())
    export(run, tmp_path / "adapter", "lora")
    export(run, tmp_path / "adapter", "lora")  # over itself
    base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert close(logits, logits_of(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"), tokens))
    export(run, tmp_path / "merged", "fp32")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert close(logits, logits_of(whole, tokens))


def test_what_is_frozen_takes_two_bytes_and_no_state(
    run_values: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    source = folder_of("v3", corpus, tmp_path / "source")
    run_values["layout"] = run_values.get("layout", {}) | {"precision": "bf16"}
    config = job(source, run_values)
    spec = config.model_spec()
    with open_mesh(config.make_layout(), torch.device("cpu")) as mesh:
        trainer = Trainer(config, spec, prepare_data(config, spec)[1], mesh)
        trainer.step()
    model = trainer.parallel.parts[0]
    frozen = [p for name, p in model.named_parameters() if not is_adapter(name)]
    adapters = sum(p.numel() for name, p in model.named_parameters() if is_adapter(name))
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    buffers = sum(b.nbytes for b in model.buffers())
    # Of adapters the copy, master, gradient and two moments.
    expected = 2 * sum(p.numel() for p in frozen) + (2 + 4 * 4) * adapters + buffers
    held = trainer.parallel.held_bytes(trainer.optimizer)
    assert expected <= held <= expected + 64  # Adam's step counts


def test_going_on_is_exact(run_values: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    source = folder_of("v3", corpus, tmp_path / "source")
    config = job(source, run_values, modules=["q_b_proj", "kv_b_proj"])
    train(config, until=2, quiet=True)
    train(config, quiet=True)
    apart = config.model_copy(update={"out": str(tmp_path / "apart")})
    train(apart, quiet=True)
    first, second = (read_model(Path(c.out), c.model_spec()).state_dict() for c in (config, apart))
    assert all(torch.equal(first[name], second[name]) for name in first)
    export(tmp_path / "apart", tmp_path / "adapter", "lora")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["self_attn.kv_b_proj", "self_attn.q_b_proj"]
    other = folder_of("v3", corpus, tmp_path / "other")
    moved = config.train.model_copy(update={"start_from": str(other), "steps": 8})
    with pytest.raises(UserError, match="holds adapters of"):
        train(config.model_copy(update={"train": moved}), quiet=True)
    with pytest.raises(UserError, match="another `lora`"):
        train(config.model_copy(update={"lora": config.lora.model_copy(update={"r": 2})}), quiet=True)


def test_dense_layers_and_shared_experts_when_named(
    run_values: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    source = folder_of("v3", corpus, tmp_path / "source")
    config = job(source, run_values, modules=["gate_proj", "up_proj", "down_proj"])
    train(config, quiet=True)
    merged, original = read_model(Path(config.out), config.model_spec()), build_model(source, torch.float32)
    changed = {n for n, w in merged.named_parameters() if not torch.equal(w, original.get_parameter(n))}
    ends = tuple(f"{name}_proj.weight" for name in ("gate", "up", "down"))
    assert changed == {n for n, _ in merged.named_parameters() if n.endswith(ends)}
    export(Path(config.out), tmp_path / "merged", "fp32")
    tokens = torch.randint(0, 512, (2, 17), generator=torch.Generator().manual_seed(1))
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert close(logits_of(merged, tokens), logits_of(whole, tokens))


def test_recomputation_changes_nothing(run_values: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    source = folder_of("v3", corpus, tmp_path / "source")
    found = {}
    config = job(source, run_values, modules=["q_a_proj", "kv_b_proj", "o_proj", "gate_proj", "down_proj"])
    for policy in ("none", "selective", "full"):
        again = config.with_layout(recompute=policy).model_copy(update={"out": str(tmp_path / policy)})
        train(again, quiet=True)
        found[policy] = read_model(tmp_path / policy, again.model_spec()).state_dict()
    for policy in ("selective", "full"):
        assert all(torch.equal(found[policy][name], found["none"][name]) for name in found["none"]), policy


def test_frozen_weights_compute_in_fp8(run_values: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    source = folder_of("v3", corpus, tmp_path / "source")
    run_values["layout"] |= {"precision": "fp8"}
    config = job(source, run_values, modules=["q_a_proj", "gate_proj", "down_proj"])
    train(config, quiet=True)
    merged, original = read_model(Path(config.out), config.model_spec()), build_model(source, torch.float32)
    changed = {n for n, w in merged.named_parameters() if not torch.equal(w, original.get_parameter(n))}
    ends = ("q_a_proj.weight", "gate_proj.weight", "down_proj.weight")
    assert changed == {n for n, _ in merged.named_parameters() if n.endswith(ends)}


def test_bad_input_is_one_line(
    run_values: dict[str, Any], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder_of("v3", corpus, tmp_path / "source")
    file = tmp_path / "job.yaml"
    file.write_text("layout: {micro_batch: 2, global_batch: 4}\ndata: {sequence_length: 32}\n")

    def refused(*command: str) -> str:
        capsys.readouterr()
        assert main([*command]) == 2
        text = capsys.readouterr().err.strip()
        assert "\n" not in text
        return text

    run = f"out={tmp_path / 'run'}"
    start = f"train.start_from={source}"
    assert "train.start_from" in refused("train", str(file), run, "lora.r=4", "model=v3-mini")
    assert "q_b_proj" in refused("train", str(file), run, start, "lora.r=4", "lora.modules=[q_b_prj]")
    assert "lora.r" in refused("train", str(file), run, start, "lora.r=-1")
    assert not (tmp_path / "run").exists()
    assert "no adapters" in refused("convert", str(source), str(tmp_path / "out"), "--to", "lora")
    config = make_run(values_from(source, run_values))
    train(config, quiet=True)
    assert "no adapters" in refused("convert", config.out, str(tmp_path / "out"), "--to", "lora")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("")
    tuned = job(source, run_values | {"model": None, "out": str(tmp_path / "tuned")})
    train(tuned, quiet=True)
    assert "not empty" in refused("convert", tuned.out, str(full), "--to", "lora")
    (source / "config.json").rename(tmp_path / "config.json")
    assert "config.json" in refused("convert", tuned.out, str(tmp_path / "merged"), "--to", "bf16")
