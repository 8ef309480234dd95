"""Whether `whalepod serve` holds: more clients than it takes, then clients that die and bodies that kill.

    python bench/serve_load.py [--clients 200] [--seconds 300] [--hostile-seconds 60]

A process of its own serves a small V3-like model with random weights (its text is noise, its work is real)
with a queue shorter than the crowd. Clients are of this process; the machine's cores are shared with them.

    crowd    all clients at once, each with a prompt of 5 to 200 random tokens and 5 to 60 new ones, again
             and again. Who is refused with 429 asks again after about a second. Nothing else may happen.
             The server's resident memory is read every second: it must not grow.
    hostile  as many ordinary clients as run at once, whose answers must all be whole, while processes that
             read a stream are killed, connections are closed or reset half way, requests stop half way, and
             hostile bodies arrive (hostile_bodies.py), each of which must be answered with a 4xx.

Then all pages of the cache must be free, /health 200, and SIGTERM end the process with 0. Prints a table and
writes results/serve_load.json; exits 1 if a check failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from statistics import mean
from typing import Any

import httpx
import numpy as np
from hostile_bodies import COMPLETIONS, bodies
from record import save

from whalepod.models.transformer import Transformer, init_weights
from whalepod.parallel.weights import save_weights
from whalepod.serve.client import OK, Answer, complete, open_client
from whalepod.spec.run import make_run
from whalepod.text.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
MODEL = {"preset": "v3-mini", "num_hidden_layers": 3, "hidden_size": 128, "vocab_size": 2048}
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
RUNNING, QUEUE, CACHE_GIB = 24, 16, 0.0015  # a cache that is too small for all that could run
FLAT = 1.05  # memory of the last fifth over that of the second: more would be growth
BODY_TIMEOUT_S = 30.0  # the server's own, for bodies that stop half way
KILLED = """
import socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
connection.sendall(bytes.fromhex(sys.argv[3]))
connection.recv(4096), connection.recv(4096)
print("streams", flush=True)
while connection.recv(4096): pass
"""


def make_model(folder: Path) -> None:
    spec = make_run({"model": MODEL}).model_spec()
    model = Transformer(spec)
    init_weights(model, 0)
    save_weights(model, folder, "fp32")
    train_tokenizer("stdlib", spec.vocab_size).save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


class Server:
    """`whalepod serve` as a process."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "whalepod", "serve", str(folder), "--port", "0", "--dtype", "fp32"]
        limits = ["--max-running", RUNNING, "--max-queue", QUEUE, "--cache-gib", CACHE_GIB]
        command += map(str, limits)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.said: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"http://[\d.]+:(\d+)", line):
                self.url, self.port = found[0], int(found[1])
                break
        else:
            raise SystemExit("".join(self.said))
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        self.said += list(self.process.stderr)

    def memory_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=30, trust_env=False).text
        return float(re.findall(rf"^whalepod_{name} (\S+)$", text, re.MULTILINE)[0])

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class Asked:
    """What became of ordinary requests. wrong: outcomes that should not be."""

    def __init__(self) -> None:
        self.refused, self.tokens = 0, 0
        self.whole: list[Answer] = []
        self.wrong: Counter[str] = Counter()

    def take(self, answer: Answer, new_tokens: int) -> None:
        if answer.outcome == OK and answer.new_tokens == new_tokens:
            self.whole.append(answer)
            self.tokens += new_tokens
        elif answer.outcome == "429":
            self.refused += 1
        else:
            self.wrong["short" if answer.outcome == OK else f"{answer.outcome}: {answer.said}"] += 1

    def figures(self, seconds: float) -> dict[str, Any]:
        first = [1e3 * answer.ttft_s for answer in self.whole if answer.ttft_s is not None] or [0.0]
        return {
            "answers": len(self.whole),
            "refused_429": self.refused,
            "anything_else": dict(self.wrong),
            "answers_per_s": len(self.whole) / seconds,
            "output_tokens_per_s": self.tokens / seconds,
            "ttft_ms_p50": float(np.percentile(first, 50)),
            "ttft_ms_p99": float(np.percentile(first, 99)),
        }


