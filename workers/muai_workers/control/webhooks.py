"""Delivering webhooks: rounds over what is due, many receivers at a time, so that a slow one delays nobody."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import redis

from muai_producers.errors import InvalidRequestError
from muai_producers.gateway.standing import read_standing
from muai_producers.store import META_PREFIX, Store
from muai_producers.webhooks.bodies import hook_body
from muai_producers.webhooks.outbox import DELIVERED, GIVEN_UP, Delivery, Outbox
from muai_producers.webhooks.policy import HookPolicy
from muai_producers.webhooks.posting import Poster
from muai_producers.webhooks.retrying import Tried, next_try_s
from muai_producers.webhooks.signing import Signer

if TYPE_CHECKING:
    from muai_config import Settings

log = logging.getLogger(__name__)
AT_ONCE = 64
AT_ONCE_PER_RECEIVER = 8
"""Of one receiver's: one that answers slowly takes no more of the places than this."""
IDLE_S = 0.1
BUSY_S = 0.5
"""After it, what found its receiver's places taken is due again."""
HOLD_MARGIN_S = 30.0


class WebhookSender:
    """Delivers what is due. One `run` at a time in a process; other processes may deliver beside it.

    Args:
        poster: None: one under the configuration's policy.
    """

    def __init__(self, settings: Settings, store: Store, poster: Poster | None = None) -> None:
        self._settings = settings.gateway.webhooks
        self._store = store
        self._outbox = Outbox(store)
        self._poster = poster or Poster(HookPolicy(self._settings), timeout_s=self._settings.timeout_s)
        self._signer: Signer | None = None
        self._busy = threading.Lock()

    @property
    def wanted(self) -> bool:
        """Whether webhooks are switched on."""
        return bool(self._settings.allowed_hosts)

    def run(self, for_s: float) -> int:
        """Deliver for `for_s` seconds, or until nothing waits; returns how many tries were made.

        Returns at once while another thread of this process is at it, and where webhooks are switched off.

        Raises:
            redis.exceptions.RedisError: the state store does not answer; what was claimed is due again in a while.
            InvalidRequestError: there is no secret to sign with.
        """
        if not self.wanted or not self._busy.acquire(blocking=False):
            return 0
        try:
            if self._outbox.num_waiting() == 0:
                return 0
            self._signer = self._signer or Signer.from_settings(self._settings)
            return asyncio.run(self._run(time.monotonic() + for_s))
        finally:
            self._busy.release()

    async def _run(self, until_s: float) -> int:
        trying: set[asyncio.Task[None]] = set()
        busy: Counter[str] = Counter()
        num_tries = 0
        try:
            while time.monotonic() < until_s:
                claimed = await asyncio.to_thread(self._claim, AT_ONCE - len(trying))
                for delivery in claimed:
                    receiver = urlsplit(delivery.url).netloc
                    if busy[receiver] >= AT_ONCE_PER_RECEIVER:
                        await asyncio.to_thread(self._outbox.again, delivery, time.time() + BUSY_S)
                        continue
                    busy[receiver] += 1
                    num_tries += 1
                    task = asyncio.create_task(self._deliver(delivery, receiver, busy))
                    trying.add(task)
                if not claimed and not trying and not await asyncio.to_thread(self._outbox.num_waiting):
                    break
                await asyncio.sleep(IDLE_S if not claimed else 0)
                for done in [task for task in trying if task.done()]:
                    trying.discard(done)
                    done.result()
        finally:
            for outcome in await asyncio.gather(*trying, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    log.warning("a delivery was not settled, and is made again: %s", outcome)
        return num_tries

    def _claim(self, most: int) -> list[Delivery]:
        hold_s = self._settings.timeout_s + HOLD_MARGIN_S
        return self._outbox.claim(most, hold_s) if most > 0 else []

    async def _deliver(self, delivery: Delivery, receiver: str, busy: Counter[str]) -> None:
        try:
            meta = await asyncio.to_thread(self._store.client.mget, [META_PREFIX + delivery.request_id])
            tried = await self._try(delivery, meta[0])
            await asyncio.to_thread(self._settle, delivery, tried)
        finally:
            busy[receiver] -= 1

    async def _try(self, delivery: Delivery, meta: bytes | None) -> Tried | None:
        """How the try went; None: the result is gone, and there is nothing to tell."""
        if meta is None:
            return None
        now_s = time.time()
        body = hook_body(read_standing(delivery.request_id, meta), now_s)
        assert self._signer is not None  # `run` has made it
        headers = self._signer.headers(delivery.tenant, delivery.request_id, int(now_s), body)
        return await self._poster.post(delivery.url, headers, body)

    def _settle(self, delivery: Delivery, tried: Tried | None) -> None:
        now_s = time.time()
        if tried is None:
            log.warning("webhook of request %s: its result has expired; given up", delivery.request_id)
            self._outbox.settle(delivery, GIVEN_UP)
            return
        if tried.delivered:
            self._outbox.settle(delivery, DELIVERED)
            return
        after = replace(delivery, num_tries=delivery.num_tries + 1, first_s=delivery.first_s or now_s)
        due_s = next_try_s(
            tried, after.num_tries, after.first_s, now_s, self._settings.give_up_after_s, random.random()
        )
        host = urlsplit(delivery.url).hostname
        if due_s is None:
            log.warning(
                "webhook of request %s to %s: %s; given up after %d tries",
                delivery.request_id,
                host,
                tried.told(),
                after.num_tries,
            )
            self._outbox.settle(delivery, GIVEN_UP)
            return
        log.info("webhook of request %s to %s: %s; trying again", delivery.request_id, host, tried.told())
        self._outbox.again(after, due_s)


def send_webhooks(sender: WebhookSender, for_s: float) -> int:
    """A run of the scheduled task: what goes wrong on our side is logged, and the next run goes on."""
    try:
        return sender.run(for_s)
    except redis.RedisError as error:
        log.warning("could not deliver webhooks: %s; the next run will", error)
    except InvalidRequestError as error:
        log.error("webhooks wait: %s", error.message)
    return 0
