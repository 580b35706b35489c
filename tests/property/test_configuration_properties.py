"""Properties 54 to 57: what stands in a file or a variable is what the system runs with, or it is refused in words."""

import json
import string
from typing import Any, Literal, get_args, get_origin

import annotated_types
import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from muai_config import ConfigError, Problem, Settings, build_settings
from muai_config.document import parse_document
from muai_config.fields import Allowed, BrokerUrl, FolderPath, Host, HttpUrl, Name, RedisUrl, UrlPath
from muai_config.reference import SettingInfo, all_settings, is_nullable, list_item, plain, plain_type, value_of

Values = dict[SettingInfo, Any]

TEXTS_BY_ALLOWED: dict[str, st.SearchStrategy[str]] = {
    next(entry.words for entry in get_args(kind) if isinstance(entry, Allowed)): texts
    for kind, texts in (
        (HttpUrl, st.from_regex(r"https?://[a-z]{1,9}(:[1-9][0-9]{0,3})?(/[a-z]{1,5})?", fullmatch=True)),
        (
            BrokerUrl,
            st.from_regex(r"(redis|rediss|sentinel|amqp|amqps)://[a-z]{1,9}(:[1-9][0-9]{0,3})?", fullmatch=True),
        ),
        (RedisUrl, st.from_regex(r"(redis|rediss|sentinel)://[a-z]{1,9}(:[1-9][0-9]{0,3})?", fullmatch=True)),
        (UrlPath, st.from_regex(r"/[a-z0-9_-]{1,9}", fullmatch=True)),
        (Host, st.sampled_from(["0.0.0.0", "127.0.0.1", "::1", "gpu-7.example.com"])),
        (Name, st.from_regex(r"[a-z][a-z0-9-]{0,9}", fullmatch=True)),
        (FolderPath, st.from_regex(r"/[a-z]{1,9}/[a-z]{1,9}", fullmatch=True)),
    )
}
# Refused or needed because of another key: `consistent` sees to these.
PRELOAD = ("monitoring", "server", "preload_models")


def bounds(info: SettingInfo) -> tuple[float, float, bool]:
    low, high, open_below = 0.0, 1e9, False
    for entry in info.field.metadata:
        if isinstance(entry, annotated_types.Ge):
            low = float(entry.ge)  # type: ignore[arg-type]
        elif isinstance(entry, annotated_types.Gt):
            low, open_below = float(entry.gt), True  # type: ignore[arg-type]
        elif isinstance(entry, annotated_types.Le):
            high = float(entry.le)  # type: ignore[arg-type]
    return low, high, open_below


def texts(info: SettingInfo) -> st.SearchStrategy[str]:
    words = info.allowed.removesuffix(", or null")
    return TEXTS_BY_ALLOWED.get(
        words, st.text(string.ascii_letters + " -_", min_size=1).filter(str.strip).map(str.strip)
    )


def valid(info: SettingInfo) -> st.SearchStrategy[Any]:
    """Every value that the file may hold for the setting."""
    kind = plain_type(info.annotation)
    low, high, open_below = bounds(info)
    values: st.SearchStrategy[Any]
    if get_origin(kind) is Literal:
        values = st.sampled_from(get_args(kind))
    elif kind is bool:
        values = st.booleans()
    elif kind is int:
        values = st.integers(int(low), int(high))
    elif kind is float:
        values = st.floats(low, high, exclude_min=open_below, allow_subnormal=False)
    elif kind is tuple and get_origin(list_item(info.annotation)) is Literal:
        choices = get_args(list_item(info.annotation))
        values = st.lists(st.sampled_from(choices), min_size=1, unique=True)
    elif kind is tuple:
        values = st.just(["all-minilm-l6-v2"])
    else:
        values = texts(info)
    return st.none() | values if is_nullable(info.annotation) else values


@st.composite
def valid_values(draw: st.DrawFn) -> Values:
    chosen = draw(st.lists(st.sampled_from(all_settings()), unique=True, max_size=25))
    return consistent({info: draw(valid(info)) for info in chosen})


