"""MuAI's client as the suite drives it, told by BENCH_CONFIG, the path of a configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import driver

from muai_config import load_settings
from muai_producers import InferenceClient
from muai_producers.errors import MuaiError

MODEL = os.environ["BENCH_MODEL"]


class Producer:
    def __init__(self) -> None:
        self.client = InferenceClient(load_settings(Path(os.environ["BENCH_CONFIG"])))

    def bulk(self, texts: Sequence[str]) -> None:
        ids = self.client.submit_many({"model": MODEL, "inputs": text} for text in texts)
        for _, outcome in self.client.results(ids, timeout_s=300):
            if isinstance(outcome, MuaiError):
                raise outcome

    def one(self, text: str) -> None:
        self.client.infer(MODEL, text, timeout_s=60)


if __name__ == "__main__":
    driver.obey(Producer, ("celery", "kombu", "redis"))
