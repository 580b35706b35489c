"""The requests of one call: sent together, awaited together, and cancelled together when nobody wants them any more."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import redis
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from muai_producers.errors import ResultTimeoutError, error_from_wire
from muai_producers.gateway.admission import Accepted, Submission
from muai_producers.gateway.coalescing import Coalescer
from muai_producers.gateway.draining import Drain
from muai_producers.gateway.failures import DrainingError
from muai_producers.gateway.openai_api.failures import told_error
from muai_producers.gateway.results import ResultHub
from muai_producers.gateway.sse import disconnected
from muai_producers.gateway.standing import Standing
from muai_producers.gateway.streams import News, StreamHub
from muai_producers.gateway.submission import IDEMPOTENCY_KEY, InferenceBody, RequestBuilder
from muai_producers.keys import NO_LIMITS, TenantLimits
from muai_producers.wire import InferenceRequest, InferenceResult, TraceHeader

log = logging.getLogger(__name__)
CALL_TIMEOUT_S = 600.0
"""As long as OpenAI's own clients wait."""
STOPPING = "this gateway is stopping; send the request again, another one takes it"
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Told:
    """News of one of the requests of a call."""

    index: int
    news: News


class Calls:
    """Makes calls of requests.

    Args:
        revoke: cancels a request; blocks.
    """

    def __init__(
        self,
        hub: ResultHub,
        streams: StreamHub,
        builder: RequestBuilder,
        admissions: Coalescer[Submission, Accepted],
        revoke: Callable[[str], bool],
        drain: Drain,
        executor: Executor,
    ) -> None:
        self._hub = hub
        self._streams = streams
        self._builder = builder
        self._admissions = admissions
        self._revoke = revoke
        self._drain = drain
        self._executor = executor

    def build(
        self,
        inferences: Sequence[InferenceBody],
        headers: Mapping[str, str],
        *,
        tenant: str,
        trace: dict[TraceHeader, str],
    ) -> list[InferenceRequest]:
        """The requests of a call.

        Raises:
            RequestError: a field or a header is wrong.
        """
        key = headers.get(IDEMPOTENCY_KEY)
        return [
            self._builder.build(
                body,
                {**headers, IDEMPOTENCY_KEY: f"{key}.{index}"} if key and index else headers,
                self._hub.new_id(),
                tenant=tenant,
                trace=trace,
            )
            for index, body in enumerate(inferences)
        ]

    async def results(
        self, requests: Sequence[InferenceRequest], receive: Receive, limits: TenantLimits = NO_LIMITS
    ) -> list[InferenceResult]:
        """Send requests and wait for all of them.

        Args:
            limits: the caller's.
        Raises:
            ClientDisconnect: the client has gone; the requests are cancelled.
            MuaiError: what the first that failed ended with, or why they could not be sent; the others are cancelled.
        """
        futures = {request.id: self._hub.expect(request.id) for request in requests}
        try:
            ids = await self._submit(requests, limits)
            async with self._cancelling(ids, keep=requests[0].idempotency_key is not None):
                waiting = [
                    self._result(request_id, request.id, futures[request.id])
                    for request_id, request in zip(ids, requests, strict=True)
                ]
                return await unless_gone(receive, _all(waiting))
        finally:
            for request_id, future in futures.items():
                self._hub.forget(request_id, future)

    async def follow(
        self, requests: Sequence[InferenceRequest], receive: Receive, limits: TenantLimits = NO_LIMITS
    ) -> AsyncGenerator[Told, None]:
        """Send requests, and tell of all of them as they go on. Returns once the first of them has told something.

        Closing the generator before its end cancels the requests.

        Raises:
            as `results`.
        """
        ids = await self._submit(requests, limits, awaited=False)
        told = self._telling(ids, keep=requests[0].idempotency_key is not None)
        try:
            first = await unless_gone(receive, anext(told))
            if first.news.error is not None:
                raise told_error(first.news.error)
        except BaseException:
            await told.aclose()
            raise
        return _with_first(first, told)

    async def _telling(self, ids: Sequence[str], *, keep: bool) -> AsyncGenerator[Told, None]:
        readers = [self._streams.read(request_id) for request_id in ids]
        pending = {asyncio.ensure_future(anext(reader)): index for index, reader in enumerate(readers)}
        async with self._cancelling(ids, keep=keep):
            num_ended = 0
            try:
                while pending:
                    done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        index = pending.pop(task)
                        try:
                            news = task.result()
                        except StopAsyncIteration:
                            continue
                        num_ended += news.end is not None
                        pending[asyncio.ensure_future(anext(readers[index]))] = index
                        yield Told(index, news)
            finally:
                await _stop(pending)
                for reader in readers:
                    await reader.aclose()
            if num_ended < len(ids):
                raise DrainingError(STOPPING)

    async def _submit(
        self, requests: Sequence[InferenceRequest], limits: TenantLimits, *, awaited: bool = True
    ) -> list[str]:
        """The ids of the requests: other ones where an Idempotency-Key was known. All are accepted, or none stays."""
        sent = [self._admissions.add(Submission(request, awaited, limits), _num_bytes(request)) for request in requests]
        outcomes = await asyncio.gather(*sent, return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        ids = [outcome.request_id for outcome in outcomes if isinstance(outcome, Accepted)]
        if failures:
            if ids and requests[0].idempotency_key is None:
                await self._cancel(ids)
            raise failures[0]
        return ids

    async def _result(self, request_id: str, sent_id: str, future: asyncio.Future[bytes | None]) -> InferenceResult:
        if request_id == sent_id:
            standing = await self._hub.settle(request_id, future, CALL_TIMEOUT_S)
        else:
            standing = await self._hub.wait(request_id, CALL_TIMEOUT_S)
        return self._outcome(standing)

    def _outcome(self, standing: Standing) -> InferenceResult:
        if standing.error is not None:
            raise told_error(error_from_wire(msgspec.to_builtins(standing.error)))
        if standing.result is not None:
            return msgspec.json.decode(standing.result, type=InferenceResult)
        if self._drain.draining:
            raise DrainingError(STOPPING)
        raise ResultTimeoutError(f"request {standing.id} is not finished after {CALL_TIMEOUT_S:g} s")

    @contextlib.asynccontextmanager
    async def _cancelling(self, ids: Sequence[str], *, keep: bool) -> AsyncGenerator[None, None]:
        """Cancel the requests when what is done with them is cut short; those that have finished stay as they are."""
        try:
            yield
        except BaseException:
            if not keep:
                await self._cancel(ids)
            raise

    async def _cancel(self, ids: Sequence[str]) -> None:
        """Runs to its end even when whoever waits is cancelled."""

        def revoke() -> None:
            try:
                for request_id in ids:
                    self._revoke(request_id)
            except redis.RedisError as error:
                log.warning("%d requests whose client has gone could not be cancelled: %s", len(ids), error)

        with contextlib.suppress(RuntimeError):  # the gateway has ended, and its threads with it
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._executor, revoke))


async def _all(waiting: Sequence[Awaitable[InferenceResult]]) -> list[InferenceResult]:
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_coroutine(one)) for one in waiting]
    except BaseExceptionGroup as failures:
        raise _first(failures) from None
    return [task.result() for task in tasks]


async def _coroutine(one: Awaitable[InferenceResult]) -> InferenceResult:
    return await one


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    found = failures.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found


async def _with_first(first: Told, rest: AsyncGenerator[Told, None]) -> AsyncGenerator[Told, None]:
    try:
        yield first
        async for told in rest:
            yield told
    finally:
        await rest.aclose()


async def unless_gone(receive: Receive, work: Awaitable[Outcome]) -> Outcome:
    """The outcome of `work`, which is given up when the client goes away.

    Raises:
        ClientDisconnect: it has.
    """
    doing = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        await _stop((doing, gone))


async def _stop(tasks: Collection[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


def _num_bytes(request: InferenceRequest) -> int:
    return sum(len(str(value)) for value in request.inputs.values())
