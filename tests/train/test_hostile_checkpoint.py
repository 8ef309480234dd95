"""A checkpoint is data: nothing in one is ever executed, and one that lies is refused with one line."""

from __future__ import annotations

import io
import json
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from whalepod.parallel.checkpoint_files import path_of
from whalepod.parallel.trained import read_model
from whalepod.serve.generate import load_model
from whalepod.spec.errors import UserError
from whalepod.spec.run import RunConfig, make_run
from whalepod.train.start import train


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def run(run_values: dict[str, Any], tmp_path: Path) -> tuple[RunConfig, Path]:
    """A run of two steps, and its checkpoint."""
    config = make_run(run_values)
    train(config, until=2, quiet=True)
    return config, path_of(Path(config.out) / "checkpoints", 2)


def agree(path: Path) -> None:
    """Makes the manifest agree with what is there, as whoever forges files would."""
    files = {
        p.name: {"bytes": p.stat().st_size, "crc32": zlib.crc32(p.read_bytes())}
        for p in path.iterdir()
        if p.name != "manifest.json" and p.name[0] != "."
    }
    (path / "manifest.json").write_text(json.dumps({"files": files}))


def shard(path: Path) -> Path:
    (found,) = path.glob("*.safetensors")
    return found


def bytes_of(bomb: Bomb) -> bytes:
    stream = io.BytesIO()
    torch.save({"model": bomb}, stream)
    return stream.getvalue()


def all_readers(config: RunConfig) -> list[Callable[[], Any]]:
    """Whatever reads checkpoints: training goes on, serving, export."""
    return [
        lambda: train(config, until=4, quiet=True),
        lambda: load_model(config.out, "fp32", "cpu"),
        lambda: read_model(Path(config.out), config.model_spec()),
    ]


def test_pickles_beside_the_tensors_are_never_opened(run: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, path = run
    bomb = Bomb(tmp_path / "executed")
    for name in (".metadata", "__0_0.distcp", "model.pt", "optimizer.pt"):
        (path / name).write_bytes(pickle.dumps(bomb) if name[0] == "." else bytes_of(bomb))
        (Path(config.out) / name).write_bytes(bytes_of(bomb))
    agree(path)
    for read in all_readers(config)[::-1]:
        read()
    assert not bomb.mark.exists()
    pickle.loads((path / ".metadata").read_bytes())
    assert bomb.mark.exists()  # it would have gone off


def lie(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """A safetensors file with another header over the same tensors."""

    def changed(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header = change(header) or header
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return changed


NORM = "model/norm.weight"


def sharding(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    """Another word on where in the whole the tensors belong."""

    def changed(header: dict[str, Any]) -> None:
        places = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
        header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(change(places) or places)

    return changed


FORGED: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "huge header": lambda data: (2**62).to_bytes(8, "little") + data[8:],
    "no JSON": lambda data: data[:8] + b"\xff" * (len(data) - 8),
    "deep JSON": lambda data: (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "beyond the end": lie(lambda h: h[NORM].update(data_offsets=[0, 2**60])),
    "huge shape": lie(lambda h: h[NORM].update(shape=[2**40])),
    "negative shape": lie(lambda h: h[NORM].update(shape=[-32])),
    "no shape": lie(lambda h: h[NORM].pop("shape") and None),
    "unknown type": lie(lambda h: h[NORM].update(dtype="PICKLE")),
    "list": lie(lambda h: [h]),
    "missing": lie(lambda h: h.update({"model/other": h.pop(NORM)})),
    "other shape": lie(lambda h: h[NORM].update(shape=[4, 8])),
    "elsewhere": lie(sharding(lambda p: p[NORM].update(saved_offsets=[2**40]))),
    "before the start": lie(sharding(lambda p: p[NORM].update(saved_offsets=[-8]))),
    "no offsets": lie(sharding(lambda p: p[NORM].clear())),
    "text for offsets": lie(sharding(lambda p: p[NORM].update(saved_offsets="__import__('os')"))),
    "no places": lie(lambda h: h["__metadata__"].update(DCP_SHARDING_INFO="[]")),
    "only in part": lambda data: save({NORM: torch.zeros(8)}),
}


@pytest.mark.parametrize("forged", [*FORGED, "pickle", "zip"])
def test_a_forged_file_is_one_line(run: tuple[RunConfig, Path], tmp_path: Path, forged: str) -> None:
    config, path = run
    bomb = Bomb(tmp_path / "executed")
    kinds: dict[str, Callable[[bytes], bytes]] = FORGED | {
        "pickle": lambda data: pickle.dumps(bomb),
        "zip": lambda data: bytes_of(bomb),
    }
    file = shard(path)
    file.write_bytes(kinds[forged](file.read_bytes()))
    agree(path)
    for read in all_readers(config):
        with pytest.raises(UserError) as caught:
            read()
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
    assert not bomb.mark.exists()


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"step": "many"}', '{"step": {}, "tokens": 1, "seconds": 1}', "[" * 100_000, "\xff"]
)
def test_a_forged_state_is_one_line(run: tuple[RunConfig, Path], text: str) -> None:
    config, path = run
    (path / "state.json").write_text(text, encoding="latin-1")
    agree(path)
    with pytest.raises(UserError) as caught:
        train(config, until=4, quiet=True)
    assert "\n" not in str(caught.value)
    assert "has no readable state.json" in str(caught.value)
