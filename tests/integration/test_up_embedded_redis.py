"""The Redis that an installation brings itself."""

import os
import shutil
from pathlib import Path

import pytest
import redis

from muai_producers.errors import BrokerError
from muai_workers.up import embedded_redis as module
from muai_workers.up.embedded_redis import EmbeddedRedis, embedded_redis, find_redis_server

pytestmark = pytest.mark.redis


def test_Given_a_folder_Then_it_serves_who_has_the_password_and_nobody_else(tmp_path: Path) -> None:
    with embedded_redis(tmp_path) as url:
        with redis.Redis.from_url(url) as client:
            assert client.ping()
            assert client.config_get("bind") == {"bind": "127.0.0.1"}
            port = client.connection_pool.connection_kwargs["port"]
        with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
        assert (tmp_path / "redis.conf").stat().st_mode & 0o077 == 0
    with redis.Redis.from_url(url) as client, pytest.raises(redis.ConnectionError):
        client.ping()


def test_Given_a_restart_Then_what_was_accepted_is_there_again(tmp_path: Path) -> None:
    with embedded_redis(tmp_path) as url, redis.Redis.from_url(url) as client:
        client.lpush("inference", "request")
    with embedded_redis(tmp_path) as url, redis.Redis.from_url(url) as client:
        assert client.lrange("inference", 0, -1) == [b"request"]


def test_Given_a_folder_in_use_Then_a_second_server_is_refused(tmp_path: Path) -> None:
    first = EmbeddedRedis(tmp_path)
    with pytest.raises(BrokerError, match="another muai"):
        EmbeddedRedis(tmp_path)
    first.release()
    EmbeddedRedis(tmp_path).release()


def test_Given_a_server_that_ends_at_once_Then_it_is_not_waited_for(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    try:
        with pytest.raises(BrokerError, match="ended at its start"):
            server.wait_until_ready(lambda: False)
    finally:
        server.release()


def test_Given_no_server_on_the_path_Then_the_packages_own_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert os.access(find_redis_server(), os.X_OK)


def test_Given_neither_Then_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(module.importlib, "import_module", absent)
    with pytest.raises(BrokerError, match=r"muai\[embedded\].*--broker"):
        find_redis_server()
