"""`whalepod generate` with one prompt and with a file of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from learnt import PROMPTS

from whalepod.cli import main
from whalepod.serve.generate import generate, load_model


def asked(capsys: pytest.CaptureFixture[str], *command: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["generate", *command])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_a_file_of_prompts(learnt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load_model(learnt / "hf", "fp32")
    source = tmp_path / "prompts.jsonl"
    lines: list[dict[str, Any]] = [{"prompt": text, "id": i} for i, text in enumerate(PROMPTS)]
    lines[1]["max_tokens"] = 3
    source.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    common = (str(learnt / "hf"), "--batch", str(source), "--max-new-tokens", "9", "--dtype", "fp32")
    code, out, err = asked(capsys, *common)
    assert code == 0
    found = [json.loads(line) for line in out.splitlines()]
    for line, after in zip(lines, found, strict=True):
        count = line.get("max_tokens", 9)
        text = generate(model, tokenizer, line["prompt"], count).text
        assert after == {**line, "text": text, "finish_reason": "length"}
    assert "4 prompts" in err
    code, out, err = asked(capsys, *common, "--out", str(tmp_path / "out.jsonl"), "--json")
    assert code == 0
    assert json.loads(out)["new_tokens"] == 9 * 3 + 3
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == found
    code, out, _ = asked(
        capsys, str(learnt / "hf"), "--prompt", PROMPTS[0], "--max-new-tokens", "9", "--speculate"
    )
    assert (code, out) == (0, PROMPTS[0] + found[0]["text"] + "\n")


def test_bad_input_is_one_line(learnt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "prompts.jsonl"
    folder = str(learnt / "hf")
    for text, message in [
        ("", "no prompt"),
        ('{"prompt": 3}', "line 1: expected"),
        ('{"prompt": "a", "messages": [{}]}', "line 1: expected"),
        ('\n{"prompt": "a"', "line 2 is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"prompt": "a", "max_tokens": "3"}', "line 1: max_tokens"),
        ('{"prompt": "a", "max_tokens": 100000}', "line 1: "),
        ('{"prompt": ""}', "line 1: "),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no chat template"),
    ]:
        source.write_text(text)
        code, _, err = asked(capsys, folder, "--batch", str(source))
        assert (code, message in err) == (2, True), (text[:50], err)
        assert len([line for line in err.splitlines() if line.startswith("whalepod:")]) == 1
    source.write_text('{"prompt": "a"}')
    for command, message in [
        ((folder,), "--prompt, or --batch"),
        ((folder, "--prompt", "a", "--batch", str(source)), "--prompt, or --batch"),
        ((folder, "--batch", str(tmp_path / "nothing")), "cannot read"),
        ((folder, "--batch", str(source), "--json"), "--out"),
        ((folder, "--batch", str(source), "--out", str(tmp_path)), "cannot write"),
        ((folder, "--prompt", "a", "--tp", "3"), "layout.tp 3"),
        ((folder, "--prompt", "a", "--ep", "3"), "layout.ep 3"),
        ((folder, "--prompt", "a", "--dp", "0"), "layout.dp_replicate must be at least 1"),
        ((folder, "--prompt", "a", "--cache-gib", "-1"), "holds no page"),
    ]:
        code, _, err = asked(capsys, *command)
        assert (code, message in err) == (2, True), (command, err)
