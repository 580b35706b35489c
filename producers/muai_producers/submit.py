"""Admission and publication of requests: all of a call or none, and what is refused was never enqueued."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import msgspec
import redis
from kombu import Connection, Queue

from muai_config.queues import REQUEST_QUEUES
from muai_producers.errors import BrokerError, IdempotencyConflictError, PayloadTooLargeError, QueueFullError
from muai_producers.messages import redis_payload, request_message
from muai_producers.store import Limits, Store
from muai_producers.wire import InferenceRequest

CHUNK = 500
"""Requests admitted in one step: bounds how long one script holds Redis."""


class Submitter(Protocol):
    """Admits and publishes requests."""

    def submit(self, requests: Sequence[InferenceRequest], limits: Limits) -> list[str]:
        """Returns the id of each request: an earlier one where its idempotency key is known.

        Raises:
            QueueFullError: over a limit; `details["accepted"]` holds the ids accepted before it, in chunks of 500.
            IdempotencyConflictError: a key was used before with other content.
            BrokerError: broker or state store do not answer; nothing of the failing chunk was enqueued.
        """
        ...

    def close(self) -> None:
        """Close connections."""
        ...


def content_digest(request: InferenceRequest) -> str:
    """Digest of what makes two requests the same. '' without a key.

    That is all but id, times, trace, reply channel, and how an embedding is written down.
    """
    if request.idempotency_key is None:
        return ""
    parameters = msgspec.structs.replace(request.parameters, encoding_format=None)
    same = msgspec.structs.replace(
        request, id="-", submitted_at=0.0, deadline=None, reply_to=None, trace={}, parameters=parameters
    )
    return hashlib.sha256(msgspec.json.encode(same)).hexdigest()


def encode_checked(request: InferenceRequest, max_payload_bytes: int) -> tuple[str, dict[str, Any], bytes]:
    """The request's message, refused when it is too large to travel."""
    queue, headers, body = request_message(request)
    if len(body) > max_payload_bytes:
        raise PayloadTooLargeError(
            f"the request has {len(body)} bytes, allowed are {max_payload_bytes} (queue.max_payload_mb)",
            {"bytes": len(body), "max_bytes": max_payload_bytes},
        )
    return queue, headers, body


def check_admitted(reply: Sequence[Any], requests: Sequence[InferenceRequest], accepted: Sequence[str]) -> None:
    """Raise what the admission's answer says, unless it is yes."""
    verdict = _text(reply[0])
    if verdict == "conflict":
        (request,) = requests
        raise IdempotencyConflictError(
            f"idempotency key {request.idempotency_key!r} was used by request {_text(reply[1])} with other content",
            {"idempotency_key": request.idempotency_key, "request_id": _text(reply[1])},
        )
    if verdict != "ok":
        limit, of, allowed, in_use = _text(reply[1]), _text(reply[2]), int(reply[3]), int(reply[4])
        subject = f" for {of!r}" if of else ""
        raise QueueFullError(
            f"full: {in_use} of {allowed} in flight{subject}, {len(requests)} more do not fit ({limit}); "
            "try again later",
            {
                "limit": limit,
                "allowed": allowed,
                "in_flight": in_use,
                "retry_after_s": 1.0,
                "accepted": list(accepted),
            },
        )


def chunked(requests: Sequence[InferenceRequest]) -> Iterator[Sequence[InferenceRequest]]:
    """Runs of requests to be admitted together: at most `CHUNK`, and each idempotency key by itself."""
    chunk: list[InferenceRequest] = []
    for request in requests:
        if request.idempotency_key is not None:
            if chunk:
                yield chunk
            yield [request]
            chunk = []
            continue
        chunk.append(request)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


Encoded = tuple[str, dict[str, Any], bytes]
"""A message: queue, headers, body."""


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


