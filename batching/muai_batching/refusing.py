"""Requests and messages that end at the collector: their senders are answered, then the messages are let go of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import redis

from muai_batching.dispatch import Dispatcher, Handle
from muai_batching.observing import CollectorMetrics
from muai_batching.tracing import CollectorTracing
from muai_producers.dead_letters import DeadLetters
from muai_producers.errors import MalformedMessageError, ModelNotFoundError, MuaiError, RequestCancelledError
from muai_producers.performance.recorder import StatisticsRecorder
from muai_producers.performance.series import Series
from muai_producers.store import FAILURE, REVOKED, Answer, Store, failure_answer
from muai_producers.wire import InferenceRequest

log = logging.getLogger(__name__)


class Refusals:
    """What is to be refused, until it is."""

    def __init__(
        self,
        store: Store,
        dispatcher: Dispatcher,
        metrics: CollectorMetrics,
        tracing: CollectorTracing,
        statistics: StatisticsRecorder,
        wall_s: Callable[[], float],
    ) -> None:
        self._store = store
        self._dead_letters = DeadLetters(store)
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._tracing = tracing
        self._statistics = statistics
        self._wall_s = wall_s
        self._refused: list[tuple[Answer | None, Handle]] = []

    def refuse(self, request: InferenceRequest, handle: Handle, error: MuaiError) -> None:
        """A request that has ended, or can never be served."""
        state = REVOKED if isinstance(error, RequestCancelledError) else FAILURE
        answer = failure_answer(request.id, error, request.reply_to, state=state, tenant=request.tenant)
        self._metrics.refused(request, error)
        self._refused.append((answer, handle))
        self._tracing.refused(request, error, state)
        # Its model may be one that there is not: names that senders make up must not become series.
        model = "" if isinstance(error, ModelNotFoundError) else request.model
        total_ms = 1000 * (self._wall_s() - request.submitted_at)
        self._statistics.failed(Series(model, "", request.task or ""), error.code, total_ms)

    def refuse_message(self, message: Any, handle: Handle, error: MuaiError) -> None:
        """A message that is no request; kept as a dead letter where it cannot be read."""
        headers = message.headers if isinstance(message.headers, dict) else {}
        request_id = headers.get("id")
        answer = None
        if isinstance(request_id, str) and request_id:
            answer = failure_answer(request_id, error)
        self._statistics.failed(Series("", "", ""), error.code)
        if isinstance(error, MalformedMessageError):
            log.warning("refused a message: %s", error)
            self._dead_letters.add_message(str(request_id or ""), message.body or b"", error)
        self._refused.append((answer, handle))

    def settle(self) -> None:
        """Answer the senders, then let go of the messages.

        Raises:
            redis.exceptions.RedisError: the store does not answer; all is kept for the next time.
        """
        if not self._refused:
            return
        refused, self._refused = self._refused, []
        answers = [answer for answer, _ in refused if answer is not None]
        try:
            accepted = self._store.answer(answers)
        except redis.RedisError:
            self._refused = refused + self._refused
            raise
        self._tracing.answered(answers, accepted)
        self._dispatcher.drop([handle for _, handle in refused])

    def forget_all(self) -> None:
        """Drop what is not settled: the broker delivers it again."""
        self._refused.clear()
