"""Follows the runtime configuration from a thread of its own, and turns SIGHUP into a version."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import redis

from muai_config.errors import ConfigError
from muai_config.loading import load_settings
from muai_config.runtime import changed_settings
from muai_producers.connections import state_client
from muai_producers.errors import MuaiError
from muai_producers.runtime_config.editing import ConfigEditor
from muai_producers.runtime_config.live import LiveSettings
from muai_producers.runtime_config.versions import APPLIED_S, ConfigVersions
from muai_producers.store import Store

if TYPE_CHECKING:
    from muai_config import Settings

log = logging.getLogger(__name__)
LOOK_EVERY_S = 0.5
"""A notice that got lost delays a version by this long."""


class ConfigFollower:
    """Keeps a process's settings at the latest version. Monitoring, not delivery: without the state store the process
    goes on with what it has.

    Args:
        reread: reads file and environment anew, for SIGHUP.
    """

    def __init__(self, live: LiveSettings, reread: Callable[[], Settings] = load_settings) -> None:
        queue = live.started_with.queue
        self.live = live
        self._reread = reread
        self._seen = live.started_with
        self._client = state_client(queue.state_url, timeout_s=2.0)
        self._versions = ConfigVersions(Store(self._client, prefix=queue.key_prefix))
        self._reload_wanted = False
        self._closed = threading.Event()
        self._told_s = float("-inf")
        self._thread = threading.Thread(target=self._run, name="muai-config", daemon=True)

    def start(self) -> None:
        """Take the version that is there, then follow the later ones."""
        try:
            self._look()
        except redis.RedisError as error:
            log.warning("the runtime configuration cannot be read (%s); starting by file and environment", error)
        self._thread.start()

    def take_sighup(self) -> None:
        """Have SIGHUP read the file again. Does nothing outside the main thread, which alone may take signals."""
        if threading.current_thread() is not threading.main_thread():
            return
        # The handler only sets a flag: it may interrupt code that holds any lock.
        signal.signal(signal.SIGHUP, lambda *_: self.reload())

    def reload(self) -> None:
        """Read file and environment again, soon, and make what changed of them a version for everybody."""
        self._reload_wanted = True

    def close(self) -> None:
        """Stop following."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)
        try:
            self._versions.forget_applied(self.live.process)
        except redis.RedisError:
            log.debug("what this process applied is forgotten by itself", exc_info=True)
        self._client.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._follow()
            except redis.RedisError as error:
                log.warning("following the runtime configuration: %s; trying again", error)
                self._closed.wait(LOOK_EVERY_S)

    def _follow(self) -> None:
        pubsub: Any = self._client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
        try:
            pubsub.subscribe(self._versions.keys.channel)
            while not self._closed.is_set():
                self._look()
                if self._reload_wanted:
                    self._reload_wanted = False
                    self._publish_file()
                    continue
                pubsub.get_message(timeout=LOOK_EVERY_S)
        finally:
            pubsub.close()

    def _look(self) -> None:
        number = self._versions.current_number()
        applied = self.live.applied
        if number not in (applied.version, applied.wanted):
            self.live.apply(self._versions.version(number))
        if self.live.applied != applied or time.monotonic() - self._told_s > APPLIED_S / 3:
            self._versions.tell_applied(self.live.applied)
            self._told_s = time.monotonic()

    def _publish_file(self) -> None:
        try:
            fresh = self._reread()
            changes, fixed = changed_settings(self._seen, fresh)
            if fixed:
                log.warning("only a restart takes up what changed of %s", ", ".join(fixed))
            if changes:
                who = f"SIGHUP at {socket.gethostname()}, process {os.getpid()}"
                ConfigEditor(fresh, self._versions).set(changes, by=who, why="the configuration file was edited")
            else:
                log.info("SIGHUP: nothing changed that can change at run time")
            self._seen = fresh
        except (ConfigError, MuaiError, OSError) as error:
            log.error("SIGHUP: the configuration stays as it is: %s", error)
