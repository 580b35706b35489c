"""A whole installation whose workers are real engines, each in its own environment."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
from tests.transport_support import OwnRedis, own_redis, wait_until
from workers.environments.build import python_of

from muai_config import build_settings
from muai_producers import InferenceClient

ROOT = Path(__file__).resolve().parents[2]
SOURCES = os.pathsep.join(str(ROOT / part) for part in ("config", "producers", "batching", "workers", "."))
START_LIMIT_S = 200.0
LEASE_S = 2.0
OF_THIS_ENVIRONMENT = ("onnx", "pytorch")


class EngineFleet:
    """Use `running_fleet`."""

    def __init__(self, redis: OwnRedis, folder: Path, models: Mapping[str, Any], optimization: dict[str, Any]) -> None:
        self.redis = redis
        self.folder = folder
        document = {
            "queue": {"broker_url": redis.url, "lease_ttl_s": LEASE_S},
            "models": dict(models),
            "optimization": {"cache": {"max_memory_mb": 64}, "pytorch": {"num_threads": 1}, **optimization},
        }
        self.config_file = folder / "muai.yaml"
        self.config_file.write_bytes(msgspec.yaml.encode(document))
        self.client = InferenceClient(build_settings(document, {}))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str, engine: str | None = None) -> None:
        """Start `muai ARGUMENTS`, with the Python of `engine`'s environment."""
        python = sys.executable if engine in (None, *OF_THIS_ENVIRONMENT) else str(python_of(str(engine)))
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [python, "-m", "muai_producers", "--config", str(self.config_file), *arguments],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": SOURCES, "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start_worker(self, engine: str) -> None:
        """Start a worker and wait until it is heard of."""
        self.start(engine, "worker", "--engine", engine, "--name", engine, engine=engine)
        self.await_engines(engine)

    def engines(self) -> set[str]:
        """The engines that have a worker."""
        from muai_producers.fleet import Fleet

        return {worker.engine for worker in Fleet(self.client.store).view(()).workers}

    def await_engines(self, *engines: str) -> None:
        def there() -> bool:
            for engine in engines:
                assert self.processes[engine].poll() is None, self.log(engine)
            return set(engines) <= self.engines()

        wait_until(there, START_LIMIT_S, f"a worker of {', '.join(engines)}")

    def family(self, name: str) -> list[psutil.Process]:
        """What a process has started."""
        return psutil.Process(self.processes[name].pid).children(recursive=True)

    def kill(self, name: str) -> None:
        """End a process alone by force, as the system does when memory runs out."""
        self.processes[name].kill()
        self.processes[name].wait()

    def stop(self) -> None:
        """End everything."""
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20.0)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.client.close()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-6000:]


@contextmanager
def running_fleet(folder: Path, models: Mapping[str, Any], *engines: str, **optimization: Any) -> Iterator[EngineFleet]:
    """A collector, a control worker and one worker of each engine, until the block ends."""
    with own_redis(folder) as redis:
        fleet = EngineFleet(redis, folder, models, optimization)
        try:
            fleet.start("collector", "collector")
            fleet.start("control", "control")
            for engine in engines:
                fleet.start(engine, "worker", "--engine", engine, "--name", engine, engine=engine)
            fleet.await_engines(*engines)
            yield fleet
        finally:
            fleet.stop()
