"""The console in a real browser: what people see, try, replay, and reach by keyboard alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys as Key
from tests.browser.accessibility import faults
from tests.browser.support import Browser, browser, need_chromium
from tests.gateway_support import GatewayStack, gateway_stack
from tests.requests import a_request
from tests.transport_support import wait_until

from muai_producers.dead_letters import DeadLetters
from muai_producers.errors import EnginesExhaustedError
from muai_producers.keys import Keys, new_key
from muai_producers.store import Store

pytestmark = [pytest.mark.redis, pytest.mark.timeout(180)]
MODELS = {
    "chatty": {"task": "chat", "source": "hub:none", "engines": ["fake"]},
    "vectors": {"task": "embedding", "source": "hub:none", "engines": ["fake"]},
    "noop": {"task": "text-classification", "source": "hub:none", "engines": ["fake"]},
}
REFRESH = {"console": {"refresh_s": 0.5}}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayStack]:
    need_chromium()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUAI_TEST_FAKE_ENGINE", '{"latency_per_piece_ms": 150}')
        folder = tmp_path_factory.mktemp("stack")
        with gateway_stack(folder, sections={"models": MODELS, "gateway": REFRESH}) as stack:
            stack.start_serving()
            stack.start_gateway()
            yield stack


@pytest.fixture(scope="module")
def window(stack: GatewayStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.fixture
def page(stack: GatewayStack, window: Browser) -> Iterator[Browser]:
    """The console, opened anew; at the end nothing was complained of, and no other host was asked for anything."""
    window.complaints()
    window.addresses()
    window.driver.get(stack.url)
    yield window
    assert window.complaints() == []
    asked = window.addresses()
    assert asked
    assert [address for address in asked if not address.startswith(stack.url)] == []


def choose(page: Browser, model: str, text: str) -> None:
    page.run("document.querySelector('#try-model').value = arguments[0]", model)
    page.run("document.querySelector('#try-model').dispatchEvent(new Event('change'))")
    page.run("document.querySelector('#try-text').value = arguments[0]", text)
    page.run("document.querySelector('#try-form').requestSubmit()")


def test_Given_a_worker_Then_it_is_shown_and_its_going_too_without_a_reload(stack: GatewayStack, page: Browser) -> None:
    page.wait_for_text("#live-now", "w1@")
    page.wait_for_text("#now-title", "All is well")
    page.run("window.isTheSame = true")
    second = stack.start("worker", "--engine", "fake", "--name", "w2")
    page.wait_for_text("#live-now", "w2@")
    second.terminate()
    second.popen.wait()
    wait_until(lambda: "w2@" not in page.text("#live-now"), what="the worker's going")
    assert page.run("return window.isTheSame") is True


def test_Given_a_chat_Then_its_text_streams_in_and_its_way_is_one_click_away(page: Browser) -> None:
    choose(page, "chatty", "one two three four five six")
    partial = page.wait_for_text("#try-out", "six")
    assert "one" not in partial  # the fake engine says the words in reverse order, one by one
    page.wait_for_text("#try-out", "six five four three two one")
    page.wait_for_text("#try-figures", "6 tokens")
    page.one("#try-figures a").click()
    way = page.wait_for_text("#live-way", "SUCCESS")
    for part in ("in the queue", "waiting for its batch", "in the engine", "in all", "chatty", "6 in, 6 out"):
        assert part in way
    assert "six five four three two one" in way


def test_Given_a_chat_that_is_stopped_Then_it_stops(page: Browser) -> None:
    choose(page, "chatty", " ".join(f"word{n}" for n in range(16)))
    page.wait_for_text("#try-out", "word15")
    page.one("#try-stop").click()
    page.wait_for_text("#try-out", "(stopped)")
    assert "word0 " not in page.text("#try-out")


def test_Given_texts_to_embed_Then_vectors_are_drawn_and_compared(page: Browser) -> None:
    choose(page, "vectors", "first\nsecond\n\nfirst")
    page.wait_for_text("#try-figures", "3 \N{MULTIPLICATION SIGN} 8 numbers")
    assert len(page.all("#try-out svg.vector")) == 3
    assert "1.000 like the first: first" in page.text("#try-out")


def test_Given_another_task_or_wrong_input_Then_the_answer_or_the_reason_is_shown(page: Browser) -> None:
    choose(page, "noop", "fine")
    assert "POSITIVE" in page.wait_for_text("#try-out", "NEGATIVE")
    choose(page, "vectors", "   ")
    page.wait_for_text("#try-out", "input")
    assert "error" in page.one("#try-out").get_attribute("class").split()
    page.complaints()  # Chromium notes the 400 itself


def test_Given_a_dead_letter_Then_it_appears_and_is_replayed_and_another_is_deleted_after_a_question(
    stack: GatewayStack, page: Browser
) -> None:
    letters = DeadLetters(Store(stack.redis.client))
    attempts = [{"engine": "onnx", "error": {"code": "model_load_failed", "message": "no such file"}}]
    letters.add(a_request("lost-1", model="noop"), EnginesExhaustedError("nobody served it", {"attempts": attempts}))
    page.wait_for_text("#dead-letters", "nobody served it")
    page.wait_for_text("#dead-badge", "1")
    page.one("#dead-letters summary").click()
    page.one("#dead-letters input[name=entry]").click()
    taken = page.text("#pulse-text")
    wait_until(lambda: page.text("#pulse-text") != taken, what="the next look")
    assert page.run("return document.querySelector('#dead-letters input[name=entry]').checked") is True
    assert "no such file" in page.text("#dead-letters details")  # neither choice nor fold was lost to the look
    page.one("#dead-letters button[value=replay]").click()
    page.wait_for_text(".deed", "1 replayed. 0 left.")
    assert len(letters) == 0
    letters.add(a_request("lost-2", model="noop"), EnginesExhaustedError("nobody served it"))
    page.wait_for_text("#live-dead", "lost-2")
    page.one("#dead-letters button[name=everything][value=purge]").click()
    page.wait_for_text("h1", "Delete every dead letter for good?")
    assert len(letters) == 1
    assert faults(page) == []
    page.one("button.danger").click()
    page.wait_for_text(".deed", "1 deleted. 0 left.")
    assert len(letters) == 0


def test_Given_the_theme_switch_Then_it_wins_over_the_system_and_is_kept(stack: GatewayStack, page: Browser) -> None:
    def background() -> str:
        return str(page.run("return getComputedStyle(document.documentElement).backgroundColor"))

    page.prefer("light")
    light = background()
    page.prefer("dark")
    dark = background()
    assert light != dark
    page.one("#theme").click()
    assert (page.text("#theme-name"), background()) == ("light", light)
    page.driver.get(stack.url)
    assert (page.text("#theme-name"), background()) == ("light", light)
    page.one("#theme").click()
    page.prefer("light")
    assert (page.text("#theme-name"), background()) == ("dark", dark)
    assert faults(page) == []
    page.one("#theme").click()
    assert (page.text("#theme-name"), background()) == ("auto", light)


def test_Given_a_keyboard_alone_Then_everything_is_reached_and_a_chat_is_sent(page: Browser) -> None:
    def press(*keys: str) -> None:
        ActionChains(page.driver).send_keys(*keys).perform()

    def focused() -> str:
        return str(page.run("const e = document.activeElement; return e.id || e.getAttribute('href') || e.tagName"))

    press(Key.TAB)
    assert page.run("return document.activeElement.className") == "skip"
    assert page.run("return document.activeElement.getBoundingClientRect().top") >= 0
    seen = []
    for _ in range(120):
        press(Key.TAB)
        seen.append(focused())
        assert page.run("return getComputedStyle(document.activeElement).outlineStyle") != "none" or seen[-1] == "BODY"
        if seen[-1] == "try-go":
            break
    for stop in ("#now", "#requests", "#try", "#dead-letters", "pause", "theme", "request", "try-model", "try-text"):
        assert stop in seen
    page.run("document.querySelector('#try-model').focus()")
    press("chatty"[0])
    press(Key.TAB, "hello there")
    ActionChains(page.driver).key_down(Key.CONTROL).send_keys(Key.ENTER).key_up(Key.CONTROL).perform()
    page.wait_for_text("#try-out", "there hello")


def test_Given_the_page_Then_it_has_no_fault_of_accessibility_wide_or_narrow_light_or_dark(
    stack: GatewayStack, page: Browser
) -> None:
    DeadLetters(Store(stack.redis.client)).add(a_request("lost-3", model="noop"), EnginesExhaustedError("no engine"))
    page.wait_for_text("#live-dead", "lost-3")
    request_id = page.run("return document.querySelector('#live-recent a[title]').title")
    page.driver.get(f"{stack.url}/?request={request_id}")
    try:
        for width, scheme in ((1360, "light"), (1360, "dark"), (360, "light")):
            page.resize(width, 900)
            page.prefer(scheme)
            assert faults(page) == []
            assert page.run("return document.documentElement.scrollWidth") <= width  # nobody scrolls sideways
    finally:
        page.resize(1360, 1000)
        DeadLetters(Store(stack.redis.client)).purge()


def test_Given_a_pause_Then_nothing_is_asked_until_it_ends(page: Browser) -> None:
    page.one("#pause").click()
    page.addresses()
    time.sleep(1.2)  # it is the absence of anything that is looked for
    assert page.addresses() == []
    assert page.one("#pause").get_attribute("aria-pressed") == "true"
    page.one("#pause").click()
    wait_until(page.addresses, what="the next look")
    page.driver.refresh()


def test_Given_keys_Then_signing_in_shows_ones_own_and_tries_as_oneself(tmp_path: Path) -> None:
    need_chromium()
    sections = {"models": MODELS, "gateway": {"require_keys": True, "key_cache_s": 0.0, **REFRESH}}
    with gateway_stack(tmp_path, sections=sections) as stack, browser(tmp_path / "profile") as window:
        stack.start_serving()
        stack.start_gateway()
        key, record = new_key("acme")
        Keys(Store(stack.redis.client)).add(record)
        window.driver.get(stack.url)
        assert faults(window) == []
        assert window.run("return document.activeElement.id") == "key"
        ActionChains(window.driver).send_keys(key, Key.ENTER).perform()
        window.wait_for_text(".tools", "acme")
        assert window.run("return document.cookie") == ""  # no script reads the session
        choose(window, "chatty", "hello there")
        window.wait_for_text("#try-out", "there hello")
        window.wait_for_text("#live-recent", "chatty")
        assert window.all("#dead-letters") == []
        assert "w1@" not in window.text("body")
        Keys(Store(stack.redis.client)).revoke(record.id)
        window.wait_for_text("#notice", "session has ended")
        assert window.complaints() == []


def test_Given_the_state_store_killed_in_mid_view_Then_the_page_says_so_and_recovers(tmp_path: Path) -> None:
    need_chromium()
    sections = {"models": MODELS, "gateway": REFRESH}
    with gateway_stack(tmp_path, sections=sections) as stack, browser(tmp_path / "profile") as window:
        gateway = stack.start_gateway()
        stack.start_serving()
        window.driver.get(stack.url)
        window.wait_for_text("#now-title", "All is well", 30)
        stack.redis.kill()
        window.wait_for_text("#now-title", "Not serving", 30)
        assert "the state store does not answer" in window.text(".reasons")
        assert "Not known while the state store does not answer." in window.text("#requests")
        assert faults(window) == []
        stack.redis.start()
        window.wait_for_text("#now-title", "All is well", 30)
        gateway.stop()
        window.wait_for_text("#notice", "The gateway does not answer", 30)
