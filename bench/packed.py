"""Decoding on a CPU is reading weights: how fast do products with few rows read them, packed and not?

    python bench/packed.py [--threads 1]

Weights of 8 MiB each, more of them than the caches hold, are multiplied with 1 to 64 rows in BF16; beside it
is what a sum over as much memory reads. Prints GB/s, writes results/packed.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from record import save
from torch import nn

from whalepod.serve.packed import pack

OUT = Path(__file__).resolve().parents[1] / "results" / "packed.json"
ROWS, COLUMNS, COUNT, ROUNDS = 4096, 1024, 96, 5


def seconds(step: Callable[[int], object]) -> float:
    """Of one of the COUNT steps: the best round."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for index in range(COUNT):
            step(index)
        best = min(best, (time.perf_counter() - start) / COUNT)
    return best


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    size = 2 * ROWS * COLUMNS / 1e9
    plain = [nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.bfloat16) for _ in range(COUNT)]
    packed = [nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.bfloat16) for _ in range(COUNT)]
    for layer in packed:
        pack(layer)
    read = size / seconds(lambda i: plain[i].weight.view(torch.int64).sum())
    found = []
    for rows in (1, 2, 8, 32, 64):
        x = torch.randn(rows, COLUMNS, dtype=torch.bfloat16)
        before, after = (size / seconds(partial(times, layers, x)) for layers in (plain, packed))
        found.append({"rows": rows, "plain_gb_s": before, "packed_gb_s": after})
        print(f"{rows:3} rows: {before:5.1f} GB/s, packed {after:5.1f}: {after / before:.2f} times")
    print(f"reading alone: {read:.1f} GB/s")
    save(OUT, {"threads": threads, "read_gb_s": read, "points": found})


def times(layers: list[nn.Linear], x: torch.Tensor, index: int) -> torch.Tensor:
    return layers[index](x)


if __name__ == "__main__":
    main()
