"""Changes of reloadable settings while processes run: checked as a whole, laid over what a process started with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from muai_config.errors import ConfigError, Problem, Source, did_you_mean
from muai_config.loading import problems_of
from muai_config.reference import SettingInfo, all_settings
from muai_config.settings import Settings

Overrides = Mapping[str, Any]
"""Values by dotted key, as they stand in a file: numbers, texts, booleans, null, lists."""


def reloadable_settings() -> dict[str, SettingInfo]:
    """The settings that may change at run time, by dotted key."""
    return {info.key: info for info in all_settings() if info.reloadable}


def key_problems(keys: Iterable[str]) -> list[Problem]:
    """What is wrong with the names: a key that does not exist, or that is read at the start alone."""
    known = {info.key: info for info in all_settings()}
    problems = []
    for key in keys:
        info = known.get(key)
        if info is None:
            nearest = did_you_mean(key, known)
            hint = f"did you mean {nearest}?" if nearest else "`muai config docs` lists the keys"
            problems.append(Problem(key, f"there is no such key; {hint}"))
        elif not info.reloadable:
            problems.append(Problem(key, "is read when a process starts: change the file, and restart what reads it"))
    return problems


def overlaid(settings: Settings, overrides: Overrides, source: Source) -> Settings:
    """`settings` with `overrides` in place of what they say, checked as a whole.

    Args:
        source: where the overrides come from, as problems say it.
    Raises:
        ConfigError: with every problem; a value that is right alone may be wrong beside another.
    """
    problems = key_problems(overrides)
    if problems:
        raise ConfigError(problems)
    if not overrides:
        return settings
    document = settings.model_dump()
    known = reloadable_settings()
    for key, value in overrides.items():
        *sections, name = known[key].location
        inner = document
        for section in sections:
            inner = inner[section]
        inner[name] = value
    try:
        return Settings.model_validate(document)
    except ValidationError as error:
        raise ConfigError(problems_of(error, lambda _: source)) from None


def reloadable_values(settings: Settings) -> dict[str, Any]:
    """Every reloadable setting's value, as a file would say it."""
    values = {}
    for key, info in reloadable_settings().items():
        value: Any = settings
        for name in info.location:
            value = getattr(value, name)
        values[key] = list(value) if isinstance(value, tuple) else value
    return values


def changed_settings(old: Settings, new: Settings) -> tuple[dict[str, Any], list[str]]:
    """What differs: the reloadable values of `new` by key, and the keys that only a restart can change."""
    changes, fixed = {}, []
    for info in all_settings():
        before: Any = old
        after: Any = new
        for name in info.location:
            before, after = getattr(before, name), getattr(after, name)
        if before == after:
            continue
        if info.reloadable:
            changes[info.key] = list(after) if isinstance(after, tuple) else after
        else:
            fixed.append(info.key)
    if old.models != new.models:
        fixed.append("models")
    return changes, fixed
