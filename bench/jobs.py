"""Commands that train, run as a user runs them: what they have written, and their processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from whalepod.parallel.checkpoint_files import steps_saved
from whalepod.train.metrics import read_metrics

PATIENCE_S = 240  # of a loaded machine


class Job:
    """One command (or several that belong together) training over two workers, and what it has written."""

    def __init__(self, folder: Path, commands: list[list[str]]) -> None:
        self.folder = folder
        self.errors = [folder.with_name(f"{folder.name}-{i}.err") for i in range(len(commands))]
        self.processes = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors.open("w"), text=True)
            for command, errors in zip(commands, self.errors, strict=True)
        ]

    def rows(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    def wait_until(self, what: Callable[[], Any]) -> Any:
        end = time.monotonic() + PATIENCE_S
        while not (found := what()):
            assert time.monotonic() < end, self.told()
            assert all(process.poll() is None for process in self.processes), self.told()
            time.sleep(0.05)
        return found

    def reach(self, step: int) -> None:
        self.wait_until(lambda: (rows := self.rows()) and rows[-1]["step"] >= step)

    def saved(self) -> int:
        return max(steps_saved(self.folder / "checkpoints"), default=0)

    def tree(self) -> list[int]:
        """All processes of it, the first ones first."""
        children = _children()
        found = [process.pid for process in self.processes if process.poll() is None]
        for pid in found:  # grows on the way
            found += children.get(pid, [])
        return found

    def workers(self) -> list[int]:
        """Those at the ends of the tree, which train."""
        children = _children()

        def trains(pid: int) -> bool:
            with suppress(FileNotFoundError):
                return b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()
            return False

        return sorted(pid for pid in self.tree() if pid not in children and trains(pid))

    def told(self) -> str:
        return "\n".join(errors.read_text()[-3000:] for errors in self.errors)

    def kill(self) -> None:
        """kill -9 of every process of it; waits until they are gone."""
        for pid in self.tree():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.end()

    def end(self) -> list[int]:
        return [process.wait(PATIENCE_S) for process in self.processes]


def _children() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                found.setdefault(parent, []).append(int(entry.name))
    return found
