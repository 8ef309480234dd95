"""Where the layouts that NVIDIA and DeepSeek shipped rank in the search, and why not higher.

    python bench/shipped_layouts.py

For every full model among the published training runs: the search over all layouts of that many GPUs with
that software; the rank of the run's own pipeline and tensor split among all splits, and the step of the
best against that of the run's own.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from record import save

import whalepod.planner
from whalepod.planner.search import Search, TrainingJob, search
from whalepod.planner.train_accuracy import COLUMNS, parse_row, read_rows

PUBLISHED = Path(whalepod.planner.__file__).parent / "data" / "validation" / "training.csv"
LINE = (
    "{gpus:11s} {software:15s} {split:17s} {rank:>4} {own:11.2f} {published:>10} "
    "{best:12.2f}  {best_split}  {why}"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, default=PUBLISHED)
    parser.add_argument("--out", type=Path, default=Path("results/shipped_layouts.json"))
    args = parser.parse_args()
    figures = []
    print(
        "GPUs        software        split             rank  own step s  published  best step s  best split"
    )
    for row in read_rows(args.rows, COLUMNS):
        if "671B" not in row["model"] or row["note"].startswith("ladder") or "FSDP" in row["note"]:
            continue
        figure = place(row)
        figures.append(figure)
        print(LINE.format(**figure))
    save(args.out, {"rows": figures})


def place(row: dict[str, str]) -> dict[str, Any]:
    """The row's rank among splits by pp x tp x cp, each with its best expert and data axes."""
    run = parse_row(row)
    c = run.candidates
    job = TrainingJob(
        run.spec, run.cluster, run.software, int(c.global_batch[0]), run.sequence_length,
        str(c.precision[0]), mtp=run.mtp,
    )  # fmt: skip
    found = search(job)
    best = found.best(job.limit_gib, 1000)
    split = int(c.pp[0]), int(c.tp[0]), int(c.cp[0])
    ranks = [i for i, r in enumerate(best, 1) if split_of(found, r) == split]
    _, step = run.predict()
    top = found.times.time_step(best[0])
    a = found.candidates
    return {
        "gpus": f"{run.cluster.num_gpus}x{run.cluster.gpu.name}",
        "software": run.software.name,
        "split": f"pp {split[0]} tp {split[1]} ep {int(c.ep[0])}",
        "rank": ranks[0] if ranks else "-",
        "own": step.seconds,
        "published": row["step_s"],
        "best": top.seconds,
        "best_split": f"pp {a.pp[best[0]]} tp {a.tp[best[0]]} ep {a.ep[best[0]]} zero {a.zero[best[0]]}",
        "why": why(step, top),
    }


def split_of(found: Search, row: int) -> tuple[int, int, int]:
    c = found.candidates
    return int(c.pp[row]), int(c.tp[row]), int(c.cp[row])


def why(own: Any, best: Any) -> str:
    """The part of the step in which the run's own layout loses most against the best."""

    def parts(step: Any) -> dict[str, float]:
        shown = {f"exchange ({axis})": t for axis, t in step.exposed.items()}
        return {**step.parts, **shown, "bubble": step.bubble}

    mine, theirs = parts(own), parts(best)
    lost = {name: t - theirs.get(name, 0.0) for name, t in mine.items()}
    name = max(lost, key=lambda n: lost[n])
    return f"{name} {lost[name]:+.1f} s" if lost[name] > 0.02 * own.seconds else ""


if __name__ == "__main__":
    main()
