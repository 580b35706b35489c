"""Watches an engine's models: what is loaded, unloaded, and kept of conversations."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterable
from typing import Any

from muai_config import ModelSpec
from muai_producers.monitoring import events, instruments
from muai_producers.monitoring.guard import guarded
from muai_producers.monitoring.recorder import Reading, Recorder
from muai_workers.engines.base import CacheStatistics, Engine

COUNTED = {
    "hits": instruments.KV_HITS,
    "misses": instruments.KV_MISSES,
    "hit_tokens": instruments.KV_HIT_TOKENS,
    "prompt_tokens": instruments.KV_PROMPT_TOKENS,
    "evictions": instruments.KV_EVICTIONS,
}


class ModelWatch:
    """Counts each load and unload of an engine, whoever asks for it, and samples what its cache keeps.

    The engine's `load`, `unload` and `close` are replaced, on this one engine, by ones that look at `loaded()` before
    and after: an engine that lets an old model go in order to load another is told as both. What it does unasked is
    seen at the next sample.
    """

    def __init__(self, engine: Engine, recorder: Recorder) -> None:
        self._engine = engine
        self._recorder = recorder
        self._lock = threading.Lock()
        self._known: set[str] = set(engine.loaded())
        self._cache: dict[str, CacheStatistics] = {}
        self._load = engine.load
        for name in ("unload", "close"):
            setattr(engine, name, self._looking_after(getattr(engine, name)))
        engine.load = self._load_watched  # type: ignore[method-assign]
        recorder.sample_from(self.sample)

    def close(self) -> None:
        """Sample no more."""
        self._recorder.drop_sampler(self.sample)

    def _load_watched(self, spec: ModelSpec) -> None:
        if spec.name in self._known:
            self._load(spec)
            return
        started_s = time.monotonic()
        try:
            self._load(spec)
        except Exception:
            events.model_load_failed(spec.name, self._engine.name, self._recorder)
            raise
        self._look(spec.name, time.monotonic() - started_s)

    def _looking_after(self, call: Any) -> Any:
        def and_look(*args: Any, **kwargs: Any) -> Any:
            answer = call(*args, **kwargs)
            self._look()
            return answer

        return and_look

    @guarded("metrics")
    def _look(self, just_loaded: str | None = None, took_s: float = 0.0) -> None:
        with self._lock:
            now = set(self._engine.loaded())
            fresh, gone = now - self._known, self._known - now
            self._known = now
        for model in fresh:
            if model == just_loaded:
                events.model_loaded(model, self._engine.name, took_s, self._recorder)
            else:
                self._recorder.count(instruments.MODEL_EVENTS, model, self._engine.name, "load")
        for model in gone:
            events.model_unloaded(model, self._engine.name, self._recorder)

    def sample(self) -> Iterable[Reading]:
        """What the cache holds of each model's conversations now; what it found and let go is counted."""
        self._look()
        statistics = dict(self._engine.cache_statistics())
        for model, now in statistics.items():
            for name, more in increases(self._cache.get(model), now).items():
                self._recorder.count(COUNTED[name], model, by=more)
        self._cache = statistics
        for model, now in statistics.items():
            yield instruments.KV_BYTES, (model,), float(now.used_bytes)
            yield instruments.KV_MAX_BYTES, (model,), float(now.max_bytes)


def increases(before: CacheStatistics | None, now: CacheStatistics) -> dict[str, int]:
    """What was counted between two looks; a model that was loaded anew counts from nought."""
    new, old = dataclasses.asdict(now), {} if before is None else dataclasses.asdict(before)
    if any(new[name] < old.get(name, 0) for name in COUNTED):
        old = {}
    return {name: new[name] - old.get(name, 0) for name in COUNTED}
