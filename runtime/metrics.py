"""What the server counts, for Prometheus.

metrics = Metrics(lambda: worker.waiting); metrics.count("chat", 200); print(metrics.text().decode())
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from runtime.replies import Counts

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """In a registry of its own. waiting: how many requests wait for their turn."""

    def __init__(self, waiting: Callable[[], float]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "tandem_requests",
            "HTTP requests by endpoint and status; 499: the client left before the answer",
            ["endpoint", "status"],
            registry=registry,
        )
        self.prompt_tokens = Counter("tandem_prompt_tokens", "Tokens of prompts that were run", registry=registry)
        self.completion_tokens = Counter("tandem_completion_tokens", "Tokens of answers", registry=registry)
        self.rounds = Counter("tandem_rounds", "Rounds of drafting and verifying", registry=registry)
        self.drafted = Counter("tandem_drafted", "Drafts, by position in the round", ["position"], registry=registry)
        self.accepted = Counter(
            "tandem_accepted", "Drafts that were right, by position in the round", ["position"], registry=registry
        )
        Gauge("tandem_queue_length", "Requests that wait for their turn", registry=registry).set_function(waiting)
        self.first_token = Histogram(
            "tandem_time_to_first_token_seconds",
            "From the request to the first token, waiting included",
            buckets=SECONDS,
            registry=registry,
        )
        self.seconds = Histogram(
            "tandem_request_seconds", "From the request to the end of its answer", buckets=SECONDS, registry=registry
        )

    def add(self, counts: Counts) -> None:
        """An answer that is over, or as much of it as was wanted."""
        if not counts.completion_tokens:
            return
        self.prompt_tokens.inc(counts.prompt_tokens)
        self.completion_tokens.inc(counts.completion_tokens)
        self.rounds.inc(counts.rounds)
        for position, (drafted, accepted) in enumerate(zip(counts.drafted, counts.accepted, strict=True), 1):
            self.drafted.labels(position).inc(drafted)
            self.accepted.labels(position).inc(accepted)

    def text(self) -> bytes:
        return generate_latest(self.registry)
