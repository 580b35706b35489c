"""The settings that a process works by, as they change: one value, replaced whole, and who wants to hear of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from muai_producers.runtime_config.versions import NOTHING, Applied, ConfigVersion

if TYPE_CHECKING:
    from muai_config import Settings

log = logging.getLogger(__name__)
Listener = Callable[["Settings"], None]
"""Takes the new settings; called from whichever thread applies a version. What it raises undoes the version here."""


class LiveSettings:
    """The settings of one process. Thread-safe.

    Args:
        started_with: what file, environment and command line gave; overrides are laid over it.
        process: the name under which the process says what it applies.
    """

    def __init__(self, started_with: Settings, process: str = "") -> None:
        self.started_with = started_with
        self.process = process
        self._current = started_with
        self._version = NOTHING
        self._failed: tuple[int, str] | None = None
        self._listeners: list[Listener] = []
        self._lock = threading.RLock()

    @property
    def current(self) -> Settings:
        """The settings now. Read it once for what belongs together: the next read may give others."""
        return self._current

    @property
    def applied(self) -> Applied:
        """Which version holds here, and which could not be applied."""
        wanted, error = self._failed or (0, "")
        return Applied(process=self.process, version=self._version.number, wanted=wanted, error=error)

    def subscribe(self, listener: Listener, since: Settings) -> None:
        """Call `listener` with each change, in the order of subscription.

        Args:
            since: what the listener works by so far; where others hold by now, it is called at once.
        """
        with self._lock:
            self._listeners.append(listener)
            if since is not self._current:
                listener(self._current)

    def apply(self, version: ConfigVersion) -> bool:
        """Work by a version from now on; False when it is wrong here, and everything stays as it was."""
        with self._lock:
            if version.number == self._version.number:
                return True
            if self._failed is not None and self._failed[0] == version.number:
                return False
            # Here, so that importing a client does not import all that checks settings.
            from muai_config.errors import ConfigError, Source
            from muai_config.runtime import overlaid

            try:
                settings = overlaid(
                    self.started_with,
                    version.overrides_of(self.process),
                    Source("runtime", f"version {version.number}"),
                )
                self._tell(settings)
            except ConfigError as error:
                self._refuse(version.number, "; ".join(str(problem) for problem in error.problems))
                return False
            except Exception as error:
                # A part that cannot work by new settings must not stop the process, nor leave it half changed.
                log.exception("configuration version %d could not be applied", version.number)
                self._refuse(version.number, f"{type(error).__name__}: {error}")
                self._undo()
                return False
            self._current, self._version, self._failed = settings, version, None
            log.info("configuration version %d applies: %s", version.number, describe(version))
            return True

    def _tell(self, settings: Settings) -> None:
        for listener in self._listeners:
            listener(settings)

    def _refuse(self, number: int, reason: str) -> None:
        self._failed = (number, reason)
        log.error(
            "configuration version %d is not applied, version %d goes on: %s", number, self._version.number, reason
        )

    def _undo(self) -> None:
        for listener in self._listeners:
            try:
                listener(self._current)
            except Exception:
                # The reason is told with the version; those that can go back do.
                log.exception("could not go back to configuration version %d", self._version.number)


def describe(version: ConfigVersion) -> str:
    """What a version changed, who did it and why, in one line."""
    who = f" (by {version.by}{': ' + version.why if version.why else ''})" if version.by else ""
    return describe_changes(version) + who


def describe_changes(version: ConfigVersion) -> str:
    """What a version changed, in one line."""
    parts = [f"{key} = {value!r}" for key, value in version.changed.items()]
    parts += [f"{key} as configured" for key in version.removed]
    if version.canary is not None:
        parts += [
            f"{key} = {value!r} at {version.canary.process} alone" for key, value in version.canary.overrides.items()
        ]
    return ", ".join(parts) or "nothing"
