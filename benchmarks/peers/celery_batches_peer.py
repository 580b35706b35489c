"""celery-batches: one buffer, flushed when full or when its time is up."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import celery_bulk
import driver
import model
from celery import Celery
from celery.signals import worker_process_init
from celery_batches import Batches, SimpleRequest

MODEL = os.environ["BENCH_MODEL"]
FLUSH_EVERY = int(os.environ["BENCH_BATCH"])
FLUSH_INTERVAL_S = 0.05
app = Celery("peer", broker=os.environ["BENCH_REDIS"], backend=os.environ["BENCH_REDIS"])
app.conf.update(task_serializer="json", worker_prefetch_multiplier=4 * FLUSH_EVERY, worker_send_task_events=False)
predict = model.noop


@worker_process_init.connect
def load_model(**_: object) -> None:
    """In the child: a model loaded before the fork hangs in it."""
    global predict
    predict = model.load(MODEL)


@app.task(name="peer.infer", base=Batches, flush_every=FLUSH_EVERY, flush_interval=FLUSH_INTERVAL_S)
def infer(requests: list[SimpleRequest]) -> None:
    answers = predict([request.args[0] for request in requests])
    for request, answer in zip(requests, answers, strict=True):
        app.backend.mark_as_done(request.id, answer, request=request)


class Producer:
    def bulk(self, texts: Sequence[str]) -> None:
        celery_bulk.run(app, infer, texts)

    def one(self, text: str) -> None:
        infer.delay(text).get(timeout=60)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        argv = ["worker", "--pool", "prefork", "--concurrency", "1", "--loglevel", "WARNING"]
        app.worker_main([*argv, "--without-gossip", "--without-mingle", "--without-heartbeat"])
    else:
        driver.obey(Producer, ("celery-batches", "celery", "kombu", "redis"))
