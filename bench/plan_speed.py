"""How long the planner's commands take, import included: each a process of its own, the middle of five.

python bench/plan_speed.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from record import save

COMMANDS = (
    "plan deepseek-v3 --gpus 2048xH800 --for train",
    "plan deepseek-v3 --gpus 64xH200 --for serve",
    "scale deepseek-v3 --gpu H800 --for train --counts 8..16384",
    "scale deepseek-v3 --gpu H100 --for serve --counts 8..16384",
    "accuracy",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results/plan_speed.json"))
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {command: [] for command in COMMANDS}
    for _ in range(args.rounds):
        for command, times in seconds.items():
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "whalepod", *command.split()], check=True, stdout=subprocess.DEVNULL
            )
            times.append(time.perf_counter() - start)
    for command, times in seconds.items():
        print(f"{median(times):6.2f} s ({min(times):.2f} to {max(times):.2f})  whalepod {command}")
    save(args.out, {"seconds": seconds})


if __name__ == "__main__":
    main()
