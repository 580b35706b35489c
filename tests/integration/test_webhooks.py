"""Webhooks from the request to a receiver: signed, tried again, to allowed addresses only.

Were these to fail, a web app would wait for word that never comes, or somebody could have MuAI call a server that only
MuAI can reach.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.gateway_support import GatewayStack, gateway_stack
from tests.transport_support import OwnRedis, wait_until
from tests.webhook_support import Receiver, a_receiver

from muai_config.gateway import WebhookSettings
from muai_producers.store import Store
from muai_producers.webhooks.outbox import Outbox
from muai_producers.webhooks.policy import HookPolicy
from muai_producers.webhooks.posting import Poster
from muai_producers.webhooks.retrying import Tried
from muai_producers.webhooks.signing import Signer, verify

pytestmark = [pytest.mark.redis, pytest.mark.timeout(120)]
MASTER = "0123456789abcdef0123456789abcdef"
NOOP = {"model": "noop", "inputs": "hello"}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with a_receiver() as receiver:
        yield receiver


# -- the whole way ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayStack]:
    folder = tmp_path_factory.mktemp("webhooks")
    (folder / "secret").write_text(MASTER)
    hooks = {
        "allowed_hosts": ["127.0.0.1"],
        "secret_file": str(folder / "secret"),
        "allow_private_networks": True,
        "allow_http": True,
        "timeout_s": 2.0,
    }
    with gateway_stack(folder, sections={"gateway": {"webhooks": hooks}}) as stack:
        stack.start_serving()
        stack.start("control", "--name", "k1")
        stack.start_gateway()
        yield stack


def submit(stack: GatewayStack, url: str, **body: Any) -> str:
    answer = httpx.post(f"{stack.url}/v1/inference", json={**NOOP, "webhook": url, **body})
    assert answer.status_code == 202, answer.text
    request_id: str = answer.json()["id"]
    return request_id


def test_given_ends_of_every_kind_then_the_receiver_is_told_of_each_once_and_signed(
    stack: GatewayStack, receiver: Receiver
) -> None:
    good = submit(stack, receiver.url(path="/hook?to=me"))
    bad = submit(stack, receiver.url(), inputs="BAD")
    parked = submit(stack, receiver.url(), model="parked")
    assert httpx.delete(f"{stack.url}/v1/inference/{parked}").status_code == 200
    receiver.wait_for(3)
    by_id = {one.headers["webhook-id"]: one for one in receiver.received}
    assert set(by_id) == {good, bad, parked}
    assert {by_id[one].told["type"] for one in (good,)} == {"inference.succeeded"}
    assert by_id[bad].told["type"] == "inference.failed"
    assert by_id[parked].told["type"] == "inference.cancelled"
    assert by_id[good].path == "/hook?to=me"
    assert by_id[good].headers["host"] == f"127.0.0.1:{receiver.port}"
    assert by_id[good].told["data"] == httpx.get(f"{stack.url}/v1/inference/{good}").json()
    secret = Signer(MASTER.encode()).secret_of("default")
    for one in receiver.received:
        assert verify(secret, one.headers, one.body, time.time())
    wait_until(lambda: Outbox(Store(stack.redis.client)).num_waiting() == 0, what="all to be settled")
    assert len(receiver.received) == 3


def test_given_a_receiver_that_fails_at_first_then_it_is_tried_again_under_the_same_id(
    stack: GatewayStack, receiver: Receiver
) -> None:
    receiver.statuses.append(500)
    request_id = submit(stack, receiver.url())
    first, second = receiver.wait_for(2)[:2]  # the first pause is 5 to 6 s
    assert first.headers["webhook-id"] == second.headers["webhook-id"] == request_id
    assert verify(Signer(MASTER.encode()).secret_of("default"), second.headers, second.body, time.time())


def test_given_a_receiver_that_hangs_then_others_are_told_all_the_same(stack: GatewayStack, receiver: Receiver) -> None:
    with a_receiver() as hanging:
        hanging.hold = threading.Event()
        for _ in range(20):
            submit(stack, hanging.url())
        hanging.wait_for(1)
        began_s = time.monotonic()
        submit(stack, receiver.url())
        receiver.wait_for(1)
        assert time.monotonic() - began_s < 2.0, "as long as the hanging one is waited for"


def test_given_a_host_that_is_not_allowed_then_the_request_is_refused_before_it_is_queued(
    stack: GatewayStack,
) -> None:
    refused = httpx.post(f"{stack.url}/v1/inference", json={**NOOP, "webhook": "http://localhost/"})
    assert refused.status_code == 400
    assert refused.json()["error"]["details"] == {"field": "webhook"}


def test_given_a_control_worker_that_is_killed_then_another_delivers(stack: GatewayStack, receiver: Receiver) -> None:
    (control,) = [process for process in stack.processes if process.log.name.startswith("control")]
    control.stop()
    stack.processes.remove(control)
    request_id = submit(stack, receiver.url())
    wait_until(lambda: stack.redis.client.hexists("muai:webhooks", request_id), what="the delivery to be due")
    stack.start("control", "--name", "k2")
    assert receiver.wait_for(1, 60.0)[0].headers["webhook-id"] == request_id


# -- one try ---------------------------------------------------------------------------------------------------------


def post(url: str, resolve: Any = None, trust: ssl.SSLContext | None = None, **settings: Any) -> Tried:
    allowed = {"allowed_hosts": ("*",), "secret_file": Path("s"), "allow_http": True, "timeout_s": 1.0, **settings}
    hooks = WebhookSettings(**allowed)
    options: dict[str, Any] = {} if resolve is None else {"resolve": resolve}
    poster = Poster(HookPolicy(hooks), timeout_s=hooks.timeout_s, trust=trust, **options)
    return asyncio.run(poster.post(url, {"webhook-id": "1"}, b"{}"))


def leading_to(*addresses: str) -> Any:
    """A look-up that gives one address after the other, as an attacker's name server would."""
    left = list(addresses)

    async def resolve(host: str, port: int) -> list[str]:
        return [left.pop(0) if len(left) > 1 else left[0]]

    return resolve


