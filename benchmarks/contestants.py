"""The peers: what each runs in, with which settings, and how it is asked."""

from __future__ import annotations

import http.client
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environments import PEERS, python_of
from benchmarks.machine import ROOT
from benchmarks.muai_side import cores, environment
from benchmarks.processes import Driver, free_port, running, wait_for

READY_S = 90.0


@dataclass(frozen=True)
class QueuePeer:
    """A task queue over Redis: `script serve` works, `script drive` produces."""

    name: str
    environment: str
    script: str
    settings: str
    batch: int = 1

    @contextmanager
    def served(self, folder: Path, redis_url: str, model: str) -> Iterator[Driver]:
        """A worker and a producer, ready."""
        argv = [str(python_of(self.environment)), str(PEERS / self.script)]
        env = {
            "PYTHONPATH": str(PEERS),
            "BENCH_REDIS": redis_url,
            "BENCH_MODEL": model,
            "BENCH_BATCH": str(self.batch),
            "OMP_NUM_THREADS": str(cores()),
        }
        with ExitStack() as stack:
            stack.enter_context(running([*argv, "serve"], folder / "worker.log", env, PEERS))
            driver = stack.enter_context(Driver([*argv, "drive"], folder / "driver.log", env, PEERS))
            driver.ask(limit_s=READY_S, do="idle", model=model, count=1, seed=0)
            yield driver


@dataclass(frozen=True)
class HttpPeer:
    """A model server that batches inside its process."""

    name: str
    script: str
    path: str
    body: str
    """Of a request; `%s` stands for the text as JSON."""
    packages: tuple[str, ...]
    wait_s: float
    """How long a batch waits for companions; 0 where the server decides."""
    environment: str = "servers"

    def settings(self, batch: int) -> str:
        waiting = f"for at most {self.wait_s * 1000:g} ms" if self.wait_s else "as long as it thinks best"
        return f"one worker, batches of at most {batch}, which wait {waiting}"

    @contextmanager
    def served(self, folder: Path, model: str, batch: int) -> Iterator[str]:
        """The server, ready; yields the URL that takes requests."""
        port = free_port()
        env = {
            "PYTHONPATH": str(PEERS),
            "BENCH_MODEL": model,
            "BENCH_BATCH": str(batch),
            "BENCH_WAIT_S": str(self.wait_s),
            "BENCH_PORT": str(port),
            "OMP_NUM_THREADS": str(cores()),
        }
        argv = [str(python_of(self.environment)), str(PEERS / self.script)]
        log = folder / "server.log"
        with running(argv, log, env, PEERS) as process:
            wait_for(lambda: answers(port, self.path, self.body % '"ready?"'), process, log, READY_S)
            yield f"http://127.0.0.1:{port}{self.path}"


def answers(port: int, path: str, body: str, headers: dict[str, str] | None = None) -> bool:
    """Whether a POST is answered with 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json", **(headers or {})})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextmanager
def http_driver(folder: Path, url: str, body: str, connections: int) -> Iterator[Driver]:
    """A client of our own for an HTTP server."""
    env = environment(BENCH_URL=url, BENCH_BODY=body, BENCH_CONNECTIONS=str(connections))
    argv = [sys.executable, str(ROOT / "benchmarks" / "http_load.py")]
    with Driver(argv, folder / "client.log", env, ROOT) as driver:
        yield driver


NOOP_QUEUES = (
    QueuePeer(
        "Celery", "celery", "celery_peer.py", "pool solo (prefork and threads are slower), prefetch 64, no events"
    ),
    QueuePeer(
        "celery-batches",
        "celery-batches",
        "celery_batches_peer.py",
        "prefork, 1 process, flush at 500 or 50 ms, prefetch 2,000",
        batch=500,
    ),
    QueuePeer("taskiq", "taskiq", "taskiq_peer.py", "list broker, 1 worker, 200 tasks at once, results polled at 1 ms"),
    QueuePeer("dramatiq", "dramatiq", "dramatiq_peer.py", "1 process, 8 threads, Redis results"),
    QueuePeer("arq", "arq", "arq_peer.py", "polled at 5 ms, 500 jobs at once"),
)

MODEL_QUEUES = (
    QueuePeer("Celery", "servers", "celery_peer.py", "one task per sentence, pool solo"),
    QueuePeer(
        "celery-batches",
        "servers",
        "celery_batches_peer.py",
        "one prefork process, flush at 32 or 50 ms, prefetch 128",
        batch=32,
    ),
)

SERVERS = (
    HttpPeer("LitServe", "litserve_peer.py", "/predict", '{"text": %s}', ("litserve",), 0.005),
    HttpPeer("BentoML", "bentoml_peer.py", "/infer", '{"text": [%s]}', ("bentoml",), 0.0),
    HttpPeer("Mosec", "mosec_peer.py", "/inference", '{"text": %s}', ("mosec",), 0.005),
)

RAY_SERVE = HttpPeer(
    "Ray Serve", "ray_serve_peer.py", "/infer", '{"text": %s}', ("ray[serve]",), 0.005, environment="ray-serve"
)
"""Beside the others where the model does nothing: what it adds is its own."""
