"""The pure parts of webhooks: which receivers are allowed, how deliveries are signed, when they are tried again."""

from __future__ import annotations

import base64
import hashlib
import hmac
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muai_config.gateway import WebhookSettings
from muai_producers.errors import InvalidRequestError
from muai_producers.gateway.standing import Standing
from muai_producers.webhooks.bodies import hook_body
from muai_producers.webhooks.outbox import Delivery
from muai_producers.webhooks.policy import HookPolicy
from muai_producers.webhooks.retrying import PAUSES_S, Tried, next_try_s
from muai_producers.webhooks.signing import Signer, verify


def policy(**settings: Any) -> HookPolicy:
    return HookPolicy(WebhookSettings(allowed_hosts=("hooks.example.com", "*.shop.example"), **settings))


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com/done?x=1",
        "https://HOOKS.example.com./done",
        "https://hooks.example.com:8443/",
        "https://eu.shop.example",
    ],
)
def test_given_an_allowed_host_then_its_address_is_taken(url: str) -> None:
    assert policy(secret_file=Path("s")).check(url) == url


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://hooks.example.com/", "https"),
        ("https://evil.example/", "not among"),
        ("https://hooks.example.com.evil.example/", "not among"),
        ("https://shop.example/", "not among"),
        ("https://evilshop.example/", "not among"),
        ("https://hooks.example.com@evil.example/", "no user"),
        ("https://user:pw@hooks.example.com/", "no user"),
        ("https://hooks.example.com/#x", "fragment"),
        ("https://hooks.example.com:99999/", "no address"),
        ("https://hooks.example.com/ä", "ASCII"),
        ("https:///x", "host"),
        ("https://[::1/", "no address"),
    ],
)
def test_given_any_other_address_then_it_is_refused_with_the_reason(url: str, why: str) -> None:
    with pytest.raises(InvalidRequestError, match=why) as refused:
        policy(secret_file=Path("s")).check(url)
    assert refused.value.details["field"] == "webhook"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "fe80::1",
        "fd00::1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
    ],
)
def test_given_an_address_that_is_not_on_the_internet_then_nothing_is_posted_there(address: str) -> None:
    assert policy(secret_file=Path("s")).choose([address]) is None
    assert policy(secret_file=Path("s"), allow_private_networks=True).choose([address]) == address
    host = f"[{address}]" if ":" in address else address
    open_to_all = HookPolicy(WebhookSettings(allowed_hosts=("*",), secret_file=Path("s")))
    with pytest.raises(InvalidRequestError, match="no address on the internet"):
        open_to_all.check(f"https://{host}/")


def test_given_several_addresses_then_the_first_public_one_is_chosen() -> None:
    assert policy(secret_file=Path("s")).choose(["10.0.0.1", "93.184.215.14", "8.8.8.8"]) == "93.184.215.14"


def test_given_no_allowed_hosts_then_webhooks_are_off() -> None:
    with pytest.raises(InvalidRequestError, match="switched off"):
        HookPolicy(WebhookSettings()).check("https://hooks.example.com/")


MASTER = b"0123456789abcdef0123456789abcdef"


def test_given_a_delivery_then_its_signature_is_that_of_the_standard_and_each_tenant_has_its_own_secret() -> None:
    signer = Signer(MASTER)
    secret = signer.secret_of("shop")
    headers = signer.headers("shop", "id-1", 1_700_000_000, b'{"a":1}')
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.new(key, b'id-1.1700000000.{"a":1}', hashlib.sha256).digest()
    assert headers["webhook-signature"] == "v1," + base64.b64encode(digest).decode()
    assert verify(secret, headers, b'{"a":1}', 1_700_000_100)
    assert not verify(secret, headers, b'{"a":2}', 1_700_000_100)
    assert not verify(secret, headers, b'{"a":1}', 1_700_000_000 + 3600)
    assert not verify(signer.secret_of("rival"), headers, b'{"a":1}', 1_700_000_100)
    assert not verify(secret, {}, b"", 0)


def test_given_a_secret_file_that_will_not_do_then_it_is_said_which_and_why(tmp_path: Path) -> None:
    short = tmp_path / "secret"
    short.write_text("short")
    for file, why in ((short, "32 at least"), (tmp_path / "none", "cannot be read"), (None, "not set")):
        hosts = () if file is None else ("a.example",)
        with pytest.raises(InvalidRequestError, match=why):
            Signer.from_settings(WebhookSettings(allowed_hosts=hosts, secret_file=file))


@given(st.integers(1, 50), st.floats(0, 1), st.integers(1, 2_592_000), st.sampled_from([None, 429, 500, 302, 404]))
def test_given_failures_then_the_pauses_grow_to_an_hour_and_end_in_time(
    num_tries: int, chance: float, give_up_after_s: int, status: int | None
) -> None:
    now_s = 1000.0 + 60 * num_tries
    due_s = next_try_s(Tried(status), num_tries, 1000.0, now_s, give_up_after_s, chance)
    pause_s = PAUSES_S[min(num_tries, len(PAUSES_S)) - 1]
    if due_s is None:
        assert now_s + pause_s * 1.2 > 1000.0 + give_up_after_s
    else:
        assert pause_s <= due_s - now_s <= 1.2 * pause_s + 1e-6
        assert due_s <= 1000.0 + give_up_after_s


def test_given_a_receiver_that_asks_for_a_pause_or_for_no_more_then_it_is_heeded() -> None:
    assert next_try_s(Tried(503, retry_after_s=100.0), 1, 0.0, 0.0, 1000, 0.0) == 100.0
    assert next_try_s(Tried(503, retry_after_s=1e6), 1, 0.0, 0.0, 10_000, 0.0) == 3600.0
    assert next_try_s(Tried(410), 1, 0.0, 0.0, 1000, 0.0) is None
    assert next_try_s(Tried(204), 1, 0.0, 0.0, 1000, 0.0) is None
    assert Tried(204).delivered
    assert not Tried(302).delivered
    assert "redirects are not followed" in Tried(302).told()


def test_given_a_delivery_then_what_is_kept_of_it_is_read_back() -> None:
    tried = Delivery("id", "shop", "https://a.example/?x=y", 3, 12.5)
    assert Delivery.read("id", tried.entry()) == tried
    assert Delivery.read("id", "shop\thttps://a.example/") == Delivery("id", "shop", "https://a.example/")


def test_given_an_end_then_the_body_says_which_and_where_the_request_stands() -> None:
    body = hook_body(Standing(id="a", state="REVOKED", status_url="/v1/inference/a"), 0.0)
    assert b'"type":"inference.cancelled","timestamp":"1970-01-01T00:00:00.000+00:00"' in body
    assert b'"id":"a"' in body
