"""arq: jobs in a sorted set, looked for every 5 ms (its own default is 500 ms)."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Any

import arq
import driver
import model
from arq.connections import RedisSettings
from arq.jobs import Job

SETTINGS = RedisSettings.from_dsn(os.environ["BENCH_REDIS"])
POLL_S = 0.005
IN_FLIGHT = 100
"""Submissions and result look-ups that the producer has under way at once."""
predict = model.load("noop")


async def infer(ctx: dict[str, Any], text: str) -> list[float]:
    return predict([text])[0]


class Producer:
    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.pool = self.loop.run_until_complete(arq.create_pool(SETTINGS))

    def bulk(self, texts: Sequence[str]) -> None:
        self.loop.run_until_complete(self._bulk(texts))

    def one(self, text: str) -> None:
        self.loop.run_until_complete(self._one(text))

    async def _bulk(self, texts: Sequence[str]) -> None:
        jobs: list[Job] = []
        for start in range(0, len(texts), IN_FLIGHT):
            chunk = texts[start : start + IN_FLIGHT]
            jobs += await asyncio.gather(*(self._submit(text) for text in chunk))
        for start in range(0, len(jobs), IN_FLIGHT):
            chunk = jobs[start : start + IN_FLIGHT]
            await asyncio.gather(*(job.result(timeout=300, poll_delay=POLL_S) for job in chunk))

    async def _submit(self, text: str) -> Job:
        job = await self.pool.enqueue_job("infer", text)
        assert job is not None
        return job

    async def _one(self, text: str) -> None:
        job = await self._submit(text)
        await job.result(timeout=60, poll_delay=POLL_S)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        worker = arq.Worker([infer], redis_settings=SETTINGS, poll_delay=POLL_S, max_jobs=500, keep_result=600)
        worker.run()
    else:
        driver.obey(Producer, ("arq", "redis"))