def consistent(values: Values) -> Values:
    """`values` without those that contradict each other."""
    settings = Settings()

    def effective(key: str) -> Any:
        return next((value for info, value in values.items() if info.key == key), value_of(settings, BY_KEY[key]))

    bounded = ("batcher.{}_batch_size", "tuner.{}_batch_size", "tuner.{}_batch_timeout_ms", "tuner.{}_cache_mb")
    for name in bounded:
        ends = [f"optimization.{name.format(end)}" for end in ("min", "max")]
        if effective(ends[0]) > effective(ends[1]):
            values = without(values, *ends)
    if effective("monitoring.prometheus.port") == effective("monitoring.server.port"):
        values = without(values, "monitoring.prometheus.port", "monitoring.server.port")
    if effective("monitoring.server.health_check_path") == effective("monitoring.server.readiness_check_path"):
        values = without(values, "monitoring.server.health_check_path", "monitoring.server.readiness_check_path")
    for destination in ("webhook", "alertmanager"):
        wanted = destination in effective("monitoring.anomaly.alert_destinations")
        if wanted and effective(f"monitoring.anomaly.{destination}_url") is None:
            values = without(values, "monitoring.anomaly.alert_destinations")
    if effective("gateway.webhooks.allowed_hosts") and effective("gateway.webhooks.secret_file") is None:
        values = without(values, "gateway.webhooks.allowed_hosts")
    tls = ("certificate", "private_key", "client_ca")
    if {effective(f"gateway.tls.{name}") is None for name in tls} == {True, False}:
        values = without(values, *(f"gateway.tls.{name}" for name in tls))
    return values


def without(values: Values, *keys: str) -> Values:
    return {info: value for info, value in values.items() if info.key not in keys}


BY_KEY = {info.key: info for info in all_settings()}


def as_document(values: Values) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for info, value in values.items():
        section = document
        for name in info.path[:-1]:
            section = section.setdefault(name, {})
        section[info.path[-1]] = value
    return document


