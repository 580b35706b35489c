"""Writing terminal results: gathered while one write is under way, and written together by the next."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

import redis

from muai_producers.store import Answer, Store

log = logging.getLogger(__name__)
MAX_PER_WRITE = 256
RETRY_S = 0.2


class ResultWriter:
    """Writes answers from a thread of its own, many in one round trip, and keeps trying while the store is away.

    A request's answer leaves as soon as it is there, not when its batch ends; the more come at once, the fewer
    round trips each costs.

    Args:
        on_written: told, on the writing thread, of answers that are written, and of each whether it was the first.
    """

    def __init__(self, store: Store, on_written: Callable[[Sequence[Answer], Sequence[bool]], None] | None = None):
        self._store = store
        self._on_written = on_written
        self._waiting: list[Answer] = []
        self._is_writing = False
        self._closed = False
        lock = threading.Lock()
        self._work = threading.Condition(lock)
        self._done = threading.Condition(lock)
        self._thread = threading.Thread(target=self._write_all, name="muai-answers", daemon=True)
        self._thread.start()

    def write(self, answer: Answer) -> None:
        """Hand over an answer; returns at once."""
        with self._work:
            self._waiting.append(answer)
            if len(self._waiting) == 1 and not self._is_writing:
                self._work.notify()

    def flush(self) -> None:
        """Return once everything handed over is written."""
        with self._done:
            self._done.wait_for(lambda: self._closed or not (self._waiting or self._is_writing))

    def close(self) -> None:
        """Write what is left, and end."""
        self.flush()
        with self._work:
            self._closed = True
            self._work.notify()
        self._thread.join(timeout=5.0)

    def _write_all(self) -> None:
        while True:
            with self._work:
                self._is_writing = False
                if not self._waiting:
                    self._done.notify_all()
                self._work.wait_for(lambda: bool(self._waiting) or self._closed)
                if self._closed:
                    return
                answers, self._waiting = self._waiting[:MAX_PER_WRITE], self._waiting[MAX_PER_WRITE:]
                self._is_writing = True
            self._write(answers)

    def _write(self, answers: list[Answer]) -> None:
        warned = False
        while not self._closed:
            try:
                accepted = self._store.answer(answers)
                break
            except redis.RedisError as error:
                if not warned:
                    log.warning("the state store does not take results: %s; holding %d", error, len(answers))
                    warned = True
                time.sleep(RETRY_S)
        else:
            return
        if self._on_written is not None:
            self._on_written(answers, accepted)
