"""Watches results from outside: what is written, when, and whether anything is written twice.

Redis itself tells of every key that is set, in order; so a second write of a terminal state shows whoever made it.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterable
from typing import Any

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from muai_producers.store import META_PREFIX, TERMINAL

_KEYSPACE = "__keyspace@0__:" + META_PREFIX
LISTEN_S = 0.5


class Witness:
    """Follows the terminal states of all requests at one state store."""

    def __init__(self, port: int) -> None:
        # Without retries: redis-py would subscribe anew by itself, and what was told in between would be missed.
        self._client = redis.Redis(port=port, retry=Retry(NoBackoff(), 0))
        self._changed = threading.Condition()
        self._finished: dict[str, float] = {}
        self._expected: dict[str, None] = {}
        self._found: set[str] = set()
        """Known to be finished by looking, not by being told: the notice may still be on its way."""
        self._second: list[str] = []
        self._closed = threading.Event()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="witness", daemon=True)
        self._thread.start()
        assert self._listening.wait(10.0)

    def close(self) -> None:
        self._closed.set()
        self._thread.join(5.0)
        self._client.close()

    def _watch(self) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(redis.RedisError):
                self._listen()
            self._closed.wait(0.05)  # the broker is being restarted

    def _listen(self) -> None:
        with contextlib.closing(self._client.pubsub(ignore_subscribe_messages=True)) as channel:
            self._await_whole(channel)
            channel.psubscribe(_KEYSPACE + "*", "muai:reply:*")
            channel.get_message(timeout=LISTEN_S)
            self._look()
            self._listening.set()
            while not self._closed.is_set():
                message = channel.get_message(timeout=LISTEN_S)
                if message is not None:
                    self._heard(message["channel"].decode(), message["data"].decode())

    @staticmethod
    def _await_whole(channel: Any) -> None:
        """Raise while the server still reads its log.

        It lets subscribers in meanwhile, and tells them of every key that the log sets: of what was written before.
        It answers no PING until it is done; on the subscriber's own connection, for another may be to a server
        that was killed since.
        """
        channel.ping()
        channel.parse_response()

    def _look(self) -> None:
        """Catch up with what was finished while nobody listened."""
        with self._changed:
            unknown = [request_id for request_id in self._expected if request_id not in self._finished]
        for start in range(0, len(unknown), 500):
            finished = self.terminal(unknown[start : start + 500])
            with self._changed:
                self._finished.update(dict.fromkeys(finished, time.monotonic()))
                self._found |= finished.keys()
                self._changed.notify_all()

    def _heard(self, channel: str, data: str) -> None:
        now_s = time.monotonic()
        with self._changed:
            if channel.startswith(_KEYSPACE):
                # Its terminal state was told of before: this is a second write.
                request_id = channel[len(_KEYSPACE) :]
                if request_id in self._finished and request_id not in self._found:
                    self._second.append(request_id)
                return
            for request_id in (line.partition(" ")[0] for line in data.split("\n")):
                if request_id in self._found:
                    self._found.discard(request_id)
                elif request_id in self._finished:
                    self._second.append(request_id)
                else:
                    self._finished[request_id] = now_s
            self._changed.notify_all()

    def expect(self, ids: Iterable[str]) -> None:
        """Follow these requests through restarts of the store too. Requests are followed from their submission."""
        with self._changed:
            self._expected.update(dict.fromkeys(ids))

    def num_finished(self, ids: Iterable[str]) -> int:
        return sum(request_id in self._finished for request_id in ids)

    def wait_for(self, ids: Iterable[str], count: int, limit_s: float) -> None:
        """Wait until `count` of `ids` have their terminal state."""
        wanted = list(ids)
        with self._changed:
            if not self._changed.wait_for(lambda: self.num_finished(wanted) >= count, limit_s):
                raise AssertionError(f"{self.num_finished(wanted)} of {count} results within {limit_s} s")

    def wait_for_any(self, count: int, limit_s: float) -> None:
        """Wait until `count` requests, whichever, have their terminal state."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._finished) >= count, limit_s):
                raise AssertionError(f"{len(self._finished)} of {count} results within {limit_s} s")

    def second_writes(self, ids: Iterable[str]) -> list[str]:
        """Requests whose terminal state was written again, once for each such write."""
        wanted = set(ids)
        return [request_id for request_id in self._second if request_id in wanted]

    def longest_pause_s(self, ids: Iterable[str], since_s: float) -> float:
        """The longest time without any result, from `since_s` to the last result."""
        moments = sorted(self._finished[request_id] for request_id in ids if request_id in self._finished)
        times = [since_s, *(moment for moment in moments if moment > since_s)]
        return max((later - sooner for sooner, later in itertools.pairwise(times)), default=0.0)

    def terminal(self, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The terminal states that the store has now."""
        wanted = list(ids)
        found = self._client.mget([META_PREFIX + request_id for request_id in wanted]) if wanted else []
        metas = {
            request_id: msgspec.json.decode(raw)
            for request_id, raw in zip(wanted, found, strict=True)
            if raw is not None
        }
        return {request_id: meta for request_id, meta in metas.items() if meta["status"] in TERMINAL}
