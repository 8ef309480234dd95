"""The kernels that stand for BF16 products where the processor has no such instructions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from whalepod.precision import widened

KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def kernel(name: str) -> Any:
    made = widened._widened(name, widened._OPERATIONS[name])
    return lambda *args, **kwargs: made(KEYS, *args, **kwargs)


def random(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


A, B, C = random(3, 12, 16), random(3, 16, 8), random(3, 12, 8)
ENDS = torch.tensor([2, 7, 12], dtype=torch.int32)
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "mm": ((A[0], B[0]), {}),
    "bmm": ((A, B), {}),
    "addmm": ((C[0], A[0], B[0]), {"beta": 0.5, "alpha": 2.0}),
    "baddbmm": ((C, A, B), {"beta": 0.5, "alpha": 2.0}),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_rounding_of_an_fp32_product(name: str) -> None:
    args, named = CALLS[name]
    found = kernel(name)(*args, **named)
    wide = [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    expected = getattr(torch.ops.aten, name)(*wide, **named)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())
    if f"{name}.out" in widened._OPERATIONS:
        out = torch.empty(found.shape, dtype=torch.bfloat16)
        assert kernel(f"{name}.out")(*args, **named, out=out) is out
        assert torch.equal(out, found)


def test_in_place() -> None:
    out = C.clone()
    kernel("baddbmm.out")(out, A, B, out=out)
    assert torch.equal(out, kernel("baddbmm")(C, A, B))


def test_fp32_is_left_alone() -> None:
    a, b = A[0].float(), B[0].float()
    found = kernel("mm")(a, b)
    assert found.dtype == torch.float32
    assert torch.equal(found, a @ b)


def test_attention() -> None:
    q, k, v = random(1, 2, 8, 16), random(1, 2, 8, 16), random(1, 2, 8, 16)
    name = widened._ATTENTION
    out, log_sum = kernel(name)(q, k, v, 0.0, True)
    wide, expected_sum = getattr(torch.ops.aten, name)(q.float(), k.float(), v.float(), 0.0, True)
    assert torch.equal(out, wide.bfloat16())
    assert torch.equal(log_sum, expected_sum)
    grads = kernel(f"{name}_backward")(C.new_ones(out.shape), q, k, v, out, log_sum, 0.0, True)
    assert [g.dtype for g in grads] == [torch.bfloat16] * 3


def test_the_replaced_products_of_this_process() -> None:
    widened.widen_products()
    assert torch.equal(A @ B, (A.float() @ B.float()).bfloat16())
    grouped = torch.nn.functional.grouped_mm(A[0], B, offs=ENDS)
    expected = torch.nn.functional.grouped_mm(A[0].float(), B.float(), offs=ENDS)
    torch.testing.assert_close(grouped.float(), expected, rtol=2**-8, atol=1e-3)
