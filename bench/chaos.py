"""Random faults over training and serving: what becomes of the job after each.

    python bench/chaos.py [--train 36] [--links 4] [--serve 12] [--seed 0]

Training: a small V3 on two workers, six faults a run at random steps. A run that a fault ended is started
again by the same command, as its user would. When it is through, the loss and gradient norm of every step
must be those of the undisturbed run, to the bit. Links: the same under torchrun over two hosts (namespaces)
whose link is cut. Serving: the same model on two workers; answers must be those of before, or errors that
say so.

Prints a row a fault, and writes results/chaos.json. Without root there is no full disk and no link.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import hosts
import httpx
import two_hosts
from jobs import Job
from record import save

from whalepod.spec.run import dump_run, make_run

ROOT = Path(__file__).resolve().parents[1]
STEPS, FAULTS_A_RUN, CHECKPOINT_EVERY = 240, 6, 5
DISK_MIB = 96  # seven checkpoints
PATIENCE_S = 120


# ------------------------------------------------------------------------------------------ training


def write_job(folder: Path, text: Path) -> list[str]:
    """run.yaml of a run whose folder is `folder`, and the command that trains it."""
    config = make_run(
        {
            "model": two_hosts.MODEL,
            "layout": {"dp_replicate": 2, "micro_batch": 2, "global_batch": 4, "precision": "fp32"},
            "data": {"source": str(text), "sequence_length": 64},
            "train": {
                "steps": STEPS,
                "evaluate_every": 0,
                "checkpoint_every": CHECKPOINT_EVERY,
                "max_restarts": FAULTS_A_RUN,
                "hang_after_s": 4.0,
            },
            "schedule": {"warmup_steps": 2},
            "device": "cpu",
            "threads_per_worker": 1,
            "out": str(folder),
        }
    )
    file = folder.with_suffix(".yaml")
    file.write_text(dump_run(config))
    return [sys.executable, "-m", "whalepod", "train", str(file)]


def kill_one(job: Job, rng: random.Random) -> bool:
    os.kill(rng.choice(job.workers()), signal.SIGKILL)
    return False


def kill_everything(job: Job, rng: random.Random) -> bool:
    job.kill()
    return True


def stop_one(job: Job, rng: random.Random) -> bool:
    """SIGSTOP for good: the others must find out, name it and start again."""
    told = job.told().count("not arrived: rank")
    os.kill(rng.choice(job.workers()), signal.SIGSTOP)
    job.wait_until(lambda: job.told().count("not arrived: rank") > told)
    return False


def stop_for_a_moment(job: Job, rng: random.Random) -> bool:
    worker = rng.choice(job.workers())
    os.kill(worker, signal.SIGSTOP)
    time.sleep(1.5)
    with suppress(ProcessLookupError):
        os.kill(worker, signal.SIGCONT)
    return False


def ask_to_end(job: Job, rng: random.Random) -> bool:
    job.processes[0].send_signal(rng.choice((signal.SIGTERM, signal.SIGINT)))
    assert job.end() == [0], f"exit code {job.processes[0].returncode}: {job.told()}"
    assert job.saved() == job.rows()[-1]["step"], "it ended without a checkpoint"
    return True


def newest_files(job: Job) -> list[Path]:
    folder = job.folder / "checkpoints"
    whole = [path for path in sorted(folder.glob("step_*")) if not path.name.endswith(".unfinished")]
    return sorted(whole[-1].iterdir())


def tear(job: Job, rng: random.Random) -> bool:
    """After a crash the newest checkpoint's file is cut short."""
    job.kill()
    file = rng.choice(newest_files(job))
    os.truncate(file, rng.randrange(file.stat().st_size))
    return True


def flip(job: Job, rng: random.Random) -> bool:
    """After a crash one bit of the newest checkpoint is another."""
    job.kill()
    file = rng.choice(newest_files(job))
    with file.open("r+b") as data:
        place = rng.randrange(file.stat().st_size)
        data.seek(place)
        byte = data.read(1)[0]
        data.seek(place)
        data.write(bytes([byte ^ (1 << rng.randrange(8))]))
    return True


def fill_disk(job: Job, rng: random.Random) -> bool:
    """The run's disk is full while two checkpoints are due."""
    saved, ballast, refused = job.saved(), job.folder / "ballast", "could not be written"
    told = job.told().count(refused)
    with suppress(OSError), ballast.open("wb") as file:
        while True:
            file.write(b"\0" * 65536)
            file.flush()
    job.wait_until(lambda: job.told().count(refused) >= told + 2)
    assert job.saved() <= saved + CHECKPOINT_EVERY, "a checkpoint was written to a full disk"
    ballast.unlink()
    return False


