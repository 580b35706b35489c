"""Settings changed while processes run: whole or not at all, everywhere, in order, and never at a request's cost."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.gateway_support import GatewayStack, gateway_stack
from tests.transport_support import OwnRedis, wait_until

from muai_config import Settings, build_settings
from muai_producers import InferenceClient
from muai_producers.errors import ConfigConflictError, InvalidConfigError, QueueFullError, UnknownVersionError
from muai_producers.runtime_config.editing import ConfigEditor
from muai_producers.runtime_config.following import ConfigFollower
from muai_producers.runtime_config.live import LiveSettings
from muai_producers.runtime_config.versions import ConfigVersions
from muai_producers.store import Store

pytestmark = pytest.mark.redis
SIZE, LEAST = "optimization.batcher.max_batch_size", "optimization.batcher.min_batch_size"


@pytest.fixture
def versions(store: Store) -> ConfigVersions:
    return ConfigVersions(store)


@pytest.fixture
def editor(muai_settings: Settings, versions: ConfigVersions) -> ConfigEditor:
    return ConfigEditor(muai_settings, versions, wall_s=lambda: 1000.0)


def test_given_a_change_then_it_is_a_version_with_who_when_and_why(
    editor: ConfigEditor, versions: ConfigVersions
) -> None:
    made = editor.set({SIZE: 64}, by="ada", why="more room")
    assert (made.number, made.changed, made.by, made.why, made.at) == (1, {SIZE: 64}, "ada", "more room", 1000.0)
    assert versions.current() == made == versions.version(1)
    assert editor.set({SIZE: 64}, by="ada") == made, "what changes nothing is no version"


def test_given_changes_that_are_only_wrong_together_then_the_second_is_refused_and_nothing_is_written(
    editor: ConfigEditor, versions: ConfigVersions
) -> None:
    editor.set({LEAST: 8}, by="ada")
    with pytest.raises(InvalidConfigError, match=r"min_batch_size: 8 is not allowed .*at most max_"):
        editor.set({SIZE: 4}, by="ada")
    assert versions.current_number() == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optimization.batcher.max_size": 4}, "did you mean optimization.batcher.max_batch_size?"),
        ({"queue.broker_url": "redis://elsewhere"}, "is read when a process starts"),
        ({SIZE: "64"}, '"64" is not allowed'),
        ({SIZE: True}, "is not allowed"),
        ({SIZE: [1] * 1000}, "is not allowed"),
    ],
)
def test_given_a_wrong_change_then_the_error_names_the_key_and_the_way_out(
    editor: ConfigEditor, versions: ConfigVersions, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        editor.set(changes, by="ada")
    assert told in caught.value.message
    assert caught.value.details["problems"][0]["key"] == next(iter(changes))
    assert versions.current_number() == 0


def test_given_rollbacks_then_each_is_a_new_version_with_the_old_values(
    editor: ConfigEditor, versions: ConfigVersions
) -> None:
    editor.set({SIZE: 64}, by="ada")
    editor.set({SIZE: 128, "queue.engine_cooldown_s": 5}, by="ada")
    back = editor.rollback(by="bob", why="too slow")
    assert (back.number, back.overrides, back.restores) == (3, {SIZE: 64}, 1)
    assert (back.changed, back.removed) == ({SIZE: 64}, ("queue.engine_cooldown_s",))
    assert editor.rollback(0, by="bob").overrides == {}
    with pytest.raises(UnknownVersionError):
        editor.rollback(77, by="bob")
    assert [version.number for version in versions.history()] == [4, 3, 2, 1]


def test_given_many_who_change_different_keys_at_once_then_every_change_holds(
    muai_settings: Settings, clean_redis: OwnRedis
) -> None:
    keys = [SIZE, "queue.engine_cooldown_s", "optimization.batcher.batch_timeout_ms", "queue.tenant_max_requests"]

    def change(number: int) -> None:
        editor = ConfigEditor(muai_settings, ConfigVersions(Store(clean_redis.client)))
        editor.set({keys[number]: 100 + number}, by=str(number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(change, range(4)))
    current = ConfigVersions(Store(clean_redis.client)).current()
    assert current.number == 4
    assert current.overrides == {key: 100 + number for number, key in enumerate(keys)}


def test_given_a_change_thought_of_for_another_version_then_it_is_refused(editor: ConfigEditor) -> None:
    editor.set({SIZE: 64}, by="ada")
    with pytest.raises(ConfigConflictError):
        editor.set({SIZE: 8}, by="bob", expected=0)


# -- a process that follows --------------------------------------------------------------------------------------------


@pytest.fixture
def live(muai_settings: Settings) -> Iterator[LiveSettings]:
    live = LiveSettings(muai_settings, "p1")
    follower = ConfigFollower(live)
    follower.start()
    try:
        yield live
    finally:
        follower.close()


def test_given_a_follower_then_it_applies_a_version_and_says_so(
    live: LiveSettings, editor: ConfigEditor, versions: ConfigVersions
) -> None:
    heard = threading.Event()
    live.subscribe(lambda _: heard.set(), live.current)
    editor.set({SIZE: 64}, by="ada")
    assert heard.wait(5.0)
    wait_until(lambda: [one.version for one in versions.applied()] == [1], what="the process's word")
    assert live.current.optimization.batcher.max_batch_size == 64


def test_given_a_process_whose_own_file_contradicts_a_version_then_it_keeps_what_it_has_and_says_why(
    muai_settings: Settings, editor: ConfigEditor, versions: ConfigVersions
) -> None:
    document = {
        "queue": {"broker_url": muai_settings.queue.broker_url},
        "optimization": {"batcher": {"min_batch_size": 8}},
    }
    live = LiveSettings(build_settings(document, {}), "stubborn")
    follower = ConfigFollower(live)
    follower.start()
    try:
        editor.set({SIZE: 4}, by="ada")
        wait_until(lambda: any(one.error for one in versions.applied()), what="the refusal")
        (told,) = versions.applied()
        assert (told.version, told.wanted) == (0, 1)
        assert "min_batch_size" in told.error
        assert live.current.optimization.batcher.max_batch_size == 32
        editor.set({SIZE: 16}, by="ada")
        wait_until(lambda: [one.version for one in versions.applied()] == [2], what="the next version")
    finally:
        follower.close()
    assert versions.applied() == []


def test_given_a_part_that_cannot_work_by_new_settings_then_all_parts_go_back(
    muai_settings: Settings, editor: ConfigEditor
) -> None:
    live, seen = LiveSettings(muai_settings, "p"), []

    def stubborn(settings: Settings) -> None:
        if settings.optimization.batcher.max_batch_size > 100:
            raise MemoryError("no room")

    live.subscribe(lambda settings: seen.append(settings.optimization.batcher.max_batch_size), live.current)
    live.subscribe(stubborn, live.current)
    assert not live.apply(editor.set({SIZE: 200}, by="ada"))
    assert seen == [200, 32]
    assert live.current is muai_settings
    assert live.applied.wanted == 1
    assert "no room" in live.applied.error


def test_given_a_client_without_a_thread_for_it_then_its_limits_follow(
    muai_settings: Settings, editor: ConfigEditor
) -> None:
    with InferenceClient(muai_settings) as client:
        client.submit_many([{"model": "noop", "inputs": "a"}, {"model": "noop", "inputs": "b"}])
        editor.set({"monitoring.server.queue_capacity": 2}, by="ada")

        def is_refused() -> bool:
            try:
                client.submit("noop", "c")
            except QueueFullError as error:
                return error.details["limit"] == "queue_capacity"
            return False

        wait_until(is_refused, what="the new limit")


# -- a whole installation ----------------------------------------------------------------------------------------------


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[GatewayStack]:
    with gateway_stack(tmp_path, queue_capacity=100_000) as stack:
        yield stack


def test_given_an_edited_file_and_sighup_then_every_process_works_by_it(stack: GatewayStack) -> None:
    stack.start_gateway()
    stack.start_serving()
    versions = ConfigVersions(Store(stack.redis.client))
    wait_until(lambda: len(versions.applied()) == 3, what="three processes")
    document = yaml.safe_load(stack.config.read_text())
    document["optimization"] = {"batcher": {"max_batch_size": 7}}
    document["queue"]["max_deliveries"] = 9
    stack.config.write_text(yaml.safe_dump(document))
    for number, name in enumerate(("collector", "worker", "gateway"), 1):
        process = next(process for process in stack.processes if process.log.name.startswith(name))
        process.popen.send_signal(signal.SIGHUP)
        if number == 1:
            wait_until(lambda: [one.version for one in versions.applied()] == [1, 1, 1], what="all at version 1")
            assert versions.current().overrides == {SIZE: 7}
            assert "SIGHUP" in versions.current().by
            assert "queue.max_deliveries" in process.log.read_text(), "what needs a restart is named"
        else:  # the same edit again: read, and nothing new
            wait_until(lambda p=process: "takes up what changed of" in p.log.read_text(), what="the second reading")  # type: ignore[misc]
    assert versions.current_number() == 1
    assert all(process.popen.poll() is None for process in stack.processes)


NUM_CHANGES = 100


def test_given_ten_processes_under_load_when_changed_a_hundred_times_then_all_follow_and_nothing_is_lost(
    stack: GatewayStack, record_property: Callable[[str, object], None]
) -> None:
    stack.start_gateway()
    stack.start_serving()
    for number in range(2, 5):
        stack.start("worker", "--engine", "fake", "--name", f"w{number}")
        stack.start("collector", "--name", f"c{number}")
    stack.start("control", "--name", "k1")
    versions = ConfigVersions(Store(stack.redis.client))
    wait_until(lambda: len(versions.applied()) == 10, 60.0, "ten processes")
    editor = ConfigEditor(stack.settings, versions)
    ended = threading.Event()
    outcomes: list[Any] = []

    def load() -> None:
        with InferenceClient(stack.settings) as client:
            while not ended.is_set():
                ids = client.submit_many([{"model": "noop", "inputs": f"text {n}"} for n in range(50)])
                outcomes.extend(client.results(ids, timeout_s=60))

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for number in range(1, NUM_CHANGES + 1):
            editor.set({SIZE: 8 + number, "optimization.batcher.batch_timeout_ms": number}, by="test")
            if number % 10 == 0:
                with pytest.raises(InvalidConfigError):
                    editor.set({SIZE: 5000, "optimization.batcher.batch_timeout_ms": 1}, by="test")
        made_s = time.monotonic()
        wait_until(
            lambda: {one.version for one in versions.applied()} == {NUM_CHANGES}, what="the last version everywhere"
        )
        took_s = time.monotonic() - made_s
    finally:
        ended.set()
        thread.join()
    assert len(versions.applied()) == 10
    assert not any(one.error for one in versions.applied())
    assert versions.current_number() == NUM_CHANGES, "an invalid change makes no version"
    assert len(outcomes) >= 50
    assert not [outcome for _, outcome in outcomes if isinstance(outcome, Exception)]
    record_property("all processes at the last version after, s", round(took_s, 3))
    record_property("requests answered meanwhile", len(outcomes))