class RedisSubmitter:
    """Broker and state store are one Redis: admission and enqueueing are a single atomic script."""

    def __init__(self, store: Store, *, max_payload_bytes: int, key_prefix: str = "") -> None:
        self._store = store
        self._max_payload_bytes = max_payload_bytes
        self._key_prefix = key_prefix

    def submit(self, requests: Sequence[InferenceRequest], limits: Limits) -> list[str]:
        """See `Submitter.submit`."""
        encoded = {request.id: encode_checked(request, self._max_payload_bytes) for request in requests}
        accepted: list[str] = []
        for chunk in chunked(requests):
            try:
                accepted += self._admit(chunk, limits, encoded, accepted)
            except redis.RedisError as error:
                raise BrokerError(f"Redis did not take the request: {error}", {"accepted": accepted}) from error
        return accepted

    def _admit(
        self,
        chunk: Sequence[InferenceRequest],
        limits: Limits,
        encoded: Mapping[str, Encoded],
        accepted: Sequence[str],
    ) -> list[str]:
        pushes: dict[str, list[bytes]] = {}
        for request in chunk:
            queue, headers, body = encoded[request.id]
            pushes.setdefault(self._key_prefix + queue, []).append(redis_payload(headers, body, queue))
        if chunk[0].idempotency_key is None:
            check_admitted(self._store.admit(chunk, limits, pushes), chunk, accepted)
            return [request.id for request in chunk]
        ((name, (payload,)),) = pushes.items()
        reply = self._store.admit_once(chunk[0], limits, content_digest(chunk[0]), (name, payload))
        check_admitted(reply, chunk, accepted)
        return [_text(reply[1])]

    def close(self) -> None:
        """Nothing of its own to close."""


class KombuSubmitter:
    """Any other broker: admitted in Redis, published with confirmation, and the admission undone where that fails.

    A process that dies between admission and publication leaves capacity taken by a request that nobody has
    accepted; the control worker's reaper gives it back.
    """

    def __init__(self, store: Store, connection: Connection, queues: Sequence[Queue], *, max_payload_bytes: int):
        self._store = store
        self._connection = connection
        self._queues = list(queues)
        self._max_payload_bytes = max_payload_bytes
        self._channel: Any = None
        self._lock = threading.Lock()

    def submit(self, requests: Sequence[InferenceRequest], limits: Limits) -> list[str]:
        """See `Submitter.submit`."""
        encoded = {request.id: encode_checked(request, self._max_payload_bytes) for request in requests}
        accepted: list[str] = []
        for chunk in chunked(requests):
            try:
                ids = self._admit(chunk, limits, accepted)
            except redis.RedisError as error:
                raise BrokerError(f"Redis did not take the request: {error}", {"accepted": accepted}) from error
            # The id of an earlier request with the same key: it is with the broker already.
            fresh = [request.id for request, known in zip(chunk, ids, strict=True) if known == request.id]
            self._publish_or_release([(request_id, encoded[request_id]) for request_id in fresh], accepted)
            accepted += ids
        return accepted

    def _admit(self, chunk: Sequence[InferenceRequest], limits: Limits, accepted: Sequence[str]) -> list[str]:
        if chunk[0].idempotency_key is None:
            check_admitted(self._store.admit(chunk, limits), chunk, accepted)
            return [request.id for request in chunk]
        reply = self._store.admit_once(chunk[0], limits, content_digest(chunk[0]))
        check_admitted(reply, chunk, accepted)
        return [_text(reply[1])]

    def _publish_or_release(self, fresh: list[tuple[str, Encoded]], accepted: list[str]) -> None:
        with self._lock:
            try:
                self._publish_again_if_stale([message for _, message in fresh])
            except (*self._connection.recoverable_connection_errors, *self._connection.channel_errors) as error:
                self._reconnect()
                self._store.release([request_id for request_id, _ in fresh])
                raise BrokerError(f"the broker did not take the request: {error}", {"accepted": accepted}) from error

    def _publish_again_if_stale(self, messages: list[Encoded]) -> None:
        """A connection that broke while it lay idle is no reason to refuse anything: try once more on a new one.

        What the broker may have of the first try goes twice under the same id, and its second result is refused.
        """
        try:
            self._publish(messages)
        except self._connection.recoverable_connection_errors:
            if self._channel is None:
                raise
            self._reconnect()
            self._publish(messages)

    def _reconnect(self) -> None:
        """Leave the connection for a new one, made when it is needed."""
        self._channel = None
        self._connection.release()
        self._connection = self._connection.clone()

    def _publish(self, messages: list[Encoded]) -> None:
        if self._channel is None:
            self._channel = self._connection.channel()
            for queue in self._queues:
                if queue.name in REQUEST_QUEUES:
                    queue.bind(self._channel).declare()
        publish_confirmed(self._channel, messages)

    def close(self) -> None:
        """Close the broker connection."""
        with self._lock:
            self._channel = None
            self._connection.release()


