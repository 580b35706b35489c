"""What a reader of a stream is told, and when."""

from hypothesis import given
from hypothesis import strategies as st

from muai_workers.engines.pieces import PieceCutter


def test_half_a_character_is_held_back() -> None:
    cutter = PieceCutter()
    assert [cutter.cut("na\ufffd"), cutter.cut("naï"), cutter.rest("naïve")] == ["na", "ï", "ve"]


def test_what_may_become_a_stop_string_is_held_back() -> None:
    cutter = PieceCutter(["\n\n"])
    assert [cutter.cut("one\n"), cutter.cut("one\ntwo"), cutter.rest("one\ntwo")] == ["one", "\ntwo", ""]


@given(st.text(alphabet="ab\n", max_size=40), st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3))
def test_pieces_joined_are_the_answer_wherever_it_stops(generated: str, stop: list[str]) -> None:
    cutter, told = PieceCutter(stop), ""
    for end in range(1, len(generated) + 1):
        text = generated[:end]
        places = [place for place in map(text.find, stop) if place >= 0]
        if places:
            answer = text[: min(places)]
            assert told + cutter.rest(answer) == answer
            return
        told += cutter.cut(text)
    assert told + cutter.rest(generated) == generated