async def ordinary(client: httpx.AsyncClient, asked: Asked, until: float, seed: int) -> None:
    """One client: asks, reads to the end, asks the next."""
    rng = random.Random(seed)
    while time.monotonic() < until:
        prompt = rng.choices(range(10, MODEL["vocab_size"]), k=rng.randint(5, 200))  # type: ignore[arg-type]
        new_tokens = rng.randint(5, 60)
        while time.monotonic() < until:
            answer = await complete(client, {"prompt": prompt, "max_tokens": new_tokens})
            asked.take(answer, new_tokens)
            if answer.outcome != "429":
                break
            await asyncio.sleep(rng.uniform(0.5, 1.5))


async def watch(server: Server, until: float) -> list[float]:
    samples = []
    while time.monotonic() < until:
        samples.append(server.memory_mib())
        await asyncio.sleep(1.0)
    return samples


async def crowd(server: Server, clients: int, seconds: float) -> dict[str, Any]:
    asked, began = Asked(), time.monotonic()
    until = began + seconds
    async with open_client(server.url, trust_env=False) as client:
        tasks = [ordinary(client, asked, until, seed) for seed in range(clients)]
        samples, *_ = await asyncio.gather(watch(server, until), *tasks)
    fifth = max(1, len(samples) // 5)
    early, late = mean(samples[fifth : 2 * fifth] or samples), mean(samples[-fifth:])
    return asked.figures(time.monotonic() - began) | {
        "memory_mib": [round(sample, 1) for sample in samples],
        "memory_mib_second_fifth": early,
        "memory_mib_last_fifth": late,
        "memory_growth": late / early - 1,
    }


def streaming_request(max_tokens: int, rng: random.Random) -> bytes:
    prompt = rng.choices(range(10, 2000), k=rng.randint(5, 200))
    fields = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    return raw_request(json.dumps(fields).encode())


def raw_request(body: bytes) -> bytes:
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Hostile:
    """Those who mean harm, or die. Each method goes on until the time is over."""

    def __init__(self, server: Server, until: float) -> None:
        self._server, self._until = server, until
        self.killed = self.left = 0
        self.statuses: dict[str, Counter[str]] = defaultdict(Counter)

    async def be_killed(self, seed: int) -> None:
        """Processes that are killed while they read a stream."""
        rng = random.Random(seed)
        while time.monotonic() < self._until:
            ask = streaming_request(1000, rng).hex()
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", KILLED, "127.0.0.1", str(self._server.port), ask),
                stdout=asyncio.subprocess.PIPE,
            )
            assert process.stdout is not None
            with suppress(TimeoutError):
                await asyncio.wait_for(process.stdout.readline(), 30)
                await asyncio.sleep(rng.uniform(0, 0.5))
                self.killed += process.returncode is None
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def leave(self, seed: int) -> None:
        """Connections that end at any moment: closed, or reset."""
        rng = random.Random(seed)
        while time.monotonic() < self._until:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
            request = streaming_request(1000, rng)
            writer.write(request[: rng.choice([len(request), rng.randrange(len(request))])])
            with suppress(TimeoutError):
                await asyncio.wait_for(reader.read(4096), rng.uniform(0, 0.5))
            if rng.random() < 0.5:
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
            writer.close()
            self.left += 1
            await asyncio.sleep(rng.uniform(0, 0.2))

    async def send_bodies(self, client: httpx.AsyncClient) -> None:
        """All of them once at least. A 429 says nothing of the body: it is sent again."""
        once = bodies()
        rounds = 0
        while rounds == 0 or time.monotonic() < self._until:
            for name, (path, body) in once.items():
                if rounds and time.monotonic() > self._until:
                    return
                self.statuses[name][await self._status(client, path, body)] += 1
                await asyncio.sleep(0.02)
            rounds += 1

    async def _status(self, client: httpx.AsyncClient, path: str, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        for _ in range(30):
            try:
                response = await client.post(path, content=body, headers=headers)
            except httpx.HTTPError as error:
                return type(error).__name__
            if response.status_code != 429:
                break
            await asyncio.sleep(1.0)
        return str(response.status_code)

    async def stop_half_way(self) -> None:
        """A body that does not arrive, on a connection that stays open."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        writer.write(raw_request(b'{"prompt": "abc"}')[:-5])
        try:
            line = await asyncio.wait_for(reader.readline(), BODY_TIMEOUT_S + 30)
            status = line.split()[1].decode() if line else "closed"
        except TimeoutError:
            status = "no answer"
        writer.close()
        self.statuses["a body that stops half way"][status] += 1


async def hostile(server: Server, seconds: float) -> dict[str, Any]:
    asked, began = Asked(), time.monotonic()
    until = began + seconds
    others = Hostile(server, until)
    async with open_client(server.url, trust_env=False) as client:
        work: list[Awaitable[Any]] = [ordinary(client, asked, until, 1000 + i) for i in range(RUNNING // 2)]
        work += [others.be_killed(2000 + i) for i in range(4)]
        work += [others.leave(3000 + i) for i in range(8)]
        work += [others.stop_half_way() for _ in range(4)]
        samples, *_ = await asyncio.gather(watch(server, until), others.send_bodies(client), *work)
    statuses = {name: dict(counts) for name, counts in others.statuses.items()}
    return asked.figures(time.monotonic() - began) | {
        "memory_mib": [round(sample, 1) for sample in samples],
        "processes_killed": others.killed,
        "connections_left": others.left,
        "hostile_bodies": sum(sum(counts.values()) for counts in statuses.values()),
        "hostile_statuses": dict(sum(others.statuses.values(), Counter())),
        "hostile_by_body": statuses,
    }


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < until:
        time.sleep(0.2)
    return held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--hostile-seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "serve_load.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model")
        server = Server(Path(folder) / "model")
        try:
            first = asyncio.run(crowd(server, args.clients, args.seconds))
            second = asyncio.run(hostile(server, args.hostile_seconds))
            preemptions = server.metric("preemptions_total")
            free = within(30, lambda: server.metric("pages_in_use") == server.metric("running") == 0)
            healthy = httpx.get(f"{server.url}/health", trust_env=False).status_code == 200
        finally:
            code = server.end()
    checks = {
        "crowd: answers or 429, nothing else": bool(first["answers"]) and not first["anything_else"],
        "crowd: 429 happened": first["refused_429"] > 0,
        f"crowd: memory grew less than {FLAT - 1:.0%}": first["memory_growth"] < FLAT - 1,
        "hostile: ordinary answers whole": bool(second["answers"]) and not second["anything_else"],
        "hostile: every body got a 4xx": all(s.startswith("4") for s in second["hostile_statuses"]),
        "after: all pages free": free,
        "after: /health 200": healthy,
        "after: SIGTERM, exit code 0": code == 0,
        "no traceback in the log": not any("Traceback" in line for line in server.said),
    }
    show(first, second, preemptions, checks)
    if not checks["no traceback in the log"]:
        print("".join(server.said[-60:]), file=sys.stderr)
    command = shlex.join(["python", "bench/serve_load.py", *sys.argv[1:]])
    figures = {"command": command, "clients": args.clients, "crowd": first, "hostile": second}
    save(args.out, {**figures, "preemptions": preemptions, "exit_code": code, "checks": checks})
    return 0 if all(checks.values()) else 1


def show(first: dict[str, Any], second: dict[str, Any], preemptions: float, checks: dict[str, bool]) -> None:
    print(f"{'':36}{'crowd':>12}{'hostile':>12}")
    rates = ("answers_per_s", "output_tokens_per_s", "ttft_ms_p50", "ttft_ms_p99")
    for key in ("answers", "refused_429", *rates):
        print(f"{key:36}{first[key]:12,.1f}{second[key]:12,.1f}")
    print(f"{'anything_else':36}{first['anything_else']!s:>12}{second['anything_else']!s:>12}")
    print(
        f"memory, MiB: {first['memory_mib'][0]:.0f} at first, {first['memory_mib_second_fifth']:.1f} in the "
        f"second fifth, {first['memory_mib_last_fifth']:.1f} in the last ({first['memory_growth']:+.2%}), "
        f"at most {max(second['memory_mib']):.0f} with hostile bodies; "
        f"{preemptions:.0f} preemptions"
    )
    print(
        f"{second['processes_killed']} processes killed, {second['connections_left']} connections left, "
        f"{second['hostile_bodies']} hostile bodies: {second['hostile_statuses']}"
    )
    for name, counts in second["hostile_by_body"].items():
        if not all(status.startswith("4") for status in counts):
            print(f"  {name}: {counts}")
    for name, holds in checks.items():
        print(f"{'ok  ' if holds else 'FAIL'} {name}")


if __name__ == "__main__":
    sys.exit(main())
