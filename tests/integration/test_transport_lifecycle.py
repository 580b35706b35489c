"""Who holds what when channels, connections, threads and processes come and go; and how one gets in at all."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from tests.transport_support import (
    OURS,
    Inbox,
    OwnRedis,
    Process,
    connect,
    free_port,
    own_redis,
    publish,
    redis_executable,
    wait_until,
)

from muai_batching.transport import LeaseObserver, close_ledgers, lease_table, ledgers, pin, reclaim_dead, unpin

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnRedis]:
    with own_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(running: OwnRedis) -> Iterator[OwnRedis]:
    running.client.flushall()
    yield running
    close_ledgers()


def num_claims(server: OwnRedis) -> int:
    return sum(lease.num_claims for lease in lease_table(server.client))


def test_given_pinned_work_when_its_channel_closes_then_only_the_rest_goes_back(server: OwnRedis) -> None:
    with connect(server.url) as connection:
        publish(connection, "q", *range(4))
        box = Inbox(connection, "q")
        box.wait_for(4)
        first, second = box.messages[:2]
        assert pin(first.delivery_tag)
        assert pin(second.delivery_tag)
    assert server.client.llen("q") == 2
    assert not pin(box.messages[2].delivery_tag)
    first.ack()
    wait_until(lambda: num_claims(server) == 1, what="the ack through a closed channel")
    unpin(second.delivery_tag)
    assert (num_claims(server), server.client.llen("q")) == (0, 3)


def test_given_an_ack_of_another_thread_when_the_prefetch_is_full_then_the_next_message_comes_at_once(
    server: OwnRedis,
) -> None:
    with connect(server.url) as connection:
        publish(connection, "q", *range(20))
        box = Inbox(connection, "q", prefetch=1)
        box.wait_for(1)
        started_s = time.monotonic()
        for count in range(2, 12):
            acker = threading.Thread(target=box.messages[-1].ack)
            acker.start()
            box.wait_for(count)
            acker.join()
        assert time.monotonic() - started_s < 0.9  # a poll that nobody wakes takes a second


def test_given_acks_and_nobody_polling_when_a_moment_passes_then_redis_knows_of_them(server: OwnRedis) -> None:
    with connect(server.url) as connection:
        publish(connection, "q", 1, 2)
        box = Inbox(connection, "q")
        box.wait_for(2)
        box.messages[0].ack()
        box.messages[1].reject()
        wait_until(lambda: num_claims(server) == 0, timeout_s=1.0)


def test_given_messages_of_two_channels_when_settled_together_then_both_channels_have_room_again(
    server: OwnRedis,
) -> None:
    with connect(server.url) as connection, connect(server.url) as other:
        publish(connection, "q", *range(8))
        boxes = [Inbox(connection, "q", prefetch=2), Inbox(other, "q", prefetch=2)]
        for box in boxes:
            box.wait_for(2)
        tags = [message.delivery_tag for box in boxes for message in box.messages]
        boxes[0].channel.settle(tags, [("LPUSH", "next", "batch")])
        assert sorted(body for box in boxes for body in box.wait_for(4)) == list(range(8))


def test_given_a_redis_that_is_away_for_longer_than_the_lease_when_work_would_begin_then_it_asks_first(
    tmp_path: Path,
) -> None:
    with own_redis(tmp_path) as server, connect(server.url, lease_ttl_s=0.2) as connection:
        publish(connection, "q", 1)
        box = Inbox(connection, "q")
        box.wait_for(1)
        tag, answers = box.messages[0].delivery_tag, []
        ledger = box.channel.ledger
        server.kill()
        silent_since_s = time.monotonic()
        wait_until(lambda: time.monotonic() - silent_since_s > 0.2)
        asking = threading.Thread(target=lambda: answers.append(ledger.pin(tag)))
        asking.start()
        assert (asking.is_alive(), answers) == (True, [])
        server.start()  # without its data, so it knows nothing of this consumer
        asking.join(timeout=10)
        assert answers == [False]
        close_ledgers()


# Forgetting a connection leaves it to the collector to close its sockets, which warns of it.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_given_a_connection_that_is_forgotten_when_collected_then_its_messages_go_back(server: OwnRedis) -> None:
    connection = connect(server.url, lease_ttl_s=0.4)
    publish(connection, "q", 1, 2)
    box = Inbox(connection, "q")
    box.wait_for(2)
    connection.transport.cycle.poller.close()
    del box, connection
    gc.collect()
    wait_until(lambda: server.client.llen("q") == 2, timeout_s=5.0)


def test_given_nothing_left_to_do_when_a_lease_has_passed_then_the_thread_ends_and_begins_again_on_demand(
    server: OwnRedis,
) -> None:
    with connect(server.url, lease_ttl_s=0.1) as connection:
        publish(connection, "q", 1)
        Inbox(connection, "q").wait_for(1)
    wait_until(lambda: lease_table(server.client) == [])
    wait_until(lambda: "muai-lease" not in [thread.name for thread in threading.enumerate()])
    with connect(server.url, lease_ttl_s=0.1) as connection:
        box = Inbox(connection, "q")
        assert box.wait_for(1) == [1]
        assert len(lease_table(server.client)) == 1


FORKING = f"""
import atexit, os, sys
from muai_batching.transport import lease_table
from tests.transport_support import Inbox, connect
connection = connect(sys.argv[1], {OURS!r})
box = Inbox(connection, "q")
box.wait_for(3)
child = os.fork()
if child == 0:
    atexit._run_exitfuncs()
    os._exit(0)
