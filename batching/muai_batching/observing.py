"""What a collector adds to the metrics."""

from __future__ import annotations

from collections.abc import Container

from muai_batching.assembler import Assembler, BatchPolicy, Formed
from muai_producers.errors import MuaiError
from muai_producers.monitoring import instruments
from muai_producers.monitoring.guard import guarded
from muai_producers.monitoring.outcomes import record_failure
from muai_producers.monitoring.recorder import Recorder
from muai_producers.wire import InferenceRequest

HELD = "collector"
"""The queue by whose name the age of what the collectors hold is told."""


class CollectorMetrics:
    """Tells the recorder: of each batch once, of what waits once a second.

    Args:
        models: those of the catalog; all others are one to the metrics.
    """

    def __init__(self, recorder: Recorder, models: Container[str]) -> None:
        self._recorder = recorder
        self._models = models
        self._shown: set[str] = set()

    def redelivered(self) -> None:
        """A request's message came again."""
        self._recorder.count(instruments.REDELIVERIES, "request")

    def refused(self, request: InferenceRequest, error: MuaiError) -> None:
        """A request ended here, without an engine."""
        model = request.model if request.model in self._models else instruments.UNKNOWN
        record_failure(self._recorder, model, request.tenant, error)

    def turns(self, model: str, way: str, count: int = 1) -> None:
        """Turns of conversations went that way."""
        self._recorder.count(instruments.CONVERSATION_TURNS, model, way, by=count)

    @guarded("metrics")
    def sent(self, formed: Formed, policy: BatchPolicy) -> None:
        """A batch has left."""
        model, size = formed.key.model, len(formed.items)
        tokens = sum(item.tokens for item in formed.items)
        self._recorder.record(
            (instruments.BATCH_FILL, (model,), (size / policy.size_limit,)),
            (instruments.BATCH_TOKENS, (model, "real"), tokens),
            (instruments.BATCH_TOKENS, (model, "padding"), formed.padded_tokens - tokens),
        )

    @guarded("metrics")
    def waiting(self, assembler: Assembler, now_s: float) -> None:
        """What waits now, by the wall clock."""
        by_model: dict[str, int] = dict.fromkeys(self._shown, 0)
        for key, count in assembler.waiting_by_key().items():
            by_model[key.model] = by_model.get(key.model, 0) + count
        self._shown.update(by_model)
        for model, count in by_model.items():
            self._recorder.set(instruments.COLLECTED, model, value=count)
        oldest_s = assembler.oldest_submitted_s()
        age_s = 0.0 if oldest_s is None else max(0.0, now_s - oldest_s)
        self._recorder.set(instruments.OLDEST_AGE, HELD, value=age_s)
