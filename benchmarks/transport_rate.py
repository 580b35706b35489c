"""Messages per second into a Celery worker, and idle latency: kombu's Redis transport against ours.

    python benchmarks/transport_rate.py [--messages 100000] [--redis redis://127.0.0.1:6379/9]

The worker's one task has a Strategy that counts and acknowledges; nothing is executed. Without `--redis` a
redis-server of its own is started.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import celery
import redis
from celery.apps.worker import Worker

QUEUE = "transport-rate"
OURS = "muai_batching.transport:Transport"


class Counter:
    """Collecting Strategy: counts what arrives, acknowledges a hundred at a time where the channel can."""

    def __init__(self) -> None:
        self.count = 0
        self.first_s = self.last_s = 0.0
        self.target = 0
        self.reached = threading.Event()
        self._unacked: list[Any] = []

    def strategy(self, task: Any, app: Any, consumer: Any, **_: Any) -> Callable[..., None]:
        return self._collect

    def _collect(self, message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **_: Any) -> None:
        self.last_s = time.perf_counter()
        if not self.count:
            self.first_s = self.last_s
        self.count += 1
        self._unacked.append(message)
        if len(self._unacked) >= 100 or self.count >= self.target:
            self._ack()
        if self.count >= self.target:
            self.reached.set()

    def _ack(self) -> None:
        pending, self._unacked = self._unacked, []
        if hasattr(pending[0].channel, "ack_many"):
            pending[0].channel.ack_many([message.delivery_tag for message in pending])
        else:
            for message in pending:
                message.ack()


@contextlib.contextmanager
def own_redis() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = ["redis-server", "--port", str(port), "--save", "", "--dir", folder]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            client = redis.Redis(port=port)
            while True:
                with contextlib.suppress(redis.ConnectionError):
                    client.ping()
                    break
                time.sleep(0.02)
            client.close()
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.terminate()
            server.wait()


def make_app(url: str, transport: str | None, counter: Counter) -> celery.Celery:
    app = celery.Celery("transport_rate", broker=url, set_as_current=False)
    app.conf.update(
        broker_transport=transport,
        task_default_queue=QUEUE,
        worker_prefetch_multiplier=0,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
    )

    @app.task(name="collect", bind=True)
    def collect(self: Any, text: str) -> None:
        raise AssertionError("the strategy executes nothing")

    collect.start_strategy = lambda app, consumer, **kwargs: counter.strategy(collect, app, consumer, **kwargs)
    return app


def raw_message(app: celery.Celery, client: redis.Redis) -> bytes:
    app.send_task("collect", kwargs={"text": "the quick brown fox " * 5}, queue=f"{QUEUE}-sample")
    raw: bytes = client.rpop(f"{QUEUE}-sample")  # type: ignore[assignment]
    return raw


def fill(client: redis.Redis, raw: bytes, num_messages: int) -> None:
    for start in range(0, num_messages, 1000):
        client.lpush(QUEUE, *[raw] * min(1000, num_messages - start))


def measure(url: str, transport: str | None, num_messages: int, num_probes: int) -> dict[str, float]:
    counter = Counter()
    app = make_app(url, transport, counter)
    client = redis.Redis.from_url(url)
    client.flushdb()
    raw = raw_message(app, client)
    fill(client, raw, num_messages)
    counter.target = num_messages
    worker = Worker(app=app, pool="solo", concurrency=1, quiet=True, without_gossip=True, without_mingle=True)
    result: dict[str, float] = {}
    probe = threading.Thread(target=_probe, args=(worker, client, raw, counter, num_probes, result))
    probe.start()
    worker.start()
    probe.join()
    client.close()
    return result


def _probe(
    worker: Worker, client: redis.Redis, raw: bytes, counter: Counter, num_probes: int, result: dict[str, float]
) -> None:
    counter.reached.wait()
    result["messages_per_s"] = counter.count / (counter.last_s - counter.first_s)
    latencies_ms = []
    for _ in range(num_probes):
        time.sleep(0.02)
        counter.reached.clear()
        counter.target = counter.count + 1
        sent_s = time.perf_counter()
        client.lpush(QUEUE, raw)
        counter.reached.wait()
        latencies_ms.append((counter.last_s - sent_s) * 1e3)
    result["idle_p50_ms"] = statistics.median(latencies_ms)
    result["idle_p99_ms"] = statistics.quantiles(latencies_ms, n=100)[98]
    cpu_s = time.process_time()
    time.sleep(3)
    result["idle_cpu_percent"] = (time.process_time() - cpu_s) / 3 * 100
    worker.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--probes", type=int, default=200)
    parser.add_argument("--redis", help="a database that may be emptied")
    parser.add_argument("--only", choices=["stock", "ours"], help="one side, in this process")
    options = parser.parse_args()
    if options.only:
        transport = OURS if options.only == "ours" else None
        # Stock is some twenty times slower; a shorter run tells its rate as well.
        count = options.messages if transport else max(1, options.messages // 20)
        figures = measure(options.redis, transport, count, options.probes)
        print(f"{options.only:6}" + "".join(f"  {name} {value:,.2f}" for name, value in figures.items()), flush=True)
        os._exit(0)
    with contextlib.nullcontext(options.redis) if options.redis else own_redis() as url:
        for side in ("stock", "ours"):
            arguments = ["--only", side, "--redis", url]
            sizes = ["--messages", str(options.messages), "--probes", str(options.probes)]
            subprocess.run([sys.executable, str(Path(__file__)), *arguments, *sizes], check=True)


if __name__ == "__main__":
    main()