class UnroutableError(ConnectionError):
    """The broker has no queues of these names, or they are not bound; other messages of the call may have arrived."""

    def __init__(self, queues: Iterable[str]) -> None:
        self.queues = frozenset(queues)
        super().__init__(f"the broker has no queue {', '.join(sorted(self.queues))}")


def publish_confirmed(
    channel: Any, messages: Sequence[Encoded], timeout_s: float = 30.0, *, exchange: str = ""
) -> None:
    """Publish to named queues and return once the broker has confirmed all of them.

    On AMQP the confirmations are awaited together, not one by one; other transports confirm by returning.

    Args:
        messages: queue, headers and body of each.
        exchange: an AMQP exchange to which the queues are bound by their names; '' for the one that has all queues.
    Raises:
        UnroutableError: AMQP has no such queues there.
        ConnectionError: the broker refused a message or did not confirm in time.
    """
    confirms = _Confirms(channel) if hasattr(channel, "confirm_select") else None
    for queue, headers, body in messages:
        message = channel.prepare_message(
            body.decode(),
            priority=0,
            content_type="application/json",
            content_encoding="utf-8",
            headers=headers,
            properties={"correlation_id": headers["id"], "delivery_mode": 2},
        )
        if confirms is None:
            channel.basic_publish(message, exchange="", routing_key=queue)
        else:
            confirms.publish(message, queue, exchange)
    if confirms is not None:
        confirms.wait(timeout_s)


class _Confirms:
    """Publisher confirms of one AMQP channel, awaited in bulk."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        state = getattr(channel, "_muai_confirms", None)
        if state is None:
            state = channel._muai_confirms = {"next": 1, "open": set(), "refused": set(), "returned": set()}
            channel.confirm_select()
            channel.events["basic_ack"].add(self._settle(state, "open"))
            channel.events["basic_nack"].add(self._settle(state, "refused"))
            channel.events["basic_return"].add(lambda *args: state["returned"].add(args[2]))
        self._state = state

    @staticmethod
    def _settle(state: dict[str, Any], kind: str) -> Any:
        def settle(delivery_tag: int, multiple: bool) -> None:
            tags = {tag for tag in state["open"] if tag <= delivery_tag} if multiple else {delivery_tag}
            state["open"] -= tags
            if kind == "refused":
                state["refused"] |= tags

        return settle

    def publish(self, message: Any, queue: str, exchange: str) -> None:
        self._state["open"].add(self._state["next"])
        self._state["next"] += 1
        self._channel._basic_publish(message, exchange=exchange, routing_key=queue, mandatory=True)

    def wait(self, timeout_s: float) -> None:
        while self._state["open"]:
            self._channel.connection.drain_events(timeout=timeout_s)
        if self._state["refused"]:
            self._state["refused"].clear()
            self._state["returned"].clear()
            raise ConnectionError("the broker refused a message")
        if self._state["returned"]:
            returned, self._state["returned"] = self._state["returned"], set()
            raise UnroutableError(returned)
