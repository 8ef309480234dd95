"""The head's loss, forward and backward: ours in slices, plain logits, torch's linear_cross_entropy.

    python bench/head_loss.py [--threads 1]

BF16 on the CPU, interleaved, median of seven; the error is of the loss against float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions

from whalepod.models.loss import head_loss


def plain(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).float(), t, reduction="sum")


def torchs(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.linear_cross_entropy(h, w, t, reduction="sum", options=LinearCrossEntropyOptions())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "sliced (whalepod)": head_loss,
        "plain logits": plain,
        "torch linear_cross_entropy": torchs,
    }
    for tokens, hidden, vocab in ((4096, 256, 4096), (2048, 512, 8192)):
        h = torch.randn(tokens, hidden).bfloat16().requires_grad_()
        w = (torch.randn(vocab, hidden) * 0.05).bfloat16().requires_grad_()
        t = torch.randint(0, vocab, (tokens,))
        with torch.no_grad():
            exact = float(F.cross_entropy(h.float() @ w.float().t(), t, reduction="sum"))
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        errors: dict[str, float] = {}
        for _ in range(8):
            for name, way in ways.items():
                start = time.perf_counter()
                loss = way(h, w, t)
                (loss / tokens).backward()
                seconds[name].append(time.perf_counter() - start)
                errors[name] = abs(loss.item() / exact - 1)
        print(f"{tokens} tokens, width {hidden}, vocabulary {vocab}")
        for name, values in seconds.items():
            print(
                f"  {name:28} {statistics.median(values[1:]) * 1e3:7.1f} ms   loss off by {errors[name]:.0e}"
            )


if __name__ == "__main__":
    main()
