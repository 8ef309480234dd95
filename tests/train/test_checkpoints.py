"""Checkpoints survive: whatever kills their writer, fills its disk or damages them afterwards."""

from __future__ import annotations

import copy
import errno
import json
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from whalepod.parallel import checkpoint_files, checkpoint_writer
from whalepod.parallel.checkpoint_files import CheckedFile, Progress, newest_whole, path_of, steps_saved
from whalepod.parallel.comm import Axis
from whalepod.spec.errors import UserError
from whalepod.spec.run import make_run
from whalepod.train.metrics import read_metrics
from whalepod.train.start import train

ALONE = Axis("alone")
KILLED = 9


def write(folder: Path, step: int, size: int = 100, keep: int = 2, keep_every: int = 0) -> Path:
    """A checkpoint of two files, as the writers make them."""
    begun = checkpoint_files.begin(folder, step)
    files = {}
    for name in ("a.safetensors", "b.safetensors"):
        file = CheckedFile(begun / name)
        file.write(bytes([step]) * size)
        files[name] = file.close()
    path = checkpoint_files.commit(folder, Progress(step=step), files)
    checkpoint_files.retain(folder, step, keep, keep_every)
    return path


def assert_whole(path: Path, step: int) -> None:
    assert checkpoint_files.damage(path) is None
    assert checkpoint_files.read_progress(path).step == step
    assert (path / "a.safetensors").read_bytes() == bytes([step]) * 100


