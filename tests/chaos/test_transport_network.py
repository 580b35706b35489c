"""Replies that leave Redis and never arrive."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import redis
from redis.exceptions import TimeoutError as RedisTimeoutError
from tests.chaos.proxy import Proxy
from tests.transport_support import Inbox, OwnRedis, TcpProxy, connect, own_redis, publish

from muai_batching.transport import LeaseLostError, SettleCommandError, close_ledgers, lease_table
from muai_producers.connections import state_client

pytestmark = [pytest.mark.redis, pytest.mark.chaos]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnRedis]:
    with own_redis(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def proxy(server: OwnRedis) -> Iterator[TcpProxy]:
    server.client.flushall()
    treacherous = TcpProxy(server.port)
    yield treacherous
    close_ledgers()
    treacherous.close()


def through(proxy: TcpProxy) -> str:
    return f"redis://127.0.0.1:{proxy.port}/0"


@pytest.mark.parametrize("treachery", ["cut", "swallow"])
def test_given_a_claim_whose_reply_never_arrives_when_reconnected_then_all_of_it_is_delivered_in_order(
    server: OwnRedis, proxy: TcpProxy, treachery: str
) -> None:
    with connect(through(proxy), socket_timeout=0.5) as connection, connect(server.url, None) as stock:
        box = Inbox(connection, "q")
        publish(stock, "q", "warm up")
        box.wait_for(1)
        getattr(proxy, f"{treachery}_reply_containing")(b"*3\r\n:0\r\n*1\r\n")
        publish(stock, "q", *range(10))
        assert box.wait_for(11) == ["warm up", *range(10)]
        assert proxy.sprung.is_set()
        box.channel.ack_many([message.delivery_tag for message in box.messages])
        assert [lease.num_claims for lease in lease_table(server.client)] == [0]


@pytest.mark.parametrize("treachery", ["cut", "swallow"])
def test_given_a_settlement_whose_reply_never_arrives_when_looked_up_then_it_took_effect_once(
    server: OwnRedis, proxy: TcpProxy, treachery: str
) -> None:
    with connect(through(proxy), socket_timeout=0.5) as connection, connect(server.url, None) as stock:
        publish(stock, "q", *range(3))
        box = Inbox(connection, "q")
        box.wait_for(3)
        getattr(proxy, f"{treachery}_reply_containing")(b"$2\r\nok\r\n")
        tags = [message.delivery_tag for message in box.messages]
        assert box.channel.settle(tags, [("LPUSH", "next", "batch")]) == [None]
        assert proxy.sprung.is_set()
        assert server.client.lrange("next", 0, -1) == [b"batch"]
        assert not box.channel.holder.tags


def test_given_a_connection_gone_silent_while_waiting_when_overdue_then_messages_come_again(
    server: OwnRedis, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muai_batching.transport.poller.PEEK_S", 0.3)
    with connect(through(proxy), socket_timeout=0.5) as connection, connect(server.url, None) as stock:
        box = Inbox(connection, "q")
        publish(stock, "q", "warm up")
        box.wait_for(1)
        proxy.swallow_reply_containing(b"after silence")
        publish(stock, "q", "after silence", headers={"note": "after silence"})
        box.wait_for(2)
        assert proxy.sprung.is_set()


def test_given_settlements_when_some_claims_are_lost_then_those_alone_change_nothing(
    server: OwnRedis, proxy: TcpProxy
) -> None:
    with connect(server.url) as connection:
        publish(connection, "q", *range(1005))
        box = Inbox(connection, "q")
        box.wait_for(1005)
        tags = [message.delivery_tag for message in box.messages]
        server.client.hdel(f"muai:transport:claims:{box.channel.ledger.consumer}", str(tags[1]))
        results = box.messages[0].channel.settle_many(
            [(tags[:3], [("LPUSH", "a", "1")]), (tags[3:5], [("LPUSH", "b", "2"), ("SET", "c", "3")])]
        )
        assert isinstance(results[0], LeaseLostError)
        assert results[0].tags == (tags[1],)
        assert results[1] == [1, b"OK"]
        assert server.client.exists("a") == 0
        assert server.client.lrange("b", 0, -1) == [b"2"]
        assert box.channel.settle(tags[5:], [("LPUSH", "b", "4"), ("GET", "nothing")]) == [2, None]
        with pytest.raises(SettleCommandError, match="command 1"):
            box.channel.settle([tags[0]], [("SET", "d", "1"), ("LPUSH", "c", "wrong type")])
        assert sorted(box.channel.holder.tags) == [tags[0], tags[2]]
        assert server.client.hlen(f"muai:transport:claims:{box.channel.ledger.consumer}") == 2


def test_given_a_settlement_that_cannot_be_confirmed_when_called_again_then_it_counts_once(
    server: OwnRedis, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(server.url) as connection:
        publish(connection, "q", "x")
        box = Inbox(connection, "q")
        box.wait_for(1)
        store = box.channel.ledger.store
        settle, calls = store.settle, []

        def settle_unheard(*args: object) -> object:
            calls.append(settle(*args))
            raise RedisTimeoutError

        monkeypatch.setattr(store, "settle", settle_unheard)
        tag, commands = box.messages[0].delivery_tag, [("LPUSH", "once", "1")]
        with pytest.raises(RedisTimeoutError):
            box.channel.settle([tag], commands)
        monkeypatch.undo()
        assert box.channel.settle([tag], commands) == [None]
        assert server.client.llen("once") == 1
        assert len(calls) == 2


@pytest.mark.parametrize("made_by", [state_client, None])
def test_given_many_connections_gone_silent_when_one_has_waited_in_vain_then_the_others_are_made_anew(
    server: OwnRedis, made_by: Callable[..., redis.Redis] | None
) -> None:
    proxy = Proxy(server.port)
    with contextlib.closing(proxy), contextlib.ExitStack() as opened:
        url = f"redis://127.0.0.1:{proxy.port}/0"
        if made_by is None:
            channel = opened.enter_context(connect(url, socket_timeout=0.5)).channel()
            client = channel._create_client()
        else:
            client = opened.enter_context(made_by(url, timeout_s=0.5))
        pool = client.connection_pool
        connections = [pool.get_connection() for _ in range(4)]
        for connection in connections:
            pool.release(connection)
        assert client.ping()
        proxy.swallow()
        with contextlib.suppress(RedisTimeoutError):
            client.ping()
        for connection in [pool.get_connection() for _ in range(4)]:
            assert connection in connections
            connection.send_command("PING")
            assert connection.read_response() == b"PONG"
            pool.release(connection)
        assert proxy.num_swallowed == 1
