"""Whether any file, body or word from outside can crash, hang or swell what reads it.

    python bench/fuzz.py [--formats a b] [--inputs 100000] [--seed 0]

Every format that whalepod reads (fuzz_files.py, fuzz_served.py) is given inputs made from valid ones
(fuzz_mutate.py). A reader accepts an input or refuses it with a UserError, over HTTP with a 4xx. Anything
else is a failure: another exception, a crash of the process, more than two seconds of CPU time or 30 s of
silence, 256 MiB more of memory. All in process, with no socket, in one worker a format, whose memory is
limited; one that dies is started again behind the input that killed it. Input n depends on seed, format and n
alone.

Prints a table, and of each kind of failure the smallest input, cut down; exits 1 if there is one. Formats
that were run are replaced in results/fuzz.json and the others stay: a campaign goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fuzz_files
import fuzz_served
from fuzz_format import Format, Refused
from fuzz_mutate import Parts, mutated
from record import save

from whalepod.spec.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CPU_S = 2.0
SILENCE_S = 30.0
ROOM = 2 << 30  # address space beyond what the process has when it begins
GROWTH_KIB = 256 << 10  # of resident memory, by one input
SHRINK_S = 3.0
FORMATS = fuzz_files.FORMATS | fuzz_served.FORMATS
COUNTERS = ("next", "accepted", "refused", "failed")


class Hang(BaseException):
    """Took more than its share of CPU time."""


@dataclass
class Failure:
    """number: of the first input that failed so; parts: the smallest; detail: what was raised."""

    signature: str
    detail: str
    number: int
    parts: Parts
    count: int = 1

    @property
    def size(self) -> int:
        return sum(map(len, self.parts.values()))


@dataclass
class Result:
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    failures: dict[str, Failure] = field(default_factory=dict)

    def add(self, failure: Failure) -> None:
        known = self.failures.get(failure.signature)
        if known is None or failure.size < known.size:
            failure.count += known.count if known else 0
            failure.number = known.number if known else failure.number
            self.failures[failure.signature] = failure
        else:
            known.count += failure.count

    @property
    def failed(self) -> int:
        return sum(failure.count for failure in self.failures.values())


def generator(seed: int, name: str, number: int) -> random.Random:
    return random.Random(f"{seed}/{name}/{number}")


def tried(fuzzed: Format, parts: Parts) -> tuple[str, str] | None:
    """Signature and detail of a failure; None where the input was accepted. Raises Refused where refused."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        try:
            fuzzed.read(parts)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except UserError as error:
        text = str(error)
        if "\n" in text or len(text) > 2000:
            return f"message of {'several lines' if len(text) < 2000 else 'thousands of characters'}", text[
                :300
            ]
        raise Refused from None
    except BaseException as error:  # PyO3's panics, Hang and SystemExit are not Exceptions
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "whalepod/src" in f.filename or "/src/whalepod/" in f.filename]
        frame = (ours or frames)[-1]
        where = f"{Path(frame.filename).name}:{frame.name}"
        detail = (str(error).splitlines() or [""])[0][:300]
        return f"{type(error).__name__} in {where}", detail
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > GROWTH_KIB:
        return "memory", f"more than {GROWTH_KIB >> 10} MiB"
    return None


def campaign(name: str, inputs: int, seed: int, isolated: bool = True) -> Result:
    """`inputs` inputs of a format. isolated: in a process of its own, as a long one should be."""
    result, start = Result(), time.perf_counter()
    if not isolated:
        with _opened(name) as fuzzed:
            for number in range(inputs):
                _one(fuzzed, name, seed, number, result)
    while isolated and result.inputs < inputs:
        _worker(name, inputs, seed, result)
    result.seconds = time.perf_counter() - start
    result.inputs = inputs
    return result


@contextlib.contextmanager
def _opened(name: str) -> Iterator[Format]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        home = os.environ.get("WHALEPOD_HOME")
        os.environ["WHALEPOD_HOME"] = folder  # this user's own hardware profiles are not part of it
        before = signal.signal(signal.SIGPROF, _hang)
        try:
            yield FORMATS[name](Path(folder))
        finally:
            signal.signal(signal.SIGPROF, before)
            os.environ.pop("WHALEPOD_HOME")
            os.environ |= {} if home is None else {"WHALEPOD_HOME": home}


def _hang(_signal: int, _frame: Any) -> None:
    raise Hang(f"more than {CPU_S:g} s")


def _one(fuzzed: Format, name: str, seed: int, number: int, result: Result) -> Failure | None:
    parts = mutated(fuzzed.seeds, fuzzed.kinds, generator(seed, name, number)) if number else fuzzed.seeds[0]
    try:
        found = tried(fuzzed, parts)
    except Refused:
        result.refused += 1
        return None
    if found is None:
        result.accepted += 1
        return None
    result.add(Failure(*found, number, parts))
    return Failure(*found, number, parts)


