"""The supervisor with stand-in processes: small scripts in the place of collectors and workers."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.transport_support import wait_until

from muai_workers.up import watchdog
from muai_workers.up.console import Row
from muai_workers.up.decisions import Hold, RestartPolicy, Role
from muai_workers.up.logs import MAX_LINE_BYTES, LogPipes
from muai_workers.up.observing import Observation
from muai_workers.up.plan import ProcessSpec
from muai_workers.up.supervisor import Supervisor

# Ends when it is told to, and says so.
POLITE = """
import signal, sys, threading
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
print("up", flush=True)
stop.wait()
print("bye", flush=True)
"""
STUBBORN = (
    'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print("up", flush=True); time.sleep(600)'
)
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}])
print("child", child.pid, flush=True)
time.sleep(600)
"""
POLICY = RestartPolicy(first_delay_s=0.01, max_delay_s=0.01, quick_s=60.0, max_quick_deaths=3)


class Lines:
    """A console that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.rows: list[Row] = []
        self.is_closed = False

    def line(self, name: str, text: str) -> None:
        self.lines.append((name, text))

    def table(self, rows: Sequence[Row], seen: Observation | None) -> None:
        self.rows = list(rows)

    def close(self) -> None:
        self.is_closed = True

    def has(self, name: str, text: str) -> bool:
        return any(who == name and text in what for who, what in self.lines)

    def said(self) -> str:
        return "\n".join(text for name, text in self.lines if name == "muai")


def script(name: str, role: Role, code: str) -> ProcessSpec:
    return ProcessSpec(name, role, (sys.executable, "-c", code))


class Running:
    """A supervisor in a thread."""

    def __init__(self, supervisor: Supervisor, console: Lines) -> None:
        self.supervisor, self.console = supervisor, console
        self.status: int | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.status = self.supervisor.run()

    def wait_for(self, name: str, text: str) -> None:
        wait_until(lambda: self.console.has(name, text), what=f"{name}: {text}")

    def join(self) -> int | None:
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()
        return self.status

    def pid(self, name: str) -> int:
        return next(process.popen.pid for process in self.supervisor.processes if process.spec.name == name)


Start = Callable[..., Running]


@pytest.fixture
def supervise() -> Iterator[Start]:
    started: list[Running] = []

    def start(*specs: ProcessSpec, **options: Any) -> Running:
        console = Lines()
        options = {"grace_s": 10.0, "policy": POLICY, **options}
        started.append(Running(Supervisor(specs, console, **options), console))
        return started[-1]

    yield start
    for running in started:
        if running.status is None:
            running.supervisor.request_stop()
            running.supervisor.request_stop()
            running.join()
        assert running.supervisor.left_behind() == []


def test_Given_processes_When_told_to_stop_Then_they_stop_in_order_and_the_status_is_zero(supervise: Start) -> None:
    running = supervise(*[script(role.value, role, POLITE) for role in (Role.REDIS, Role.ENGINE, Role.COLLECTOR)])
    for role in ("redis", "engine", "collector"):
        running.wait_for(role, "up")
    running.supervisor.request_stop()
    assert running.join() == 0
    farewells = [name for name, text in running.console.lines if text == "bye"]
    assert farewells == ["collector", "engine", "redis"]
    assert running.console.is_closed


def test_Given_a_process_that_is_killed_Then_it_is_started_again(supervise: Start) -> None:
    running = supervise(script("engine", Role.ENGINE, POLITE))
    running.wait_for("engine", "up")
    os.kill(running.pid("engine"), signal.SIGKILL)
    wait_until(lambda: sum(text == "up" for _, text in running.console.lines) == 2, what="a second start")
    assert "killed by SIGKILL; starts again" in running.console.said().replace("(", "").replace(")", "")
    running.supervisor.request_stop()
    assert running.join() == 0


def test_Given_a_process_that_cannot_live_Then_it_is_given_up_and_the_status_says_so(supervise: Start) -> None:
    running = supervise(script("engine", Role.ENGINE, "raise SystemExit(3)"), script("redis", Role.REDIS, POLITE))
    assert running.join() == 1
    assert "it died 3 times in a row" in running.console.said()
    assert "stopping" in running.console.said()


def test_Given_one_engine_given_up_Then_the_other_goes_on(supervise: Start) -> None:
    running = supervise(script("bad", Role.ENGINE, "raise SystemExit(2)"), script("good", Role.ENGINE, POLITE))
    running.wait_for("muai", "bad ended (exit status 2); given up")
    running.wait_for("good", "up")
    wait_until(lambda: [row.state for row in running.console.rows] == ["given up", "running"])
    running.supervisor.request_stop()
    assert running.join() == 1


def test_Given_a_command_that_does_not_exist_Then_it_is_given_up(supervise: Start) -> None:
    running = supervise(ProcessSpec("engine", Role.ENGINE, ("/nonexistent",)))
    assert running.join() == 1
    assert "cannot be started" in running.console.said()


def test_Given_a_gate_Then_only_redis_starts_before_it_opens(supervise: Start) -> None:
    gate = threading.Event()
    running = supervise(script("engine", Role.ENGINE, POLITE), script("redis", Role.REDIS, POLITE), gate=gate.is_set)
    running.wait_for("redis", "up")
    assert not running.console.has("muai", "engine started")
    gate.set()
    running.wait_for("engine", "up")


def test_Given_requests_in_flight_When_told_to_stop_Then_they_are_waited_for(supervise: Start) -> None:
    in_flight = [3]

    def observe() -> Observation:
        return Observation(time.monotonic(), in_flight[0], None, frozenset())

    running = supervise(
        script("collector", Role.COLLECTOR, POLITE),
        script("gateway", Role.GATEWAY, POLITE),
        observe=observe,
        drain=True,
    )
    running.wait_for("collector", "up")
    running.wait_for("gateway", "up")
    running.supervisor.request_stop()
    running.wait_for("gateway", "bye")  # takes no more in
    assert not running.console.has("collector", "bye")
    in_flight[0] = 0
    assert running.join() == 0
    assert "everything accepted is answered" in running.console.said()


def test_Given_requests_that_are_not_answered_in_time_Then_their_number_is_told(supervise: Start) -> None:
    running = supervise(
        script("collector", Role.COLLECTOR, POLITE),
        observe=lambda: Observation(time.monotonic(), 3, None, frozenset()),
        drain=True,
        grace_s=0.3,
    )
    running.wait_for("collector", "up")
    running.supervisor.request_stop()
    assert running.join() == 0
    assert "3 requests are accepted and not answered; they stay in the queue" in running.console.said()


def test_Given_a_process_that_does_not_stop_When_told_twice_Then_everything_is_killed(supervise: Start) -> None:
    running = supervise(
        script("engine", Role.ENGINE, STUBBORN),
        script("redis", Role.REDIS, POLITE),
        observe=lambda: Observation(time.monotonic(), 3, None, frozenset()),
        drain=True,
        grace_s=600.0,
    )
    running.wait_for("engine", "up")
    running.wait_for("redis", "up")
    running.supervisor.request_stop()
    running.supervisor.request_stop()
    assert running.join() == 130
    assert not running.supervisor.left_behind()


def test_Given_a_process_that_is_killed_Then_what_it_started_itself_ends_too(supervise: Start) -> None:
    running = supervise(script("engine", Role.ENGINE, PARENT))
    running.wait_for("engine", "child")
    child = int(next(text for _, text in running.console.lines if text.startswith("child")).split()[1])
    os.kill(running.pid("engine"), signal.SIGKILL)
    wait_until(lambda: not is_alive(child), what="the child's end")


class Keeper:
    """A warden that holds what it is told to."""

    def __init__(self) -> None:
        self.held: dict[str, Hold] = {}
        self.said = ["a remark"]

    def holds(self) -> dict[str, Hold]:
        return dict(self.held)

    def remarks(self) -> list[str]:
        said, self.said = self.said, []
        return said


def test_Given_a_process_that_is_held_Then_it_stops_and_starts_anew_once_it_is_let_go(supervise: Start) -> None:
    keeper = Keeper()
    running = supervise(
        script("held", Role.ENGINE, POLITE), script("other", Role.ENGINE, POLITE), grace_s=10.0, warden=keeper
    )
    for name in ("held", "other"):
        running.wait_for(name, "up")
    running.wait_for("muai", "a remark")
    keeper.held = {"held": Hold("its GPU failed", 10.0)}
    running.wait_for("held", "bye")
    running.wait_for("muai", "held is stopped: its GPU failed")
    wait_until(lambda: running.supervisor.standings()["held"].pid is None, what="its end")
    wait_until(lambda: [row.state for row in running.console.rows] == ["held", "running"])
    keeper.held = {}
    wait_until(lambda: sum(text == "up" for name, text in running.console.lines if name == "held") == 2)
    assert not running.console.has("other", "bye")
    running.supervisor.request_stop()
    assert running.join() == 0


def test_Given_a_held_process_that_does_not_stop_Then_it_is_killed_and_not_started(supervise: Start) -> None:
    keeper = Keeper()
    running = supervise(script("held", Role.ENGINE, STUBBORN), grace_s=600.0, warden=keeper)
    running.wait_for("held", "up")
    keeper.held = {"held": Hold("it hangs", 0.2)}
    running.wait_for("muai", "held does not stop: killing it")
    running.wait_for("muai", "held stopped (killed by SIGKILL)")
    wait_until(lambda: [row.state for row in running.console.rows] == ["held"])
    running.supervisor.request_stop()
    assert running.join() == 0


def test_Given_a_process_that_was_given_up_When_it_was_held_and_is_let_go_Then_it_gets_another_chance(
    supervise: Start, tmp_path: Path
) -> None:
    keeper = Keeper()
    marker = tmp_path / "well"
    code = f"import pathlib, sys, time\nif not pathlib.Path({str(marker)!r}).exists(): sys.exit(3)\n" + POLITE
    running = supervise(script("frail", Role.ENGINE, code), script("other", Role.ENGINE, POLITE), warden=keeper)
    running.wait_for("muai", "frail ended (exit status 3); given up")
    assert running.supervisor.standings()["frail"].given_up
    keeper.held = {"frail": Hold("its GPU failed", 10.0)}
    wait_until(lambda: [row.state for row in running.console.rows][:1] == ["held"])
    marker.touch()
    keeper.held = {}
    running.wait_for("frail", "up")
    assert running.supervisor.standings()["frail"].given_up is None
    running.supervisor.request_stop()
    assert running.join() == 0


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that nobody has waited for yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_Given_the_pipe_closes_Then_the_watchdog_ends_what_it_was_told_of_and_what_has_the_token() -> None:
    token = "token-of-this-test"
    told = subprocess.Popen([sys.executable, "-c", POLITE], start_new_session=True, stdout=subprocess.DEVNULL)
    env = {**os.environ, watchdog.TOKEN_VARIABLE: token}
    untold = subprocess.Popen([sys.executable, "-c", PARENT], start_new_session=True, stdout=subprocess.PIPE, env=env)
    assert untold.stdout is not None
    child = int(untold.stdout.readline().split()[1])
    read_end, write_end = os.pipe()
    dog = subprocess.Popen([sys.executable, watchdog.__file__, str(read_end), token], pass_fds=[read_end])
    os.close(read_end)
    os.write(write_end, f"+ {told.pid}\n".encode())
    assert told.poll() is None
    os.close(write_end)
    for process in (dog, told, untold):
        process.wait(timeout=20)
    untold.stdout.close()
    wait_until(lambda: not is_alive(child), what="the child's end")


def test_Given_output_in_pieces_Then_lines_come_whole_and_an_endless_one_is_cut() -> None:
    pipes = LogPipes()
    read_end, write_end = os.pipe()
    pipes.add("x", os.fdopen(read_end, "rb", buffering=0))
    os.write(write_end, b"one\ntw")
    assert list(pipes.read(5)) == [("x", "one")]
    os.write(write_end, b"o\xff\r\n\n")
    assert list(pipes.read(5)) == [("x", "two\ufffd")]
    os.write(write_end, b"y" * (MAX_LINE_BYTES + 1))
    assert list(pipes.read(5)) == [("x", "y" * (MAX_LINE_BYTES + 1))]
    os.write(write_end, b"end")
    assert list(pipes.read(5)) == []
    os.close(write_end)
    assert list(pipes.read(5)) == [("x", "end")]
    with contextlib.closing(pipes):
        pipes.wake()
        assert list(pipes.read(60)) == []
