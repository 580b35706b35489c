"""Stock Celery: one task per request. `python celery_peer.py serve | drive`, told by BENCH_REDIS and BENCH_MODEL."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import driver
import model
from celery import Celery
from celery.result import ResultSet
from celery.signals import worker_process_init

MODEL = os.environ["BENCH_MODEL"]
app = Celery("peer", broker=os.environ["BENCH_REDIS"], backend=os.environ["BENCH_REDIS"])
app.conf.update(
    task_serializer="json",
    worker_prefetch_multiplier=64,
    task_store_errors_even_if_ignored=False,
    worker_send_task_events=False,
    redis_max_connections=64,
)
predict = model.noop


@worker_process_init.connect
def load_model(**_: object) -> None:
    """In the child: a model loaded before the fork hangs in it."""
    global predict
    predict = model.load(MODEL)


@app.task(name="peer.infer")
def infer(text: str) -> list[float]:
    return predict([text])[0]


class Producer:
    def bulk(self, texts: Sequence[str]) -> None:
        with app.producer_pool.acquire(block=True) as producer:
            results = ResultSet([infer.apply_async((text,), producer=producer) for text in texts], app=app)
        results.join_native(timeout=300)

    def one(self, text: str) -> None:
        infer.delay(text).get(timeout=60)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        processes = os.environ["BENCH_PROCESSES"]
        argv = ["worker", "--pool", "prefork", "--concurrency", processes, "--loglevel", "WARNING"]
        app.worker_main([*argv, "--without-gossip", "--without-mingle", "--without-heartbeat"])
    else:
        driver.obey(Producer(), ("celery", "kombu", "redis"))