def _worker(name: str, inputs: int, seed: int, result: Result) -> None:
    """Runs a process until all inputs are done, or it dies; then `result.inputs` is where to go on."""
    context = multiprocessing.get_context("fork")
    counters = context.RawArray(ctypes.c_longlong, len(COUNTERS))
    counters[0] = result.inputs
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, inputs, seed, counters, sender), daemon=True)
    process.start()
    sender.close()
    last, since, found = -1, time.monotonic(), []
    why = None
    while True:
        with suppress(EOFError):
            if receiver.poll(0.5):
                found.append(receiver.recv())
                continue
        if not process.is_alive():
            break
        if counters[0] != last:
            last, since = counters[0], time.monotonic()
        elif time.monotonic() - since > SILENCE_S + 60 * (last == result.inputs):  # the first also sets up
            why = "silence"
            process.kill()
        process.join(0.01)
    process.join()
    with suppress(EOFError):
        while receiver.poll():
            found.append(receiver.recv())
    for failure in found:
        result.add(failure)
    number = counters[0]
    result.accepted += counters[1]
    result.refused += counters[2]
    result.inputs = number
    if process.exitcode:
        if number == inputs or number < 0:
            raise SystemExit(f"{name}: the worker ended with {process.exitcode} outside its inputs")
        seeds, kinds = _seeds(name)
        parts = mutated(seeds, kinds, generator(seed, name, number)) if number else seeds[0]
        died = why or f"exit {process.exitcode}"
        result.add(Failure(f"crash: {died}", f"the worker ended: {died}", number, parts))
        result.inputs = number + 1


def _seeds(name: str) -> tuple[list[Parts], dict[str, str]]:
    """Of a format, asked of a process of its own: making them may use threads, and forks must not."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def tell() -> None:
        with _opened(name) as fuzzed:
            sender.send((fuzzed.seeds, fuzzed.kinds))

    process = context.Process(target=tell)
    process.start()
    found = receiver.recv()
    process.join()
    return found


def _work(name: str, inputs: int, seed: int, counters: Any, sender: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what dying libraries say
    with _opened(name) as fuzzed:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
        gc.freeze()
        result = Result()
        for number in range(counters[0], inputs):
            counters[0] = number
            failure = _one(fuzzed, name, seed, number, result)
            counters[1], counters[2] = result.accepted, result.refused
            if failure is not None:
                sender.send(failure)
        for failure in result.failures.values():
            failure.count = 0
            sender.send(_shrunk(fuzzed, failure))
        counters[0] = inputs


def _shrunk(fuzzed: Format, failure: Failure) -> Failure:
    """The same failure with as little as a few seconds find."""
    until = time.monotonic() + SHRINK_S
    if failure.signature.startswith(("Hang", "memory", "MemoryError")):
        return failure
    for name, data in failure.parts.items():
        best, step = data, max(len(data) // 2, 1)
        while step and time.monotonic() < until:
            at = 0
            while at < len(best) and time.monotonic() < until:
                shorter = best[:at] + best[at + step :]
                with suppress(Refused):
                    found = tried(fuzzed, {**failure.parts, name: shorter})
                    if found and found[0] == failure.signature:
                        best = shorter
                        failure.parts = {**failure.parts, name: best}
                        failure.detail = found[1]
                        continue
                at += step
            step //= 2
    return failure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS), metavar="NAME")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "fuzz.json")
    args = parser.parse_args()
    known = json.loads(args.out.read_text())["formats"] if args.out.is_file() else {}
    failed = 0
    print(
        f"{'format':14}{'inputs':>9}{'inputs/s':>10}{'accepted':>10}{'refused':>9}{'failures':>10}",
        flush=True,
    )
    for name in args.formats:
        result = campaign(name, args.inputs, args.seed)
        failed += result.failed
        rate = result.inputs / result.seconds
        counts = f"{result.accepted:>10}{result.refused:>9}{result.failed:>10}"
        print(f"{name:14}{result.inputs:>9}{rate:>10.0f}{counts}", flush=True)
        shown = []
        for failure in sorted(result.failures.values(), key=lambda f: -f.count):
            parts = {k: repr(v)[1:][:400] for k, v in failure.parts.items()}
            row = {"kind": failure.signature, "says": failure.detail, "count": failure.count}
            shown.append(row | {"first": failure.number, "smallest": parts})
            print(
                f"    {failure.count} x {failure.signature}: {failure.detail} (first: input {failure.number})"
            )
            for part, text in parts.items():
                print(f"        {part}: {text}", flush=True)
        known[name] = {
            "inputs": result.inputs, "seed": args.seed, "inputs_per_s": round(rate),
            "accepted": result.accepted, "refused": result.refused, "failed": result.failed,
            "failures": shown[:10],
        }  # fmt: skip
        save(args.out, {"command": "python bench/fuzz.py", "formats": known})
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
