"""A whole installation under test: broker, state store, collector, engine workers, and a client."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from tests.chaos.brokers import Broker, RabbitNode, RedisServer
from tests.chaos.figures import Figures, keep
from tests.chaos.supervisor import Supervised
from tests.chaos.witness import Witness
from tests.transport_support import wait_until

from muai_config import Settings, build_settings
from muai_config.engines import ALL_ENGINES
from muai_config.queues import ALL_QUEUES
from muai_producers import InferenceClient
from muai_producers.store import SUCCESS

RESUME_LIMIT_S = 15.0
ANSWER_LIMIT_S = 60.0
SLOWEST_PER_S = 200
"""Requests that a busy machine still answers each second; how soon work resumes is judged by the pause alone."""
LATENCY = {"latency_per_request_ms": 1.0, "latency_per_batch_ms": 30.0}


def num_requests() -> int:
    """Requests of a scenario: `MUAI_TEST_CHAOS_REQUESTS`, small where it is not set."""
    return int(os.environ.get("MUAI_TEST_CHAOS_REQUESTS", "600"))


def is_full_form() -> bool:
    """Whether this is `make chaos`, and not the short form of `make test`."""
    return num_requests() >= 10_000


def lease_ttl_s() -> float:
    """The default lease in the full form, a short one in the short form."""
    return 8.0 if is_full_form() else 2.0


@dataclass
class Load:
    """Requests under way, and what was known when they were submitted."""

    ids: list[str]
    refused_before: int
    faults_s: list[float] = field(default_factory=list)
    """Monotonic moments of the faults."""
    away_s: float = 0.0
    """How long what was killed took to start again: none of ours."""


class Stack:
    """Start with `start`, end with `stop`.

    Args:
        state: keeps the results; carries the messages too where `broker` is the same.
        workers: names of the engine workers, with the role that each plays.
    """

    def __init__(
        self,
        broker: Broker,
        state: RedisServer,
        folder: Path,
        *,
        workers: Mapping[str, str],
        models: Mapping[str, Any],
        lease_ttl_s: float,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.broker, self.state, self.folder = broker, state, folder
        self._models, self._lease_ttl_s = models, lease_ttl_s
        self.runs_file = folder / "runs"
        self.settings = self._settings()
        self.config_file = self.write_config("muai")
        self.processes = {"collector": self._process("collector", "collector", "collector")}
        for name, role in workers.items():
            self.processes[name] = self._process(name, role, name)
        self.processes["control"] = self._process("control", "control", "control")
        self.verified = True
        """Whether all that was submitted was found well: no test need fear what an earlier one left."""
        self.witness = Witness(state.port)
        self.client = InferenceClient(self.settings)

    def _settings(self, port: int | None = None) -> Settings:
        return build_settings(self._document(port), {})

    def _document(self, port: int | None = None) -> dict[str, Any]:
        broker_url = self.broker.url(port)
        same = isinstance(self.broker, RedisServer)
        return {
            "queue": {
                "broker_url": broker_url,
                "redis_url": broker_url if same else self.state.url(),
                "lease_ttl_s": self._lease_ttl_s,
            },
            "monitoring": {"server": {"queue_capacity": 100_000}, "tracing": {"enabled": False}},
            "models": dict(self._models),
        }

    def write_config(self, name: str, port: int | None = None) -> Path:
        """A configuration file; with `port`, one that goes through a proxy of the broker on that port."""
        file = self.folder / f"{name}.yaml"
        file.write_bytes(msgspec.yaml.encode(self._document(port)))
        return file

    def _process(self, name: str, *arguments: str) -> Supervised:
        environment = {
            "MUAI_TEST_RUNS": str(self.runs_file),
            "MUAI_TEST_FAKE_ENGINE": msgspec.json.encode(LATENCY).decode(),
            "MUAI_TEST_CONFIG": str(self.config_file),
        }
        return Supervised(name, [arguments[0], str(self.config_file), *arguments[1:]], environment, self._log(name))

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def start(self) -> None:
        for process in self.processes.values():
            process.start()
        self.wait_whole()

    def wait_whole(self) -> None:
        """Wait until every process works."""
        for process in self.processes.values():
            process.wait_ready()
        num_workers = sum(name.startswith("worker") for name in self.processes)
        wait_until(lambda: self.num_alive() >= num_workers, what="the workers' announcement")

    def num_alive(self) -> int:
        return int(self.state.client.hlen(self.client.store.keys.workers))  # type: ignore[arg-type]

    def stop(self) -> None:
        for process in self.processes.values():
            process.begin_stop()
        for process in self.processes.values():
            process.stop()
        self.client.close()
        self.witness.close()

    def restart(self, name: str, number: signal.Signals = signal.SIGTERM, **environment: str) -> None:
        """End a process and start it again in another environment."""
        self.verified = False
        self.processes[name].restart(number, **environment)
        self.wait_whole()
        self.verified = True

    # -- load ----------------------------------------------------------------------------------------------------

    def submit(self, count: int, *, model: str = "noop", texts: Sequence[str] = ()) -> Load:
        """Submit `count` requests, and those of `texts` besides, in one call."""
        self.verified = False
        refused = self.refused()
        inputs = [*texts, *(f"request {number}" for number in range(count))]
        load = Load(self.client.submit_many({"model": model, "inputs": text} for text in inputs), refused)
        self.witness.expect(load.ids)
        return load

    def refused(self) -> int:
        """Second results that were offered and refused so far."""
        return int(self.state.client.hget(self.client.store.keys.stats, "duplicates_refused") or 0)  # type: ignore[arg-type]

    def await_share(self, load: Load, share: float) -> None:
        """Wait until that share of the load is answered."""
        limit_s = ANSWER_LIMIT_S + len(load.ids) / SLOWEST_PER_S
        self.witness.wait_for(load.ids, max(1, int(len(load.ids) * share)), limit_s)

    def signal(self, load: Load, number: signal.Signals, *names: str) -> None:
        """A signal to processes, to all at the same moment."""
        load.faults_s.append(min(self.processes[name].signal(number) for name in names))

    def runs(self) -> list[list[str]]:
        """The ids of each run of a batch on a fake engine, in order."""
        return [msgspec.json.decode(line) for line in self.runs_file.read_bytes().splitlines()]

    # -- verdict -------------------------------------------------------------------------------------------------

    def verify(self, scenario: str, load: Load, *, failures: Sequence[str] = ()) -> Figures:
        """Wait for all results; nothing is lost, nothing answered twice, nothing left behind, work resumed in time.

        Args:
            failures: the requests that are to fail; all others succeed.
        """
        self.await_share(load, 1.0)
        at_first = self.witness.terminal(load.ids)
        self._settle_down()
        at_last = self.witness.terminal(load.ids)
        seconds = self.witness.second_writes(load.ids)
        pauses = [self.witness.longest_pause_s(load.ids, moment_s) for moment_s in load.faults_s]
        figures = Figures(
            scenario,
            self.broker.kind,
            len(load.ids),
            len(load.ids) - len(at_last),
            len(seconds),
            self.refused() - load.refused_before,
            max(pauses, default=0.0),
        )
        failed = sorted(request_id for request_id, meta in at_last.items() if meta["status"] != SUCCESS)
        assert failed == sorted(failures), [at_last[request_id] for request_id in failed[:3]]
        assert (figures.lost, figures.second_results) == (0, 0), figures
        assert at_first == at_last, "a terminal state changed"
        assert figures.longest_pause_s < RESUME_LIMIT_S + load.away_s, figures
        keep(figures)
        self.wait_whole()
        self.verified = True
        return figures

    def _settle_down(self) -> None:
        """Wait until nothing is on its way any more: late duplicates included."""
        wait_until(lambda: not self.left_behind(), 90.0, "an empty system")

    def left_behind(self) -> dict[str, int]:
        """What is still counted somewhere though all is answered."""
        keys, redis = self.client.store.keys, self.state.client
        left: dict[str, Any] = {"in flight": redis.hlen(keys.inflight), "load": redis.hlen(keys.load)}
        left |= {f"outstanding {engine}": redis.zcard(keys.outstanding(engine)) for engine in ALL_ENGINES}
        if isinstance(self.broker, RabbitNode):
            left |= self.broker.depths()
        else:
            left |= {queue: redis.llen(queue) for queue in ALL_QUEUES if queue.split(".")[0] in ("inference", "engine")}
            left |= {key.decode(): redis.hlen(key) for key in redis.scan_iter("muai*:claims:*")}
        return {name: count for name, count in left.items() if count}

    def num_said(self, sentences: Sequence[str], names: Sequence[str]) -> int:
        """How often any of the sentences is in the logs of those processes."""
        texts = [self.processes[name].log_file.read_text(errors="replace") for name in names]
        return sum(text.count(sentence) for text in texts for sentence in sentences)

    def logs(self) -> str:
        """The ends of all processes' logs, to be read where a test fails."""
        return "\n".join(f"--- {process.name}\n{process.log_tail()}" for process in self.processes.values())
