"""A profile from what was measured: the machine's plain fields, the file, and a table of it."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from whalepod.calibrate.kernels import DTYPES, short
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import Gpu, load_gpu, spelled_gpu
from whalepod.spec.measured import Product, profile_folder, profile_name
from whalepod.text.tokenizer import write_atomically
from whalepod.train.metrics import GIB


def write_profile(gpu: Gpu, out: Path | None = None) -> Path:
    """Writes the profile to `out`, else where its name is looked up; returns the file."""
    check_out(out)
    path = out or profile_folder() / f"{gpu.name}.yaml"
    text = yaml.safe_dump(profile_values(gpu), sort_keys=False, default_flow_style=None, width=110)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"cannot write the hardware profile {path}: {error.strerror}") from None
    load_gpu(path)
    return path


def profile_values(gpu: Gpu) -> dict[str, Any]:
    """The profile's fields as they are written, without what is unset."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if v is not None and v not in ((), {})}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    return plain(asdict(gpu))


def profile_table(gpu: Gpu) -> Any:
    """What was measured, in short."""
    from rich.table import Table

    found = gpu.measured
    assert found is not None
    table = Table(title=gpu.title, title_justify="left", box=None, show_header=False)
    for precision in DTYPES:
        best = {
            "products": max(x.flop_s for x in found.products if x.precision == precision),
            "grouped": max((x.flop_s for x in found.grouped if x.precision == precision), default=0),
            "attention": max(
                (x.forward_flop_s for x in found.attention if x.precision == precision), default=0
            ),
        }
        rates = ", ".join(f"{what} {rate / 1e12:.3g}" for what, rate in best.items())
        table.add_row(f"best in {precision}, TFLOP/s", rates)
    table.add_row(
        "memory, GB/s",
        f"elementwise {found.stream_gb_s:.3g}, picked rows {found.gather_gb_s:.3g}, "
        f"AdamW {found.optimizer_gb_s:.3g}",
    )
    table.add_row(
        "a small operation", f"alone {found.dispatch_us:.3g} us, in training {found.operation_us:.3g} us"
    )
    for op in dict.fromkeys(row.op for row in found.collectives):
        rows = [row for row in found.collectives if row.op == op]
        ranks = max(row.ranks for row in rows)
        times = ", ".join(
            f"{x.seconds * 1e3:.3g} ms of {x.bytes >> 10} KiB" for x in rows if x.ranks == ranks
        )
        table.add_row(f"{op}, {ranks} workers", times)
    return table


def check_out(out: Path | None) -> None:
    if out is not None and out.suffix.lower() not in (".yaml", ".yml"):
        raise UserError(f"a hardware profile must end in .yaml, not {out.name[:80]!r}")


def check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise UserError(
            f"a profile's name has letters, digits, dots and dashes, at most 64, not {name[:80]!r}"
        )


def described(place: torch.device, name: str | None, products: tuple[Product, ...], gb_s: float) -> Gpu:
    """The profile's plain fields. A CPU's peaks are what was reached; a known accelerator keeps its own."""
    on_cpu, machine = place.type == "cpu", machine_name(place)
    known = None if on_cpu else spelled_gpu(machine)
    reached = {p: short(max(x.flop_s for x in products if x.precision == p) / 1e12) for p in DTYPES}
    tflops = dict(known.tflops) if known else reached
    memory = _host_memory() / cores() if on_cpu else torch.cuda.mem_get_info(place)[1]
    by_us = f"measured, {today()}"
    fields: dict[str, Any] = {
        "name": name or ("cpu" if on_cpu else profile_name(machine)),
        "title": f"{'one core of ' if on_cpu else ''}{machine}, {by_us}",
        "tflops": tflops,
        "reachable": {p: short(min(1.0, reached[p] / tflops[p])) for p in reached if p in tflops},
        "memory_gib": short(memory / GIB),
        "gpus_per_node": cores() if on_cpu else torch.cuda.device_count(),
    }
    if known:
        ours = dict.fromkeys(("reachable", "memory_gib", "gpus_per_node"), by_us)
        return replace(known, **fields, aliases=(), price=None, sources={**known.sources, **ours})
    return Gpu(
        **fields,
        architecture="cpu" if on_cpu else _architecture(place),
        vendor="unknown",
        memory_tb_s=short(gb_s / 1e3),
        sources=dict.fromkeys((*fields.keys() - {"name", "title"}, "memory_tb_s"), by_us),
    )


def _architecture(place: torch.device) -> Any:
    if torch.version.hip:
        return "cdna3"
    major, minor = torch.cuda.get_device_capability(place)
    return "ada" if (major, minor) == (8, 9) else {8: "ampere", 9: "hopper"}.get(major, "blackwell")


def machine_name(place: torch.device) -> str:
    """The processor's or the accelerator's own name."""
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return " ".join(found[1].split())[:200]
    return platform.processor() or platform.machine() or "CPU"


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _host_memory() -> int:
    """Bytes that this machine has, or that its container may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no limit is a word, not a number
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total
