"""Compiles the native part once per machine type and user, and loads it.

The library is found by a hash of everything it depends on: sources, compiler, torch, Python and the
processor's features (it is compiled for the very processor). So a home folder shared by unlike machines, or
an upgrade of torch, can never load the wrong one. Ranks that start together build once: the first holds a
file lock, which the system drops if it dies, and the library appears by one rename.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

import torch
from filelock import FileLock

SOURCES = Path(__file__).parent / "native"
MODULE = "whalepod_shm_native"
TORCH = Path(torch.__file__).parent


class Unavailable(RuntimeError):
    """The native part cannot be had here; the message says why in one line."""


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    raise Unavailable("no C++ compiler (g++ or clang++) is installed")


def _compile_flags() -> list[str]:
    python = sysconfig.get_paths()["include"]
    if not Path(python, "Python.h").is_file():
        raise Unavailable("Python's headers (python3-dev) are not installed")
    includes = [TORCH / "include", TORCH / "include/torch/csrc/api/include", python]
    return [
        *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-march=native", "-pthread"),
        # Sums must have the same bits on every rank and in the reference: no fused multiply-add.
        *("-ffp-contract=off", "-fwrapv"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-DTORCH_EXTENSION_NAME={MODULE}",
        *(word for folder in includes for word in ("-isystem", str(folder))),
    ]


def _link_flags() -> list[str]:
    folder = TORCH / "lib"
    return [
        *("-shared", "-pthread", f"-L{folder}", f"-Wl,-rpath,{folder}"),
        *("-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"),
    ]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _key(compiler: str, flags: Sequence[str]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256()
    for part in (version, torch.__version__, sys.version, _processor(), " ".join(flags)):
        digest.update(part.encode() + b"\0")
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def _folder(key: str) -> Path:
    """A private folder for the library: in the user's cache, else in the temporary folder.

    Only a folder that nobody else can write to will do, since what lies there is executed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for base in (cache / "whalepod", Path(tempfile.gettempdir()) / f"whalepod-{os.getuid()}"):
        folder = base / f"shm-{key}"
        try:
            base.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError:
            continue
        if all(_is_private(path) for path in (base, folder)) and os.access(folder, os.W_OK):
            return folder
    raise Unavailable("no folder for the compiled library that only this user may write to")


def _is_private(path: Path) -> bool:
    info = path.lstat()
    is_others = info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not is_others


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise Unavailable(f"compiling failed: {lines[0] if lines else command[0]}")


def _build(compiler: str, flags: Sequence[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        sources = sorted(SOURCES.glob("*.cpp"), key=lambda path: -path.stat().st_size)
        objects = [str(Path(scratch, f"{path.stem}.o")) for path in sources]
        compiles = [
            [compiler, *flags, "-c", str(path), "-o", out] for path, out in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(_run, compiles))
        linked = Path(scratch, library.name)
        _run([compiler, *objects, "-o", str(linked), *_link_flags()])
        linked.rename(library)


def _library(compiler: str, flags: Sequence[str]) -> Path:
    return _folder(_key(compiler, flags)) / f"{MODULE}.so"


def will_compile() -> bool:
    """Whether `load` is going to take its half a minute."""
    try:
        return MODULE not in sys.modules and not _library(_compiler(), _compile_flags()).is_file()
    except Unavailable:
        return False


def load() -> ModuleType:
    """The native module, built if need be (about half a minute). Raises Unavailable with the reason."""
    if sys.platform != "linux":
        raise Unavailable(f"shared memory workers need Linux, this is {sys.platform}")
    if MODULE in sys.modules:
        return sys.modules[MODULE]
    compiler, flags = _compiler(), _compile_flags()
    library = _library(compiler, flags)
    if not library.is_file():
        with FileLock(library.with_suffix(".lock")):
            if not library.is_file():
                _build(compiler, flags, library)
    spec = importlib.util.spec_from_file_location(
        MODULE, library, loader=ExtensionFileLoader(MODULE, str(library))
    )
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as problem:
        raise Unavailable(f"the compiled library does not load: {problem}") from None
    sys.modules[MODULE] = module
    return module
