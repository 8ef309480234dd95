"""`whalepod doctor` for the terminal: a line for each check, and what to do. Drawn from its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def doctor_view(doc: Mapping[str, Any]) -> Group:
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column()
    for check in doc["checks"]:
        found = Text(check["found"])
        if check["remedy"]:
            found.append(f"\n-> {check['remedy']}", style="bold")
        table.add_row(Text(check["status"], style=STYLES[check["status"]]), Text(check["name"]), found)
    bad = {state: sum(c["status"] == state for c in doc["checks"]) for state in ("failed", "warning")}
    ranks = f"{doc['num_ranks']:,} rank{'s' * (doc['num_ranks'] > 1)} on {doc['num_hosts']:,} host"
    verdict = Text(f"\n{ranks}{'s' * (doc['num_hosts'] > 1)}: ")
    words = (
        "everything is well"
        if doc["status"] == "ok"
        else f"{bad['failed']} failed, {bad['warning']} warnings"
    )
    verdict.append(words, style=STYLES[doc["status"]])
    return Group(table, verdict)
