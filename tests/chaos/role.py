"""`python -m tests.chaos.role ROLE CONFIG NAME …`: one process of a stack under test."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from muai_config import ModelSpec, Settings, load_settings
from muai_producers import InferenceClient
from muai_producers.errors import MuaiError
from muai_producers.wire import INPUT_FIELD, InferenceRequest

RESULT_LIMIT_S = 300.0
SLEEP = re.compile(r"SLEEP:([0-9.]+)")


def follow_clock(file: Path) -> None:
    """Shift `time.time` by the seconds that the file says, from now on; for processes that libfaketime upsets."""
    true_time = time.time
    time.time = lambda: true_time() + float(file.read_text())


def run_engine(settings: Settings, name: str) -> None:
    """An engine worker on the fake engine, which notes each run of a batch in the file that `MUAI_TEST_RUNS` names."""
    if clock := os.environ.get("MUAI_TEST_CLOCK"):
        follow_clock(Path(clock))
    from muai_workers.app import run_engine_worker
    from muai_workers.engines import fake
    from muai_workers.engines.base import Completion

    options = fake.FakeOptions.from_env_value(os.environ.pop("MUAI_TEST_FAKE_ENGINE", ""))
    notes = os.open(os.environ["MUAI_TEST_RUNS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    class NotingEngine(fake.FakeEngine):
        def run(self, spec: ModelSpec, task: str, requests: Sequence[InferenceRequest]) -> Iterator[Completion]:
            os.write(notes, (json.dumps([request.id for request in requests]) + "\n").encode())
            naps_s = [
                float(found[1])
                for request in requests
                if (found := SLEEP.search(str(request.inputs[INPUT_FIELD[task]])))
            ]
            time.sleep(max(naps_s, default=0.0))
            yield from super().run(spec, task, requests)

    fake.create = lambda _: NotingEngine(options)
    run_engine_worker(settings, "fake", name)


def run_collector(settings: Settings, name: str) -> None:
    from muai_batching.app import run_collector

    run_collector(settings, name)


def run_control(settings: Settings, name: str) -> None:
    from muai_workers.app import run_control

    run_control(settings, name)


def run_real(settings: Settings, name: str) -> None:
    """An engine worker on PyTorch."""
    from muai_workers.app import run_engine_worker

    run_engine_worker(settings, "pytorch", name)


def run_producer(settings: Settings, name: str) -> None:
    """Submit `COUNT` requests to each of `MODELS`, in turn, and say what came of them as one line of JSON."""
    count, models = int(sys.argv[4]), sys.argv[5].split(",")
    with InferenceClient(settings) as client:
        wanted = [
            {"model": models[index % len(models)], "inputs": f"{name} says {index}"}
            for index in range(count * len(models))
        ]
        ids: list[str] = []
        for start in range(0, len(wanted), 50):
            ids += client.submit_many(wanted[start : start + 50])
        outcomes = list(client.results(ids, timeout_s=RESULT_LIMIT_S))
    failed = [str(outcome) for _, outcome in outcomes if isinstance(outcome, MuaiError)]
    sys.stdout.write(json.dumps({"ids": ids, "answered": [request_id for request_id, _ in outcomes], "failed": failed}))
    sys.stdout.flush()


ROLES = {
    "collector": run_collector,
    "engine": run_engine,
    "real": run_real,
    "control": run_control,
    "producer": run_producer,
}

if __name__ == "__main__":
    ROLES[sys.argv[1]](load_settings(Path(os.environ.get("MUAI_TEST_CONFIG", sys.argv[2]))), sys.argv[3])
