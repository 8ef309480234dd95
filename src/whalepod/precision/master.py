"""Mixed precision for parameters on one device: BF16 to compute with, FP32 to remember.

Weights in BF16 have 8 bits of mantissa, so an update below 1/256 of a weight is lost; DeepSeek-V3
(section 3.3.2) therefore keeps master weights and accumulated gradients in FP32. `MasterWeights`
turns parameters into BF16 copies of FP32 masters and collects each gradient, as soon as
autograd has finished it, into an FP32 sum. Masters and sums are flat buffers (one tensor each, the
parameters are views), so that the optimiser, the norm and a reduction over replicas each touch
one long tensor instead of hundreds of short ones.

With `compute_dtype=float32` the parameters are the masters themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class MasterWeights:
    """FP32 masters and gradient sums of `parameters`, which are of `compute_dtype` from now on.

    `decayed` and `plain` are the two flat parameters for an optimiser: matrices, and vectors
    (norms, biases), whose `.grad` is the accumulated gradient. `on_gradient(offset, size)` is
    called after each parameter's gradient of a backward pass is in the sum; offsets count
    elements of the flat buffer, which begins with the last parameters: gradients appear
    roughly from its start to its end.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], compute_dtype: torch.dtype) -> None:
        named = list(reversed(parameters.items()))
        named.sort(key=lambda item: item[1].dim() < 2)
        device = named[0][1].device
        total = sum(p.numel() for _, p in named)
        num_decayed = sum(p.numel() for _, p in named if p.dim() >= 2)
        self.values = torch.empty(total, dtype=torch.float32, device=device)
        self.gradients = torch.zeros_like(self.values)
        self.decayed = self._part(0, num_decayed)
        self.plain = self._part(num_decayed, total)
        self.offsets: dict[str, tuple[int, torch.Size]] = {}
        self.on_gradient: Callable[[int, int], None] | None = None
        self._parameters = [parameter for _, parameter in named]
        self._collectors: list[Callable[[Tensor], None]] = []
        self._copies: list[Tensor] = []
        self._masters: list[Tensor] = []
        self._first = [True] * len(named)
        self._own = compute_dtype != torch.float32
        offset = 0
        for index, (name, parameter) in enumerate(named):
            size = parameter.numel()
            master = self.values[offset : offset + size].view(parameter.shape)
            master.copy_(parameter.detach())
            self.offsets[name] = (offset, parameter.shape)
            parameter.data = master.to(compute_dtype)
            self._copies.append(parameter.data)
            self._masters.append(master)
            self._collectors.append(self._collector(index, offset, size))
            parameter.register_post_accumulate_grad_hook(self._collectors[-1])
            offset += size

    def _part(self, start: int, end: int) -> nn.Parameter:
        part = nn.Parameter(self.values[start:end])
        part.grad = self.gradients[start:end]
        return part

    def _collector(self, index: int, offset: int, size: int) -> Callable[[Tensor], None]:
        total = self.gradients[offset : offset + size]

        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.view(-1)
            # The first gradient of a step overwrites: the buffer is never cleared for its sake.
            if self._first[index]:
                total.copy_(gradient)
                self._first[index] = False
            else:
                total.add_(gradient)
            parameter.grad = None
            if self.on_gradient is not None:
                self.on_gradient(offset, size)

        return collect

    def collect(self) -> None:
        """Takes gradients that came without autograd's hook: pipelines add weight gradients by hand."""
        for parameter, collect in zip(self._parameters, self._collectors, strict=True):
            if parameter.grad is not None:
                collect(parameter)

    def start_step(self) -> None:
        """Forgets the gradients of the last step."""
        self._first = [True] * len(self._first)

    def clear_missing(self) -> None:
        """Zeroes the sums of parameters that got no gradient this step."""
        for first, (offset, shape) in zip(self._first, self.offsets.values(), strict=True):
            if first:
                self.gradients[offset : offset + shape.numel()].zero_()

    @torch.no_grad()
    def write_back(self) -> None:
        """Rounds the masters into the model's parameters: after an optimiser step or a load."""
        if self._own:
            torch._foreach_copy_(self._copies, self._masters)

    def named(self, decayed: Tensor, plain: Tensor) -> dict[str, Tensor]:
        """Views by parameter name of two flat tensors shaped as `decayed` and `plain`."""
        edge = self.decayed.numel()
        views = {}
        for name, (offset, shape) in self.offsets.items():
            flat, start = (decayed, offset) if offset < edge else (plain, offset - edge)
            views[name] = flat[start : start + shape.numel()].view(shape)
        return views