os.waitpid(child, 0)
box.channel.ledger.store.client.set("held after the fork", len(box.channel.holder.tags))
box.channel.ledger.store.client.blmove("gate", "gate", 0, "RIGHT", "RIGHT")
"""


def test_given_a_forked_child_when_it_ends_then_its_parent_keeps_its_claims(server: OwnRedis) -> None:
    with connect(server.url, None) as stock:
        publish(stock, "q", 1, 2, 3)
    process = Process(FORKING, server.url)
    try:
        wait_until(lambda: server.client.get("held after the fork") == b"3")
        assert num_claims(server) == 3
        server.client.lpush("gate", "open")
        process.wait()
        assert (num_claims(server), server.client.llen("q")) == (0, 3)
    finally:
        process.end()


HOARDER = f"""
import os, signal, sys
from tests.transport_support import Inbox, connect
Inbox(connect(sys.argv[1], {OURS!r}), "q").wait_for(2500)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_given_a_large_hoard_of_a_dead_consumer_when_reclaimed_from_outside_then_all_is_back_in_order(
    server: OwnRedis,
) -> None:
    with connect(server.url, None) as stock:
        publish(stock, "q", *range(2500))
    before = server.client.lrange("q", 0, -1)
    Process(HOARDER, server.url).wait()
    (dead,) = lease_table(server.client)
    assert (dead.num_claims, server.client.llen("q")) == (2500, 0)
    observer = LeaseObserver(8.0)
    looks = [reclaim_dead(server.client, observer, now_s) for now_s in (0.0, 4.0, 8.0, 12.0)]
    assert [[(item.consumer, item.num_messages) for item in look] for look in looks] == [
        [],
        [],
        [(dead.consumer, 2500)],
        [],
    ]
    assert server.client.lrange("q", 0, -1) == before
    assert server.client.hlen("muai:transport:deliveries") == 2500
    assert lease_table(server.client) == []


# Getting in


def serve_one(url: str, transport: str = OURS, ssl_options: dict[str, object] | None = None, **options: object) -> None:
    connection = connect(url, transport, **options)
    connection.ssl = ssl_options or False
    with connection:
        publish(connection, "q", "hello")
        box = Inbox(connection, "q")
        assert box.wait_for(1) == ["hello"]
        box.messages[0].ack()
    assert len(ledgers()) == 1
    close_ledgers()


def test_given_a_user_a_password_and_a_database_number_when_consuming_then_state_lies_there_too(
    tmp_path: Path,
) -> None:
    with own_redis(tmp_path) as server:
        server.client.execute_command("ACL", "SETUSER", "muai", "on", ">secret", "~*", "&*", "+@all")
        server.client.execute_command("ACL", "SETUSER", "default", "-@all", "+info", "+ping", "+client")
        serve_one(f"redis://muai:secret@127.0.0.1:{server.port}/3")
        assert server.client.info("keyspace").keys() <= {"db3"}


def test_given_tls_when_consuming_then_the_ledger_speaks_it_as_well(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the test's certificate")
    if shutil.which("redis-server") is None:
        pytest.skip("the redis-server that the Python package carries was built without TLS")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    tls_port = free_port()
    files = ("--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-ca-cert-file", str(certificate))
    with own_redis(tmp_path, "--tls-port", str(tls_port), "--tls-auth-clients", "no", *files):
        options: dict[str, object] = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_ca_certs": str(certificate)}
        serve_one(f"rediss://127.0.0.1:{tls_port}/0", ssl_options=options)


def test_given_sentinels_when_consuming_then_the_master_they_name_is_used(tmp_path: Path) -> None:
    port = free_port()
    config = tmp_path / "sentinel.conf"
    with own_redis(tmp_path) as master:
        config.write_text(f"port {port}\nsentinel monitor muai 127.0.0.1 {master.port} 1\n")
        command = [redis_executable(), str(config), "--sentinel"]
        sentinel = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=dict(os.environ))
        try:
            wait_until(lambda: _sentinel_answers(port), what="the sentinel")
            serve_one(f"sentinel://127.0.0.1:{port}/0", "muai_batching.transport:SentinelTransport", master_name="muai")
            assert master.client.exists("q") == 0
            assert master.client.info("commandstats")["cmdstat_evalsha"]["calls"] > 0
        finally:
            sentinel.kill()
            sentinel.wait()


def _sentinel_answers(port: int) -> bool:
    with contextlib.suppress(redis.ConnectionError), redis.Redis(port=port) as client:
        return bool(client.execute_command("SENTINEL", "get-master-addr-by-name", "muai"))
    return False