Fault = Callable[[Job, random.Random], bool]
TRAINING: dict[str, Fault] = {
    "kill -9 of a worker": kill_one,
    "kill -9 of all": kill_everything,
    "SIGSTOP of a worker, for good": stop_one,
    "SIGSTOP of a worker, 1.5 s": stop_for_a_moment,
    "SIGTERM or SIGINT": ask_to_end,
    "torn checkpoint": tear,
    "wrong bit in a checkpoint": flip,
    "full disk": fill_disk,
}
"""Each returns whether the command has ended and is to be started again."""


def losses(job: Job) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in job.rows()]


def disturbed(
    place: Path, text: Path, names: list[str], rng: random.Random
) -> tuple[Job, list[dict[str, Any]]]:
    """A run through all of these faults in this order; when it was further than before each."""
    command = write_job(place, text)
    job, rows = Job(place, [command]), []
    for index, name in enumerate(names):
        job.reach(round((index + rng.uniform(0.3, 0.9)) * STEPS / (len(names) + 1)) + 1)
        step, start = job.rows()[-1]["step"], time.monotonic()
        row = {"kind": "training", "fault": name, "step": step}
        rows.append(row)
        try:
            if TRAINING[name](job, rng):
                job = Job(place, [command])
            job.reach(step + 1)
            row["further_after_s"] = round(time.monotonic() - start, 1)
        except AssertionError as error:
            row["ended"] = f"not through: {' '.join(str(error).split())[-300:]}"
            job.kill()
            return job, rows
    job.end()
    return job, rows


def train_through(place: Path, text: Path, count: int, rng: random.Random) -> list[dict[str, Any]]:
    calm = Job(place / "calm", [write_job(place / "calm", text)])
    assert calm.end() == [0], calm.told()
    expected = losses(calm)
    kinds = list(TRAINING)
    if not mounted(place / "disk"):
        kinds.remove("full disk")
    names = [kinds[i % len(kinds)] for i in range(count)]
    rng.shuffle(names)
    out = []
    for number, first in enumerate(range(0, count, FAULTS_A_RUN)):
        job, rows = disturbed(place / "disk" / f"run{number}", text, names[first : first + FAULTS_A_RUN], rng)
        code = job.processes[0].returncode
        same = losses(job) == expected
        for row in rows:
            row.setdefault(
                "ended", "same losses" if same and code == 0 else f"other losses, exit code {code}"
            )
            show(row)
        out += rows
        shutil.rmtree(job.folder)
    return out


