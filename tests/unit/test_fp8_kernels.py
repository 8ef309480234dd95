"""The Triton kernels beside their twins in plain torch, in Triton's interpreter; and compiled for a GPU that
is not here. On a real GPU: tests/gpu/test_fp8_on_gpu.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
CHECKS = Path(__file__).parents[1] / "fp8_checks.py"


def check(name: str, **environment: str) -> None:
    """In a process of its own: Triton asks for its interpreter when kernels are defined."""
    done = subprocess.run(
        [sys.executable, str(CHECKS), name, "cpu"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("name", ["rounding", "broken", "turning", "products", "groups", "sums"])
def test_in_the_interpreter(name: str) -> None:
    check(name, TRITON_INTERPRET="1")


def test_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    check("compile", TRITON_CACHE_DIR=str(tmp_path))
