"""Alerts in the state store: what fires, what was sent where, and what is on its way.

A check reads the state, decides, and writes the new state together with the notices that follow from it, in one step
that fails when another check has written in between. So each notice is made once, however many control workers there
are; and since it is kept until it is delivered, none is lost when one of them dies.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from muai_producers.alerts.records import Alert, AlertEntry, AlertState, Delivery, DeliveryState, Finding
from muai_producers.store import Store

MAX_HISTORY = 1000
CLAIM_S = 30.0
"""A control worker that dies while it sends a notice keeps it from others for so long."""
WAIT_FOR_BEGINNING_S = 1.0

# KEYS: state, history, times, deliveries, outbox, due. ARGV: the state as it was read ('' for none), the new one, now,
# number of alerts, id and entry of each, then id, entry and first attempt of each delivery.
_COMMIT = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
local at, now = 5, ARGV[3]
for _ = 1, tonumber(ARGV[4]) do
  redis.call('HSET', KEYS[2], ARGV[at], ARGV[at + 1])
  redis.call('ZADD', KEYS[3], 'NX', now, ARGV[at])
  at = at + 2
end
while ARGV[at] do
  redis.call('HSET', KEYS[5], ARGV[at], ARGV[at + 1])
  redis.call('HSET', KEYS[4], ARGV[at], ARGV[at + 2])
  redis.call('ZADD', KEYS[6], now, ARGV[at])
  at = at + 3
end
return 1
"""

# KEYS: due, outbox. ARGV: now, until when what is taken is kept from others, how many.
_CLAIM = """
local ids = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[1], 'LIMIT', 0, ARGV[3])
local found = {}
for _, id in ipairs(ids) do
  local entry = redis.call('HGET', KEYS[2], id)
  if entry then
    redis.call('ZADD', KEYS[1], ARGV[2], id)
    found[#found + 1] = entry
  else
    redis.call('ZREM', KEYS[1], id)
  end
end
return found
"""


