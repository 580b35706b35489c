"""Writing the text of running requests into their streams, from a thread of its own, many requests in one round trip.

The engine never waits for Redis: what it tells while a write is under way is joined to one piece, so that what is held
here is never more than the text of the running requests, however long Redis takes. What has not been written when a
request finishes is left out, for readers take it from the result.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import msgspec
import redis

from muai_producers.streams.store import CLOSE, MORE, RESTART, StreamStore, Write
from muai_producers.streams.text import Change, Retelling
from muai_producers.wire import InferenceRequest
from muai_workers.engines.base import Piece

log = logging.getLogger(__name__)
FLUSH_EVERY_S = 0.005
"""Least time between two writes: pieces that come within it travel together."""
RETRY_S = 0.2
MAX_PER_WRITE = 256


@dataclass(eq=False)
class _Pen:
    """One request's stream, held under one claim."""

    request_id: str
    token: str
    retelling: Retelling
    num_chars: int
    """Told so far, what is held here included."""
    waiting: list[str] = field(default_factory=list)
    restarts: bool = False
    """Whether what waits is a new beginning."""
    is_done: bool = False
    is_lost: bool = False
    """Whether another worker holds the stream now."""
    num_writes: int = 0

    def put(self, change: Change) -> None:
        if change.restarts:
            self.waiting, self.restarts, self.num_chars = [], True, 0
        self.waiting.append(change.text)
        self.num_chars += len(change.text)

    def take(self) -> Write | None:
        """What there is to write, joined."""
        if self.is_done:
            return Write(self.request_id, self.token, self.num_writes, CLOSE)
        if not self.waiting:
            return None
        text = "".join(self.waiting)
        kind, before = (RESTART, 0) if self.restarts else (MORE, self.num_chars - len(text))
        write = Write(self.request_id, self.token, self.num_writes, kind, before, text)
        self.waiting, self.restarts = [], False
        self.num_writes += 1
        return write


class StreamWriter:
    """Writes pieces of text. Thread-safe; several batches may share it."""

    def __init__(self, streams: StreamStore) -> None:
        self._streams = streams
        self._work = threading.Condition()
        self._dirty: dict[_Pen, None] = {}
        self._closed = False
        self._thread: threading.Thread | None = None

    def open(self, requests: Sequence[InferenceRequest]) -> RunStreams:
        """Claim the streams of those of `requests` that want one.

        Raises:
            redis.exceptions.RedisError: the state store does not answer.
        """
        ids = [request.id for request in requests if request.stream]
        if not ids:
            return RunStreams(self, {})
        self._start()
        token = uuid.uuid4().hex
        pens = {
            request_id: _Pen(request_id, token, Retelling(told), len(told or ""))
            for request_id, told in zip(ids, self._streams.claim(token, ids), strict=True)
        }
        return RunStreams(self, pens)

    def tell(self, pen: _Pen, piece: str) -> None:
        """Hand over a piece of an attempt's text; returns at once."""
        with self._work:
            if pen.is_lost or pen.is_done:
                return
            change = pen.retelling.add(piece)
            if change is not None:
                pen.put(change)
                self._mark(pen)

    def begin(self, pen: _Pen) -> None:
        """An attempt begins."""
        with self._work:
            pen.retelling.begin()

    def finish(self, pen: _Pen) -> None:
        """The request has its result."""
        with self._work:
            if not pen.is_done:
                pen.is_done, pen.waiting = True, []
                self._mark(pen)

    def close(self) -> None:
        """End the thread; what it has not written is in the results."""
        with self._work:
            self._closed = True
            self._work.notify()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def _mark(self, pen: _Pen) -> None:
        self._dirty[pen] = None
        if len(self._dirty) == 1:
            self._work.notify()

    def _start(self) -> None:
        with self._work:
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_all, name="muai-streams", daemon=True)
                self._thread.start()

    def _write_all(self) -> None:
        while True:
            with self._work:
                self._work.wait_for(lambda: bool(self._dirty) or self._closed)
                if self._closed:
                    return
                pens = list(self._dirty)[:MAX_PER_WRITE]
                writes = []
                for pen in pens:
                    del self._dirty[pen]
                    write = pen.take()
                    if write is not None:
                        writes.append((pen, write))
            began_s = time.monotonic()
            if writes:
                self._write(writes)
            time.sleep(max(0.0, began_s + FLUSH_EVERY_S - time.monotonic()))

    def _write(self, writes: Sequence[tuple[_Pen, Write]]) -> None:
        """Write until Redis takes it; always the same, for it may have taken it and its answer got lost."""
        warned = False
        while not self._closed:
            try:
                stand = self._streams.append([write for _, write in writes])
                break
            except redis.RedisError as error:
                if not warned:
                    log.warning("the state store does not take streams: %s; their text goes on with the results", error)
                    warned = True
                time.sleep(RETRY_S)
        else:
            return
        for (pen, _), stands in zip(writes, stand, strict=True):
            if not stands:
                pen.is_lost = True


class RunStreams:
    """The streams of one run of a batch; requests without one are passed over."""

    def __init__(self, writer: StreamWriter, pens: dict[str, _Pen]) -> None:
        self._writer = writer
        self._pens = pens

    def begin(self, request_ids: Collection[str]) -> None:
        """The engine runs these requests now, from their beginning."""
        for request_id in request_ids:
            if request_id in self._pens:
                self._writer.begin(self._pens[request_id])

    def tell(self, piece: Piece) -> None:
        """Some more text."""
        if piece.request_id in self._pens:
            self._writer.tell(self._pens[piece.request_id], piece.text)

    def finish(self, request_id: str) -> None:
        """The request has its result, or another end."""
        if request_id in self._pens:
            self._writer.finish(self._pens[request_id])


def steady(request: InferenceRequest) -> InferenceRequest:
    """The request, such that running it again gives the same text where the engine can: a streamed one that samples
    without a seed gets one that goes with its id. Else every retry would begin its reader's text anew.
    """
    parameters = request.parameters
    if not request.stream or parameters.temperature == 0.0 or parameters.seed is not None:
        return request
    seed = zlib.crc32(request.id.encode())
    return msgspec.structs.replace(request, parameters=msgspec.structs.replace(parameters, seed=seed))
