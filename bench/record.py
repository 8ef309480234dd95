"""How every bench writes down what it measured: figures beside the date and the machine."""

from __future__ import annotations

import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch


def save(out: Path, figures: dict[str, Any]) -> None:
    """Writes `out` as JSON; its folder is made. The load average is that of the bench itself, mostly."""
    where = {
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "load_average_after": os.getloadavg()[0],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(where | figures, indent=1) + "\n")