class AlertStore:
    """Reads and writes alerts.

    Raises:
        redis.exceptions.RedisError: from every method, when the store does not answer.
    """

    def __init__(self, store: Store) -> None:
        self._client: Any = store.client
        prefix = f"{store.keys.prefix}:alerts"
        self._state = f"{prefix}:state"
        self._history = f"{prefix}:history"
        self._times = f"{prefix}:times"
        self._deliveries = f"{prefix}:deliveries"
        self._outbox = f"{prefix}:outbox"
        self._due = f"{prefix}:due"
        self._reports = f"{prefix}:reports"
        self._counts = f"{prefix}:counts"
        self._commit = self._client.register_script(_COMMIT)
        self._claim = self._client.register_script(_CLAIM)

    # -- checks --------------------------------------------------------------------------------------------------

    def states(self) -> tuple[dict[str, AlertState], bytes]:
        """What is remembered, by type and subject; and the bytes that `commit` wants back."""
        raw: bytes = self._client.get(self._state) or b""
        return (_decode_states(raw)[0] if raw else {}), raw

    def commit(
        self,
        seen: bytes,
        states: Mapping[str, AlertState],
        alerts: Sequence[Alert],
        deliveries: Sequence[Delivery],
        now_s: float,
    ) -> bool:
        """Write what a check has decided; False, and nothing written, when another has written since `seen`."""
        args: list[Any] = [seen, _encode((states, now_s)), now_s, len(alerts)]
        for alert in alerts:
            args += (alert.id, _encode(alert))
        for delivery in deliveries:
            args += (delivery.id, _encode(delivery), _encode(delivery.state))
        keys = [self._state, self._history, self._times, self._deliveries, self._outbox, self._due]
        return bool(self._commit(keys=keys, args=args))

    def report(self, finding: Finding, keep_s: float) -> None:
        """Tell the next checks of something that only this process can see, for `keep_s` seconds."""
        self._client.hset(self._reports, finding.key, _encode((finding, time.time() + keep_s)))

    def withdraw(self, finding: Finding) -> None:
        """What was reported is over."""
        self._client.hdel(self._reports, finding.key)

    def reports(self, now_s: float) -> list[Finding]:
        """What was reported and still holds."""
        found, old = [], []
        for key, raw in self._client.hgetall(self._reports).items():
            finding, until_s = _decode_report(raw)
            if until_s > now_s:
                found.append(finding)
            else:
                old.append(key)
        if old:
            self._client.hdel(self._reports, *old)
        return found

    # -- deliveries ----------------------------------------------------------------------------------------------

    def claim(self, now_s: float, limit: int) -> list[Delivery] | None:
        """Take notices that are due; nobody else gets them within `CLAIM_S`. None when nothing is due.

        The end of an alert is held back until its beginning has been sent, or given up.
        """
        raw = self._claim(keys=[self._due, self._outbox], args=[now_s, now_s + CLAIM_S, limit])
        if not raw:
            return None
        claimed = [_decode_delivery(one) for one in raw]
        ready = []
        for delivery in claimed:
            beginning = f"{delivery.alert.id}/firing/{delivery.state.destination}"
            if delivery.state.kind == "resolved" and self._client.hexists(self._outbox, beginning):
                self._client.zadd(self._due, {delivery.id: now_s + WAIT_FOR_BEGINNING_S}, xx=True)
            else:
                ready.append(delivery)
        return ready

    def settle(self, delivery: Delivery, next_s: float | None) -> None:
        """Note how an attempt went.

        Args:
            delivery: with its new state.
            next_s: when it is tried again; None: it was sent, or given up.
        """
        pipe = self._client.pipeline(transaction=True)
        pipe.hset(self._deliveries, delivery.id, _encode(delivery.state))
        if next_s is None:
            pipe.zrem(self._due, delivery.id)
            pipe.hdel(self._outbox, delivery.id)
            pipe.hincrby(self._counts, f"{delivery.state.destination}:{delivery.state.status}", 1)
        else:
            pipe.hset(self._outbox, delivery.id, _encode(delivery))
            pipe.zadd(self._due, {delivery.id: next_s})
        pipe.execute()

    # -- history -------------------------------------------------------------------------------------------------

    def open(self) -> list[Alert]:
        """Alerts that last, oldest first."""
        states, _ = self.states()
        found = [state.alert for state in states.values() if state.phase == "firing" and state.alert is not None]
        return sorted(found, key=lambda alert: alert.timestamp)

    def history(self, limit: int = 100, *, only_open: bool = False) -> list[AlertEntry]:
        """Alerts with what became of their notices, newest first."""
        open_ids = {alert.id for alert in self.open()}
        ids = [raw.decode() for raw in self._client.zrevrange(self._times, 0, MAX_HISTORY - 1)]
        ids = [alert_id for alert_id in ids if not only_open or alert_id in open_ids][:limit]
        if not ids:
            return []
        pairs = [(alert_id, raw) for alert_id, raw in zip(ids, self._client.hmget(self._history, ids), strict=True)]
        names = [f"{alert_id}/{kind}/{place}" for alert_id in ids for kind in _KINDS for place in _PLACES]
        told = dict(zip(names, self._client.hmget(self._deliveries, names), strict=True))
        entries = []
        for alert_id, raw in pairs:
            if raw is not None:
                own = [told[f"{alert_id}/{kind}/{place}"] for kind in _KINDS for place in _PLACES]
                deliveries = [_decode_delivery_state(one) for one in own if one is not None]
                entries.append(
                    AlertEntry(alert=_decode_alert(raw), is_open=alert_id in open_ids, deliveries=deliveries)
                )
        return entries

    def counts(self) -> dict[str, int]:
        """Notices that were sent or given up, since the store began, as `destination:status`."""
        return {name.decode(): int(count) for name, count in self._client.hgetall(self._counts).items()}

    def trim(self) -> int:
        """Forget all but the newest `MAX_HISTORY` alerts; returns how many were forgotten."""
        old = [raw.decode() for raw in self._client.zrange(self._times, 0, -MAX_HISTORY - 1)]
        self._forget(old)
        return len(old)

    def _forget(self, ids: Iterable[str]) -> None:
        for alert_id in ids:
            pipe = self._client.pipeline(transaction=True)
            pipe.zrem(self._times, alert_id)
            pipe.hdel(self._history, alert_id)
            pipe.hdel(self._deliveries, *(f"{alert_id}/{kind}/{place}" for kind in _KINDS for place in _PLACES))
            pipe.execute()


_KINDS, _PLACES = ("firing", "resolved"), ("log", "webhook", "alertmanager")
_encode = msgspec.json.Encoder().encode
_decode_states = msgspec.json.Decoder(tuple[dict[str, AlertState], float]).decode
_decode_report = msgspec.json.Decoder(tuple[Finding, float]).decode
_decode_delivery = msgspec.json.Decoder(Delivery).decode
_decode_delivery_state = msgspec.json.Decoder(DeliveryState).decode
_decode_alert = msgspec.json.Decoder(Alert).decode
