"""The console over HTTP: who sees what, what may be done and by whom; nothing of a client's is taken for HTML."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from tests.gateway_support import GatewayStack, gateway_stack
from tests.requests import a_request
from tests.transport_support import wait_until

from muai_producers.dead_letters import DeadLetters
from muai_producers.errors import EnginesExhaustedError, MalformedMessageError, ModelLoadError
from muai_producers.fleet import Fleet, GpuRecord, WorkerRecord
from muai_producers.gateway.sessions import COOKIE, token_of
from muai_producers.keys import Keys, new_key
from muai_producers.store import Limits, Store, failure_answer

pytestmark = pytest.mark.redis
EVIL = "<script>alert('x')</script>"
PAGE = {"accept": "text/html,application/xhtml+xml"}
MODELS = {
    "noop": {"task": "text-classification", "source": "hub:none", "engines": ["fake"]},
    "parked": {"task": "embedding", "source": "hub:none", "engines": ["onnx"]},
}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayStack]:
    """A gateway that asks for keys."""
    gateway = {"require_keys": True, "key_cache_s": 0.0}
    folder = tmp_path_factory.mktemp("keyed")
    with gateway_stack(folder, sections={"gateway": gateway, "models": MODELS}) as stack:
        stack.start_serving()
        stack.start_gateway()
        yield stack


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayStack]:
    """A gateway that asks nobody, without a collector or worker."""
    with gateway_stack(tmp_path_factory.mktemp("opened"), sections={"models": MODELS}) as stack:
        stack.start_gateway()
        yield stack


@pytest.fixture(autouse=True)
def closed_visits() -> Iterator[None]:
    yield
    while Visit.opened:
        Visit.opened.pop().close()


def a_key(stack: GatewayStack, tenant: str, *, operator: bool = False) -> str:
    key, record = new_key(tenant, operator=operator)
    Keys(Store(stack.redis.client)).add(record)
    return key


class Visit:
    """A browser's part: keeps the cookie, and sends what browsers send."""

    opened: ClassVar[list[httpx.Client]] = []

    def __init__(self, stack: GatewayStack, key: str | None = None) -> None:
        self.http = httpx.Client(base_url=stack.url, timeout=30.0)
        self.opened.append(self.http)
        self.own = {"origin": stack.url}
        if key is not None:
            answer = self.post("/console/sign-in", key=key)
            assert (answer.status_code, answer.headers["location"]) == (303, "/")

    def post(self, path: str, headers: dict[str, str] | None = None, **form: Any) -> httpx.Response:
        return self.http.post(path, data=form, headers=self.own if headers is None else headers)

    def page(self, path: str = "/") -> str:
        answer = self.http.get(path, headers=PAGE)
        assert answer.status_code == 200, answer.text
        return answer.text

    @property
    def token(self) -> str:
        found = re.search(r'name="muai-token" content="([0-9a-f]{64})"', self.page())
        assert found is not None
        return found[1]

    def api(self, path: str) -> httpx.Response:
        """A call as the page's script makes it."""
        return self.http.get(path, headers={"x-muai-console": self.token})


def test_Given_a_program_at_the_root_Then_it_gets_a_small_index_and_head_works(opened: GatewayStack) -> None:
    for headers in ({"accept": "application/json"}, {"accept": "*/*"}, {}):
        answer = httpx.get(f"{opened.url}/", headers=headers)
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["console"] is True
        for path in answer.json()["links"].values():
            assert httpx.get(f"{opened.url}{path}").status_code in (200, 503), path
    head = httpx.head(f"{opened.url}/")
    assert (head.status_code, head.content) == (200, b"")


def test_Given_the_page_Then_its_headers_allow_no_inline_script_and_it_names_no_other_host(
    opened: GatewayStack,
) -> None:
    visit = Visit(opened)
    answer = visit.http.get("/", headers=PAGE)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert (answer.headers["x-content-type-options"], answer.headers["cache-control"]) == ("nosniff", "no-store")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert not re.search(r"<script(?![^>]*\ssrc=)|\son\w+=|\sstyle=|<style", answer.text)
    assert not re.search(r'(?:src|href|action)="(?:https?:)?//', answer.text)
    for path in re.findall(r'(?:src|href)="(/console/assets/[^"]+)"', answer.text):
        asset = visit.http.get(path)
        assert asset.status_code == 200
        assert "immutable" in asset.headers["cache-control"]
        assert visit.http.get(path, headers={"if-none-match": asset.headers["etag"]}).status_code == 304
    assert visit.http.get("/console/assets/pages.py").status_code in (401, 404)


