"""How a setting is declared: type, default, range and everything the documentation says about it, in one place."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError, PydanticUndefined


def setting(
    default: Any = PydanticUndefined,
    *,
    describe: str,
    unit: str | None = None,
    example: Any = None,
    reloadable: bool = False,
    env: str | None = None,
    also_env: str | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    min_length: int | None = None,
) -> Any:
    """Declare a setting.

    Args:
        env: the environment variable, where it is not the one that the key's path gives.
        also_env: a second, shorter variable for the same key.
        reloadable: the value may change while processes run.
    """
    extra = {"unit": unit, "example": example, "reloadable": reloadable, "env": env, "also_env": also_env}
    return Field(
        default,
        description=describe,
        ge=ge,
        gt=gt,
        le=le,
        min_length=min_length,
        json_schema_extra={name: value for name, value in extra.items() if value is not None},
    )


def section(model: "type[Section]", describe: str) -> Any:
    """Declare a group of settings, itself at its defaults when absent."""
    return Field(default_factory=model, description=describe)


class Conflict(NamedTuple):
    """A value that is wrong because of another value."""

    key: str
    value: object
    allowed: str


class Section(BaseModel):
    """Base of every group of settings: immutable, strictly typed, closed to unknown keys.

    Strict means that nothing is converted: "8" is no integer, 1 is no boolean, True is no integer. Only an integer
    counts as a number where a fraction is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_section_is_all_defaults(cls, value: object) -> object:
        # A section whose keys are all commented out reads as null in YAML.
        return {} if value is None else value

    def conflicts(self) -> Iterator[Conflict]:
        """The values that contradict each other; each is already right by itself."""
        return iter(())

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> Self:
        conflicts = list(self.conflicts())
        if conflicts:
            shown = "; ".join(f"{conflict.key}: {conflict.allowed}" for conflict in conflicts)
            raise PydanticCustomError("conflicts", "{shown}", {"shown": shown, "conflicts": conflicts})
        return self


class Allowed(NamedTuple):
    """What a text may be, in words, for error messages and the reference."""

    words: str


class Invalid(ValueError):  # noqa: N818 - never leaves this package: pydantic turns it into an error entry
    """The text does not have the form that the setting's `Allowed` states."""


def _list_as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _refuse_repeats(value: tuple[object, ...]) -> tuple[object, ...]:
    if len(set(value)) != len(value):
        raise Invalid
    return value


Item = TypeVar("Item")
# A list in the file, a tuple in the settings (frozen to its depth), no entry twice.
DistinctList = Annotated[
    tuple[Item, ...],
    BeforeValidator(_list_as_tuple),
    AfterValidator(_refuse_repeats),
    Allowed("each at most once"),
]


def _matching(test: Callable[[str], bool]) -> AfterValidator:
    def check(value: str) -> str:
        if not test(value):
            raise Invalid
        return value

    return AfterValidator(check)


def _is_url(value: str, schemes: tuple[str, ...]) -> bool:
    if re.search(r"\s", value):
        return False
    try:
        parts = urlsplit(value)
        parts.port  # noqa: B018 - reading it checks it
    except ValueError:
        return False
    return parts.scheme in schemes and bool(parts.hostname)


REDIS_SCHEMES = ("redis", "rediss", "sentinel")
AMQP_SCHEMES = ("amqp", "amqps")


def _is_broker_url(value: str, schemes: tuple[str, ...]) -> bool:
    # Several Sentinels are written as several addresses with semicolons between them.
    addresses = value.split(";")
    if len(addresses) > 1 and not all(address.startswith("sentinel://") for address in addresses):
        return False
    return all(_is_url(address, schemes) for address in addresses)


def _written(schemes: tuple[str, ...]) -> str:
    return ", ".join(f"{scheme}://" for scheme in schemes)


HttpUrl = Annotated[
    str, _matching(lambda value: _is_url(value, ("http", "https"))), Allowed("an http:// or https:// address")
]
BrokerUrl = Annotated[
    str,
    _matching(lambda value: _is_broker_url(value, REDIS_SCHEMES + AMQP_SCHEMES)),
    Allowed(f"an address that starts with {_written(REDIS_SCHEMES + AMQP_SCHEMES)}"),
]
RedisUrl = Annotated[
    str,
    _matching(lambda value: _is_broker_url(value, REDIS_SCHEMES)),
    Allowed(f"an address that starts with {_written(REDIS_SCHEMES)}"),
]
UrlPath = Annotated[
    str,
    _matching(lambda value: re.fullmatch(r"/[^\s?#]*", value) is not None),
    Allowed("a path that starts with /"),
]
Host = Annotated[
    str,
    _matching(lambda value: re.fullmatch(r"[^\s/]+", value) is not None),
    Allowed("a host name or an address to bind to"),
]
Name = Annotated[
    str,
    _matching(lambda value: re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}", value) is not None),
    Allowed("a name of letters, digits and . _ - / that starts with a letter or digit"),
]


def _text_as_path(value: object) -> object:
    if isinstance(value, str):
        if not value.strip() or "\0" in value:
            raise Invalid
        return Path(value).expanduser()
    return value


FolderPath = Annotated[Path, BeforeValidator(_text_as_path), Allowed("the path of a folder")]
FilePath = Annotated[Path, BeforeValidator(_text_as_path), Allowed("the path of a file")]
HostPattern = Annotated[
    str,
    _matching(lambda value: re.fullmatch(r"\*|(\*\.)?[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", value) is not None),
    Allowed("a host name in lower case, or * with or without a name after it, as in *.example.com"),
]
