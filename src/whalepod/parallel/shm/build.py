"""The native part of shared memory workers: compiled by `native.py`, loaded as a module of Python."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

import torch

from whalepod.parallel.native import Library, Unavailable

__all__ = ["Unavailable", "load", "will_compile"]

MODULE = "whalepod_shm_native"
TORCH = Path(torch.__file__).parent


def _library() -> Library:
    python = sysconfig.get_paths()["include"]
    if not Path(python, "Python.h").is_file():
        raise Unavailable("Python's headers (python3-dev) are not installed")
    includes = [TORCH / "include", TORCH / "include/torch/csrc/api/include", python]
    compile_flags = (
        # Sums must have the same bits on every rank and in the reference: no fused multiply-add.
        *("-ffp-contract=off", "-fwrapv"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-DTORCH_EXTENSION_NAME={MODULE}",
        *(word for folder in includes for word in ("-isystem", str(folder))),
    )
    folder = TORCH / "lib"
    link = (f"-L{folder}", f"-Wl,-rpath,{folder}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python")
    return Library(MODULE, Path(__file__).parent / "native", compile_flags, link)


def will_compile() -> bool:
    """Whether `load` is going to take its half a minute."""
    try:
        return MODULE not in sys.modules and not _library().is_built()
    except Unavailable:
        return False


def load() -> ModuleType:
    """The native module, built if need be (about half a minute). Raises Unavailable with the reason."""
    if MODULE in sys.modules:
        return sys.modules[MODULE]
    library = _library().file()
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
