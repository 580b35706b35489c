"""A reader's text is the text of the result, whatever the attempts, cuts and reconnections on the way.

Were it to fail, somebody would read a token twice, or miss one, after a crash that nobody else noticed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muai_producers.errors import InvalidRequestError
from muai_producers.streams.listening import Feed
from muai_producers.streams.store import Entry, joined
from muai_producers.streams.text import Change, Offset, Reading, Retelling, StreamEvent

TEXT = st.text(alphabet="ab é\U0001f40d", max_size=12)


class Stream:
    """A stream as Redis would keep it."""

    def __init__(self) -> None:
        self.num_chars = 0
        self._entries: list[tuple[int, Entry]] = []
        self._last_id = 0

    def write(self, change: Change | None) -> None:
        """As a worker and the script of appending do together."""
        if change is None:
            return
        if change.restarts:
            self._entries, self.num_chars = [], 0
        self._last_id += 1
        self._entries.append((self._last_id, Entry(change.restarts, self.num_chars, change.text)))
        self.num_chars += len(change.text)

    def text(self) -> str | None:
        return joined([entry for _, entry in self._entries])

    def update(self, feed: Feed) -> None:
        """As the listening thread does."""
        seen = int(feed.last_entry.partition(b"-")[0])
        feed.add([(b"%d-0" % entry_id, fields_of(entry)) for entry_id, entry in self._entries if entry_id > seen])


def fields_of(entry: Entry) -> dict[bytes, bytes]:
    return {
        b"k": b"!" if entry.restarts else b"+",
        b"p": str(entry.chars_before).encode(),
        b"t": entry.text.encode(),
    }


@dataclass
class Page:
    """What stands before the reader's eyes."""

    text: str = ""
    offset: str | None = None
    num_restarts: int = 0

    def show(self, events: list[StreamEvent]) -> None:
        for event in events:
            self.offset = event.offset
            if event.kind == "restart":
                self.text = ""
                self.num_restarts += 1
            else:
                assert event.text
                self.text += event.text


PIECES = st.lists(TEXT.filter(bool), max_size=5)


@settings(max_examples=300)
@given(
    attempts=st.lists(PIECES, min_size=1, max_size=4),
    looks=st.lists(st.sampled_from(["look", "leave", "nothing"]), min_size=1, max_size=12),
    same_worker=st.booleans(),
)
def test_given_random_attempts_and_reconnections_then_the_text_read_is_that_of_the_result(
    attempts: list[list[str]], looks: list[str], same_worker: bool
) -> None:
    stream, feed, page, reading, retelling = Stream(), Feed("r"), Page(), Reading(), Retelling()
    turns = itertools.cycle(looks)
    for number, pieces in enumerate(attempts):  # each but the last breaks off where its pieces end
        if number and same_worker:
            retelling.begin()
        elif number:
            retelling = Retelling(stream.text())
        for piece in pieces:
            stream.write(retelling.add(piece))
            turn = next(turns)
            if turn == "leave":  # and come back to another gateway, with the last offset
                feed, reading = Feed("r"), Reading(page.offset and Offset.parse(page.offset))
            if turn != "nothing":
                stream.update(feed)
                page.show(reading.take(feed.log))
    texts = ["".join(pieces) for pieces in attempts]
    page.show(reading.finish(texts[-1]))
    assert page.text == texts[-1]
    if all(texts[-1].startswith(text) for text in texts):
        assert page.num_restarts == 0, "attempts that agree must not show"


@given(text=TEXT, other=TEXT, cut=st.integers(0, 12))
def test_given_an_offset_then_only_a_text_that_begins_alike_is_read_on_from_it(text: str, other: str, cut: int) -> None:
    page = Page()
    page.show(Reading().finish(text[:cut]))
    offset = None if page.offset is None else Offset.parse(page.offset)
    page.show(Reading(offset).finish(other))
    assert page.text == other
    assert (page.num_restarts == 0) == other.startswith(text[:cut])


@given(st.text(max_size=30))
def test_given_anything_else_than_an_offset_then_it_is_refused_and_named(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="no offset of a stream") as refused:
        Offset.parse(text)
    assert refused.value.details["field"] == "after"


def test_given_a_stream_whose_beginning_is_lost_then_nothing_is_told_of_it_but_a_new_beginning() -> None:
    feed, reading = Feed("r"), Reading()
    feed.add([(b"0-1", {b"k": b"+", b"p": b"5", b"t": b"lost"})])
    assert reading.take(feed.log) == []
    feed.add([(b"0-2", {b"k": b"!", b"p": b"0", b"t": b"new"}), (b"0-3", {b"k": b"+", b"p": b"3", b"t": b"er"})])
    assert [event.text for event in reading.take(feed.log)] == ["newer"]


@pytest.mark.parametrize("texts", [("ab", "abc"), ("abc", "ab"), ("x", "y")])
def test_given_two_attempts_then_what_they_share_is_written_once(texts: tuple[str, str]) -> None:
    retelling = Retelling()
    first = [retelling.add(character) for character in texts[0]]
    retelling.begin()
    second = [change for change in map(retelling.add, texts[1]) if change]
    assert all(change == (False, character) for change, character in zip(first, texts[0], strict=True))
    told = {("ab", "abc"): [(False, "c")], ("abc", "ab"): [], ("x", "y"): [(True, "y")]}
    assert second == told[texts]
