"""Changes at run time, whatever they are: taken whole, or refused whole."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muai_config import Settings
from muai_config.errors import ConfigError, Source
from muai_config.reference import all_settings
from muai_config.runtime import changed_settings, overlaid, reloadable_settings, reloadable_values
from muai_producers.runtime_config.live import LiveSettings
from muai_producers.runtime_config.versions import ConfigVersion, differing

RELOADABLE = reloadable_settings()
FIXED = [info.key for info in all_settings() if not info.reloadable]
START = Settings()
SOURCE = Source("runtime", "version 1")
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5000), st.floats(allow_nan=False, width=32), st.text(max_size=5),
    st.lists(st.sampled_from(["log", "webhook", "onnx", "pytorch", "vllm", "x"]), max_size=4),
)  # fmt: skip


@st.composite
def changes(draw: st.DrawFn) -> dict[str, Any]:
    """Some reloadable keys, with values that are right, nearly right, or anything."""
    keys = draw(st.lists(st.sampled_from(sorted(RELOADABLE)), min_size=1, max_size=5, unique=True))
    return {key: draw(st.one_of(st.just(RELOADABLE[key].example), VALUES)) for key in keys}


def at(settings: Settings, key: str) -> Any:
    return reloadable_values(settings)[key]


# Property 58: non-critical parameters support runtime updates.
@pytest.mark.property(58)
@given(changes())
def test_given_any_changes_then_they_hold_whole_or_not_at_all(changed: dict[str, Any]) -> None:
    try:
        after = overlaid(START, changed, SOURCE)
    except ConfigError as error:
        assert error.problems  # noqa: PT017 - most changes are right
        assert Settings() == START, "what processes hold was touched"
        return
    others = set(RELOADABLE) - set(changed)
    assert {key: at(after, key) for key in changed} == changed
    assert {key: at(after, key) for key in others} == {key: at(START, key) for key in others}
    found, fixed = changed_settings(START, after)
    assert not fixed
    assert overlaid(START, found, SOURCE) == after


@pytest.mark.property(58)
@given(st.sampled_from(FIXED), VALUES)
def test_given_a_key_that_is_read_at_the_start_then_it_cannot_be_changed(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="is read when a process starts"):
        overlaid(START, {key: value}, SOURCE)


@pytest.mark.property(58)
@given(st.sampled_from(sorted(RELOADABLE)))
def test_given_any_reloadable_key_then_its_documented_example_can_be_set(key: str) -> None:
    needs = {
        "monitoring.anomaly.alert_destinations": {"monitoring.anomaly.webhook_url": "http://127.0.0.1:1/"},
    }
    assert at(overlaid(START, {key: RELOADABLE[key].example, **needs.get(key, {})}, SOURCE), key) == (
        RELOADABLE[key].example
    )


@pytest.mark.property(58)
@given(st.lists(changes(), max_size=8))
def test_given_any_versions_in_order_then_a_process_works_by_the_last_that_was_right(
    versions: list[dict[str, Any]],
) -> None:
    live, expected, heard = LiveSettings(START), START, []
    live.subscribe(heard.append, START)
    for number, overrides in enumerate(versions, 1):
        applied = live.apply(ConfigVersion(number=number, overrides=overrides))
        try:
            expected = overlaid(START, overrides, SOURCE)
        except ConfigError:
            assert not applied
            assert live.applied.wanted == number
            assert live.applied.error
        else:
            assert applied
            assert live.applied.version == number
        assert live.current == expected
    assert not heard or heard[-1] == expected


@given(st.dictionaries(st.sampled_from("abcd"), st.integers()), st.dictionaries(st.sampled_from("abcd"), st.integers()))
def test_given_two_sets_of_overrides_then_what_differs_leads_from_one_to_the_other(
    old: dict[str, int], new: dict[str, int]
) -> None:
    changed, removed = differing(old, new)
    assert {key: value for key, value in {**old, **changed}.items() if key not in removed} == new