def as_text(value: Any) -> str:
    """A value as it stands in an environment variable."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(as_text, value)) or "[]" if isinstance(value, list) else str(value)


def as_variables(values: Values) -> dict[str, str]:
    return {info.variables[0]: as_text(value) for info, value in values.items()}


def in_effect(settings: Settings, info: SettingInfo) -> Any:
    return plain(value_of(settings, info))


# Property 54: YAML configuration is parsed correctly
@pytest.mark.property(54)
@settings(max_examples=150, deadline=None)
@given(values=valid_values(), style=st.sampled_from([None, True, False]))
def test_Given_a_valid_file_When_it_is_read_Then_every_value_in_it_is_in_effect(
    values: Values, style: bool | None
) -> None:
    text = yaml.safe_dump(as_document(values), default_flow_style=style, allow_unicode=True)
    loaded = build_settings(parse_document(text.encode(), "a.yaml").values, {})
    assert {info.key: in_effect(loaded, info) for info in values} == {info.key: value for info, value in values.items()}


# Property 54: YAML configuration is parsed correctly
@pytest.mark.property(54)
@settings(max_examples=100, deadline=None)
@given(values=valid_values())
def test_Given_a_file_When_sections_are_written_in_JSON_Then_it_means_the_same(values: Values) -> None:
    document = as_document(values)
    from_json = parse_document(json.dumps(document).encode(), "a.yaml").values
    assert build_settings(from_json, {}) == build_settings(document, {})


# Property 55: Environment variables override configuration
@pytest.mark.property(55)
@settings(max_examples=150, deadline=None)
@given(in_file=valid_values(), in_env=valid_values())
def test_Given_a_file_and_variables_When_both_set_a_key_Then_the_variable_wins(in_file: Values, in_env: Values) -> None:
    assume(len(consistent(in_file | in_env)) == len(in_file | in_env))
    loaded = build_settings(as_document(in_file), as_variables(in_env))
    for info, value in (in_file | in_env).items():
        assert in_effect(loaded, info) == value, info.key


# Property 55: Environment variables override configuration
@pytest.mark.property(55)
@settings(max_examples=100, deadline=None)
@given(
    info=st.sampled_from([info for info in all_settings() if plain_type(info.annotation) is bool]),
    word=st.sampled_from(["true", "yes", "on", "1", "false", "no", "off", "0"]),
    upper=st.booleans(),
    other=st.booleans(),
)
def test_Given_a_boolean_When_a_variable_spells_it_in_any_way_Then_it_is_what_the_word_says(
    info: SettingInfo, word: str, upper: bool, other: bool
) -> None:
    env = {info.variables[0]: word.upper() if upper else word}
    assert in_effect(build_settings(as_document({info: other}), env), info) is (word in {"true", "yes", "on", "1"})


def wrong(info: SettingInfo) -> st.SearchStrategy[Any]:
    """Values that the file must not hold for the setting."""
    kind = plain_type(info.annotation)
    low, high, open_below = bounds(info)
    is_bounded = any(isinstance(entry, annotated_types.Le) for entry in info.field.metadata)
    choices: list[st.SearchStrategy[Any]] = [st.just({"a": 1})]
    if not is_nullable(info.annotation):
        choices.append(st.none())
    if kind is bool:
        choices += [st.sampled_from(["true", "false", "", 0, 1, 0.0])]
    elif kind in (int, float):
        choices += [st.booleans(), st.sampled_from(["1", "12abc", "", "1e3"]), st.just([1])]
        choices += [st.integers(-(10**9), int(low) - 1), st.just(float("nan")), st.just(float("inf"))]
        choices += [st.just(low)] if open_below else []
        choices += [st.integers(int(high) + 1, 10**18)] if is_bounded else []
        choices += [st.floats(low + 1.25, low + 1.75)] if kind is int else []
    elif kind is tuple:
        choices += [st.just("vllm"), st.just([1]), st.just([None]), st.just(["no such thing"])]
        choices += [st.just([info.default[0]] * 2)] if info.default else []
    else:
        choices += [st.integers(), st.booleans(), st.just(["a"]), st.just("")]
    return st.one_of(choices)


# Property 56: Invalid configuration is rejected with clear errors
@pytest.mark.property(56)
@settings(max_examples=200, deadline=None)
@given(data=st.data(), info=st.sampled_from(all_settings()))
def test_Given_a_wrong_value_When_read_Then_one_line_names_the_key_the_value_and_what_is_allowed(
    data: st.DataObject, info: SettingInfo
) -> None:
    value = data.draw(wrong(info))
    with pytest.raises(ConfigError) as caught:
        build_settings(as_document({info: value}), {})
    (line,) = str(caught.value).splitlines()
    assert line.startswith((f"{info.key}: ", f"{info.key}["))
    assert "is not allowed (allowed: " in line
    assert len(caught.value.problems) == 1


# Property 56: Invalid configuration is rejected with clear errors
@pytest.mark.property(56)
@settings(max_examples=150, deadline=None)
@given(
    info=st.sampled_from([info for info in all_settings() if plain_type(info.annotation) in (bool, int, float)]),
    text=st.sampled_from(["maybe", "12abc", "0x10", "1_000", "--1", "1e", "tru", "None", "1,2", "inf", "nan", "{}"]),
)
def test_Given_a_variable_of_the_wrong_type_When_read_Then_the_line_names_the_variable(
    info: SettingInfo, text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_settings({}, {info.variables[0]: text})
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{info.key}: ")
    assert text in line
    assert line.endswith(f"[from {info.variables[0]}]")


# Property 56: Invalid configuration is rejected with clear errors
@pytest.mark.property(56)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), info=st.sampled_from([info for info in all_settings() if info.path[0] != "models"]))
def test_Given_a_key_with_a_letter_missing_When_read_Then_the_right_key_is_offered(
    data: st.DataObject, info: SettingInfo
) -> None:
    name = info.path[-1]
    at = data.draw(st.integers(0, len(name) - 1))
    misspelt = name[:at] + name[at + 1 :]
    document = as_document({info: None})
    section = document
    for part in info.path[:-1]:
        section = section[part]
    del section[name]
    section[misspelt] = True
    with pytest.raises(ConfigError) as caught:
        build_settings(document, {})
    assert (
        str(caught.value) == f"{'.'.join((*info.path[:-1], misspelt))}: there is no such key; did you mean {info.key}?"
    )


# Property 56: Invalid configuration is rejected with clear errors
@pytest.mark.property(56)
@settings(max_examples=100, deadline=None)
@given(data=st.data(), chosen=st.lists(st.sampled_from(all_settings()), unique=True, min_size=2, max_size=12))
def test_Given_several_wrong_values_When_read_Then_each_has_its_line(
    data: st.DataObject, chosen: list[SettingInfo]
) -> None:
    document = as_document({info: data.draw(wrong(info)) for info in chosen})
    with pytest.raises(ConfigError) as caught:
        build_settings(document, {})
    named = {problem.key.partition("[")[0] for problem in caught.value.problems}
    assert named == {info.key for info in chosen}
    assert len(str(caught.value).splitlines()) == len(caught.value.problems)


# Property 56: Invalid configuration is rejected with clear errors
@pytest.mark.property(56)
@settings(max_examples=200, deadline=None)
@given(
    content=st.binary(max_size=200)
    | st.text(st.sampled_from("ab:-[]{}&*!<>|#'\"\n\t ,?%@\\0"), max_size=80).map(str.encode)
)
def test_Given_any_bytes_When_read_Then_they_are_values_or_problems_on_single_lines(content: bytes) -> None:
    problems: tuple[Problem, ...] = ()
    lines: list[str] = []
    try:
        build_settings(parse_document(content, "a.yaml").values, {})
    except ConfigError as error:
        problems, lines = error.problems, str(error).splitlines()
    assert len(lines) == len(problems)


# Property 57: Default values are used for missing configuration
@pytest.mark.property(57)
@settings(max_examples=150, deadline=None)
@given(values=valid_values(), by_variable=st.booleans())
def test_Given_some_keys_When_others_are_missing_Then_those_have_their_defaults(
    values: Values, by_variable: bool
) -> None:
    document, env = ({}, as_variables(values)) if by_variable else (as_document(values), {})
    loaded = build_settings(document, env)
    for info in all_settings():
        if info not in values:
            assert value_of(loaded, info) == info.default, info.key
