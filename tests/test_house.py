"""Walls that import-linter cannot see: who may speak of processes, what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import whalepod

ROOT = Path(whalepod.__file__).parent


def modules(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def identifiers(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        found |= {getattr(node, field) for field in ("id", "attr", "arg", "name") if hasattr(node, field)}
    return {name for name in found if isinstance(name, str)}


@pytest.mark.parametrize("path", modules("models", "precision"), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_single_device_code_knows_nothing_of_processes(path: Path) -> None:
    assert not any(name.startswith("torch.distributed") for name in imported(path))
    assert not identifiers(path) & {"rank", "world_size", "mesh", "process_group", "DTensor"}


def test_collectives_are_called_in_one_place() -> None:
    calls = ("all_", "reduce", "broadcast", "gather", "scatter", "barrier", "send", "recv", "init_", "batch_")
    callers = set()
    for path in modules("."):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "dist"
                and node.attr.startswith(calls)
            ):
                callers.add(path.relative_to(ROOT).as_posix())
    assert callers == {"parallel/comm.py", "parallel/mesh.py"}


@pytest.mark.parametrize(
    "statement",
    [
        "import whalepod.spec.run",
        "import whalepod.text.tokenizer",
        "from whalepod.cli import main; main(['models'])",
    ],
)
def test_answers_without_torch(statement: str) -> None:
    code = f"{statement}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_no_pickle_is_loaded_and_yaml_is_safe() -> None:
    for path in modules("."):
        assert not imported(path) & {"pickle", "dill", "cloudpickle"}, path
        source = path.read_text()
        assert "torch.load(" not in source, path
        assert "yaml.load(" not in source or "CSafeLoader" in source or "SafeLoader" in source, path
