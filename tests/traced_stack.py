"""A whole installation of real processes, gateway included, whose two engines are fakes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import msgspec

from muai_config import Settings, build_settings
from muai_producers import InferenceClient
from muai_producers.fleet import Fleet
from tests.transport_support import ROOT, free_port, wait_until

MODELS = {
    "plain": {"task": "chat", "source": "hub:none", "engines": ["fake", "onnx"]},
    "unloadable": {"task": "embedding", "source": "hub:none", "engines": ["fake", "onnx"]},
}
FIRST = {"poison_marker": "POISON", "fail_to_load": ["unloadable"]}
SECOND = {"poison_marker": "VENOM"}


class TracedStack:
    """A whole installation whose engines are fakes: `fake` fails where it is told to, `onnx` serves what it left."""

    def __init__(
        self,
        folder: Path,
        broker: str,
        state: str,
        endpoint: str,
        *,
        logs: Mapping[str, Any] | None = None,
        capacity: int = 100,
        **tracing: Any,
    ) -> None:
        self._folder = folder
        self.port = free_port()
        document = {
            "queue": {"broker_url": broker, "redis_url": state},
            "optimization": {"batcher": {"adaptive_batching": False, "batch_timeout_ms": 60}},
            "monitoring": {
                "server": {"host": "127.0.0.1", "port": self.port, "queue_capacity": capacity},
                "prometheus": {"enabled": False},
                "tracing": {"endpoint": endpoint, "max_traces_per_s": 0, **tracing},
                "logs": dict(logs or {}),
            },
            "models": MODELS,
        }
        self._config = folder / "muai.yaml"
        self._config.write_bytes(msgspec.yaml.encode(document))
        self.settings: Settings = build_settings(document, {})
        self._processes: list[tuple[subprocess.Popen[bytes], Path]] = []

    def start(self) -> None:
        command = ["-m", "muai_producers"]
        self._start("gateway", *command, "gateway")
        self._start("collector", *command, "collector", "--name", "c1")
        self._start("control", *command, "control", "--name", "k1")
        self._start("first", "-m", "tests.stand_in", "fake", "w1", msgspec.json.encode(FIRST).decode())
        self._start("second", "-m", "tests.stand_in", "onnx", "w2", msgspec.json.encode(SECOND).decode())
        with InferenceClient(self.settings) as client:
            fleet = Fleet(client.store)
            try:
                wait_until(lambda: self._is_whole(fleet), timeout_s=90, what="the fleet")
            except AssertionError as error:
                raise AssertionError(f"{error}; {fleet.view(())}\n{self.logs()[-6000:]}") from None

    def _is_whole(self, fleet: Fleet) -> bool:
        for process, log in self._processes:
            assert process.poll() is None, log.read_text()
        view = fleet.view(())
        try:
            answers = httpx.get(f"http://127.0.0.1:{self.port}/health").status_code in (200, 503)
        except httpx.TransportError:
            return False
        return answers and len(view.workers) == 2 and bool(view.collectors)

    def _start(self, name: str, *arguments: str) -> None:
        log = self._folder / f"{name}.log"
        packages = os.pathsep.join(str(ROOT / part) for part in ("config", "producers", "batching", "workers", "."))
        env = {**os.environ, "PYTHONPATH": packages, "MUAI_CONFIG": str(self._config), "MUAI_HOME": str(self._folder)}
        with log.open("wb") as output:
            process = subprocess.Popen([sys.executable, *arguments], env=env, cwd=ROOT, stdout=output, stderr=output)
        self._processes.append((process, log))

    def logs(self) -> str:
        return "\n".join(log.read_text() for _, log in self._processes)

    def stop(self) -> None:
        for process, _ in self._processes:
            process.terminate()
        for process, _ in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
