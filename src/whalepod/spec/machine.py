"""What this machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def main_memory(which: Literal["MemTotal", "MemAvailable"]) -> int:
    """Bytes of this machine's memory, all or free; 8 GiB where it does not say."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(which)), 8 * 2**30)
