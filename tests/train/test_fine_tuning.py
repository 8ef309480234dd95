"""From Hugging Face weights to a run and back: `transformers` starts it, and reads what comes out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from whalepod.cli import main
from whalepod.parallel import checkpoint, trained
from whalepod.parallel.export import export
from whalepod.parallel.mesh import open_mesh
from whalepod.parallel.weights import build_model, convert_hf
from whalepod.spec.errors import UserError
from whalepod.spec.model import read_config
from whalepod.spec.run import load_run, make_run
from whalepod.text.tokenizer import train_tokenizer
from whalepod.train.loop import Trainer
from whalepod.train.start import prepare_data, train

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))
from harness import run_ranks
from start_from import CONFIG, same_start

KINDS: dict[str, Any] = {
    "v3": lambda: transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**CONFIG)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128,
        )
    ),
}  # fmt: skip


def folder_of(kind: str, corpus: Path, folder: Path) -> Path:
    torch.manual_seed(0)
    model = KINDS[kind]().to(torch.bfloat16)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = torch.randn(buffer.shape) * 0.1
    model.save_pretrained(folder)
    train_tokenizer(str(corpus), 512).save(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    return folder


def values_from(folder: Path, run_values: dict[str, Any]) -> dict[str, Any]:
    del run_values["model"]
    run_values["train"] |= {"start_from": str(folder), "steps": 4, "evaluate_every": 0}
    run_values["optimizer"] = {"learning_rate": 1e-3}
    return run_values


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str, run_values: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    source = folder_of(kind, corpus, tmp_path / "source")
    config = make_run(values_from(source, run_values))
    original = build_model(source, torch.float32)
    with open_mesh(config.make_layout(), torch.device("cpu")) as mesh:
        files = prepare_data(config, config.model_spec())[1]
        start = Trainer(config, config.model_spec(), files, mesh)
    for name, piece in start.parallel.state.weights().items():
        assert torch.equal(piece.tensor, original.get_parameter(name)), name
    for name, buffer in checkpoint.saved_buffers(start.parallel.parts[0]).items():
        assert torch.equal(buffer, original.get_buffer(name)), name

    train(config, until=2, quiet=True)
    train(config, quiet=True)  # goes on from its own checkpoint, not from the folder
    run = Path(config.out)
    assert load_run(run / "run.yaml").model == str(source)
    assert (run / "generation_config.json").is_file()
    export(run, tmp_path / "tuned", "fp32")
    tokens = torch.randint(0, 512, (2, 17), generator=torch.Generator().manual_seed(1))
    ours = trained.read_model(run, read_config(run)).eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.float32).eval()
    with torch.no_grad():
        logits, expected, before = ours(tokens), theirs(tokens).logits, original(tokens)
    assert float((logits - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    assert float((logits - before).abs().max()) > 1e-2 * float(before.abs().max())


def test_from_fp8_and_to_fp8(run_values: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    source = folder_of("v3", corpus, tmp_path / "source")
    convert_hf(source, tmp_path / "low", "fp8")
    for file in source.glob("tokenizer*"):
        (tmp_path / "low" / file.name).write_bytes(file.read_bytes())
    config = make_run(values_from(tmp_path / "low", run_values))
    train(config, quiet=True)
    run = Path(config.out)
    for to in ("fp8", "bf16"):
        export(run, tmp_path / to, to)
    tuned = trained.read_model(run, read_config(run))
    for to, digits in (("fp8", 2**-4), ("bf16", 2**-8)):
        again = build_model(tmp_path / to, torch.float32)
        for name, weight in tuned.named_parameters():
            error = (again.get_parameter(name) - weight).norm() / weight.norm()
            assert float(error.detach()) < digits, (to, name)


@pytest.mark.slow
def test_every_rank_reads_its_part(corpus: Path, tmp_path: Path) -> None:
    source = folder_of("v3", corpus, tmp_path / "source")
    for differing in run_ranks(same_start, 2, str(source), timeout_s=300):
        assert differing == []


def test_what_cannot_be_started_from_is_one_line(
    run_values: dict[str, Any], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder_of("v3", corpus, tmp_path / "source")
    job = tmp_path / "job.yaml"
    job.write_text("layout: {micro_batch: 2, global_batch: 4}\n")

    def refused(*overrides: str) -> str:
        capsys.readouterr()
        command = ["train", str(job), f"out={tmp_path / 'run'}", "data.sequence_length=32", *overrides]
        assert main(command) == 2
        text = capsys.readouterr().err.strip()
        assert "\n" not in text
        return text

    assert "nothing': neither a file nor a folder" in refused(f"train.start_from={tmp_path / 'nothing'}")
    assert "shape" in refused(f"train.start_from={source}", "model=v3-mini")
    (source / "model.safetensors").write_bytes(b"torn")
    assert "model.safetensors" in refused(f"train.start_from={source}")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError):
        make_run({"train": {"start_from": 3}})