def mounted(folder: Path) -> bool:
    """A small disk of its own; False where one cannot be made, and then an ordinary folder."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


# ---------------------------------------------------------------------------------------------- links


def cut_links(place: Path, text: Path, count: int, rng: random.Random) -> list[dict[str, Any]]:
    """One job over two hosts, whose link is cut again and again."""
    out: list[dict[str, Any]] = []
    steps = 20 * (count + 1)
    with hosts.two_nodes(rate_mbit=100) as names:
        calm = two_hosts.run(two_hosts.job("dp", place / "calm-link", str(text), steps), names)
        job = two_hosts.Job(two_hosts.job("dp", place / "cut-link", str(text), steps), names)
        for host in range(hosts.NODES):
            job.start(host)
        for index in range(count):
            job.wait(lambda i=index: job.steps() >= 20 * i + rng.randint(3, 9), PATIENCE_S * 2, "its steps")
            step, start, seconds = job.steps(), time.monotonic(), rng.uniform(0.5, 6.0)
            side = rng.choice(names)
            hosts.set_link(side, up=False)
            time.sleep(seconds)
            hosts.set_link(side, up=True)
            job.wait(lambda s=step: job.steps() > s + 1, PATIENCE_S, "going on")
            out.append(
                {
                    "kind": "links",
                    "fault": "link cut",
                    "step": step,
                    "further_after_s": round(time.monotonic() - start, 1),
                }
            )
        job.finish()
        for row in out:
            row["ended"] = "same losses" if job.losses() == calm.losses() else "other losses"
            show(row)
    return out


# -------------------------------------------------------------------------------------------- serving

PROMPTS = ("def read(", "import os\n", "class Point:\n    def ", "for line in ")


class Server:
    """`whalepod serve` on two workers, and its address."""

    def __init__(self, model: Path, log: Path) -> None:
        options = ["--port", "0", "--dtype", "fp32", "--cache-gib", "0.01", "--tp", "2"]
        self.job = Job(log, [[sys.executable, "-m", "whalepod", "serve", str(model), *options]])
        self.job.wait_until(lambda: "http://" in self.job.told())
        self.url = "http://" + self.job.told().split("http://")[1].split()[0].rstrip("/,.")

    def ask(self, prompt: str, **more: Any) -> httpx.Response:
        body = {"model": "calm", "prompt": prompt, "max_tokens": 24, "temperature": 0} | more
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)

    def texts(self) -> list[str]:
        return [self.ask(prompt).json()["choices"][0]["text"] for prompt in PROMPTS]

    def end(self) -> int:
        self.job.processes[0].terminate()
        return self.job.end()[0]


def kill_worker(server: Server, rng: random.Random) -> str:
    """Its requests get an error that says so, /health tells, and it ends by itself when asked."""
    others = [pid for pid in server.job.workers() if pid != server.job.processes[0].pid]
    os.kill(rng.choice(others), signal.SIGKILL)
    answer = server.ask(rng.choice(PROMPTS))
    assert answer.status_code >= 500, answer.status_code
    assert answer.json()["error"]["message"], answer.text
    assert httpx.get(f"{server.url}/health").status_code == 503
    assert server.end() == 0
    return f"{answer.status_code}, /health 503, exit 0; started again: same tokens"


def kill_server(server: Server, rng: random.Random) -> str:
    server.job.kill()
    return "started again: same tokens"


def pause_worker(server: Server, rng: random.Random) -> str:
    others = [pid for pid in server.job.workers() if pid != server.job.processes[0].pid]
    worker = rng.choice(others)
    os.kill(worker, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(worker, signal.SIGCONT)
    return "same tokens"


def leave(server: Server, rng: random.Random) -> str:
    """A client that reads one piece and is gone."""
    body = {"model": "calm", "prompt": rng.choice(PROMPTS), "max_tokens": 60, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
    return "same tokens"


def hostile(server: Server, rng: random.Random) -> str:
    bodies = [b"[" * 5000, b'{"prompt": 1e999}', b"\xff\xfe", b'{"prompt": "a", "max_tokens": -1}', b"{}"]
    answer = httpx.post(f"{server.url}/v1/completions", content=rng.choice(bodies), timeout=60)
    assert 400 <= answer.status_code < 500, answer.status_code
    return "4xx, same tokens"


SERVING: dict[str, Callable[[Server, random.Random], str]] = {
    "kill -9 of a serving worker": kill_worker,
    "kill -9 of the server": kill_server,
    "SIGSTOP of a serving worker, 1.5 s": pause_worker,
    "a client leaves": leave,
    "a hostile body": hostile,
}


def serve_through(place: Path, model: Path, count: int, rng: random.Random) -> list[dict[str, Any]]:
    server = Server(model, place / "server")
    expected, out = server.texts(), []
    kinds = list(SERVING)
    for number in range(count):
        name = kinds[number % len(kinds)]
        row: dict[str, Any] = {"kind": "serving", "fault": name}
        start = time.monotonic()
        try:
            row["ended"] = SERVING[name](server, rng)
            if server.job.processes[0].poll() is not None:
                server = Server(model, place / "server")
            if server.texts() != expected:
                row["ended"] = "other tokens"
        except (AssertionError, httpx.HTTPError) as error:
            row["ended"] = f"not as it should: {error!r}"[:300]
            server.job.kill()
            server = Server(model, place / "server")
        row["further_after_s"] = round(time.monotonic() - start, 1)
        show(row)
        out.append(row)
    assert server.end() == 0
    return out


# ----------------------------------------------------------------------------------------------------


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['fault']:36} step {row.get('step', '-')!s:>4}  on again after "
        f"{row.get('further_after_s', '-')!s:>5} s  {row['ended']}",
        flush=True,
    )


def is_good(row: dict[str, Any]) -> bool:
    return row["ended"].endswith(("same losses", "same tokens")) and not row["ended"].startswith("not")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--train", type=int, default=36)
    parser.add_argument("--links", type=int, default=4)
    parser.add_argument("--serve", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "chaos.json")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        text = place / "text"
        text.mkdir()
        for source in sorted(Path(os.__file__).parent.glob("*.py"))[:40]:
            shutil.copy(source, text)
        try:
            rows += train_through(place, text, args.train, rng)
            if args.links and os.geteuid() == 0:
                rows += cut_links(place, text, args.links, rng)
            if args.serve:
                rows += serve_through(place, place / "calm", args.serve, rng)
        finally:
            subprocess.run(["umount", str(place / "disk")], check=False, capture_output=True)
    good = sum(is_good(row) for row in rows)
    print(f"{len(rows)} faults, {good} with the undisturbed run's losses or tokens afterwards")
    save(args.out, {"seed": args.seed, "faults": len(rows), "as_they_should": good, "rows": rows})


if __name__ == "__main__":
    main()