def test_Given_hostile_names_and_messages_Then_they_are_shown_as_text(opened: GatewayStack) -> None:
    store = Store(opened.redis.client)
    request = a_request("id<script>", model=EVIL, tenant=EVIL)
    store.admit([request], Limits())
    store.answer([failure_answer(request.id, ModelLoadError(EVIL, {"attempts": [_attempt()]}), tenant=EVIL)])
    DeadLetters(store).add(request, EnginesExhaustedError(EVIL, {"attempts": [_attempt()]}))
    fleet = Fleet(store)
    fleet.announce(WorkerRecord(name=EVIL, engine="fake", slots=1, device=EVIL, models_loaded=(EVIL,)))
    fleet.cool_down("fake", EVIL, EVIL, 60)
    visit = Visit(opened)
    wait_until(lambda: "&lt;script&gt;" in visit.page(), what="the look at the fleet")
    page = visit.page(f"/?request={request.id}")
    assert "alert(&#39;x&#39;)" in page
    assert "<script>" not in page
    assert EVIL not in page
    assert page.count("&lt;script&gt;") > 8
    assert EVIL not in visit.page(f"/?request={EVIL}nobody")
    way = visit.http.get(f"/v1/console/requests/{request.id}").json()
    assert (way["error_message"], way["attempts"][0]["message"]) == (EVIL, EVIL)
    fleet.withdraw(EVIL)
    DeadLetters(store).purge()


def _attempt() -> dict[str, Any]:
    return {"engine": EVIL, "error": {"code": EVIL, "message": EVIL}}


def test_Given_keys_Then_the_page_asks_for_one_and_a_wrong_one_is_refused(keyed: GatewayStack) -> None:
    visit = Visit(keyed)
    page = visit.page()
    assert 'data-page="sign-in"' in page
    assert "inference.high" not in page
    wrong = visit.post("/console/sign-in", key=new_key("acme")[0])
    assert (wrong.status_code, COOKIE in wrong.headers.get("set-cookie", "")) == (401, False)
    assert 'role="alert"' in wrong.text
    assert visit.post("/console/sign-in", {"origin": "https://evil.example"}, key=a_key(keyed, "a")).status_code == 403
    for path in ("overview", "requests", "dead-letters"):
        assert visit.http.get(f"/v1/console/{path}").status_code == 401


def test_Given_a_tenants_key_Then_only_its_own_requests_exist_and_nothing_of_the_fleet(keyed: GatewayStack) -> None:
    acme, rival = Visit(keyed, a_key(keyed, "acme")), Visit(keyed, a_key(keyed, "rival"))
    sent = acme.http.post(
        "/v1/inference?wait=20",
        json={"model": "noop", "inputs": "hello"},
        headers={"x-muai-console": acme.token},
    ).json()
    assert sent["state"] == "SUCCESS"
    request_id = sent["id"]
    assert request_id in acme.page()
    assert request_id not in rival.page()
    assert [one["id"] for one in acme.api("/v1/console/requests").json()["data"]] == [request_id]
    assert rival.api("/v1/console/requests").json()["data"] == []
    way = acme.api(f"/v1/console/requests/{request_id}").json()
    assert [step["name"] for step in way["steps"]] == ["queue", "batching", "dispatch", "inference", "answer"]
    assert sum(step["took_ms"] for step in way["steps"]) == pytest.approx(way["latency_ms"], abs=5)
    unknown = rival.api(f"/v1/console/requests/{request_id}")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "request_not_found")
    assert "no request" in rival.page(f"/?request={request_id}")
    overview = acme.api("/v1/console/overview").json()
    assert (overview["tenant"], overview["fleet"], overview["answered"]) == ("acme", None, None)
    refused = acme.api("/v1/console/dead-letters")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    assert "Dead letters" not in acme.page()
    assert acme.post("/console/dead-letters", token=acme.token, everything="purge", confirmed="1").status_code == 403


