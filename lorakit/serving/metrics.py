"""The figures of /metrics, in the text format of Prometheus.

Each endpoint has a registry of its own, so that several in one process do not add up.
"""

import time

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from lorakit.serving.worker import Job, Piece, Worker

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_WHOLE_TEXT = (0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The figures of one endpoint."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"lorakit_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"lorakit_{name}", text, registry=self.registry)

        self.responses = counter("http_responses", "Responses by path and status", "path", "status")
        self.texts = counter("texts", "Texts that ended, and why", "model", "finish_reason")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts", "model")
        self.cached_tokens = counter(
            "cached_prompt_tokens", "Tokens of prompts taken over from earlier rows", "model"
        )
        self.new_tokens = counter("generated_tokens", "Tokens that were made", "model")
        self.running = gauge("texts_running", "Texts that are being made")
        self.waiting = gauge(
            "texts_waiting", "Texts that wait for a slot, or for room in the cache"
        )
        self.first_token = Histogram(
            "lorakit_first_token_seconds",
            "Time from a request to the first token of a text",
            buckets=_FIRST_TOKEN,
            registry=self.registry,
        )
        self.whole_text = Histogram(
            "lorakit_text_seconds",
            "Time from a request to the end of a text",
            buckets=_WHOLE_TEXT,
            registry=self.registry,
        )

    def told(self, job: Job, piece: Piece) -> None:
        """Count what became of a row."""
        took = time.monotonic() - job.began
        if piece.token is not None:
            self.new_tokens.labels(job.model).inc()
            if piece.row not in job.started:
                self.first_token.observe(took)
        if piece.finish_reason is not None:
            self.texts.labels(job.model, piece.finish_reason).inc()
            self.prompt_tokens.labels(job.model).inc(len(job.rows[piece.row].prompt))
            self.cached_tokens.labels(job.model).inc(piece.cached_tokens)
            self.whole_text.observe(took)

    def page(self, worker: Worker) -> bytes:
        """Return the page of /metrics."""
        self.running.set(worker.engine.running)
        self.waiting.set(worker.engine.waiting)
        return generate_latest(self.registry)
