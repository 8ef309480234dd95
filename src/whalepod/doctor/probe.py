"""What one rank finds out by itself: versions, limits, memory, the speed of a product, FP8, its disk."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import socket
import tempfile
import time
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch.cuda import nccl

import whalepod
from whalepod.parallel.shm.backend import host_identity
from whalepod.precision.products import multiply, quantize
from whalepod.spec.machine import main_memory
from whalepod.train.metrics import GIB, synchronize

FILE_BYTES = 2**26
_CHUNK = 2**22


@dataclass(frozen=True)
class Disk:
    """Of the folder that a run writes to, MB/s (10^6 bytes) through to the disk. error: why there is none."""

    folder: str
    free_gib: float = 0.0
    write_mb_s: float = 0.0
    read_mb_s: float = 0.0
    fsync_ms: float = 0.0
    sees_first: bool = True  # whether what the first rank wrote there is here too
    error: str | None = None


@dataclass(frozen=True)
class Link:
    """This rank and another, both sending at once: seconds of a few bytes, GB/s (10^9) each way."""

    peer: int
    latency_s: float
    gb_s: float


@dataclass(frozen=True)
class Report:
    """Everything that a rank found. `disk` is of the first rank of a host; `clock_s`: ahead of the first
    rank's; `wrong`: `axis/operation: what came` of collectives."""

    rank: int
    host: str
    host_id: str
    device: str
    versions: dict[str, str]
    open_files: int
    locked_memory: int  # bytes that may be pinned; -1 without limit
    shm_gib: float
    memory_free_gib: float
    tflops: float
    fp8: str
    disk: Disk | None = None
    clock_s: float = 0.0
    clock_error_s: float = 0.0
    links: tuple[Link, ...] = ()
    axes: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Report:
        return _REPORT.validate_json(data)


_REPORT = TypeAdapter(Report)


def examine(device: torch.device, rank: int, folder: Path) -> Report:
    """This rank by itself; all ranks at once, so that what they share is shared."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_cuda else main_memory("MemAvailable") / local
    first_here = int(os.environ.get("LOCAL_RANK", "0")) == 0
    return Report(
        rank=rank,
        host=socket.gethostname(),
        host_id=host_identity() if os.path.exists("/proc/self/ns/net") else socket.gethostname(),
        device=torch.cuda.get_device_name(device) if on_cuda else "cpu",
        versions=versions(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        shm_gib=_shm_gib(),
        memory_free_gib=free / GIB,
        tflops=product_tflops(device),
        fp8=fp8_state(device),
        disk=time_disk(folder) if first_here else None,
    )


def product_tflops(device: torch.device, seconds: float = 0.4) -> float:
    """Of the fastest of many small products, which nothing disturbed: in BF16, on a CPU in FP32."""
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    x = torch.randn(size, size, device=device).to(dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        torch.mm(x, x)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def versions() -> dict[str, str]:
    """Of what must be the same everywhere; `whalepod` with a sum over its source."""
    sources = sorted(Path(whalepod.__file__).parent.rglob("*.py"))
    code = 0
    for source in sources:
        code = zlib.crc32(source.read_bytes(), code)
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "whalepod": f"{whalepod.__version__} (source {code:08x})",
    }
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda or torch.version.hip)
        found["NCCL"] = ".".join(map(str, nccl.version()))
        with suppress(OSError, IndexError):
            found["driver"] = Path("/sys/module/nvidia/version").read_text().split()[0]
    return found


def _shm_gib() -> float:
    return shutil.disk_usage("/dev/shm").total / GIB if os.path.isdir("/dev/shm") else 0.0


def fp8_state(device: torch.device) -> str:
    """`hardware` or `emulated`, once a product in FP8 came out near the one in FP32; else what went wrong."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(256, 256, generator=generator).to(device) for _ in range(2))
    try:
        a, b = quantize(x, (1, 128), "ue8m0"), quantize(w, (128, 128), "ue8m0")
        error = (multiply(a, b, "ue8m0", torch.float32) - x @ w.T).norm() / (x @ w.T).norm()
    except (RuntimeError, ImportError, NotImplementedError) as problem:
        return f"fails: {str(problem).splitlines()[0][:120]}"
    if not float(error) < 0.1:
        return f"wrong by {float(error):.0%}"
    hardware = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    return "hardware" if hardware else "emulated"


def nearest_folder(folder: Path) -> Path:
    """The folder itself, or what is there of its path: nothing is made that a run would stumble over."""
    folder = folder.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def time_disk(folder: Path) -> Disk:
    """Writes, syncs and reads a file of 64 MiB, which is gone afterwards."""
    folder = nearest_folder(folder)
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".whalepod-doctor-") as file:
            return time_file(Path(file.name), folder, free)
    except OSError as error:
        return Disk(str(folder), error=error.strerror or str(error))


def time_file(path: Path, folder: Path, free: int, size: int = FILE_BYTES) -> Disk:
    block = os.urandom(_CHUNK)  # nothing that a file system could compress
    handle = os.open(path, os.O_RDWR)
    try:
        start = time.perf_counter()
        for _ in range(size // _CHUNK):
            if os.write(handle, block) != _CHUNK:
                raise OSError("a file was written in part only")
        os.fsync(handle)
        synced = time.perf_counter()
        os.pwrite(handle, block[:4096], 0)
        again = time.perf_counter()
        os.fsync(handle)
        fsync = time.perf_counter() - again
        if hasattr(os, "posix_fadvise"):  # from the disk, not from memory
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(handle, 0, os.SEEK_SET)
        reading = time.perf_counter()
        while os.read(handle, _CHUNK):
            pass
        read = time.perf_counter() - reading
    finally:
        os.close(handle)
    return Disk(str(folder), free / GIB, size / (synced - start) / 1e6, size / read / 1e6, fsync * 1e3)
