"""One job over two hosts (network namespaces with a slow link between) trains as it does on one.

The bench (`bench/two_hosts.py`) at a smaller size: the same losses to the bit, and bytes over the link as
the dry run names axes for them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import hosts  # pyright: ignore[reportMissingImports]
import two_hosts  # pyright: ignore[reportMissingImports]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="network namespaces")]


@pytest.fixture
def names() -> Iterator[list[str]]:
    opened = hosts.two_nodes(rate_mbit=1000)
    try:
        made = opened.__enter__()
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"two namespaces and a limited link cannot be made here: {hosts.why(error)}")
    yield made
    opened.__exit__(None, None, None)


def test_two_hosts_train_as_one(names: list[str], tmp_path: Path, corpus: Path, small_model: dict) -> None:
    alone, both = (
        two_hosts.run(two_hosts.job("dp", tmp_path / f"on-{n}", str(corpus), 3, small_model), names, hosts=n)
        for n in (1, 2)
    )
    assert len(both.losses()) == 3
    assert both.losses() == alone.losses()
    planned = two_hosts.planned_bytes(both.config)
    assert set(planned) <= {"dp", "dp_replicate", "data", "stage", "replicas", "expert_data", "world"}
    assert hosts.sent_bytes(names) > 3 * sum(planned.values()) > 0
