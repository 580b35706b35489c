"""dramatiq with its Redis broker and result backend."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import dramatiq
import driver
import model
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

REDIS = os.environ["BENCH_REDIS"]
broker = RedisBroker(url=REDIS)
broker.add_middleware(Results(backend=RedisBackend(url=REDIS)))
dramatiq.set_broker(broker)
predict = model.load("noop")


@dramatiq.actor(actor_name="infer", store_results=True, max_retries=0)
def infer(text: str) -> list[float]:
    return predict([text])[0]


class Producer:
    def bulk(self, texts: Sequence[str]) -> None:
        group = dramatiq.group([infer.message(text) for text in texts]).run()
        received = sum(1 for _ in group.get_results(block=True, timeout=300_000))
        assert received == len(texts)

    def one(self, text: str) -> None:
        infer.send(text).get_result(block=True, timeout=60_000)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        program = str(Path(sys.executable).with_name("dramatiq"))
        os.execv(program, [program, "dramatiq_peer", "--processes", "1", "--threads", "8"])
    driver.obey(Producer, ("dramatiq", "redis"))
