"""Keys and values of earlier turns, kept by conversation."""

from muai_workers.kv_cache.manager import CacheKey, KeysAndValues, KVCacheManager, Reuse, common_prefix
from muai_workers.kv_cache.model_cache import ModelCache

__all__ = ["CacheKey", "KVCacheManager", "KeysAndValues", "ModelCache", "Reuse", "common_prefix"]
