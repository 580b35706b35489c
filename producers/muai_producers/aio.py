"""The client for asyncio: the same operations, awaited.

It wraps `InferenceClient` instead of repeating it. Short operations run on a thread; waiting costs no thread: the
client's one listening thread wakes the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from muai_producers import errors
from muai_producers.client import InferenceClient, Inputs, RequestStatus, still_open
from muai_producers.streams.text import StreamEvent
from muai_producers.wire import InferenceRequest, InferenceResult

if TYPE_CHECKING:
    from muai_config import Settings


class AsyncInferenceClient:
    """`InferenceClient` for asyncio; arguments and errors are the same."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.sync = InferenceClient(settings)

    async def __aenter__(self) -> AsyncInferenceClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """See `InferenceClient.close`."""
        await asyncio.to_thread(self.sync.close)

    async def submit(self, model: str, inputs: Inputs, **options: Any) -> str:
        """See `InferenceClient.submit`."""
        return await asyncio.to_thread(self.sync.submit, model, inputs, **options)

    async def submit_many(self, requests: Iterable[Mapping[str, Any] | InferenceRequest]) -> list[str]:
        """See `InferenceClient.submit_many`."""
        return await asyncio.to_thread(self.sync.submit_many, list(requests))

    async def status(self, request_id: str) -> RequestStatus:
        """See `InferenceClient.status`."""
        return await asyncio.to_thread(self.sync.status, request_id)

    async def cancel(self, request_id: str) -> bool:
        """See `InferenceClient.cancel`."""
        return await asyncio.to_thread(self.sync.cancel, request_id)

    async def result(self, request_id: str, timeout_s: float | None = None) -> InferenceResult:
        """See `InferenceClient.result`."""
        async for _, outcome in self.results([request_id], timeout_s):
            if isinstance(outcome, errors.MuaiError):
                raise outcome
            return outcome
        raise AssertionError("unreachable: results() yields or raises")

    async def infer(
        self, model: str, inputs: Inputs, *, timeout_s: float | None = None, **options: Any
    ) -> InferenceResult:
        """`submit` and `result` in one call: see there."""
        return await self.result(await self.submit(model, inputs, **options), timeout_s)

    async def results(
        self, request_ids: Iterable[str], timeout_s: float | None = None
    ) -> AsyncIterator[tuple[str, InferenceResult | errors.MuaiError]]:
        """See `InferenceClient.results`."""
        remaining = dict.fromkeys(request_ids)
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[list[str]] = asyncio.Queue()

        def wake(ids: list[str]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(arrived.put_nowait, ids)

        stop_watching = await asyncio.to_thread(self.sync.watch, list(remaining), wake)
        try:
            ids = list(remaining)
            while True:
                for item in await asyncio.to_thread(self._finished, ids, remaining):
                    yield item
                if not remaining:
                    return
                timeout = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
                try:
                    ids = await asyncio.wait_for(arrived.get(), timeout)
                except TimeoutError:
                    raise still_open(remaining, timeout_s) from None
        finally:
            stop_watching()

    async def stream(
        self, request_id: str, after: str | None = None, timeout_s: float | None = None
    ) -> AsyncIterator[StreamEvent]:
        """See `InferenceClient.stream`."""
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()

        def wake() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(woken.set)

        follower = await asyncio.to_thread(self.sync.follow, request_id, after, wake)
        try:
            while True:
                woken.clear()
                for event in follower.take():
                    yield event
                if follower.error is not None:
                    raise follower.error
                if follower.finished:
                    return
                try:
                    await asyncio.wait_for(woken.wait(), timeout_s)
                except TimeoutError:
                    raise still_open([request_id], timeout_s) from None
        finally:
            follower.close()

    def _finished(
        self, ids: list[str], remaining: dict[str, None]
    ) -> list[tuple[str, InferenceResult | errors.MuaiError]]:
        return list(self.sync.finished(ids, remaining))
