"""A schedule as JSON, as a timeline and as a picture."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from whalepod.report.schedule import draw_schedule, parse_times, schedule_json, schedule_table, time_schedule
from whalepod.spec.errors import UserError
from whalepod.spec.presets import load_model_spec
from whalepod.spec.schedule import RULES

V3 = load_model_spec("deepseek-v3")


def test_json_says_all() -> None:
    result = json.loads(json.dumps(schedule_json(time_schedule("1f1b", 4, 8)), allow_nan=False))
    assert result["bubble_fraction"] == pytest.approx(3 / 11)
    assert result["makespan"] == 33
    assert [rank["peak_micro_batches_held"] for rank in result["ranks"]] == [4, 3, 2, 1]
    first = result["ranks"][0]
    assert first["stages"] == [0]
    assert first["steps"][0] == {
        "action": "0F0", "kind": "F", "parts": [{"stage": 0, "kind": "F", "micro_batch": 0}],
        "start": 0, "end": 1,
    }  # fmt: skip
    assert sum(step["end"] - step["start"] for step in first["steps"]) == first["busy"] == 24
    pairs = [
        s for s in schedule_json(time_schedule("dualpipev", 2, 6))["ranks"][0]["steps"] if s["kind"] == "F&B"
    ]
    assert [part["kind"] for part in pairs[0]["parts"]] == ["F", "B"]


def test_schedules_do_equal_work() -> None:
    """Times are of a rank's share, so that two stages per rank take half each."""
    busy = {name: time_schedule(name, 4, 8).timeline.busy for name in RULES}
    for name, each in busy.items():
        assert each == pytest.approx([24] * 4), name


def test_a_model_gives_its_own_stage_times() -> None:
    timed = time_schedule("1f1b", 8, 16, spec=V3)
    assert timed.split is not None
    result = schedule_json(timed)
    assert result["split"]["layers"][-1][1] == 61
    assert result["split"]["imbalance"] > 1
    even = time_schedule("1f1b", 8, 16)
    assert timed.timeline.bubble > even.timeline.bubble
    assert sum(timed.timeline.busy) == pytest.approx(sum(even.timeline.busy))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("width", [60, 116, 200])
def test_timeline_fits_the_terminal(name: str, width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(schedule_table(time_schedule(name, 4, 8), width))
    lines = console.export_text().splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    rows = [line for line in lines if "·" in line]
    assert len(rows) == 4
    assert all("F" in row for row in rows)


@pytest.mark.parametrize("name", ["1f1b", "dualpipev"])
def test_picture(name: str, tmp_path: Path) -> None:
    path = draw_schedule(time_schedule(name, 2, 4), tmp_path / "deep" / "picture.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "1f2b"}, "unknown schedule '1f2b'"),
        ({"times": (1, 2, 3)}, "four positive numbers, of F, B, I and W, not 1, 2, 3"),
        ({"times": (0, 2, 1, 1)}, "four positive numbers"),
        ({"times": (1, float("nan"), 1, 1)}, "four positive numbers"),
        ({"p2p": -1.0}, "p2p at least 0"),
        ({"num_micro_batches": 10**6}, "more than the 60000"),
        ({"pp": 64, "num_micro_batches": 64, "spec": V3}, "61 layers for 64 pipeline stages"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    given = {"name": "1f1b", "pp": 4, "num_micro_batches": 8} | arguments
    with pytest.raises(UserError, match=message):
        time_schedule(**given)


def test_times_from_text() -> None:
    assert parse_times("1, 2,1.5,0.5") == (1, 2, 1.5, 0.5)
    with pytest.raises(UserError, match="such as 1,2,1,1; not 'fast'"):
        parse_times("fast")
