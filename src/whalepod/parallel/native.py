"""Compiles a native part once per machine type and user.

The library is found by a hash of everything it depends on: sources, compiler, torch, Python and the
processor's features (it is compiled for the very processor). So a home folder shared by unlike machines, or
an upgrade of torch, can never load the wrong one. Ranks that start together build once: the first holds a
file lock, which the system drops if it dies, and the library appears by one rename.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

_COMPILE = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-march=native", "-pthread")


class Unavailable(RuntimeError):
    """The native part cannot be had here; the message says why in one line."""


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    raise Unavailable("no C++ compiler (g++ or clang++) is installed")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _folder(name: str) -> Path:
    """A private folder for the library: in the user's cache, else in the temporary folder.

    Only a folder that nobody else can write to will do, since what lies there is executed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for base in (cache / "whalepod", Path(tempfile.gettempdir()) / f"whalepod-{os.getuid()}"):
        folder = base / name
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


@dataclass(frozen=True)
class Library:
    """A shared library of all `*.cpp` in a folder. compile, link: flags beyond the usual ones."""

    name: str
    sources: Path
    compile: tuple[str, ...]
    link: tuple[str, ...] = ()

    def is_built(self) -> bool:
        return self._path().is_file()

    def file(self) -> Path:
        """The library, built if need be. Raises Unavailable with the reason."""
        path = self._path()
        if not path.is_file():
            with FileLock(path.with_suffix(".lock")):
                if not path.is_file():
                    self._build(path)
        return path

    def _path(self) -> Path:
        if sys.platform != "linux":
            raise Unavailable(f"native parts need Linux, this is {sys.platform}")
        version = subprocess.run(
            [_compiler(), "--version"], capture_output=True, text=True, check=False
        ).stdout
        digest = hashlib.sha256()
        flags = " ".join((*_COMPILE, *self.compile, *self.link))
        for part in (version, torch.__version__, sys.version, _processor(), flags):
            digest.update(part.encode() + b"\0")
        for path in sorted(self.sources.iterdir()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return _folder(f"{self.name}-{digest.hexdigest()[:20]}") / f"{self.name}.so"

    def _build(self, library: Path) -> None:
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            sources = sorted(self.sources.glob("*.cpp"), key=lambda path: -path.stat().st_size)
            objects = [str(Path(scratch, f"{path.stem}.o")) for path in sources]
            compiles = [
                [_compiler(), *_COMPILE, *self.compile, "-c", str(path), "-o", out]
                for path, out in zip(sources, objects, strict=True)
            ]
            with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
                list(pool.map(_run, compiles))
            linked = Path(scratch, library.name)
            _run([_compiler(), *objects, "-o", str(linked), "-shared", "-pthread", *self.link])
            linked.rename(library)
