"""Making a new version: checked as a whole under the settings of whoever makes it, before anybody hears of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from muai_config.errors import ConfigError, Problem, Source
from muai_config.runtime import key_problems, overlaid
from muai_producers.errors import ConfigConflictError, InvalidConfigError
from muai_producers.runtime_config.versions import MAX_TEXT, Canary, ConfigVersion, ConfigVersions, differing

if TYPE_CHECKING:
    from muai_config import Settings

TRIES = 20
"""Two who edit at once both get their way, one after the other, as long as they change different things."""


class ConfigEditor:
    """Changes the runtime configuration. What is tried on one process ends with any other version.

    Args:
        settings: what changes are checked against: files and environment, without overrides.
    Raises:
        InvalidConfigError: from every method: the whole would be wrong; nothing was written.
        ConfigConflictError: others made a version meanwhile.
        redis.exceptions.RedisError: the state store does not answer.
    """

    def __init__(self, settings: Settings, versions: ConfigVersions, wall_s: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._versions = versions
        self._wall_s = wall_s

    def set(self, changes: Mapping[str, Any], *, by: str, why: str = "", expected: int | None = None) -> ConfigVersion:
        """Give keys new values.

        Args:
            expected: the version that the change was thought of for; with another one there it is refused.
        Returns:
            the new version; the one that is there already, when nothing would change.
        """
        return self.change(changes, (), by=by, why=why, expected=expected)

    def unset(self, keys: Sequence[str], *, by: str, why: str = "", expected: int | None = None) -> ConfigVersion:
        """Let keys go by files and environments again."""
        return self.change({}, keys, by=by, why=why, expected=expected)

    def change(
        self, changes: Mapping[str, Any], unset: Sequence[str], *, by: str, why: str = "", expected: int | None = None
    ) -> ConfigVersion:
        """Give keys new values and let others go, in one version; as `set`."""
        problems = key_problems(unset)
        problems += [Problem(key, "is to be set and unset at once") for key in unset if key in changes]
        if problems:
            raise _invalid(ConfigError(problems))
        gone = set(unset)
        return self._make(
            lambda old: {**{key: value for key, value in old.items() if key not in gone}, **changes}, by, why, expected
        )

    def try_on(
        self, process: str, changes: Mapping[str, Any], *, by: str, why: str = "", expected: int | None = None
    ) -> ConfigVersion:
        """Give keys new values at one process alone; as `set`. All others go on as they are."""
        return self._make(dict, by, why, expected, canary=Canary(process=process, overrides=dict(changes)))

    def rollback(self, to: int | None = None, *, by: str, why: str = "", expected: int | None = None) -> ConfigVersion:
        """Go back to an earlier version, as a new one.

        Args:
            to: its number; None: the one before the latest. 0: nothing is overridden any more.
            expected: as `set` has it; None: the version that is the latest now.
        Raises:
            UnknownVersionError: there is none of that number.
        """
        latest = self._versions.current_number() if expected is None else expected
        number = max(0, latest - 1) if to is None else to
        target = self._versions.version(number)
        return self._make(lambda _: dict(target.overrides), by, why, latest, restores=number)

    def _make(
        self,
        change: Callable[[Mapping[str, Any]], dict[str, Any]],
        by: str,
        why: str,
        expected: int | None,
        restores: int | None = None,
        canary: Canary | None = None,
    ) -> ConfigVersion:
        for attempt in range(TRIES):
            current = self._versions.current()
            if expected is not None and current.number != expected:
                raise ConfigConflictError(
                    f"the runtime configuration is at version {current.number}, not {expected}: look, and try again",
                    {"version": current.number, "expected": expected},
                )
            version = self._next(current, change(current.overrides), by, why, restores, canary)
            if version is None:
                return current
            try:
                self._versions.advance(version)
            except ConfigConflictError:
                if attempt == TRIES - 1:
                    raise
                continue
            return version
        raise AssertionError("unreachable: the last try returns or raises")

    def _next(
        self,
        current: ConfigVersion,
        overrides: dict[str, Any],
        by: str,
        why: str,
        restores: int | None,
        canary: Canary | None,
    ) -> ConfigVersion | None:
        number = current.number + 1
        source = Source("runtime", f"version {number}")
        try:
            overlaid(self._settings, overrides, source)
            if canary is not None:
                overlaid(self._settings, {**overrides, **canary.overrides}, source)
        except ConfigError as error:
            raise _invalid(error) from None
        changed, removed = differing(current.overrides, overrides)
        if not changed and not removed and canary == current.canary:
            return None
        return ConfigVersion(
            number=number,
            overrides=overrides,
            changed=changed,
            removed=removed,
            restores=restores,
            at=self._wall_s(),
            by=by[:MAX_TEXT],
            why=why[:MAX_TEXT],
            canary=canary,
        )


def _invalid(error: ConfigError) -> InvalidConfigError:
    problems = [{"key": problem.key, "message": problem.message} for problem in error.problems]
    return InvalidConfigError("; ".join(str(problem) for problem in error.problems), {"problems": problems})
