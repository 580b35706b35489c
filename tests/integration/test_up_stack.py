"""`muai up` as people run it: start, submit, Ctrl-C; and killed without a chance to say goodbye."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.transport_support import wait_until
from tests.up_support import Up, answers

pytestmark = pytest.mark.redis


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    up = Up(tmp_path)
    try:
        yield up
    finally:
        up.stop()


def test_Given_muai_up_When_interrupted_Then_what_was_accepted_is_answered_and_nothing_is_left_running(up: Up) -> None:
    up.submit()
    (up.home / "lines.txt").write_text("text\n" * 300)
    accepted = up.muai("submit", "noop", "--file", str(up.home / "lines.txt"))
    assert len(accepted.stdout.split()) == 300
    assert len(up.processes()) >= 6  # itself, watchdog, redis, collector, worker, control; the gateway where it can be
    wait_until(lambda: answers(up.port), what="the gateway")
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(timeout=60) == 0
    said = up.log.read_text()
    assert "everything accepted is answered" in said
    assert f"console and API: http://127.0.0.1:{up.port}/ " in said
    assert up.processes() == []
    assert not (up.home / "up.json").exists()


def test_Given_muai_up_When_it_is_killed_Then_nothing_is_left_running(up: Up) -> None:
    up.submit()
    up.process.kill()
    up.process.wait()
    wait_until(lambda: not up.processes(), timeout_s=30, what="the end of everything that was started")


def test_Given_an_engine_that_cannot_run_here_Then_up_says_why(up: Up) -> None:
    refused = up.muai("--config", str(up.home / "muai.yaml"), "up", "--engines", "deepspeed,fake")
    assert refused.returncode == 1
    assert refused.stderr.startswith("engine_unavailable: cannot run here: deepspeed: ")
