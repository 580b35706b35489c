"""Writing terminal results: gathered while one write is under way, and written together by the next."""

from __future__ import annotations

import logging
import threading

import redis

from muai_producers.store import Answer, Store

log = logging.getLogger(__name__)
MAX_PER_WRITE = 256
RETRY_S = 0.2


class ResultWriter:
    """Writes answers from a thread of its own, many in one round trip, and keeps trying while the store is away.

    A request's answer leaves as soon as it is there, not when its batch ends; the more come at once, the fewer
    round trips each costs.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: list[Answer] = []
        self._num_open = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._write_all, name="muai-answers", daemon=True)
        self._thread.start()

    def write(self, answer: Answer) -> None:
        """Hand over an answer; returns at once."""
        with self._changed:
            self._waiting.append(answer)
            self._num_open += 1
            self._changed.notify_all()

    def flush(self) -> None:
        """Return once everything handed over is written."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_open == 0 or self._closed)

    def close(self) -> None:
        """Write what is left, and end."""
        self.flush()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=5.0)

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._closed)
                if self._closed:
                    return
                answers, self._waiting = self._waiting[:MAX_PER_WRITE], self._waiting[MAX_PER_WRITE:]
            self._write(answers)
            with self._changed:
                self._num_open -= len(answers)
                self._changed.notify_all()

    def _write(self, answers: list[Answer]) -> None:
        warned = False
        while not self._closed:
            try:
                self._store.answer(answers)
                return
            except redis.RedisError as error:
                if not warned:
                    log.warning("the state store does not take results: %s; holding %d", error, len(answers))
                    warned = True
                with self._changed:
                    self._changed.wait(RETRY_S)
