"""Running one batch at an engine worker: what is still wanted runs, each request is answered by itself, and what the
engine could not serve is handed back to go to the next engine.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import redis

from muai_batching.routing import attempt, chain_spent, cools_engine, route
from muai_config.engines import ALL_ENGINES
from muai_config.slots import slots_of
from muai_producers.conversations import conversation_of
from muai_producers.dead_letters import DeadLetters
from muai_producers.errors import (
    DeadlineExceededError,
    EngineError,
    MalformedMessageError,
    ModelLoadError,
    MuaiError,
    PoisonedRequestError,
    RequestCancelledError,
    RequestError,
)
from muai_producers.fleet import Fleet
from muai_producers.logs import about_batch, about_request
from muai_producers.logs.contents import tell_contents
from muai_producers.monitoring import instruments
from muai_producers.monitoring.outcomes import record_failure
from muai_producers.monitoring.recorder import Recorder
from muai_producers.monitoring.recorder import recorder as own_recorder
from muai_producers.performance.recorder import NullRecorder, StatisticsRecorder
from muai_producers.performance.series import Series
from muai_producers.store import FAILURE, RETRY, Answer, Pins, Store, failure_answer, success_answer
from muai_producers.streams.store import StreamStore
from muai_producers.tracing import NO_TRACER, Tracer, names
from muai_producers.wire import Attempt, Batch, InferenceRequest
from muai_workers.aborting import AbortWatch, Watched
from muai_workers.engines.base import Completion, Engine, Piece
from muai_workers.engines.isolate import run_isolated
from muai_workers.gpus.activity import EngineActivity
from muai_workers.model_manager import ModelManager
from muai_workers.monitoring.serving import FirstPieces, record_fallback, record_run, record_served
from muai_workers.recording import RunFigures
from muai_workers.results import ResultWriter
from muai_workers.running import BatchRun, milliseconds
from muai_workers.streaming import RunStreams, StreamWriter, steady
from muai_workers.tracing import WorkerTracing

if TYPE_CHECKING:
    from muai_config import ModelSpec, Settings

log = logging.getLogger(__name__)
Stage = TypeVar("Stage")
SHOWN_FROM_S = 0.1
"""STARTED is not written for a model whose batches take less: nobody would see it, and it costs as much as a result."""


@dataclass(frozen=True)
class WorkerIdentity:
    """Who runs a batch, as results say it."""

    name: str
    gpu: str = ""
    queue: str = ""
    """Its own, for the conversations that it keeps; '' where it keeps none."""


class BatchRunner:
    """Runs batches on one engine, as many at a time as the worker has slots.

    A batch that is there early waits for its turn inside `run`; while one batch's answers are still being written, the
    next is in the engine already. Thread-safe.

    Args:
        models: loads the engine's models and keeps them within bounds; None: one of its own.
        tracer: told how the requests that are traced fare here.
        statistics: takes in how long requests took and how they ended.
        recorder: what the metrics are told.
        wall_s: wall-clock seconds.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        store: Store,
        identity: WorkerIdentity,
        *,
        models: ModelManager | None = None,
        tracer: Tracer = NO_TRACER,
        statistics: StatisticsRecorder | None = None,
        wall_s: Callable[[], float] = time.time,
        recorder: Recorder = own_recorder,
    ) -> None:
        self.settings = settings
        self._recorder = recorder
        self.engine = engine
        self.identity = identity
        self.activity = EngineActivity()
        self.models = models or ModelManager(settings, engine)
        about = {names.WORKER: identity.name, names.GPU: identity.gpu or None}
        self._tracing = WorkerTracing(tracer, store, about, wall_s)
        self.writer = ResultWriter(store, self._tracing.written if tracer.enabled else None)
        self._streams = StreamWriter(StreamStore.under(settings, store))
        self._aborts = AbortWatch(store, engine.abort, lambda request: self._fail(request, _too_late(request)), wall_s)
        self._store = store
        self._fleet = Fleet(store)
        self._dead_letters = DeadLetters(store)
        self._statistics = statistics or NullRecorder()
        self._wall_s = wall_s
        self._took_s: dict[str, float] = {}
        """Of each model's last batch."""
        # Threads of its own for the engine: libraries keep a pool of helpers for each thread that calls them, and
        # those of a thread that stands by would take the cores of the one at work.
        slots = slots_of(settings, engine.name)  # type: ignore[arg-type]
        self._engine_threads = ThreadPoolExecutor(slots.running, thread_name_prefix="muai-engine")
        self._last_turn = threading.local()
        """When the last one of each of these threads ended, in monotonic seconds."""

    def run(self, batch: Batch, claim: Callable[[], None] | None = None) -> list[Batch]:
        """Run a batch.

        Every request of it is answered before this returns, but for those in the returned batches, which are to be
        published to their own engine's queue.

        Args:
            claim: called when the batch's turn has come; what it raises passes through, and nothing was begun.
        Raises:
            redis.exceptions.RedisError: the state store does not answer; the batch must be delivered again.
        """
        run = self._engine_threads.submit(self._take_turn, batch, claim, time.monotonic()).result()
        if run is None:
            return []
        with about_batch(batch, worker=self.identity.name):
            self._guarded(batch, lambda: self._finish(run))
        return run.again

    def refuse(self, batch_id: str, content: str, error: Exception) -> None:
        """Keep what claims to be a batch and cannot be read, as a dead letter."""
        log.error("batch %s cannot be read: %s", batch_id, error)
        self._dead_letters.add_message(batch_id, content, MalformedMessageError(f"the batch cannot be read: {error}"))

    def reconfigure(self, settings: Settings) -> None:
        """Work by these settings from now on."""
        self.settings = settings

    def close(self) -> None:
        """Write what is left to write, once nothing runs any more."""
        self._engine_threads.shutdown()
        self._aborts.close()
        self._streams.close()
        self.writer.close()
        self._statistics.close()

    # -- the stages ----------------------------------------------------------------------------------------------

    def _take_turn(self, batch: Batch, claim: Callable[[], None] | None, arrived_s: float) -> BatchRun | None:
        held_from_s = max(arrived_s, getattr(self._last_turn, "ended_s", 0.0))
        try:
            if claim is not None:
                claim()
            with about_batch(batch, worker=self.identity.name):
                run = self._guarded(batch, lambda: self._serve(batch))
        finally:
            self._last_turn.ended_s = time.monotonic()
        if run is not None:
            run.held_s = self._last_turn.ended_s - held_from_s - run.loading_s
        return run

    def _guarded(self, batch: Batch, stage: Callable[[], Stage]) -> Stage | None:
        """What a stage returns; None when it failed by a fault of ours, and every request was answered with that."""
        try:
            return stage()
        except redis.RedisError:
            raise
        except Exception as error:
            # Nobody's requests may wait for ever for a fault of ours, whatever it is.
            log.exception("batch %s could not be run", batch.id)
            failure = MuaiError(f"a fault in the worker: {type(error).__name__}: {error}", {"batch_id": batch.id})
            self._end(batch.requests, failure, batch.attempts)
            self.writer.flush()
            self._tracing.give_up(batch)
            self._store.finish_batch(batch, now_s=self._wall_s(), took_s=0.0, size=0, ended=_ended_turns(batch))
            return None

    def _serve(self, batch: Batch) -> BatchRun:
        run = self._start(batch)
        if run.deaths and len(run.requests) > 1:
            log.warning("batch %s was running when its worker died; its requests are run alone", batch.id)
            run.again = [self._alone(run, request) for request in run.requests]
        elif run.requests:
            run.again = self._execute(run)
        self._took_s[batch.model] = run.took_s = time.monotonic() - run.run_started_s - run.loading_s
        return run

    def _finish(self, run: BatchRun) -> None:
        run.figures.finished(len(run.requests), run.held_s)
        self.writer.flush()
        self._tracing.finish(run.trace)
        self._store.finish_batch(
            run.batch,
            now_s=self._wall_s(),
            took_s=run.took_s,
            size=0 if run.again else len(run.requests),
            moved=[(part.engine, part.id) for part in run.again],
            ended=_ended_turns(run.batch, run.again),
        )
        record_served(self._recorder, run.batch.model, run.batch.engine, run.served)

    def _start(self, batch: Batch) -> BatchRun:
        """Mark the requests started; leave out what is answered, cancelled or expired."""
        trace = self._tracing.begin(batch)
        info = {"batch_id": batch.id, "engine": batch.engine, "worker": self.identity.name}
        is_quick = self._took_s.get(batch.model, SHOWN_FROM_S) < SHOWN_FROM_S
        ids = [request.id for request in batch.requests]
        wanted, num_starts = self._store.start_batch(batch.id, ids, None if is_quick else info, self._pins(batch))
        now_s = self._wall_s()
        run = BatchRun(batch, [], batch.deaths + num_starts - 1, time.monotonic(), trace=trace)
        series = Series(batch.model, batch.engine, batch.task)
        run.figures = RunFigures(self._statistics, series, pads=not self.engine.capabilities.continuous_batching)
        run.positions = {request.id: position for position, request in enumerate(batch.requests)}
        run.told_of_all = {
            "model": batch.model,
            "task": batch.task,
            "batch_id": batch.id,
            "attempts": batch.attempts,
            "worker": self.identity.name,
            "gpu_id": self.identity.gpu or None,
            "dispatch_ms": milliseconds(batch.formed_at, now_s),
        }
        for request, is_wanted in zip(batch.requests, wanted, strict=True):
            if is_wanted and request.deadline is not None and request.deadline <= now_s:
                self._fail(request, _too_late(request))
            elif is_wanted:
                run.requests.append(request)
        trace.prepared(run.requests)
        return run

    def _pins(self, batch: Batch) -> Pins | None:
        """The conversations of a batch, told as kept here before they are answered: their next turns come at once."""
        if not self.identity.queue:
            return None
        kept = [conversation for conversation, _ in _turns(batch.requests)]
        return Pins(self.identity.queue, kept, self.settings.optimization.cache.conversation_ttl_s)

    def _execute(self, run: BatchRun) -> list[Batch]:
        batch = run.batch
        limit = self.settings.queue.max_deliveries
        if run.deaths >= limit:
            for request in run.requests:
                message = (
                    f"request {request.id} was running when its worker died, {run.deaths} times; it is not tried again"
                )
                self._bury(request, PoisonedRequestError(message, {"deaths": run.deaths, "max_deliveries": limit}))
            return []
        spec = self.settings.models.get(batch.model)
        if spec is None:
            missing = ModelLoadError(f"the catalog of worker {self.identity.name} has no model {batch.model!r}")
            return self._elsewhere(run, dict.fromkeys((request.id for request in run.requests), missing))
        streams = self._streams.open(run.requests)
        first_pieces = FirstPieces(run.requests)

        def tell(piece: Piece) -> None:
            first_pieces.seen(piece.request_id, self._wall_s())
            streams.tell(piece)

        with self._aborts.watching(run.requests) as watched, ExitStack() as kept:
            report = run_isolated(
                lambda requests: run.trace.run(requests, self._run_engine(spec, batch, requests, streams, watched)),
                run.requests,
                lambda completion: self._complete(run, completion, streams, watched),
                on_piece=tell,
                prepare=lambda: self._prepare(run, spec, kept),
                relieve=self.models.relieve,
            )
        self._recorder.observe(instruments.FIRST_TOKEN, batch.model, batch.engine, values=first_pieces.times_s)
        record_run(self._recorder, batch.model, batch.engine, len(run.requests), len(run.failed))
        if report.engine_failure is not None and cools_engine(report.engine_failure):
            reason = report.engine_failure.message
            log.warning("%s cannot serve %s: %s", batch.engine, batch.model, reason)
            self._fleet.cool_down(batch.engine, batch.model, reason, self.settings.queue.engine_cooldown_s)
        return self._elsewhere(run, run.failed) if run.failed else []

    def _prepare(self, run: BatchRun, spec: ModelSpec, kept: ExitStack) -> None:
        """See to it that the model is loaded, and stays so while `kept` is open."""
        reason = self.engine.refusal(spec)
        if reason is not None:
            raise ModelLoadError(reason, {"model": spec.name, "engine": self.engine.name})
        is_loaded = spec.name in self.engine.loaded()
        started_s = time.monotonic()
        run.trace.load(lambda: kept.enter_context(self.models.using(spec)), is_loaded=is_loaded)
        run.loading_s += 0.0 if is_loaded else time.monotonic() - started_s

    def _run_engine(
        self,
        spec: ModelSpec,
        batch: Batch,
        requests: Sequence[InferenceRequest],
        streams: RunStreams,
        watched: Watched,
    ) -> Iterator[Completion | Piece]:
        """One forward pass of those that have not had their end meanwhile."""
        wanted = []
        for request in requests:
            if watched.is_gone(request.id):
                yield Completion(request.id, error=RequestCancelledError(f"request {request.id} has ended"))
            else:
                wanted.append(steady(request))
        if wanted:
            streams.begin([request.id for request in wanted])
            yield from self.activity.watching(len(wanted), self.engine.run(spec, batch.task, wanted))

    def _complete(self, run: BatchRun, completion: Completion, streams: RunStreams, watched: Watched) -> None:
        request = run.batch.requests[run.positions[completion.request_id]]
        if watched.is_gone(request.id):
            streams.finish(request.id)  # its end is told already: cancelled, or past its deadline
            return
        if not isinstance(completion.error, EngineError):
            streams.finish(request.id)
            watched.answer(request.id)
        if completion.output is not None:
            result = run.result(request, completion.output, self._wall_s())
            run.served.append((request, result))
            if self.settings.monitoring.logs.contents:
                tell_contents(log, request, completion.output.outputs)
            answer = success_answer(request, result)
            self._tracing.answering(request, completion.output)
            self.writer.write(answer)
            run.figures.served(result)
        elif isinstance(completion.error, EngineError):
            run.failed[request.id] = completion.error
            self._tracing.failed(request, completion.error)
        else:
            self._fail(request, completion.error or MuaiError("the engine gave neither output nor error"))

    # -- what this engine could not serve ------------------------------------------------------------------------

    def _elsewhere(self, run: BatchRun, failed: dict[str, MuaiError]) -> list[Batch]:
        """The batches that carry failed requests to the next engine; answers those that have none left."""
        run.figures.attempts_failed(list(failed.values()))
        by_reason: dict[tuple[str, str], list[InferenceRequest]] = {}
        for request in run.requests:
            if request.id in failed:
                error = failed[request.id]
                by_reason.setdefault((error.code, error.message), []).append(request)
        view = self._fleet.view(ALL_ENGINES) if self.settings.optimization.fallback_on_error else None
        moved: list[Batch] = []
        for requests in by_reason.values():
            error = failed[requests[0].id]
            history = (*run.batch.attempts, attempt(run.batch.engine, error))
            if view is None:
                self._end(requests, error, history)
                continue
            way = route(run.batch.chain, run.batch.model, view)
            history += way.skipped
            record_fallback(self._recorder, run.batch.model, run.batch.engine, way.engine, len(requests))
            if way.engine is None:
                self._end(requests, chain_spent(run.batch.model, history), history)
                continue
            in_time = [request for request in requests if not self._expired(request)]
            if in_time:
                part = self._part(
                    run.batch,
                    in_time,
                    engine=way.engine,
                    chain=way.rest,
                    attempts=history,
                    deaths=0,
                    after=run.batch.id,
                )
                moved.append(part)
                self._tracing.moved(part)
                self._store.mark(
                    RETRY, [request.id for request in in_time], {"engine": way.engine, "error": error.to_wire()}
                )
        return moved

    def _alone(self, run: BatchRun, request: InferenceRequest) -> Batch:
        # One try alone at least: among several, it need not have been this one that killed the worker.
        deaths = min(run.deaths, self.settings.queue.max_deliveries - 1)
        return self._part(run.batch, [request], deaths=deaths)

    def _part(self, batch: Batch, requests: Sequence[InferenceRequest], **changes: Any) -> Batch:
        received = dict(zip((request.id for request in batch.requests), batch.received_at, strict=False))
        return msgspec.structs.replace(
            batch,
            id=str(uuid.uuid4()),
            requests=list(requests),
            received_at=tuple(received[request.id] for request in requests) if received else (),
            queue="",
            **changes,
        )

    def _expired(self, request: InferenceRequest) -> bool:
        if request.deadline is not None and request.deadline <= self._wall_s():
            self._fail(request, _too_late(request))
            return True
        return False

    def _end(self, requests: Sequence[InferenceRequest], error: MuaiError, history: Sequence[Attempt]) -> None:
        for request in requests:
            told = type(error)(error.message, {**error.details, "attempts": msgspec.to_builtins(history)})
            self._bury(request, told)

    def _bury(self, request: InferenceRequest, error: MuaiError) -> None:
        """End a request that nobody could serve: its sender is told, and it is kept to be looked at."""
        self._dead_letters.add(request, error)
        self._fail(request, error)

    def _fail(self, request: InferenceRequest, error: MuaiError) -> None:
        if not isinstance(error, RequestError):
            with about_request(request):
                log.warning("request %s failed: %s", request.id, error)
        record_failure(self._recorder, request.model, request.tenant, error, self.engine.name)
        self._tracing.answering(request, error=error)
        self.writer.write(_failure(request, error))
        spec = self.settings.models.get(request.model)
        task = request.task or (spec.task if spec is not None else "")
        self._statistics.failed(
            Series(request.model, self.engine.name, task),
            error.code,
            milliseconds(request.submitted_at, self._wall_s()),
        )


def _turns(requests: Sequence[InferenceRequest]) -> Iterator[tuple[str, str]]:
    """Of those that belong to conversations: the conversation, and the request's id."""
    for request in requests:
        conversation = conversation_of(request)
        if conversation is not None:
            yield conversation, request.id


def _ended_turns(batch: Batch, again: Sequence[Batch] = ()) -> list[tuple[str, str]]:
    """The turns of a batch that have ended here, rather than go on in `again`."""
    going_on = {request.id for part in again for request in part.requests}
    return [(conversation, turn) for conversation, turn in _turns(batch.requests) if turn not in going_on]


def _failure(request: InferenceRequest, error: MuaiError) -> Answer:
    return failure_answer(request.id, error, request.reply_to, state=FAILURE, tenant=request.tenant)


def _too_late(request: InferenceRequest) -> DeadlineExceededError:
    return DeadlineExceededError(
        f"the deadline of request {request.id} passed before it was answered", {"deadline": request.deadline}
    )
