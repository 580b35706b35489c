"""An engine of MuAI, BENCH_ENGINE, without any queue: texts sorted by length, in batches of BENCH_BATCH."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import driver

from muai_config import load_settings
from muai_producers.wire import InferenceRequest
from muai_workers.engines.registry import create_engine

MODEL = os.environ["BENCH_MODEL"]
ENGINE = os.environ.get("BENCH_ENGINE", "pytorch")
BATCH = int(os.environ["BENCH_BATCH"])


class Producer:
    def __init__(self) -> None:
        settings = load_settings(Path(os.environ["BENCH_CONFIG"]))
        self.spec = settings.model(MODEL)
        self.engine = create_engine(ENGINE, settings)
        self.engine.load(self.spec)

    def bulk(self, texts: Sequence[str]) -> None:
        ordered = sorted(texts, key=lambda text: len(text.split()))
        requests = [
            InferenceRequest(id=str(number), model=MODEL, task=self.spec.task, inputs={"text": text})
            for number, text in enumerate(ordered)
        ]
        for start in range(0, len(requests), BATCH):
            for completion in self.engine.run(self.spec, self.spec.task, requests[start : start + BATCH]):
                assert completion.output is not None, completion.error

    def one(self, text: str) -> None:
        self.bulk([text])


if __name__ == "__main__":
    driver.obey(Producer, ("torch", "transformers") if ENGINE == "pytorch" else ("onnxruntime",))
