"""A step that is tried on one of two collectors first, against a real Redis; with simulated fleets and their clock."""

from __future__ import annotations

import pytest
from tests.transport_support import OwnRedis
from tests.tuning_simulation import STRETCH_S, Fleet

from muai_batching.assembler import BatchKey
from muai_batching.shards import ShardLeases, shard_of
from muai_config import build_settings
from muai_producers.errors import InvalidConfigError
from muai_producers.fleet import CollectorRecord, WorkerRecord, collector_process
from muai_producers.fleet import Fleet as FleetBook
from muai_producers.performance.monitor import PerformanceMonitor
from muai_producers.performance.series import Series
from muai_producers.runtime_config.editing import ConfigEditor
from muai_producers.runtime_config.live import LiveSettings
from muai_producers.runtime_config.versions import ConfigVersions
from muai_producers.store import Store
from muai_workers.tuning.auto_tuner import AutoTuner
from muai_workers.tuning.records import TuningEvent, Values

pytestmark = pytest.mark.redis
VALUES = Values(batch_size=4, batch_timeout_ms=50, cache_size_mb=1024)
BEGAN_S = 1_790_000_000.0
HIGH, QUIET = 100.0, 15.0
NUM_SHARDS = 2
COLLECTORS = ("c1@host", "c2@host")


def model_on(shard: int) -> str:
    """A model whose requests belong to a shard."""
    names = (f"m{number}" for number in range(100))
    return next(name for name in names if shard_of(BatchKey(name, "embedding", ("onnx",)), NUM_SHARDS) == shard)


class Installation:
    """Two collectors with a model each, whose settings are those that a real process would have."""

    def __init__(self, server: OwnRedis) -> None:
        self.store = Store(server.client)
        self.models = [model_on(shard) for shard in range(NUM_SHARDS)]
        document = {
            "queue": {"broker_url": server.url, "collector_shards": NUM_SHARDS},
            "models": {name: {"task": "embedding", "source": "hub:none", "engines": ["onnx"]} for name in self.models},
            "optimization": {
                "batcher": {"max_batch_size": 4},
                "tuner": {"enabled": True, "target_latency_ms": 500.0},
            },
        }
        self.settings = build_settings(document, {})
        self.now_s = BEGAN_S
        self.fleets = [Fleet(seed=seed, now_s=BEGAN_S) for seed in (1, 2)]
        self.live = [LiveSettings(self.settings, collector_process(name)) for name in COLLECTORS]
        self.monitor = PerformanceMonitor(self.store, 604_800, wall_s=lambda: self.now_s)
        self.versions = ConfigVersions(self.store)
        self.editor = ConfigEditor(self.settings, self.versions)
        self.tuner = AutoTuner(self.settings, self.store, self.monitor, lambda: self.now_s)
        self.alive = list(COLLECTORS)
        for name in COLLECTORS:
            ShardLeases(self.store, name, NUM_SHARDS, 3600.0).claim(len(COLLECTORS))

    def sizes(self) -> list[int]:
        """The largest batch of either collector."""
        for live in self.live:
            live.apply(self.versions.current())
        return [live.current.optimization.batcher.max_batch_size for live in self.live]

    def go(self, intervals: int) -> list[TuningEvent]:
        """Let intervals pass; returns what the tuner decided."""
        events = []
        for _ in range(intervals):
            sizes, buckets = self.sizes(), {}
            for _ in range(6):
                for model, fleet, size, rate in zip(self.models, self.fleets, sizes, (HIGH, QUIET), strict=True):
                    series, start_s = Series(model, "onnx", "embedding"), int(fleet.now_s)
                    values = VALUES.with_value("batch_size", size)
                    buckets[start_s, series.member] = fleet.run_counted(STRETCH_S, rate, values)
            for call in self.monitor.data.calls(buckets):
                self.monitor.data.call(call)
            self.now_s = self.fleets[0].now_s + 4.0
            self.announce()
            events += self.tuner.run()
        return events

    def announce(self) -> None:
        book = FleetBook(self.store)
        for model in self.models:
            book.announce(WorkerRecord(name=f"w-{model}", engine="onnx", slots=1, device="simulated"))
        for name in self.alive:
            book.announce_collector(CollectorRecord(name=name))


@pytest.fixture
def installed(clean_redis: OwnRedis) -> Installation:
    return Installation(clean_redis)


def test_given_two_collectors_then_the_busy_one_tries_a_step_alone_and_all_have_it_once_it_has_helped(
    installed: Installation,
) -> None:
    [raised] = installed.go(1)
    wanted = raised.new["batch_size"]
    assert raised.outcome == "raised"
    assert "first at c1@host (collector) alone" in raised.rationale
    assert installed.sizes() == [wanted, 4]
    version = installed.versions.current()
    assert (version.by, version.overrides) == ("tuner", {})
    [spread] = installed.go(1)
    assert (spread.outcome, spread.new) == ("spread", {"batch_size": wanted})
    assert installed.sizes() == [wanted, wanted]
    assert installed.go(2)[0].outcome == "kept"


def test_given_a_canary_that_dies_then_its_step_is_taken_back_and_no_process_has_it(installed: Installation) -> None:
    installed.go(1)
    assert installed.sizes()[0] > 4
    installed.store.client.delete("muai:shard:0")
    installed.store.client.hdel("muai:collectors", COLLECTORS[0])
    installed.alive.remove(COLLECTORS[0])
    assert installed.go(1)[0].outcome == "rolled_back"
    assert installed.sizes() == [4, 4]


@pytest.mark.property(49)
def test_given_tuning_that_is_switched_off_during_a_trial_then_the_canary_is_as_configured(
    installed: Installation,
) -> None:
    """Property 49. A switch that the tuner finds in the files, after a restart: the runtime configuration is as it
    was."""
    installed.go(1)
    document = {
        "optimization": {"tuner": {"enabled": False}},
        "queue": {"broker_url": installed.settings.queue.broker_url},
    }
    AutoTuner(build_settings(document, {}), installed.store, installed.monitor, lambda: installed.now_s).run()
    assert installed.versions.current().canary is None
    assert installed.sizes() == [4, 4]


def test_given_an_operators_change_during_a_trial_then_it_holds_everywhere_and_the_trial_is_over(
    installed: Installation,
) -> None:
    installed.go(1)
    installed.editor.set({"optimization.batcher.max_batch_size": 6}, by="ada")
    assert installed.sizes() == [6, 6]


def test_given_a_trial_then_what_would_be_wrong_at_the_canary_is_refused(installed: Installation) -> None:
    with pytest.raises(InvalidConfigError, match="max_batch_size"):
        installed.editor.try_on("c1@host (collector)", {"optimization.batcher.max_batch_size": -1}, by="ada")
    assert installed.versions.current_number() == 0
