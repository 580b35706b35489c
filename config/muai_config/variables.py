"""Environment variables: which there are, and how their text becomes a value."""

import functools
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from muai_config.errors import Problem, Source, did_you_mean
from muai_config.reference import (
    SettingInfo,
    all_settings,
    is_nullable,
    list_item,
    plain_type,
    shown_value,
)

PREFIX: Final = "MUAI_"

# Variables of ours that are no settings.
OTHER_VARIABLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "MUAI_CONFIG": "the configuration file to read",
        "MUAI_LOG_LEVEL": "how much the processes log",
        "MUAI_HOME": "the folder for converted models and the embedded broker's data",
        "MUAI_ENGINE": "the engine that a worker process runs",
        "MUAI_WORKER_NAME": "the name that a worker process goes by",
        "MUAI_INSECURE_NO_AUTH": "whether the gateway asks nobody for a key on an address that others can reach",
        "MUAI_GPUS": "the GPUs that a worker process may use",
    }
)
OTHER_PREFIXES: Final = ("MUAI_TEST_", "MUAI_BENCH_")

BOOLEANS: Final[Mapping[str, bool]] = MappingProxyType(
    {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
)
_INTEGER = re.compile(r"[-+]?[0-9]{1,30}")
_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})(?:[eE][-+]?[0-9]{1,3})?")


@functools.cache
def settings_by_variable() -> Mapping[str, SettingInfo]:
    return {variable: info for info in all_settings() for variable in info.variables}


def read_variables(env: Mapping[str, str]) -> tuple[dict[SettingInfo, tuple[str, Any]], list[Problem]]:
    """The settings that `env` gives, each with the variable's name and its value, and what is wrong in it.

    A variable with an empty text counts as not set: that is how docker compose passes on what is absent.
    """
    values: dict[SettingInfo, tuple[str, Any]] = {}
    problems = list(_unknown_variables(env))
    for info in all_settings():
        given = [(variable, env[variable].strip()) for variable in info.variables if env.get(variable, "").strip()]
        if not given:
            continue
        if len({text for _, text in given}) > 1:
            names = " and ".join(variable for variable, _ in given)
            problems.append(Problem(info.key, f"{names} differ (allowed: one of them, or the same value in both)"))
            continue
        variable, text = given[0]
        try:
            values[info] = (variable, parse_text(text, info.annotation))
        except ValueError:
            allowed = info.allowed + _spelling(info.annotation)
            message = f"{shown_value(text)} is not allowed (allowed: {allowed})"
            problems.append(Problem(info.key, message, Source("variable", variable)))
    return values, problems


def _spelling(annotation: Any) -> str:
    kind = plain_type(annotation)
    if kind is bool:
        return "; in a variable also yes, no, on, off, 1, 0"
    return ", with commas between the entries" if kind is tuple else ""


def parse_text(text: str, annotation: Any) -> Any:
    """The value that a variable's text stands for, by the setting's type; its range is checked elsewhere.

    Booleans are true, false, yes, no, on, off, 1 and 0 in any case; lists have commas between their entries, and `[]`
    is the empty one; `null` is null where null is allowed.

    Raises:
        ValueError: the text is no value of that type.
    """
    text = text.strip()
    if is_nullable(annotation) and text.lower() == "null":
        return None
    kind = plain_type(annotation)
    if kind is bool:
        return _looked_up(text)
    if kind is int:
        return int(_matching(_INTEGER, text))
    if kind is float:
        return float(_matching(_NUMBER, text))
    if kind is tuple:
        return _parse_list(text, list_item(annotation))
    return text


def _parse_list(text: str, item: Any) -> list[Any]:
    if text == "[]":
        return []
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entries):
        raise ValueError("an entry of the list is empty")
    return [parse_text(entry, item) for entry in entries]


def _looked_up(text: str) -> bool:
    if text.lower() not in BOOLEANS:
        raise ValueError("not a boolean")
    return BOOLEANS[text.lower()]


def _matching(pattern: re.Pattern[str], text: str) -> str:
    if pattern.fullmatch(text) is None:
        raise ValueError("not a number")
    return text


def _unknown_variables(env: Mapping[str, str]) -> Iterator[Problem]:
    known = settings_by_variable()
    for name in sorted(env):
        is_ours = name.startswith(PREFIX) and name not in known and name not in OTHER_VARIABLES
        if is_ours and not name.startswith(OTHER_PREFIXES):
            nearest = nearest_variable(name)
            hint = f"did you mean {nearest}?" if nearest else "`muai config docs` lists the variables"
            yield Problem(name, f"there is no such variable; {hint}", Source("variable", name))


def nearest_variable(name: str) -> str | None:
    """The variable that `name` was probably meant to be: by its key's full path first, by spelling else."""
    for info in all_settings():
        if name == info.regular_variable:
            return info.variables[0]
    by_long_name = {info.regular_variable: info.variables[0] for info in all_settings()}
    candidates = {variable: variable for variable in (*settings_by_variable(), *OTHER_VARIABLES)}
    nearest = did_you_mean(name, by_long_name | candidates)
    return None if nearest is None else (by_long_name | candidates)[nearest]
