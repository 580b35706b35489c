"""API keys: each belongs to a tenant. The key itself is shown once, when it is made; what is kept is its hash.

A key has 256 random bits, so a plain SHA-256 is as good a hash as a slow one: there is nothing to guess from.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from muai_producers.errors import InvalidRequestError
from muai_producers.store import Store

log = logging.getLogger(__name__)
Tenant = Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""No colon and no slash: tenants are parts of keys in Redis and of paths."""
_KEY = re.compile(r"muai_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")


class TenantLimits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a tenant may have, as one of its keys says; None: what the configuration says for everybody."""

    max_requests: Annotated[int, Meta(ge=1)] | None = None
    """Accepted and not yet answered."""
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    """In requests accepted and not yet answered."""
    requests_per_minute: Annotated[int, Meta(ge=1, le=10_000_000)] | None = None


NO_LIMITS = TenantLimits()


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What is kept of a key."""

    id: str
    """The part of the key that may be known to everybody."""
    digest: str
    """SHA-256 of the key, in hexadecimal digits."""
    tenant: Tenant
    limits: TenantLimits = NO_LIMITS
    name: str = ""
    """What the key is for."""
    operator: bool = False
    """Whether its holder runs the installation: sees all of it in the console, and may replay and purge dead letters.
    Requests and results of other tenants stay closed to the API."""
    created_at: float = 0.0
    """Wall-clock seconds since the epoch."""


def new_key(
    tenant: str, limits: TenantLimits | None = None, name: str = "", *, operator: bool = False
) -> tuple[str, KeyRecord]:
    """A new key and its record.

    Raises:
        InvalidRequestError: the tenant's name or a limit is not allowed.
    """
    key_id = secrets.token_hex(6)
    key = f"muai_{key_id}_{secrets.token_urlsafe(32)}"
    fields = {"id": key_id, "digest": _digest(key), "tenant": tenant, "name": name, "created_at": time.time()}
    more = {"limits": msgspec.to_builtins(limits or TenantLimits()), "operator": operator}
    try:
        record = msgspec.convert({**fields, **more}, KeyRecord)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(
            f"{error}; a tenant has 1 to 64 letters, digits and . _ -, and limits are whole numbers above 0"
        ) from None
    return key, record


def id_of(key: str) -> str | None:
    """The id that a key names; None when it is no key of ours."""
    found = _KEY.fullmatch(key)
    return found[1] if found else None


def matches(record: KeyRecord, key: str) -> bool:
    """Whether the record is the key's. Takes as long for a key that is nearly right as for any other."""
    return hmac.compare_digest(record.digest, _digest(key))


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class Keys:
    """The keys of an installation: those in the state store, and those in a file that the operator keeps.

    Args:
        file: one record a line; it is read again when it has changed.
    Raises:
        InvalidRequestError: the file cannot be read, or a line of it is no record.
        redis.exceptions.RedisError: from every method, when the store does not answer.
    """

    def __init__(self, store: Store, file: Path | None = None) -> None:
        self._client: Any = store.client
        self._key = f"{store.keys.prefix}:keys"
        self._file = file
        self._seen: tuple[int, int] | None = None
        self._from_file: Mapping[str, KeyRecord] = {}
        self._read_file()

    def add(self, record: KeyRecord) -> None:
        """Keep a record in the state store: the key works from now on."""
        self._client.hset(self._key, record.id, msgspec.json.encode(record))

    def revoke(self, key_id: str) -> bool:
        """Forget a key of the state store; False when there is none of that id."""
        return bool(self._client.hdel(self._key, key_id))

    def all(self) -> list[KeyRecord]:
        """Every key, oldest first."""
        kept = [_decode(raw) for raw in self._client.hgetall(self._key).values()]
        return sorted([*kept, *self._read_file().values()], key=lambda record: record.created_at)

    def find(self, key_ids: Sequence[str]) -> list[KeyRecord | None]:
        """The records of these ids, in one round trip."""
        from_file = self._read_file()
        kept = self._client.hmget(self._key, list(key_ids)) if key_ids else []
        return [
            from_file.get(key_id) or (None if raw is None else _decode(raw))
            for key_id, raw in zip(key_ids, kept, strict=True)
        ]

    def _read_file(self) -> Mapping[str, KeyRecord]:
        if self._file is None:
            return {}
        try:
            stat = self._file.stat()
            if self._seen != (stat.st_mtime_ns, stat.st_size):
                self._from_file = read_records(self._file)
                self._seen = (stat.st_mtime_ns, stat.st_size)
        except (OSError, InvalidRequestError) as error:
            if self._seen is None:
                raise InvalidRequestError(f"gateway.keys_file: {error}") from error
            log.warning("gateway.keys_file: %s; what it said before holds", error)  # a slip while it is edited
        return self._from_file


def read_records(file: Path) -> dict[str, KeyRecord]:
    """The records in a file, by id; empty lines and those that begin with # are passed over.

    Raises:
        InvalidRequestError: a line is no record; the message names it.
    """
    records = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                record = _decode(line)
            except msgspec.DecodeError as error:
                raise InvalidRequestError(f"{file}:{number} is no record of a key: {error}") from None
            records[record.id] = record
    return records


_decode = msgspec.json.Decoder(KeyRecord).decode
