"""A batch is no unit of failure: run it, and when it fails find who is to blame."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from muai_producers.errors import (
    EngineError,
    EngineUnavailableError,
    InferenceFailedError,
    ModelLoadError,
    MuaiError,
    OutOfMemoryError,
)
from muai_producers.wire import InferenceRequest
from muai_workers.engines.base import Completion, Piece
from muai_workers.engines.failures import as_engine_error

BROKEN_AFTER_RUNS = 7
"""Failed runs without a single success that make an engine count as broken: the batch, its halves, its quarters."""


@dataclass(frozen=True)
class IsolationReport:
    """How a batch went."""

    runs: int
    """Calls of the engine, 1 when all went well."""
    rounds: int
    """Halvings deep, 1 when all went well."""
    engine_failure: MuaiError | None = None
    """Set when the engine as a whole failed: every request that was left got this error."""


def run_isolated(
    run: Callable[[Sequence[InferenceRequest]], Iterable[Completion | Piece]],
    requests: Sequence[InferenceRequest],
    on_completion: Callable[[Completion], None],
    *,
    on_piece: Callable[[Piece], None] | None = None,
    prepare: Callable[[], None] | None = None,
    relieve: Callable[[], None] | None = None,
) -> IsolationReport:
    """Run `requests` together, answering each exactly once, whatever the engine does.

    A failed batch is halved, round by round, until the failing requests stand alone and the others have succeeded: one
    bad request of n costs at most ceil(log2 n) + 1 rounds. What is completed is never run again. When
    `BROKEN_AFTER_RUNS` runs have failed and none has completed anything, or when the model cannot be loaded, the engine
    is to blame and all that are left get its error.

    Args:
        run: one forward pass; may raise after it has completed some.
        on_completion: told of each completion as it comes. What it raises passes through and ends the run.
        on_piece: told of each piece of streamed text as it comes, as `on_completion`. A request that is run again
            starts its text again.
        prepare: called once before the first run, to load the model; when it raises, the engine is to blame.
        relieve: called after each out-of-memory error, to free what can be freed before the halves run.
    """
    isolation = _Isolation(run, requests, on_completion, on_piece)
    if prepare is not None and isolation.left:
        try:
            prepare()
        except Exception as cause:  # noqa: BLE001 - whatever a library raises is an engine failure
            failure = as_engine_error(cause)
            isolation.fail_rest(failure)
            return IsolationReport(0, 0, failure)
    pieces: list[list[InferenceRequest]] = [list(isolation.left.values())] if isolation.left else []
    rounds = 0
    while pieces:
        rounds += 1
        waiting, pieces = deque(pieces), []
        while waiting:
            part = waiting.popleft()
            if isolation.fits is not None and len(part) > isolation.fits:
                waiting.extendleft(reversed(_split(part, isolation.fits)))
                continue
            error = isolation.attempt(part)
            if error is None:
                continue
            if isolation.blames_engine(error):
                isolation.fail_rest(error)
                return IsolationReport(isolation.runs, rounds, error)
            if isinstance(error, OutOfMemoryError):
                isolation.fits = max(1, len(part) // 2)
                if relieve is not None:
                    relieve()
            pieces.extend(isolation.halve(part, error))
    return IsolationReport(isolation.runs, rounds)


class _Isolation:
    """The requests of one batch that are still unanswered, and what the engine has shown so far."""

    def __init__(
        self,
        run: Callable[[Sequence[InferenceRequest]], Iterable[Completion | Piece]],
        requests: Sequence[InferenceRequest],
        on_completion: Callable[[Completion], None],
        on_piece: Callable[[Piece], None] | None,
    ) -> None:
        self._run = run
        self._on_piece = on_piece
        self._on_completion = on_completion
        self.left = {request.id: request for request in requests}
        self.runs = 0
        self.fits: int | None = None
        """Most requests that may still fit in memory together; None: nothing has run out of memory."""
        self._failed_runs = 0
        self._any_completed = False

    def attempt(self, part: Sequence[InferenceRequest]) -> MuaiError | None:
        """Run `part`; returns what went wrong for those of it that are still unanswered."""
        self.runs += 1
        error = self._drain(part)
        if error is None and any(request.id in self.left for request in part):
            error = InferenceFailedError("the engine ended its run without answering every request")
        # Too little memory for several says nothing yet: a smaller part may fit.
        if error is not None and (len(part) == 1 or not isinstance(error, OutOfMemoryError)):
            self._failed_runs += 1
        return error

    def _drain(self, part: Sequence[InferenceRequest]) -> MuaiError | None:
        # Only the engine's own steps are guarded: an error of `_on_completion` is the caller's and must reach it.
        try:
            events = iter(self._run(part))
        except Exception as error:  # noqa: BLE001 - whatever a library raises is an engine failure
            return as_engine_error(error)
        while True:
            try:
                event = next(events)
            except StopIteration:
                return None
            except Exception as error:  # noqa: BLE001 - see above
                return as_engine_error(error)
            if isinstance(event, Completion):
                self._answer(event)
            elif self._on_piece is not None and event.request_id in self.left:
                self._on_piece(event)

    def _answer(self, completion: Completion) -> None:
        if self.left.pop(completion.request_id, None) is not None:
            self._any_completed = True
            self._on_completion(completion)

    def blames_engine(self, error: MuaiError) -> bool:
        if isinstance(error, ModelLoadError | EngineUnavailableError):
            return True
        if not isinstance(error, EngineError):
            return False  # some request's own error, which must not fall on the others
        return self._failed_runs >= BROKEN_AFTER_RUNS and not self._any_completed

    def halve(self, part: Sequence[InferenceRequest], error: MuaiError) -> list[list[InferenceRequest]]:
        """The two halves of what is unanswered in `part`; one that stands alone is answered with `error` instead."""
        unanswered = [request for request in part if request.id in self.left]
        if len(unanswered) > 1 or len(part) > 1:
            return _split(unanswered, max(1, (len(unanswered) + 1) // 2))
        self._fail(unanswered[0], error)
        return []

    def fail_rest(self, error: MuaiError) -> None:
        for request in list(self.left.values()):
            self._fail(request, error)

    def _fail(self, request: InferenceRequest, error: MuaiError) -> None:
        del self.left[request.id]
        self._on_completion(Completion(request.id, error=error))


def _split(piece: Sequence[InferenceRequest], size: int) -> list[list[InferenceRequest]]:
    return [list(piece[start : start + size]) for start in range(0, len(piece), size)]
