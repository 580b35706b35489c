"""Connections to the state store."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlsplit

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from muai_producers.silence import heeding


def state_client(url: str, *, timeout_s: float = 3.0, retries: int = 6) -> redis.Redis:
    """A Redis client for `redis://`, `rediss://`, `unix://` or `sentinel://h:p;h:p/db?master_name=…`.

    Answers are bytes. A connection that breaks is tried again for about two seconds before an error is raised, with
    fewer `retries` for less. When one has waited `timeout_s` in vain for a reply, all others of the process to that
    server are made anew before their next command.
    """
    client = _client(url, timeout_s, Retry(ExponentialBackoff(cap=0.5, base=0.02), retries=retries))
    pool = client.connection_pool
    pool.connection_class = heeding(pool.connection_class)
    return client


def _client(url: str, timeout_s: float, retry: Retry) -> redis.Redis:
    if not url.startswith("sentinel://"):
        return redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=5.0, retry=retry)
    addresses = [urlsplit(part if "://" in part else f"sentinel://{part}") for part in url.split(";")]
    query = {key: values[0] for address in addresses for key, values in parse_qs(address.query).items()}
    last = addresses[-1]
    sentinel: Any = Sentinel(  # type: ignore[no-untyped-call]
        [(address.hostname or "127.0.0.1", address.port or 26379) for address in addresses],
        sentinel_kwargs={"password": query.get("sentinel_password"), "socket_timeout": 2.0},
        socket_timeout=timeout_s,
    )
    client: redis.Redis = sentinel.master_for(
        query.get("master_name", "mymaster"), password=last.password, db=int(last.path.strip("/") or 0), retry=retry
    )
    return client
