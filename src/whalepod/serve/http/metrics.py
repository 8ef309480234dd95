"""What Prometheus is told: counted here what clients see, asked of the engine what it knows itself."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from whalepod.serve.request import Chunk, Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_LATER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)


class Metrics:
    """The metrics of one app, in a registry of its own."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(service))
        self._requests = Counter(
            "whalepod_requests", "HTTP requests answered", ["endpoint", "status"], registry=self._registry
        )
        self._in_flight = Gauge(
            "whalepod_requests_in_flight", "Generations asked for", registry=self._registry
        )
        self._first = self._histogram(
            "time_to_first_token", "From the request to its first token", _FIRST_TOKEN
        )
        self._later = self._histogram(
            "time_per_output_token", "Mean of a sequence's later tokens", _LATER_TOKEN
        )
        self._whole = self._histogram("request_duration", "From the request to the end of its answer", _WHOLE)

    def answered(self, endpoint: str, status: int) -> None:
        self._requests.labels(endpoint, str(status)).inc()

    def in_flight(self, change: int) -> None:
        self._in_flight.inc(change)

    def finished(self, seconds: float) -> None:
        self._whole.observe(seconds)

    def clock(self, since: float) -> SequenceClock:
        return SequenceClock(self._first, self._later, since)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        name = f"whalepod_{name}_seconds"
        return Histogram(name, help_text, buckets=buckets, registry=self._registry)


class SequenceClock:
    """Times the tokens of one sequence, from `since` (of time.perf_counter)."""

    def __init__(self, first: Histogram, later: Histogram, since: float) -> None:
        self._first, self._later, self._since = first, later, since
        self._begun: tuple[float, int] | None = None

    def saw(self, chunk: Chunk) -> None:
        now = time.perf_counter()
        if self._begun is None and chunk.new_tokens:
            self._begun = now, chunk.new_tokens
            self._first.observe(now - self._since)
        if chunk.finish_reason and self._begun and chunk.new_tokens > self._begun[1]:
            begun, tokens = self._begun
            self._later.observe((now - begun) / (chunk.new_tokens - tokens))


class _Engine(Collector):
    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        stats = self._service.stats()
        gauges = {
            "running": "Sequences in the batch",
            "waiting": "Sequences in the queue",
            "pages": "Pages of the cache",
            "pages_in_use": "Pages that sequences hold",
        }
        for name, help_text in gauges.items():
            yield GaugeMetricFamily(f"whalepod_{name}", help_text, value=getattr(stats, name))
        counters = {
            "prompt_tokens": ("prompt_tokens", "Tokens of prompts"),
            "cached_tokens": ("cached_tokens", "Tokens of prompts found in the prefix cache"),
            "generated_tokens": ("new_tokens", "Tokens generated"),
            "preemptions": ("preemptions", "Sequences that gave their pages up and began again"),
            "sequences_finished": ("finished", "Sequences finished"),
            "steps": ("steps", "Steps of the engine"),
        }
        for name, (key, help_text) in counters.items():
            yield CounterMetricFamily(f"whalepod_{name}", help_text, value=getattr(stats, key))
        failure = self._service.failure
        yield GaugeMetricFamily(
            "whalepod_broken", "1 if the engine is broken", value=int(failure is not None)
        )
