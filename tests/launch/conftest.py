"""The files of every job for every engine, written once."""

from __future__ import annotations

import pytest
from launch_jobs import job, pairs

from whalepod.launch.launch import Launched, launch


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Launched]:
    """The files of all pairs, in folders with a blank in their names."""
    root = tmp_path_factory.mktemp("jobs of all kinds")
    return {(name, engine): launch(job(name), engine, root / f"{name} {engine}") for name, engine in pairs()}
