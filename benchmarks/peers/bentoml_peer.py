"""BentoML: POST /infer `{"text": [one text]}`, since what it batches are lists.

Told by BENCH_MODEL, BENCH_BATCH and BENCH_PORT.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import bentoml
import model

BATCH = int(os.environ["BENCH_BATCH"])


@bentoml.service(
    workers=1,
    traffic={"timeout": 300, "max_concurrency": 2048},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class Served:
    def __init__(self) -> None:
        self.predict_batch = model.load(os.environ["BENCH_MODEL"])

    @bentoml.api(batchable=True, max_batch_size=BATCH, max_latency_ms=60_000)
    def infer(self, text: list[str]) -> list[list[float]]:
        return self.predict_batch(text)


if __name__ == "__main__":
    program = str(Path(sys.executable).with_name("bentoml"))
    address = ["--host", "127.0.0.1", "--port", os.environ["BENCH_PORT"]]
    os.execv(program, [program, "serve", "bentoml_peer:Served", *address])
