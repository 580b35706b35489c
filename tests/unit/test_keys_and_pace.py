"""Keys are checked by their hash, and what is said of waiting follows from what was measured."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muai_producers.errors import InvalidRequestError
from muai_producers.gateway.pace import LONGEST_S, Pace
from muai_producers.keys import TenantLimits, id_of, matches, new_key, read_records


def test_given_a_new_key_then_its_record_knows_it_and_no_other_and_does_not_hold_it() -> None:
    key, record = new_key("acme", TenantLimits(max_requests=5), "web")
    assert id_of(key) == record.id
    assert matches(record, key)
    assert not matches(record, new_key("acme")[0])
    assert key.rsplit("_", 1)[1].encode() not in msgspec.json.encode(record)


@pytest.mark.parametrize("text", ["", "muai_", "sk-abc", "muai_0123456789ab_short", "muai_0123456789AB_" + "x" * 43])
def test_given_what_is_no_key_of_ours_then_it_has_no_id(text: str) -> None:
    assert id_of(text) is None


@pytest.mark.parametrize("tenant", ["", "a:b", "a/b", "a b", "-a", "x" * 65, "é"])
def test_given_a_tenant_that_could_be_taken_for_another_key_then_it_is_refused(tenant: str) -> None:
    with pytest.raises(InvalidRequestError):
        new_key(tenant)


def test_given_a_file_with_a_wrong_line_then_the_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    record = msgspec.json.encode(new_key("acme")[1]).decode()
    file.write_text(f"# keys\n{record}\n{{}}\n")
    with pytest.raises(InvalidRequestError, match="keys:3 is no record"):
        read_records(file)


@given(st.lists(st.tuples(st.floats(0.1, 10.0), st.integers(0, 500)), min_size=1, max_size=40), st.integers(1, 1000))
def test_given_any_looks_then_the_pace_lies_between_the_slowest_and_the_fastest_stretch(
    steps: list[tuple[float, int]], ahead: int
) -> None:
    pace, now_s, answered = Pace(), 100.0, 7
    pace.saw(answered, now_s)
    assert pace.wait_s(ahead) is None
    for took_s, more in steps:
        now_s, answered = now_s + took_s, answered + more
        pace.saw(answered, now_s)
    rates = [more / took_s for took_s, more in steps]
    rate = pace.per_s()
    if rate is not None:
        assert min(rates) - 1e-6 <= rate <= max(rates) + 1e-6
        wait_s = pace.wait_s(ahead)
        assert wait_s is not None
        assert 0 < wait_s <= LONGEST_S


def test_given_an_old_burst_then_the_pace_forgets_it() -> None:
    pace = Pace()
    pace.saw(0, 0.0)
    pace.saw(100_000, 10.0)
    for second in range(11, 60):
        pace.saw(100_000 + second - 10, float(second))
    assert pace.per_s() == pytest.approx(1.0)
    assert pace.wait_s(10) == pytest.approx(10.0)


def test_given_a_counter_that_begins_anew_then_nothing_is_known_again() -> None:
    pace = Pace()
    pace.saw(500, 0.0)
    pace.saw(600, 5.0)
    pace.saw(3, 6.0)
    assert pace.per_s() is None
