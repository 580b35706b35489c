"""A whole installation with a gateway, on a Redis of its own, as processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from muai_config import Settings, build_settings
from muai_producers.fleet import Fleet
from muai_producers.store import Store
from tests.transport_support import ROOT, OwnRedis, free_port, own_redis, wait_until

MODELS = {
    "noop": {"task": "text-classification", "source": "hub:none", "engines": ["fake"]},
    "chatty": {"task": "chat", "source": "hub:none", "engines": ["fake"]},
    "parked": {"task": "embedding", "source": "hub:none", "engines": ["onnx"]},
}
"""No worker serves `parked`: its requests stay where they are."""


class Process:
    """`muai COMMAND …` under a configuration; its output goes to a file."""

    def __init__(self, folder: Path, config: Path, *command: str) -> None:
        self.log = folder / f"{command[0]}-{free_port()}.log"
        packages = os.pathsep.join(str(ROOT / name) for name in ("config", "producers", "batching", "workers"))
        env = {**os.environ, "PYTHONPATH": packages, "MUAI_CONFIG": str(config), "MUAI_HOME": str(folder)}
        with self.log.open("wb") as output:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "muai_producers", *command], env=env, stdout=output, stderr=output
            )

    def terminate(self) -> None:
        self.popen.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        self.popen.kill()
        self.popen.wait()


class GatewayStack:
    """The processes of one installation.

    Args:
        sections: further sections of the configuration.
        server: keys of `monitoring.server`.
    """

    def __init__(self, folder: Path, redis: OwnRedis, *, sections: dict[str, Any] | None = None, **server: Any) -> None:
        self.folder, self.redis = folder, redis
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        document = {
            "queue": {"broker_url": redis.url, "max_payload_mb": 1},
            "monitoring": {
                "server": {"host": "127.0.0.1", "port": self.port, **server},
                "prometheus": {"enabled": False},
                "tracing": {"enabled": False},
            },
            "models": MODELS,
            **(sections or {}),
        }
        self.config = folder / "muai.yaml"
        self.config.write_text(yaml.safe_dump(document))
        self.settings: Settings = build_settings(document, {})
        self.processes: list[Process] = []

    def start(self, *command: str) -> Process:
        process = Process(self.folder, self.config, *command)
        self.processes.append(process)
        return process

    def start_gateway(self, *options: str) -> Process:
        process = self.start("gateway", *options)
        wait_until(lambda: process.popen.poll() is not None or self._answers(), what="the gateway")
        assert process.popen.poll() is None, process.log.read_text()
        return process

    def start_serving(self) -> None:
        """Start a collector and a worker of the fake engine, and wait until the fleet has them."""
        self.start("collector", "--name", "c1")
        self.start("worker", "--engine", "fake", "--name", "w1")
        fleet = Fleet(Store(self.redis.client))

        def complete() -> bool:
            view = fleet.view(())
            return bool(view.workers and view.collectors)

        wait_until(complete, what="the fleet")

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health").status_code in (200, 503)
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        for process in self.processes:
            process.stop()


@contextlib.contextmanager
def gateway_stack(folder: Path, *, sections: dict[str, Any] | None = None, **server: Any) -> Iterator[GatewayStack]:
    with own_redis(folder) as redis:
        stack = GatewayStack(folder, redis, sections=sections, **server)
        try:
            yield stack
        finally:
            stack.stop()
