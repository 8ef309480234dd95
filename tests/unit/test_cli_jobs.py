"""Wrong input to the commands that run jobs: exit 2 and one line that helps."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from whalepod.cli import main


@pytest.fixture
def run_file(run_values, tmp_path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run_values))
    return file


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main([str(part) for part in argv]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "did you mean 'steps'"),
        ("trian.steps=3", "did you mean 'train'"),
        ("model=v3-mimi", "did you mean 'v3-mini'"),
        ("model=deepseek-v4-pro", "figures only"),
        ("model=deepseek-v3.2", "cannot be run yet"),
        ("model.hidden_sise=64", "hidden_size"),
        ("model.hidden_size=wide", "type int"),
        ("layout.global_batch=7", "multiple of"),
        ("layout.dp_shard=0", "at least 1"),
        ("layout.global_batch=1000000000000", "at most 1048576"),
        ("layout.precision=fp4", "fp32"),
        ("train.steps=-1", "train.steps"),
        ("optimizer.learning_rate=nan", "learning_rate"),
        ("data.source=/no/such/place", "/no/such/place"),
        ("data.tokenizer=/no/such/tokenizer.json", "/no/such/tokenizer.json"),
        ("data.sequence_length=1000000", "4096 positions"),
        ("out=", "out"),
        ("justaword", "section.key=value"),
        ("train.steps=[", "YAML"),
    ],
)
def test_wrong_overrides(run_file, capsys, override, message) -> None:
    assert message in refused(capsys, "train", run_file, override)


def test_wrong_files(tmp_path, capsys) -> None:
    bad = tmp_path / "bad.yaml"
    for text, message in (
        ("a: [", "not valid YAML"),
        ("- 1\n- 2", "must hold a mapping"),
        ("!!python/object/apply:os.system ['echo']", "not valid YAML"),
        ("model: {preset: 3}", "preset"),
        ("x: " + "[" * 3000, "YAML"),
    ):
        bad.write_text(text)
        assert message in refused(capsys, "train", bad)
    bad.write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in refused(capsys, "train", bad)
    assert "no-such.yaml" in refused(capsys, "train", tmp_path / "no-such.yaml")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "ok.yaml").write_text(f"out: {tmp_path / 'out'}\ndata: {{source: {tmp_path / 'empty.txt'}}}")
    assert "no text" in refused(capsys, "train", tmp_path / "ok.yaml")


def test_wrong_generate_and_convert(tmp_path, capsys) -> None:
    assert "no folder" in refused(capsys, "generate", tmp_path / "nothing", "--prompt", "a")
    (tmp_path / "config.json").write_text("{")
    assert "not valid JSON" in refused(capsys, "generate", tmp_path, "--prompt", "a")
    assert "prompt" in refused(capsys, "generate", tmp_path)
    assert "temperature" in refused(capsys, "generate", tmp_path, "--prompt", "a", "--temperature", "-1")
    assert "unknown format" in refused(capsys, "convert", tmp_path, tmp_path / "x", "--to", "fp9")
    assert "no folder" in refused(capsys, "convert", tmp_path / "nothing", tmp_path / "x")
    assert "same folder" in refused(capsys, "convert", tmp_path, tmp_path)


def test_a_run_without_a_checkpoint_says_so(tmp_path, capsys) -> None:
    import json

    from whalepod.spec.model import to_config
    from whalepod.spec.presets import load_model_spec

    (tmp_path / "config.json").write_text(json.dumps(to_config(load_model_spec("v3-mini"))))
    (tmp_path / "run.yaml").write_text("model: v3-mini")
    assert "no checkpoint yet" in refused(capsys, "generate", tmp_path, "--prompt", "a")
    (tmp_path / "checkpoints" / "step_00000005").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000005" / "state.json").write_text("{}")
    assert "none of the 1 checkpoints" in refused(capsys, "generate", tmp_path, "--prompt", "a")