def test_given_a_public_name_that_leads_into_the_private_network_then_no_connection_is_made(receiver: Receiver) -> None:
    tried = post(receiver.url("hooks.example.com"), leading_to("127.0.0.1"))
    assert tried.status is None
    assert "no address on the internet" in tried.reason
    assert post(receiver.url("localhost")).status is None
    assert receiver.received == []


def test_given_a_name_that_changes_its_address_then_what_was_checked_is_what_is_connected_to(
    receiver: Receiver,
) -> None:
    # 192.0.2.1 is nobody's; were the name looked up again for the connection, it would reach the receiver.
    tried = post(
        receiver.url("hooks.example.com"),
        leading_to("8.8.8.8", "127.0.0.1"),
        timeout_s=0.3,
        allow_private_networks=False,
    )
    assert tried.status is None
    assert receiver.received == []


def test_given_a_redirect_then_it_is_not_followed(receiver: Receiver) -> None:
    with a_receiver() as inner:
        receiver.statuses.append(307)
        receiver.headers["Location"] = inner.url(path="/secret")
        tried = post(receiver.url(), allow_private_networks=True)
        assert (tried.status, tried.delivered) == (307, False)
        assert inner.received == []


def test_given_a_pause_that_the_receiver_asks_for_then_it_is_told(receiver: Receiver) -> None:
    receiver.statuses.append(429)
    receiver.headers["Retry-After"] = "77"
    assert post(receiver.url(), allow_private_networks=True) == Tried(429, retry_after_s=77.0)


@pytest.mark.parametrize(
    "says", [b"", b"HTTP/1.1 200", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000]
)
def test_given_a_receiver_that_speaks_no_http_or_never_ends_then_the_try_fails_in_time(says: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            client, _ = server.accept()
            with client:
                client.recv(100_000)
                client.sendall(says)
                client.settimeout(5)
                try:
                    while client.recv(1000):
                        pass
                except OSError:
                    pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        began_s = time.monotonic()
        tried = post(f"http://127.0.0.1:{server.getsockname()[1]}/", allow_private_networks=True)
        assert tried.status is None
        assert tried.reason
        assert time.monotonic() - began_s < 3.0
        thread.join(6)


def test_given_tls_then_the_certificate_must_be_the_hosts(tmp_path: Path) -> None:
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=hooks.example.com",
    ]
    command += ["-addext", "subjectAltName=DNS:hooks.example.com", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    trust = ssl.create_default_context(cafile=str(certificate))
    resolve = leading_to("127.0.0.1")
    with a_receiver(server) as secure:
        url = secure.url("hooks.example.com", scheme="https")
        assert post(url, resolve, trust, allow_private_networks=True).delivered
        assert not post(url.replace("hooks.", "other."), resolve, trust, allow_private_networks=True).delivered
        assert not post(url, resolve, allow_private_networks=True).delivered  # nobody vouches for it
        assert len(secure.received) == 1


def test_given_a_claimed_delivery_then_nobody_else_gets_it_until_the_claim_is_over(clean_redis: OwnRedis) -> None:
    store = Store(clean_redis.client)
    outbox = Outbox(store)
    clean_redis.client.hset(store.keys.webhooks, "a", "shop\thttps://a.example/")
    clean_redis.client.zadd(store.keys.webhooks_due, {"a": 0})
    (claimed,) = outbox.claim(10, 60.0, now_s=1000.0)
    assert outbox.claim(10, 60.0, now_s=1059.0) == []
    assert outbox.claim(10, 60.0, now_s=1061.0) == [claimed]
    outbox.settle(claimed, "webhooks_delivered")
    outbox.again(claimed, 0.0)  # another process had it as well, and was late
    assert outbox.claim(10, 60.0, now_s=2000.0) == []
    assert outbox.num_waiting() == 0