def killed_at(moment: int, act: Any) -> bool:
    """Does `act` in a process that dies, without any clean-up, before its `moment`-th operation on files.
    Returns whether it died."""
    child = os.fork()
    if child == 0:
        left = moment

        def dying(operation: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os._exit(KILLED)
                return operation(*args, **kwargs)

            return call

        try:
            for owner, names in (
                (os, ("fsync", "rmdir", "unlink", "open")),
                (Path, ("mkdir", "rename", "open")),
                (CheckedFile, ("write", "close")),
            ):
                for name in names:
                    setattr(owner, name, dying(getattr(owner, name)))
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


def test_a_kill_before_any_operation_on_files_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    seen, moment = set(), 0
    died = True
    while died:
        moment += 1
        folder = tmp_path / str(moment)
        write(folder, 1)
        write(folder, 2)
        died = killed_at(moment, lambda folder=folder: write(folder, 3))
        checkpoint_files.remove_stale(folder)  # as the next start does
        newest = newest_whole(folder, ALONE)
        assert newest is not None
        step = checkpoint_files.read_progress(newest).step
        assert_whole(newest, step)
        seen.add(step)
        assert sorted(folder.iterdir()) == [path_of(folder, step) for step in steps_saved(folder)]
        write(folder, 4)  # and it can go on
        assert_whole(path_of(folder, 4), 4)
    assert seen == {2, 3}
    assert moment > 15


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "cut": (lambda p: cut(p / "b.safetensors"), "b.safetensors has 99 bytes, its manifest says 100"),
    "bit": (lambda p: flip(p / "b.safetensors"), "b.safetensors is damaged: its CRC-32 is not that"),
    "gone": (lambda p: (p / "a.safetensors").unlink(), "it has no a.safetensors"),
    "state": (lambda p: flip(p / "state.json"), "state.json is damaged"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "it has no manifest.json"),
    "torn manifest": (lambda p: cut(p / "manifest.json"), "it cannot be read"),
    "foreign": (
        lambda p: (p / "c.safetensors").write_bytes(b""),
        "c.safetensors, which its manifest",
    ),
    "fifo": (lambda p: ((p / "a.safetensors").unlink(), os.mkfifo(p / "a.safetensors")), "is not a file"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    damage, message = DAMAGES[what]
    write(tmp_path, 1)
    damage(write(tmp_path, 2))
    with caplog.at_level(logging.WARNING):
        assert newest_whole(tmp_path, ALONE) == path_of(tmp_path, 1)
    (record,) = caplog.records
    assert f"{path_of(tmp_path, 2)} is passed over: " in record.getMessage()
    assert message in record.getMessage()
    write(tmp_path, 2)  # the run comes there again
    assert newest_whole(tmp_path, ALONE) == path_of(tmp_path, 2)
    shutil.rmtree(path_of(tmp_path, 1))
    damage(path_of(tmp_path, 2))
    with pytest.raises(UserError, match=r"none of the 1 checkpoints in .* is whole"):
        newest_whole(tmp_path, ALONE)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", ".."])
def test_a_manifest_names_files_of_its_folder_only(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "crc32": 0}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert "manifest.json does not describe" in (checkpoint_files.damage(path) or "")


def test_the_newest_and_every_so_many_stay(tmp_path: Path) -> None:
    for step in range(1, 11):
        write(tmp_path, step, keep=2, keep_every=4)
    assert steps_saved(tmp_path) == [4, 8, 9, 10]


def test_a_checkpoint_in_the_background_is_of_its_own_step(
    run_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer is held up until training is a step further, and writes what the state was."""
    run_values["train"] |= {"evaluate_every": 0, "steps": 4, "keep_checkpoints": 9}
    plain = copy.deepcopy(run_values) | {"out": str(tmp_path / "plain")}
    plain["train"]["checkpoint_async"] = False
    train(make_run(plain), quiet=True)
    go_on, write_shares = threading.Event(), checkpoint_writer.write_shares

    def slow(path: Path, shares: Any) -> Any:
        assert go_on.wait(60)
        return write_shares(path, shares)

    def further(trainer: Any) -> Any:
        out = step(trainer)
        if trainer.progress.step == 2:  # ... of which this is the third
            assert steps_saved(tmp_path / "run" / "checkpoints") == []
            go_on.set()
        return out

    from whalepod.train.loop import Trainer

    step = Trainer.step
    monkeypatch.setattr(checkpoint_writer, "write_shares", slow)
    monkeypatch.setattr(Trainer, "step", further)
    train(make_run(run_values), quiet=True)
    for name in (2, 4):
        ours, theirs = (path_of(tmp_path / run / "checkpoints", name) for run in ("run", "plain"))
        (shard,) = ours.glob("*.safetensors")
        assert shard.read_bytes() == (theirs / shard.name).read_bytes()


def test_a_full_disk_is_told_and_training_goes_on(
    run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_file = CheckedFile.write
    full = True

    def no_space(file: CheckedFile, data: Any) -> None:
        if full and file.bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_file(file, data)

    monkeypatch.setattr(CheckedFile, "write", no_space)
    config = make_run(run_values)
    folder = Path(config.out) / "checkpoints"
    with pytest.raises(UserError, match="step 6 could not be written: rank 0: No space left on device"):
        train(config, quiet=True)
    lines = [r.getMessage() for r in caplog.records if "could not be written" in r.getMessage()]
    assert [line.split(" could")[0] for line in lines] == [f"checkpoint of step {n}" for n in (2, 4, 6)]
    assert len(read_metrics(Path(config.out) / "metrics.jsonl")) == 6
    assert list(folder.iterdir()) == []
    full = False
    assert train(config, quiet=True).failed_checkpoints == 0
    assert steps_saved(folder) == [4, 6]


def test_a_run_whose_text_has_changed_is_refused(
    run_values: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    shutil.copytree(corpus, text)
    run_values["data"]["source"] = str(text)
    train(make_run(run_values), until=2, quiet=True)
    first = sorted(text.iterdir())[0]
    content = first.read_text()
    first.write_text(content.replace("value", "other"))
    with pytest.raises(UserError, match="the text has changed since checkpoint") as caught:
        train(make_run(run_values), quiet=True)
    assert "\n" not in str(caught.value)
    first.write_text(content)
    assert train(make_run(run_values), quiet=True).steps == 6


def test_damage_in_the_newest_checkpoint_costs_the_steps_since_the_one_before(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    whole = make_run(run_values | {"out": str(tmp_path / "whole")})
    train(whole, quiet=True)
    config = make_run(run_values)
    train(config, until=4, quiet=True)
    flip(next(path_of(Path(config.out) / "checkpoints", 4).glob("*.safetensors")))
    train(config, quiet=True)
    ours, theirs = (read_metrics(Path(c.out) / "metrics.jsonl") for c in (config, whole))
    assert [row["loss"] for row in ours] == [row["loss"] for row in theirs]
    assert steps_saved(Path(config.out) / "checkpoints") == [4, 6]