def test_Given_a_session_Then_its_cookie_alone_opens_no_api_and_it_ends_when_told_or_when_its_key_is_revoked(
    keyed: GatewayStack,
) -> None:
    key = a_key(keyed, "leaver")
    visit = Visit(keyed, key)
    session = visit.http.cookies[COOKIE]
    assert key not in session
    assert all(session.encode() not in name for name in keyed.redis.client.keys("*"))
    assert visit.http.get("/v1/models").status_code == 401
    assert visit.http.get("/v1/models", headers={"x-muai-console": "0" * 64}).status_code == 401
    assert visit.api("/v1/models").status_code == 200
    assert visit.post("/console/sign-out", token="0" * 64).status_code == 403
    assert visit.post("/console/sign-out", token=token_of(session)).status_code == 303
    visit.http.cookies.set(COOKIE, session)
    assert 'data-page="sign-in"' in visit.page()
    again = Visit(keyed, key)
    token = again.token
    Keys(Store(keyed.redis.client)).revoke(key.split("_")[1])
    assert 'data-page="sign-in"' in again.page()
    assert again.http.get("/v1/models", headers={"x-muai-console": token}).status_code == 401


def test_Given_an_operator_Then_dead_letters_are_replayed_and_purged_after_a_question(keyed: GatewayStack) -> None:
    store = Store(keyed.redis.client)
    letters = DeadLetters(store)
    letters.purge()
    letters.add(a_request("dead-1", model="noop"), EnginesExhaustedError("no engine"))
    letters.add(a_request("dead-2", model="noop"), EnginesExhaustedError("no engine"))
    letters.add_message("garbage", b"\xff", MalformedMessageError("not JSON"))
    operator = Visit(keyed, a_key(keyed, "ops", operator=True))
    fleet = operator.api("/v1/console/overview").json()["fleet"]
    assert [worker["engine"] for worker in fleet["workers"]] == ["fake"]
    garbage, second, first = operator.api("/v1/console/dead-letters").json()["data"]
    assert (garbage["can_be_replayed"], first["request_id"]) == (False, "dead-1")
    token = operator.token
    for headers, form in (
        ({}, {"token": token}),
        ({"origin": "https://evil.example"}, {"token": token}),
        ({"sec-fetch-site": "cross-site"}, {"token": token}),
        (None, {"token": "0" * 64}),
        (None, {}),
    ):
        answer = operator.post("/console/dead-letters", headers, everything="purge", confirmed="1", **form)
        assert answer.status_code == 403
    assert len(letters) == 3
    replayed = operator.post("/console/dead-letters", token=token, action="replay", entry=first["entry_id"])
    assert replayed.headers["location"] == "/?replayed=1&left=2#dead-letters"
    assert "1 replayed." in operator.page(replayed.headers["location"].partition("#")[0])
    wait_until(lambda: len(operator.api("/v1/console/requests").json()["data"]) >= 1, what="the replayed one's answer")
    asked = operator.post("/console/dead-letters", token=token, action="purge", entry=second["entry_id"])
    assert (asked.status_code, "Delete this dead letter for good?" in asked.text, len(letters)) == (200, True, 2)
    wrong = operator.post("/console/dead-letters", token=token, action="replay", entry="nonsense")
    assert wrong.status_code == 400
    assert "two numbers" in wrong.text
    nothing = operator.post("/console/dead-letters", token=token, action="replay")
    assert nothing.headers["location"] == "/?nothing=1#dead-letters"
    everything = operator.post("/console/dead-letters", token=token, everything="replay", confirmed="1")
    assert everything.headers["location"] == "/?replayed=1&unreadable=1&left=1#dead-letters"
    purged = operator.post("/console/dead-letters", token=token, everything="purge", confirmed="1")
    assert purged.headers["location"] == "/?purged=1&left=0#dead-letters"
    assert len(letters) == 0


