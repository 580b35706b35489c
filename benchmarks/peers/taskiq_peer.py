"""taskiq over taskiq-redis: a list as queue, results in Redis."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import driver
import model
from taskiq import AsyncTaskiqTask
from taskiq_redis import ListQueueBroker, RedisAsyncResultBackend

REDIS = os.environ["BENCH_REDIS"]
POLL_S = 0.001
IN_FLIGHT = 100
"""Submissions and result look-ups that the producer has under way at once."""
results: RedisAsyncResultBackend[list[float]] = RedisAsyncResultBackend(REDIS, result_ex_time=600)
broker = ListQueueBroker(REDIS).with_result_backend(results)
predict = model.load("noop")


@broker.task(task_name="infer")
async def infer(text: str) -> list[float]:
    return predict([text])[0]


class Producer:
    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(broker.startup())

    def bulk(self, texts: Sequence[str]) -> None:
        self.loop.run_until_complete(self._bulk(texts))

    def one(self, text: str) -> None:
        self.loop.run_until_complete(self._one(text))

    async def _bulk(self, texts: Sequence[str]) -> None:
        tasks: list[AsyncTaskiqTask[list[float]]] = []
        for start in range(0, len(texts), IN_FLIGHT):
            tasks += await asyncio.gather(*(infer.kiq(text) for text in texts[start : start + IN_FLIGHT]))
        for start in range(0, len(tasks), IN_FLIGHT):
            chunk = tasks[start : start + IN_FLIGHT]
            await asyncio.gather(*(task.wait_result(check_interval=POLL_S, timeout=300) for task in chunk))

    async def _one(self, text: str) -> None:
        task = await infer.kiq(text)
        await task.wait_result(check_interval=POLL_S, timeout=60)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        program = str(Path(sys.executable).with_name("taskiq"))
        options = [
            "--workers",
            "1",
            "--max-async-tasks",
            "200",
            "--log-level",
            "WARNING",
            "--ack-type",
            "when_received",
        ]
        os.execv(program, [program, "worker", "taskiq_peer:broker", *options])
    driver.obey(Producer, ("taskiq", "taskiq-redis", "redis"))
