"""The part of the cache that one loaded model sees."""

from __future__ import annotations

from collections.abc import Sequence

from muai_producers.wire import InferenceRequest
from muai_workers.kv_cache.manager import CacheKey, KeysAndValues, KVCacheManager, Reuse


class ModelCache:
    """Looks up and keeps for one model in memory. Thread-safe.

    Closed, it keeps nothing more: what a last request of an unloaded model computed fits no weights that are loaded
    later under the same name.
    """

    def __init__(self, manager: KVCacheManager, model: str) -> None:
        self._manager = manager
        self._model = model
        self._closed = False

    def wants(self, request: InferenceRequest) -> bool:
        """Whether anything is kept for the request: it belongs to a conversation."""
        return request.conversation_id is not None and self._manager.enabled and not self._closed

    def find(self, request: InferenceRequest, ids: Sequence[int]) -> Reuse | None:
        """As `KVCacheManager.get_cache`."""
        return self._manager.get_cache(self._key(request), ids) if self.wants(request) else None

    def keep(self, request: InferenceRequest, ids: Sequence[int], kept: KeysAndValues) -> None:
        """As `KVCacheManager.store_cache`."""
        if self.wants(request):
            self._manager.store_cache(self._key(request), ids, kept)

    def close(self) -> None:
        """Free what is kept: the model is no longer loaded."""
        self._closed = True
        self._manager.drop_model(self._model)

    def _key(self, request: InferenceRequest) -> CacheKey:
        return CacheKey(request.tenant, request.conversation_id or "", self._model)
