"""The README's commands do what it says."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from whalepod.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_make_targets_exist_and_the_second_is_what_ci_runs() -> None:
    wanted = [line for line in commands() if line[0] == "make"]
    assert [line[1] for line in wanted] == ["run", "test"]
    for line in wanted:
        plan = subprocess.run(["make", "-n", *line[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
        assert "pip install" in plan.stdout or (ROOT / ".venv" / "ready").exists()
        assert ("whalepod demo" if line[1] == "run" else "pytest") in plan.stdout
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_the_tour(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WHALEPOD_HOME", str(tmp_path / "home"))  # the profile is for this test alone
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    tour = [line for line in commands() if line[0] == "whalepod"]
    assert len(tour) >= 8
    for line in tour:
        # A fifth of the steps, and short sequences: the commands are the README's otherwise.
        small = [re.sub(r"(?<=train.steps=)(\d+)", lambda m: str(int(m[0]) // 5), part) for part in line[1:]]
        if line[1] == "train":
            small += ["data.sequence_length=64", "layout.micro_batch=4", "layout.global_batch=8"]
        elif line[1] == "calibrate":
            small += ["--quick"]
        elif line[1] == "serve":
            serves_until_told_to_end([*line[1:], "--port", "0"])
            continue
        elif "--measure" in line:
            small += ["--global-batch", "8", "--sequence-length", "64"]
        assert main(small) == 0, (line, capsys.readouterr().err)
    out = capsys.readouterr().out
    assert "deepseek-v3" in out
    assert out.count("def main(") == 2


def serves_until_told_to_end(command: list[str]) -> None:
    started = [sys.executable, "-m", "whalepod", *command]
    with subprocess.Popen(started, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("http://" in line for line in process.stderr)
        process.terminate()
        assert process.wait(timeout=60) == 0


def test_the_tree_is_the_tree() -> None:
    tree = re.search(r"```\nsrc/whalepod/\n(.*?)```", README, re.DOTALL)
    assert tree is not None
    named = set(re.findall(r"^  (\w+(?:\.py|/))", tree[1], re.MULTILINE))
    package = ROOT / "src" / "whalepod"
    folders = {f"{p.name}/" for p in package.iterdir() if p.is_dir() and p.name != "__pycache__"}
    files = {p.name for p in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert named == folders | files
