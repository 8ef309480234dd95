"""One engine over many ranks: all of them keep the same books, and take every step together.

A step: the first rank tells everyone what is new (requests, those that end); everyone plans the next runs of
every replica, alike; each replica's ranks run theirs through the model; the replicas tell each other the
tokens that were picked, and everyone writes them down. Where replicas share experts, one with nothing to run
takes part all the same, with one token that is nobody's, for its experts may be wanted. What travels between
ranks besides activations is JSON of a few hundred bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from whalepod.parallel.inference import Inference
from whalepod.serve.core import Core, CoreConfig, Job
from whalepod.serve.picked import Mask, Next, Picked
from whalepod.serve.request import FinishReason, Grammar, Request, Sampling, Stats
from whalepod.serve.runner import Runner


def no_grammar(grammar: Grammar) -> Mask:
    raise AssertionError(f"no grammar library for {grammar}")


class Fleet:
    """The first rank calls `add`, `end`, `step` and at last `stop`; the others `follow` meanwhile."""

    def __init__(
        self, inference: Inference, config: CoreConfig, make_mask: Callable[[Grammar], Mask] = no_grammar
    ) -> None:
        mesh, layout = inference.mesh, inference.mesh.layout
        self.spec, self.config, self.make_mask = inference.spec, config, make_mask
        self._world, self._own = mesh.world, mesh["dp"].rank
        self._shares_experts = layout.ep > 1
        self.cores = [Core(inference.spec, config) for _ in range(layout.num_replicas)]
        self._runner = Runner(inference, config.num_pages, config.page_size, config.speculate)
        places = [layout.place(rank) for rank in range(layout.num_devices)]
        replicas = [place["dp_replicate"] * layout.dp_shard + place["dp_shard"] for place in places]
        self._speakers = [replicas.index(replica) for replica in range(layout.num_replicas)]
        self._jobs: dict[int, tuple[Core, Job]] = {}
        self._events: list[list[Any]] = []
        self._queued = [0] * len(self.cores)  # requests in them
        self._next_number = 0

    # ------------------------------------------------------------------- the first rank

    @property
    def is_idle(self) -> bool:
        return not self._events and all(core.is_idle for core in self.cores)

    @property
    def max_running(self) -> int:
        return self.config.max_running * len(self.cores)

    @property
    def token_bytes(self) -> float:
        """Of a token's rows in the cache of this rank."""
        return self._runner.cache.token_bytes

    def add(self, request: Request, ends: frozenset[int] = frozenset(), mask: Mask | None = None) -> Job:
        """Queues a request with the replica that has the fewest; mask: of its grammar, if it is made already.
        Raises UserError for what cannot be done."""
        loads = [core.load + queued for core, queued in zip(self.cores, self._queued, strict=True)]
        replica = loads.index(min(loads))
        job = self.cores[replica].admit(request, ends)
        job.wish = replace(job.wish, mask=mask)
        job.number = self._next_number
        self._next_number += 1
        self._jobs[job.number] = (self.cores[replica], job)
        self._queued[replica] += 1
        self._events.append(["add", job.number, replica, asdict(job.request), sorted(job.ends)])
        return job

    def check(self, request: Request) -> None:
        """Raises UserError for what the model or the cache cannot take."""
        self.cores[0].admit(request, frozenset())

    def end(self, job: Job, reason: FinishReason) -> None:
        """Ends a job from outside: a stop string, a client that is gone."""
        if job.reason is None:
            job.reason = reason
            self._events.append(["end", job.number])

    def step(self) -> list[Job]:
        """One pass of the model. Returns the jobs that got tokens, with them in `picked`."""
        events, self._events = self._events, []
        self._queued = [0] * len(self.cores)
        return self._step(events) or []

    def stop(self) -> None:
        """Lets the other ranks go."""
        self._world.share(json.dumps("stop").encode())

    def check_integrity(self) -> None:
        for core in self.cores:
            core.scheduler.check_integrity()

    def stats(self) -> Stats:
        """Of all replicas together."""
        all_of_them = [core.stats() for core in self.cores]
        total = {f.name: sum(getattr(s, f.name) for s in all_of_them) for f in fields(Stats)}
        return Stats(**(total | {"page_size": self.config.page_size}))

    # ------------------------------------------------------------------- every rank

    def follow(self) -> None:
        """The other ranks' life, until the first one stops."""
        while self._step(None) is not None:
            pass

    def _step(self, events: list[list[Any]] | None) -> list[Job] | None:
        told = b"" if events is None else json.dumps(events, default=list).encode()
        found = json.loads(self._world.share(told)[0])
        if found == "stop":
            return None
        for event in found:
            self._happen(*event)
        plans = [core.schedule() for core in self.cores]
        if not any(runs for runs, _ in plans):
            return []
        runs, jobs = plans[self._own]
        wanted = runs or self._shares_experts
        own = self._runner.run(runs, [job.wish for job in jobs]) if wanted else []
        # Of one replica too: equal logits need not draw equal tokens on every device.
        everyones = self._exchanged(own) if self._world.size > 1 else [own]
        changed = []
        for core, plan, following in zip(self.cores, plans, everyones, strict=True):
            changed += core.apply(*plan, following)
        for job in changed:
            if job.reason is not None:
                del self._jobs[job.number]
        return changed

    def _happen(self, kind: str, number: int, *more: Any) -> None:
        if kind == "add":
            replica, request, ends = more
            core = self.cores[replica]
            if number not in self._jobs:  # on the other ranks
                job = core.admit(_request(request), frozenset(ends))
                job.number = number
                self._jobs[number] = (core, job)
            core.begin(self._jobs[number][1], self.make_mask)
        elif number in self._jobs:  # else it ended by itself meanwhile
            core, job = self._jobs.pop(number)
            core.end(job)

    def _exchanged(self, own: Sequence[Next]) -> list[list[Next]]:
        """Every replica's tokens, by replica."""
        speaks = self._world.rank == self._speakers[self._own]
        told = json.dumps([asdict(each) for each in own]).encode() if speaks else b""
        shared = self._world.share(told)
        return [[_next(each) for each in json.loads(shared[rank])] for rank in self._speakers]


def _request(values: dict[str, Any]) -> Request:
    """A Request from what `asdict` and JSON made of it."""
    grammar = values["grammar"]
    more = {
        "prompt": tuple(values["prompt"]),
        "sampling": Sampling(**values["sampling"]),
        "stop": tuple(values["stop"]),
        "stop_ids": frozenset(values["stop_ids"]),
        "grammar": None if grammar is None else Grammar(**grammar),
    }
    return Request(**(values | more))


def _next(values: dict[str, Any]) -> Next:
    picked = [
        Picked(each["token"], each["logprob"], tuple((token, value) for token, value in each["top"]))
        for each in values["picked"]
    ]
    return Next(picked, tuple(values["drafts"]))
