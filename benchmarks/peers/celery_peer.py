"""Stock Celery: one task per request. `python celery_peer.py serve | drive`, told by BENCH_REDIS and BENCH_MODEL."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import celery_bulk
import driver
import model
from celery import Celery
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
    """When the pool starts, not at import: the producer needs no model."""
    global predict
    predict = model.load(MODEL)


@app.task(name="peer.infer")
def infer(text: str) -> list[float]:
    return predict([text])[0]


class Producer:
    def bulk(self, texts: Sequence[str]) -> None:
        celery_bulk.run(app, infer, texts)

    def one(self, text: str) -> None:
        infer.delay(text).get(timeout=60)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        argv = ["worker", "--pool", "solo", "--loglevel", "WARNING"]
        app.worker_main([*argv, "--without-gossip", "--without-mingle", "--without-heartbeat"])
    else:
        driver.obey(Producer, ("celery", "kombu", "redis"))
