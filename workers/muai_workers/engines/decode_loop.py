"""Continuous batching: requests join and leave the running batch of a model between two tokens."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from muai_producers.errors import OutOfMemoryError
from muai_workers.engines.base import Completion, Piece
from muai_workers.engines.decoder import Decoder, JoiningDecoder
from muai_workers.engines.failures import as_engine_error
from muai_workers.engines.padding import group_by_length, pad_rows
from muai_workers.engines.row import Row
from muai_workers.engines.sampling import choose_tokens
from muai_workers.kv_cache import ModelCache, Reuse

LINGER_S = 5.0
"""How long the loop's thread stays after the last request: starting one for each costs its libraries' own threads."""
Event = Completion | Piece


@dataclass(frozen=True)
class LoopLimits:
    """How much runs at once; what is more waits, in order."""

    max_rows: int = 32
    max_tokens: int = 32_768
    """Of all rows as long as they may become, padded to the longest. One row alone may have more."""
    call_overhead_tokens: int = 32
    """See `group_by_length`."""


@dataclass(eq=False)
class _Run:
    """The requests of one call, and the way back to the thread that called."""

    events: queue.SimpleQueue[Event | Exception] = field(default_factory=queue.SimpleQueue)
    ended: bool = False
    """Nobody listens any more: it failed, or its caller went away."""
    apart: bool = False
    """It was in a group that failed: its rows stay among themselves, until it shows which run is to blame."""

    def fail(self, error: Exception) -> None:
        self.ended = True
        self.events.put(error)


@dataclass(eq=False)
class _Place:
    """A row in the loop."""

    row: Row
    run: _Run
    reuse: Reuse | None = None
    looked: bool = False
    """Whether the cache was asked: once for each request, however often it starts."""
    aborted: bool = False
    forgets: bool = False
    """Its conversation has ended meanwhile."""
    done: bool = False
    tried_alone: bool = False
    """It ran out of memory by itself, before the caches were emptied for it."""

    def complete(self, events: Sequence[Event]) -> None:
        self.done = True
        for event in events:
            self.run.events.put(event)


@dataclass(eq=False)
class _Group:
    """Rows that share each forward pass."""

    decoder: Decoder
    places: list[_Place]


class DecodeLoop:
    """Runs a model's requests together, whichever calls they came with. Thread-safe.

    One thread computes. Before each step it lets go of what was aborted and admits what waits, first come first
    served: newcomers read their prompts as a group of their own, and then join the running one where the model's
    decoder lets rows join; else the groups take their steps in turn.

    What fails is kept apart: a group that runs out of memory is computed anew in two halves; one that fails otherwise
    is computed anew run by run, so that a run fails only by its own requests.

    Args:
        new_decoder: called for each group.
        relieve: frees what memory can be freed.
    """

    def __init__(
        self,
        name: str,
        new_decoder: Callable[[], Decoder],
        *,
        pad_id: int,
        padding_side: Literal["left", "right"],
        limits: LoopLimits,
        cache: ModelCache | None,
        relieve: Callable[[], object],
    ) -> None:
        self._name = name
        self._new_decoder = new_decoder
        self._pad_id = pad_id
        self._padding_side = padding_side
        self._limits = limits
        self._cache = cache
        self._relieve = relieve
        self._waiting: deque[_Place] = deque()
        self._groups: list[_Group] = []
        """Changed by the loop's thread alone."""
        self._row_limit: int | None = None
        """Below `max_rows` after memory has run out; grows back as rows finish."""
        self._closed = False
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()

    def run(self, rows: Sequence[Row]) -> Iterator[Event]:
        """Take `rows` in and yield what becomes of them, each completed once.

        Raises:
            Exception: as the decoder raised it, in a group of none but these rows; those not completed are dropped.
        """
        run = _Run()
        with self._changed:
            self._waiting.extend(_Place(row, run) for row in rows)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"muai-decode-{self._name}", daemon=True)
                self._thread.start()
            self._changed.notify()
        left = len(rows)
        try:
            while left:
                event = run.events.get()
                if isinstance(event, Exception):
                    raise event
                left -= isinstance(event, Completion)
                yield event
        finally:
            run.ended = True

    def abort(self, request_ids: Collection[str]) -> None:
        """As `Engine.abort`; looked at before each token."""
        for place in self._places():
            if place.row.request.id in request_ids:
                place.aborted = True

    def relimit(self, max_rows: int, max_tokens: int) -> None:
        """Admit by these limits from now on; what runs goes on."""
        self._limits = dataclasses.replace(self._limits, max_rows=max_rows, max_tokens=max_tokens)

    def forget(self, tenant: str, conversation_id: str) -> None:
        """Keep nothing of the conversation's requests that are under way."""
        for place in self._places():
            request = place.row.request
            if (request.tenant, request.conversation_id) == (tenant, conversation_id):
                place.forgets = True

    def close(self) -> None:
        """Let the thread end as soon as there is nothing to do; returns at once."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _places(self) -> list[_Place]:
        with self._changed:
            waiting = list(self._waiting)
        return [*waiting, *(place for group in list(self._groups) for place in group.places)]

    # -- the thread ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while self._has_work():
            try:
                self._round()
            except Exception as error:  # noqa: BLE001 - nobody may wait for ever for a fault of ours
                for run in {place.run for place in self._places()}:
                    run.fail(error)
                self._groups.clear()

    def _has_work(self) -> bool:
        if self._groups:
            return True
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed, LINGER_S)
            if not self._waiting:
                self._thread = None
            return bool(self._waiting)

    def _round(self) -> None:
        for group in list(self._groups):
            self._drop_ended(group)
        running = list(self._groups)
        for places in self._admit():
            self._start(places)
        for group in running:
            if group in self._groups:
                self._step(group)

    def _drop_ended(self, group: _Group) -> None:
        going = [index for index, place in enumerate(group.places) if not self._has_ended(place)]
        self._go_on(group, going)

    def _has_ended(self, place: _Place) -> bool:
        if place.aborted and not place.run.ended:
            place.complete([place.row.cancelled()])
        return place.done or place.run.ended

    def _admit(self) -> list[list[_Place]]:
        """Take from those that wait what fits, divided into what starts together."""
        running = [place for group in self._groups for place in group.places]
        widest = max((place.row.final_tokens for place in running), default=0)
        count, admitted = len(running), []
        with self._changed:
            self._waiting = deque(place for place in self._waiting if not self._has_ended(place))
            while self._waiting:
                place = self._waiting[0]
                widest = max(widest, place.row.final_tokens)
                if count and not self._fits(count + 1, widest):
                    break
                count += 1
                admitted.append(self._waiting.popleft())
        return self._divided(admitted)

    def _fits(self, num_rows: int, widest_tokens: int) -> bool:
        max_rows = self._limits.max_rows if self._row_limit is None else self._row_limit
        return num_rows <= max_rows and num_rows * widest_tokens <= self._limits.max_tokens

    def _divided(self, places: Sequence[_Place]) -> list[list[_Place]]:
        together = [place for place in places if not place.run.apart]
        parts: dict[_Run, list[_Place]] = {}
        for place in places:
            if place.run.apart:
                parts.setdefault(place.run, []).append(place)
        return [part for part in (together, *parts.values()) if part]

    # -- groups --------------------------------------------------------------------------------------------------

    def _start(self, places: list[_Place]) -> None:
        """Read the prompts of `places`, in groups of like length where those can be joined afterwards."""
        if not isinstance(decoder := self._new_decoder(), JoiningDecoder) or not decoder.joins:
            self._begin(_Group(decoder, places), lambda: self._prompts(decoder, places))
            return
        for place in places:
            self._look_up(place)
        lengths = [len(place.row.ids) - (place.reuse.num_tokens if place.reuse else 0) for place in places]
        parts = group_by_length(
            lengths,
            call_overhead_tokens=self._limits.call_overhead_tokens,
            max_padded_tokens=self._limits.max_tokens,
        )
        for part in parts:
            self._start_joining([places[index] for index in part])

    def _start_joining(self, places: list[_Place]) -> None:
        decoder = self._new_decoder()
        assert isinstance(decoder, JoiningDecoder)
        kept = [place.reuse.kept if place.reuse else None for place in places]
        rest = [place.row.ids[place.reuse.num_tokens if place.reuse else 0 :] for place in places]
        group = _Group(decoder, places)
        self._begin(group, lambda: decoder.resume(pad_rows(rest, self._pad_id, self._padding_side), kept))
        for place in places:
            place.reuse = None
        if group in self._groups:
            self._merge(group)

    def _look_up(self, place: _Place) -> None:
        """Ask for what is kept of the conversation, at the last moment: its turn before may just have ended."""
        if place.looked or self._cache is None or not self._cache.wants(place.row.request):
            return
        place.looked = True
        place.reuse = self._cache.find(place.row.request, place.row.ids)
        place.row.cached_tokens = place.reuse.num_tokens if place.reuse else 0

    def _prompts(self, decoder: Decoder, places: list[_Place]) -> torch.Tensor:
        return decoder.start(pad_rows([place.row.ids for place in places], self._pad_id, self._padding_side))

    def _begin(self, group: _Group, read_prompts: Callable[[], torch.Tensor]) -> None:
        self._groups.append(group)
        try:
            self._take(group, read_prompts())
        except Exception as error:  # noqa: BLE001 - whatever a library raises is told to those whom it concerns
            self._fail(group, error)

    def _merge(self, newcomers: _Group) -> None:
        """Join a group that has started to one that runs, where there is one that may take it."""
        apart = newcomers.places[0].run if newcomers.places[0].run.apart else None
        for group in self._groups:
            if group is newcomers or not isinstance(group.decoder, JoiningDecoder):
                continue
            if {place.run if place.run.apart else None for place in group.places} == {apart}:
                try:
                    group.decoder.join(newcomers.decoder)
                except Exception as error:  # noqa: BLE001 - see above
                    self._fail(newcomers, error)
                    return
                group.places += newcomers.places
                self._groups.remove(newcomers)
                return

    def _step(self, group: _Group) -> None:
        try:
            self._take(group, group.decoder.step([place.row.generated[-1] for place in group.places]))
        except Exception as error:  # noqa: BLE001 - see above
            self._fail(group, error)

    def _take(self, group: _Group, logits: torch.Tensor) -> None:
        """Choose the next token of each row; those that are finished leave."""
        tokens = choose_tokens(logits, [place.row.sampler for place in group.places])
        going: list[int] = []
        for index, (place, token) in enumerate(zip(group.places, tokens, strict=True)):
            reason = None if token is None else place.row.take(token)
            if token is None:
                place.complete([place.row.broken()])
            elif reason is not None:
                self._remember(group.decoder, index, place)
                place.complete(place.row.finish(reason))
            else:
                going.append(index)
                piece = place.row.piece()
                if piece is not None:
                    place.run.events.put(piece)
        self._go_on(group, going)

    def _go_on(self, group: _Group, going: list[int]) -> None:
        """Keep the rows of these indices, and the group only if there are any."""
        num_gone = len(group.places) - len(going)
        if not num_gone:
            return
        if self._row_limit is not None:
            self._row_limit += num_gone
            if self._row_limit >= self._limits.max_rows:
                self._row_limit = None
        group.places = [group.places[index] for index in going]
        if going:
            group.decoder.keep(going)
        else:
            self._groups.remove(group)

    def _remember(self, decoder: Decoder, index: int, place: _Place) -> None:
        request = place.row.request
        if self._cache is None or place.forgets or not self._cache.wants(request):
            return
        if isinstance(decoder, JoiningDecoder) and decoder.joins:
            kept = decoder.kept(index)
            # The last token was chosen and not computed with, unless it is the one that ends the answer.
            self._cache.keep(request, place.row.ids[: kept.num_tokens], kept)

    # -- failures ------------------------------------------------------------------------------------------------

    def _fail(self, group: _Group, error: Exception) -> None:
        """Start the rows of a group again in a smaller circle, or tell their run when there is none."""
        num_rows = sum(len(one.places) for one in self._groups)
        self._groups.remove(group)
        places = [place for place in group.places if not self._has_ended(place)]
        runs = {place.run for place in places}
        if isinstance(as_engine_error(error), OutOfMemoryError):
            self._relieve()
            if num_rows > 1:
                self._row_limit = max(1, num_rows // 2)
                self._again(places)
            elif places and not places[0].tried_alone:
                places[0].tried_alone = True
                self._again(places)
            elif places:
                places[0].complete([Completion(places[0].row.request.id, error=as_engine_error(error))])
        elif len(runs) > 1:
            for run in runs:
                run.apart = True
            self._again(places)
        else:
            for run in runs:
                run.fail(error)

    def _again(self, places: Sequence[_Place]) -> None:
        for place in places:
            place.reuse = None
        with self._changed:
            self._waiting.extendleft(reversed(places))
