"""Two hosts on one machine: network namespaces joined by one link of limited speed. Needs Linux and root."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

NODES = 2
LINK = "slow0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@contextmanager
def two_nodes(rate_mbit: int) -> Iterator[list[str]]:
    """Names of two namespaces with one link between them. Gone afterwards, the link with them.

    Raises CalledProcessError or FileNotFoundError where they cannot be made.
    """
    names = [f"whalepod-{os.getpid()}-{i}" for i in range(NODES)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", LINK, "netns", names[0], "type", "veth", "peer", "name", LINK, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", LINK)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", LINK, "up")
            limit = ["rate", f"{rate_mbit}mbit", "burst", "256kb", "latency", "400ms"]
            tc = ["tc", "-n", name, "qdisc", "add", "dev", LINK, "root", "tbf", *limit]
            subprocess.run(tc, check=True, capture_output=True, text=True)
        yield names
    finally:
        for name in names:
            with suppress(subprocess.CalledProcessError, FileNotFoundError):
                kill_all(name)
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def kill_all(name: str) -> int:
    """kill -9 of every process of a host; how many there were."""
    found = [int(pid) for pid in ip("netns", "pids", name).split()]
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(found)


def set_link(name: str, up: bool) -> None:
    """Plugs or unplugs a host's end of the link."""
    ip("-n", name, "link", "set", LINK, "up" if up else "down")


def sent_bytes(names: list[str]) -> int:
    """Everything that has crossed the link since it was made, both ways."""
    links = [json.loads(ip("-n", name, "-s", "-j", "link", "show", "dev", LINK))[0] for name in names]
    return sum(link["stats64"]["tx"]["bytes"] for link in links)


def why(error: Exception) -> str:
    """One line on what could not be done."""
    return str(getattr(error, "stderr", None) or error).strip().splitlines()[0]
