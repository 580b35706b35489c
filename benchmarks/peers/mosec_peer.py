"""Mosec: POST /inference `{"text": …}`. Told by BENCH_MODEL, BENCH_BATCH, BENCH_WAIT_S and BENCH_PORT."""

from __future__ import annotations

import os
import sys
from typing import Any

import model
import mosec

BATCH = int(os.environ["BENCH_BATCH"])
WAIT_MS = max(1, round(1000 * float(os.environ["BENCH_WAIT_S"])))


class Served(mosec.Worker):
    def __init__(self) -> None:
        self.predict_batch = model.load(os.environ["BENCH_MODEL"])

    def forward(self, data: list[dict[str, str]]) -> list[dict[str, Any]]:
        return [{"output": answer} for answer in self.predict_batch([one["text"] for one in data])]


if __name__ == "__main__":
    sys.argv += ["--address", "127.0.0.1", "--port", os.environ["BENCH_PORT"], "--timeout", "300000"]
    server = mosec.Server()
    server.append_worker(Served, num=1, max_batch_size=BATCH, max_wait_time=WAIT_MS, timeout=300)
    server.run()
