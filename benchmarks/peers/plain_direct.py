"""MiniLM through transformers alone, as the peers run it: texts sorted by length, in batches of BENCH_BATCH."""

from __future__ import annotations

import os
from collections.abc import Sequence

import driver
import model

BATCH = int(os.environ["BENCH_BATCH"])


class Producer:
    def __init__(self) -> None:
        self.predict = model.load(os.environ["BENCH_MODEL"])

    def bulk(self, texts: Sequence[str]) -> None:
        ordered = sorted(texts, key=lambda text: len(text.split()))
        for start in range(0, len(ordered), BATCH):
            self.predict(ordered[start : start + BATCH])

    def one(self, text: str) -> None:
        self.predict([text])


if __name__ == "__main__":
    driver.obey(Producer, ("torch", "transformers"))
