"""vLLM's asynchronous engine on an event loop of its own, in a thread of its own, for callers on any thread."""

from __future__ import annotations

import asyncio
import logging
import queue
import signal
import threading
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from muai_producers.errors import EngineUnavailableError, MuaiError
from muai_workers.engines.base import Completion, Piece
from muai_workers.engines.row import cancelled

log = logging.getLogger(__name__)
SHUTDOWN_LIMIT_S = 20.0
Event = Completion | Piece


@dataclass(eq=False)
class Run:
    """The requests of one call, and the way back to the thread that called."""

    events: queue.SimpleQueue[Event | MuaiError] = field(default_factory=queue.SimpleQueue)
    tasks: set[asyncio.Task[Completion]] = field(default_factory=set)
    """Touched by the loop alone."""


@dataclass(frozen=True)
class Job:
    """One request on its way into the engine."""

    request_id: str
    serve: Callable[[Any, Callable[[Piece], None]], Awaitable[Completion]]
    """Given the engine and where its pieces go, computes the completion."""


class BackgroundEngine:
    """Admits requests of any number of callers to one running engine. Thread-safe.

    Args:
        make: makes the engine, called on the loop's thread.
        failure: what an exception of a job means: a completion with its error, or the end of the engine.
    Raises:
        Exception: as `make` raised it.
    """

    def __init__(
        self, name: str, make: Callable[[], Any], failure: Callable[[str, BaseException], Completion | MuaiError]
    ) -> None:
        self._failure = failure
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[str, set[asyncio.Task[Completion]]] = {}
        self.dead: MuaiError | None = None
        """Why nothing can be computed any more."""
        self._thread = threading.Thread(target=self._work, name=f"muai-vllm-{name}", daemon=True)
        self._thread.start()
        try:
            self.engine = asyncio.run_coroutine_threadsafe(_call(make), self._loop).result()
        except BaseException:
            self._end_loop()
            raise

    def start(self, jobs: Sequence[Job]) -> Run:
        """Admit jobs; each puts its pieces and its completion into the run's events, whatever becomes of it."""
        run = Run()
        self._loop.call_soon_threadsafe(self._begin, run, jobs)
        return run

    def give_up(self, run: Run) -> None:
        """Stop what of a run is still under way: nobody listens any more."""
        self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in list(run.tasks)])

    def abort(self, request_ids: Collection[str]) -> None:
        """Stop requests: each completes as cancelled."""
        self._loop.call_soon_threadsafe(self._cancel, list(request_ids))

    def close(self) -> None:
        """Shut the engine down and end its processes; what runs completes as cancelled."""
        try:
            self.engine.shutdown()
        finally:
            self._end_loop()

    # -- on the loop's thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        # The engine's processes inherit it: Ctrl-C on a terminal reaches them too, and they would be gone before the
        # worker has finished what it runs. It stops them itself.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _begin(self, run: Run, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if self.dead is not None:
                run.events.put(self.dead)
                return
            task: asyncio.Task[Completion] = self._loop.create_task(self._serve(job, run))
            run.tasks.add(task)
            self._tasks.setdefault(job.request_id, set()).add(task)
            task.add_done_callback(partial(self._ended, run, job))

    async def _serve(self, job: Job, run: Run) -> Completion:
        return await job.serve(self.engine, run.events.put)

    def _ended(self, run: Run, job: Job, task: asyncio.Task[Completion]) -> None:
        run.tasks.discard(task)
        tasks = self._tasks[job.request_id]
        tasks.discard(task)
        if not tasks:
            del self._tasks[job.request_id]
        if task.cancelled():
            run.events.put(Completion(job.request_id, error=cancelled(job.request_id)))
            return
        error = task.exception()
        if error is None:
            run.events.put(task.result())
            return
        meant = self._failure(job.request_id, error)
        if isinstance(meant, EngineUnavailableError):
            self.dead = meant
        run.events.put(meant)

    def _cancel(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            for task in list(self._tasks.get(request_id, ())):
                task.cancel()

    def _end_loop(self) -> None:
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result(SHUTDOWN_LIMIT_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(SHUTDOWN_LIMIT_S)
            self._loop.close()


async def _call(make: Callable[[], Any]) -> Any:
    return make()


async def _cancel_all() -> None:
    """End what still runs on the loop, and let it end."""
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