def test_Given_gpus_that_are_watched_Then_their_readings_are_shown(opened: GatewayStack) -> None:
    fleet, now_s = Fleet(Store(opened.redis.client)), time.time()
    card = GpuRecord(
        host="host-a",
        index="3",
        uuid="GPU-1",
        name="NVIDIA H100",
        worker="onnx-1",
        memory_used_bytes=20_000_000_000,
        memory_total_bytes=80_000_000_000,
        utilization_percent=87.4,
        temperature_c=61.0,
        power_w=412.2,
        power_limit_w=700.0,
        read_at=now_s,
        written_at=now_s,
    )
    silent = GpuRecord(
        host="host-b",
        index="0",
        uuid="GPU-2",
        state="degraded",
        reason="<b>Xid 48</b>",
        read_at=now_s,
        written_at=now_s,
    )
    fleet.announce_gpus([card, silent])
    visit = Visit(opened)
    first, second = wait_until(
        lambda: visit.http.get("/v1/console/overview").json()["fleet"]["gpus"] or None, what="the look at the fleet"
    )
    assert (first["index"], first["utilization_percent"], first["power_limit_w"]) == ("3", 87.4, 700.0)
    assert (second["state"], second["memory_used_bytes"]) == ("degraded", None)
    page = visit.page()
    for told in ("3 on <code>host-a</code>", "87 %", "20.0 of 80.0", "61 °C", "412 W of 700", "&lt;b&gt;Xid 48"):
        assert told in page
    fleet.withdraw_gpus([card, silent])


def test_Given_limits_that_are_none_Then_they_are_refused(opened: GatewayStack) -> None:
    for limit in ("0", "101", "-1", "x", "1.5"):
        answer = httpx.get(f"{opened.url}/v1/console/requests", params={"limit": limit})
        assert (answer.status_code, answer.json()["error"]["details"]["field"]) == (400, "limit")


def test_Given_requests_that_wait_Then_the_page_shows_where_and_without_a_collector_says_so(
    opened: GatewayStack,
) -> None:
    visit = Visit(opened)
    sent = [visit.http.post("/v1/inference", json={"model": "parked", "inputs": "x", "priority": 9}) for _ in range(3)]
    overview = wait_until(lambda: _with_queued(visit, 3), what="the look at the queues")
    (queue,) = [queue for queue in overview["fleet"]["queues"] if queue["messages"]]
    assert (queue["name"], queue["priority"], queue["messages"]) == ("inference.high", "high", 3)
    assert queue["oldest_age_s"] >= 0
    assert "no collector is running" in overview["reasons"]
    page = visit.page(f"/?request={sent[0].json()['id']}")
    assert "no collector" in page
    assert "It is accepted" in page


def _with_queued(visit: Visit, depth: int) -> Any:
    overview = visit.http.get("/v1/console/overview").json()
    return overview if sum(queue["messages"] for queue in overview["fleet"]["queues"]) == depth else None


def test_Given_a_state_store_that_is_away_Then_the_page_says_so(tmp_path: Path) -> None:
    with gateway_stack(tmp_path, sections={"models": MODELS}) as stack:
        stack.start_gateway()
        visit = Visit(stack)
        assert "Not serving" not in visit.page()
        stack.redis.kill()
        page = wait_until(lambda: page if "Not serving" in (page := visit.page()) else None, what="the news")
        assert "the state store does not answer" in page
        overview = visit.http.get("/v1/console/overview").json()
        assert (overview["state_store"], overview["status"], overview["in_flight"]) == (False, "unhealthy", None)
        assert visit.http.get("/v1/console/requests").status_code == 503


def test_Given_the_console_switched_off_Then_there_is_the_index_alone(tmp_path: Path) -> None:
    with gateway_stack(tmp_path, sections={"gateway": {"console": {"enabled": False}}, "models": MODELS}) as stack:
        stack.start_gateway()
        index = httpx.get(f"{stack.url}/", headers=PAGE).json()
        assert (index["console"], "console" in index["links"]) == (False, False)
        for path in ("/v1/console/overview", "/console/assets/console.css", "/console/sign-in"):
            assert httpx.get(f"{stack.url}{path}").status_code == 404
        assert "/v1/console/overview" not in httpx.get(f"{stack.url}/openapi.json").json()["paths"]
