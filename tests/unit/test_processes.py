"""Forks see what their starter sees."""

from __future__ import annotations

import os
from typing import Any

import pytest

from whalepod.parallel import processes


def _seen(answers: Any, names: list[str]) -> None:
    answers.put({name: os.environ.get(name) for name in names})


def test_a_fork_has_the_environment_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["WHALEPOD_HERE", "WHALEPOD_GONE", "OMP_NUM_THREADS"]
    context = processes.context()
    answers = context.Queue()

    def seen() -> dict[str, str | None]:
        call, arguments = processes.as_here(_seen, answers, names)
        fork = context.Process(target=call, args=arguments)
        fork.start()
        found = answers.get(timeout=120)
        fork.join()
        return found

    monkeypatch.setenv("WHALEPOD_GONE", "1")  # if this is the first fork, its server is born with it
    assert seen()["WHALEPOD_GONE"] == "1"
    monkeypatch.delenv("WHALEPOD_GONE")
    monkeypatch.setenv("WHALEPOD_HERE", "new")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert seen() == {"WHALEPOD_HERE": "new", "WHALEPOD_GONE": None, "OMP_NUM_THREADS": "3"}
