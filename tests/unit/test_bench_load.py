"""What the benchmark suite puts its contestants under: the same for each of them, and as described."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pvariance
from types import ModuleType
from typing import Any

import pytest
from benchmarks.arrivals import arrival_times
from benchmarks.environments import PEERS, pinned
from benchmarks.figures import FIGURES
from benchmarks.machine import ROOT
from benchmarks.plan import FULL, QUICK
from benchmarks.processes import BenchmarkError, Driver

ECHO = """
import json, sys
print(json.dumps({"versions": {"echo": "1"}}), flush=True)
for line in sys.stdin:
    command = json.loads(line)
    if command.get("die"):
        sys.exit("the reason")
    print(json.dumps(command), flush=True)
"""


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of peers as their own processes see it: on the path."""
    monkeypatch.syspath_prepend(str(PEERS))
    return PEERS


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("kind", ["poisson", "gamma"])
def test_given_a_rate_when_arrivals_are_drawn_then_they_come_at_it_and_in_order(kind: str) -> None:
    times = arrival_times(kind, rate=500.0, seconds=60.0, seed=7)

    assert times == sorted(times)
    assert times[-1] < 60.0
    assert len(times) == pytest.approx(30_000, rel=0.05)


def test_given_gamma_arrivals_when_compared_with_poisson_then_their_gaps_vary_twice_as_much() -> None:
    def variation(kind: str) -> float:
        times = arrival_times(kind, rate=100.0, seconds=600.0, seed=3)
        gaps = [after - before for before, after in pairwise(times)]
        return float(pvariance(gaps) ** 0.5 / fmean(gaps))

    assert variation("poisson") == pytest.approx(1.0, rel=0.05)
    assert variation("gamma") == pytest.approx(2.0, rel=0.1)


def test_given_a_seed_when_arrivals_are_drawn_twice_then_they_are_the_same() -> None:
    assert arrival_times("gamma", 10.0, 5.0, 1) == arrival_times("gamma", 10.0, 5.0, 1)
    assert arrival_times("gamma", 10.0, 5.0, 1) != arrival_times("gamma", 10.0, 5.0, 2)


def test_given_an_unknown_kind_when_arrivals_are_drawn_then_it_is_refused() -> None:
    with pytest.raises(ValueError, match="poisson or gamma, not uniform"):
        arrival_times("uniform", 1.0, 1.0, 0)


def test_given_sentences_when_drawn_then_every_length_from_5_to_60_words_occurs_and_seeds_repeat(peers: Path) -> None:
    texts = module(peers / "texts.py")
    drawn = texts.sentences(5000, seed=1)

    assert {len(sentence.split()) for sentence in drawn} == set(range(5, 61))
    assert drawn == texts.sentences(5000, seed=1)
    assert drawn[:10] != texts.sentences(10, seed=2)


def test_given_a_driver_when_asked_then_it_answers_each_command(tmp_path: Path) -> None:
    with Driver([sys.executable, "-c", ECHO], tmp_path / "log") as driver:
        assert driver.versions == {"echo": "1"}
        assert driver.ask(count=1) == {"count": 1}
        assert driver.ask(count=2) == {"count": 2}


def test_given_a_driver_that_ends_when_asked_then_the_error_has_its_last_words(tmp_path: Path) -> None:
    with (
        Driver([sys.executable, "-c", ECHO], tmp_path / "log") as driver,
        pytest.raises(BenchmarkError, match=r"ended with 1:\n(.|\n)*the reason"),
    ):
        driver.ask(die=True)


def test_given_a_driver_that_hangs_when_asked_then_it_is_ended_in_time(tmp_path: Path) -> None:
    hang = ECHO.replace("print(json.dumps(command), flush=True)", "import time; time.sleep(600)")
    with (
        Driver([sys.executable, "-c", hang], tmp_path / "log") as driver,
        pytest.raises(BenchmarkError, match="no answer"),
    ):
        driver.ask(limit_s=0.2, count=1)


def test_given_a_suite_told_to_stop_while_a_driver_starts_when_it_ends_then_nothing_is_left(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    hang = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    suite = f"""
import signal, sys
from pathlib import Path
from benchmarks.processes import Driver
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
Driver([sys.executable, "-c", {hang!r}], Path({str(tmp_path / "log")!r}))
"""
    with subprocess.Popen([sys.executable, "-c", suite], cwd=ROOT) as process:
        deadline_s = time.monotonic() + 30
        while not (pid.exists() and pid.read_text()):
            assert time.monotonic() < deadline_s
            assert process.poll() is None
            time.sleep(0.02)
        process.terminate()
        assert process.wait(30) == 3
    assert not Path(f"/proc/{pid.read_text()}").exists()


def test_given_requirements_when_read_then_every_peer_is_pinned() -> None:
    for path in (PEERS / "requirements").glob("*.txt"):
        assert all(line.count("==") == 1 for line in path.read_text().split()), path
    assert set(pinned("servers", ("litserve", "mosec"))) == {"litserve", "mosec"}


@pytest.mark.parametrize("plan", [FULL, QUICK], ids=lambda plan: plan.mode)
def test_given_a_plan_when_figures_count_their_steps_then_each_has_some(plan: Any) -> None:
    assert all(figure.steps(plan) > 0 for figure in FIGURES.values())


class _Echo(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    received: list[str]

    def do_POST(self) -> None:
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"]
        self.received.append(text)
        status, body = (500, b"broken") if text == "break" else (200, json.dumps(text).encode())
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: the tests look at what was received."""


@pytest.fixture
def producer(peers: Path) -> Any:
    received: list[str] = []
    Handler = type("Handler", (_Echo,), {"received": received})  # noqa: N806
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        load = module(PEERS.parent / "http_load.py")
        made = load.Producer(f"http://127.0.0.1:{server.server_port}/x", '{"text": %s}', connections=4)
        made.received = received
        yield made
        server.shutdown()
        thread.join()


def test_given_texts_when_sent_over_http_then_each_arrives_once(producer: Any) -> None:
    texts = [f'number "{number}" — 100 %' for number in range(50)]

    producer.bulk(texts)

    assert sorted(producer.received) == sorted(texts)


def test_given_an_answer_that_is_no_200_when_sending_then_the_measurement_fails(producer: Any) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        producer.bulk(["fine", "break"])

    assert "500" in str(caught.value.exceptions[0])
