"""Looking for a new version now and then, for a process that has no thread to follow them: a web app's client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import redis

from muai_producers.runtime_config.live import LiveSettings
from muai_producers.runtime_config.versions import ConfigVersions

LOOK_EVERY_S = 1.0


class Looker:
    """Applies the latest version when asked to, at most once in `LOOK_EVERY_S`. Thread-safe."""

    def __init__(
        self, live: LiveSettings, versions: ConfigVersions, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._live = live
        self._versions = versions
        self._now_s = now_s
        self._looked_s = float("-inf")
        self._lock = threading.Lock()

    def look_now_and_then(self) -> None:
        """Take up a version that is new. A store that does not answer changes nothing: whoever asks it for more will
        hear of that.
        """
        now_s = self._now_s()
        if now_s - self._looked_s < LOOK_EVERY_S or not self._lock.acquire(blocking=False):
            return
        try:
            self._looked_s = now_s
            number = self._versions.current_number()
            if number != self._live.applied.version:
                self._live.apply(self._versions.version(number))
        except redis.RedisError:
            pass
        finally:
            self._lock.release()
