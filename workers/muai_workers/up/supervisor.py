"""Keeps processes running: starts, restarts, shows and stops them. What it decides is in `decisions`.

One loop in one thread does everything, woken by output, by signals and by time.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from muai_workers.up import watchdog
from muai_workers.up.console import OWN_NAME, Row, SupervisorConsole
from muai_workers.up.decisions import (
    GiveUp,
    Hold,
    RestartPolicy,
    Role,
    after_death,
    describe_status,
    is_viable,
    next_to_stop,
)
from muai_workers.up.logs import LogPipes
from muai_workers.up.observing import Observation
from muai_workers.up.plan import ProcessSpec
from muai_workers.up.process import SupervisedProcess

TURN_S = 0.2
SHOW_EVERY_S = 0.5
KILL_MARGIN_S = 5.0
"""A process that is asked to stop gets this much longer than it is configured to take."""
FAILED, KILLED = 1, 130
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _nothing_seen() -> Observation | None:
    return None


class Warden(Protocol):
    """Says which processes must not run, such as those whose GPU has failed. Asked several times a second, in the
    supervisor's thread: it waits for nothing.
    """

    def holds(self) -> Mapping[str, Hold]:
        """By process name."""
        ...

    def remarks(self) -> Sequence[str]:
        """What there is to say since it was last asked."""
        ...


class NoWarden:
    """Everything may run."""

    def holds(self) -> Mapping[str, Hold]:
        return {}

    def remarks(self) -> Sequence[str]:
        return ()


@dataclass(frozen=True)
class Standing:
    """How a supervised process stands."""

    pid: int | None
    """None: it does not run."""
    given_up: str | None


class Supervisor:
    """Runs processes until it is told to stop, or until what is left of them is of no use.

    Args:
        grace_s: how long a process that is told to stop may take, and how long a drain may.
        gate: everything but Redis is started once this says yes.
        observe: the latest look at the installation.
        drain: told to stop, wait for what is accepted to be answered before anything but the gateway stops.
        warden: what it holds is stopped, and started again once it lets go.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        console: SupervisorConsole,
        *,
        grace_s: float,
        gate: Callable[[], bool] = lambda: True,
        observe: Callable[[], Observation | None] = _nothing_seen,
        drain: bool = False,
        policy: RestartPolicy | None = None,
        warden: Warden | None = None,
    ) -> None:
        self.processes = [SupervisedProcess(spec) for spec in specs]
        self._console = console
        self._grace_s = grace_s
        self._gate = gate
        self._gate_open = False
        self._observe = observe
        self._drain = drain
        self._policy = policy or RestartPolicy()
        self._warden = warden or NoWarden()
        self._pipes = LogPipes()
        self._token = secrets.token_hex(16)
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._num_interrupts = 0
        self._stopping_since_s: float | None = None
        self._drained = not drain
        self._killed = False
        self._shown_s = 0.0

    # -- from outside ----------------------------------------------------------------------------------------------

    def request_stop(self) -> None:
        """Stop in order; asked a second time, kill. Callable from any thread and from a signal handler."""
        self._num_interrupts += 1
        self._pipes.wake()

    def standings(self) -> dict[str, Standing]:
        """By process name. Callable from any thread."""
        found = {}
        for process in self.processes:
            popen = process.popen
            found[process.spec.name] = Standing(None if popen is None else popen.pid, process.given_up)
        return found

    def left_behind(self) -> list[int]:
        """Process groups of what was started, directly or not, and still runs."""
        return sorted(watchdog.stray_groups(self._token, set()))

    def run(self) -> int:
        """Supervise. Blocks.

        Returns:
            the exit status: 0 when stopped on request, 1 when something needed was given up, 130 when killed.
        """
        try:
            with self._signals(), self._watched():
                while self._turn(time.monotonic()):
                    for name, line in self._pipes.read(TURN_S):
                        self._console.line(name, line)
                self._say_what_stays()
        finally:
            self._kill_all()
            self._console.close()
            self._pipes.close()
        return self._exit_status()

    def _exit_status(self) -> int:
        if self._killed:
            return KILLED
        return FAILED if any(process.given_up for process in self.processes) else 0

    # -- the loop --------------------------------------------------------------------------------------------------

    def _turn(self, now_s: float) -> bool:
        """One round of looking and acting; False when all is over."""
        for process in self.processes:
            status = process.ended()
            if status is not None:
                self._on_death(process, status, now_s)
        if self._stopping_since_s is None:
            self._heed_warden(now_s)
            self._start_due(now_s)
            self._decide_to_stop(now_s)
        elif self._num_interrupts > 1 and not self._killed:
            self._say("killing everything; what is accepted and not answered stays in the queue")
            self._killed = True
            self._kill_all()
        going_on = self._stopping_since_s is None or self._stop_next(now_s)
        if now_s - self._shown_s >= SHOW_EVERY_S:
            self._shown_s = now_s
            self._console.table([self._row(process, now_s) for process in self.processes], self._observe())
        return going_on

    def _heed_warden(self, now_s: float) -> None:
        for remark in self._warden.remarks():
            self._say(remark)
        holds = self._warden.holds()
        for process in self.processes:
            hold = holds.get(process.spec.name)
            if hold is None:
                if process.hold is not None:
                    self._say(f"{process.spec.name} may run again")
                    process.release(now_s)
                continue
            if process.hold is None:
                self._say(f"{process.spec.name} is stopped: {hold.reason}")
                process.ask_to_stop(now_s)
            process.hold, process.due_s = hold, None
            stop_sent_s = process.stop_sent_s
            if process.is_running and stop_sent_s is not None and now_s - stop_sent_s > hold.patience_s:
                # Once: a process that waits for a broken device cannot even be killed before that answers.
                self._say(f"{process.spec.name} does not stop: killing it")
                process.kill()
                process.stop_sent_s = None

    def _start_due(self, now_s: float) -> None:
        for process in self.processes:
            if process.due_s is None or now_s < process.due_s:
                continue
            if process.spec.role is not Role.REDIS and not self._gate_is_open():
                continue
            try:
                output = process.start(now_s, {**os.environ, watchdog.TOKEN_VARIABLE: self._token})
            except OSError as error:
                process.due_s, process.given_up = None, f"it cannot be started: {error}"
                self._say(f"{process.spec.name}: {process.given_up}")
                continue
            self._pipes.add(process.spec.name, output)
            self._tell_watchdog("+", process)
            assert process.popen is not None
            self._say(f"{process.spec.name} started (pid {process.popen.pid})")

    def _gate_is_open(self) -> bool:
        self._gate_open = self._gate_open or self._gate()
        return self._gate_open

    def _on_death(self, process: SupervisedProcess, status: int, now_s: float) -> None:
        self._tell_watchdog("-", process)
        name = process.spec.name
        if self._stopping_since_s is not None:
            self._say(f"{name} stopped ({describe_status(status)})")
            return
        if process.hold is not None or process.stop_sent_s is not None:
            # Stopped because it was held; where it was let go of meanwhile, it starts at once.
            self._say(f"{name} stopped ({describe_status(status)})")
            process.due_s = None if process.hold is not None else now_s
            return
        decision = after_death(
            self._policy,
            status=status,
            uptime_s=now_s - process.started_s,
            quick_deaths=process.quick_deaths,
            chance=random.random(),
        )
        if isinstance(decision, GiveUp):
            process.given_up = decision.reason
            self._say(f"{name} ended ({describe_status(status)}); given up: {decision.reason}")
        else:
            process.quick_deaths = decision.quick_deaths
            process.restarts += 1
            process.due_s = now_s + decision.delay_s
            self._say(f"{name} ended ({describe_status(status)}); starts again in {decision.delay_s:.1f} s")

    def _decide_to_stop(self, now_s: float) -> None:
        given_up: dict[Role, list[bool]] = {}
        for process in self.processes:
            given_up.setdefault(process.spec.role, []).append(process.given_up is not None)
        if not is_viable(given_up):
            self._say("what is left cannot serve requests: stopping")
            self._drained = True
            self._stopping_since_s = now_s
        elif self._num_interrupts:
            self._say(f"stopping; this may take up to {self._grace_s:.0f} s; again kills at once")
            self._stopping_since_s = now_s
        for process in self.processes:
            if self._stopping_since_s is not None:
                process.due_s = None

    def _stop_next(self, now_s: float) -> bool:
        """Take the next step of stopping; False when nothing runs any more."""
        running = [process for process in self.processes if process.is_running]
        if not running:
            return False
        stage = next_to_stop(process.spec.role for process in running)
        if Role.GATEWAY not in stage and not self._is_drained(now_s):
            return True
        for process in running:
            if process.spec.role not in stage:
                continue
            if process.stop_sent_s is None:
                process.ask_to_stop(now_s)
            elif now_s - process.stop_sent_s > self._grace_s + KILL_MARGIN_S:
                self._say(f"{process.spec.name} does not stop: killing it")
                process.kill()
        return True

    def _is_drained(self, now_s: float) -> bool:
        """Whether all that was accepted is answered, or the time for that is over."""
        if self._drained:
            return True
        assert self._stopping_since_s is not None
        seen = self._observe()
        late = now_s - self._stopping_since_s > self._grace_s
        if not late and (seen is None or seen.taken_s < self._stopping_since_s or seen.in_flight):
            return False
        self._drained = True
        if seen is not None and not seen.in_flight:
            self._say("everything accepted is answered")
        return True

    def _say_what_stays(self) -> None:
        seen = self._observe()
        if seen is not None and seen.in_flight:
            self._say(
                f"{seen.in_flight} requests are accepted and not answered; they stay in the queue for the next start"
            )

    # -- showing ---------------------------------------------------------------------------------------------------

    def _row(self, process: SupervisedProcess, now_s: float) -> Row:
        popen = process.popen
        uptime_s = now_s - process.started_s if popen else None
        return Row(
            process.spec.name, popen.pid if popen else None, self._state(process, now_s), uptime_s, process.restarts
        )

    def _state(self, process: SupervisedProcess, now_s: float) -> str:
        if process.hold is not None:
            return "held, stopping" if process.is_running else "held"
        if process.given_up is not None:
            return "given up"
        if not process.is_running:
            due_s = process.due_s
            return "stopped" if due_s is None else f"starts in {max(0.0, due_s - now_s):.0f} s" if due_s else "waiting"
        if process.stop_sent_s is not None:
            return "stopping"
        if not process.spec.worker:
            return "running"
        seen = self._observe()
        return "ready" if seen is not None and process.spec.worker in seen.ready_workers else "starting"

    def _say(self, text: str) -> None:
        self._console.line(OWN_NAME, text)

    # -- the ends --------------------------------------------------------------------------------------------------

    def _kill_all(self) -> None:
        """Redis is asked instead, and killed only if need be: it writes what it holds to the disk first."""
        for process in self.processes:
            if process.is_running and process.spec.role is not Role.REDIS:
                process.kill()
                assert process.popen is not None
                try:
                    process.popen.wait(KILL_MARGIN_S)
                except subprocess.TimeoutExpired:
                    # One that waits for a broken device is not to be had, not even by SIGKILL.
                    self._say(f"{process.spec.name} (pid {process.popen.pid}) cannot be killed: its device holds it")
        for process in self.processes:
            if process.is_running and process.spec.role is Role.REDIS:
                assert process.popen is not None
                process.ask_to_stop(time.monotonic())
                try:
                    process.popen.wait(KILL_MARGIN_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.popen.wait()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Stop on the usual signals; where this is not the main thread, who holds that takes care of them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, _number: int, _frame: Any) -> None:
        self.request_stop()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        read_end, self._watch_pipe = os.pipe()
        command = [sys.executable, "-I", "-S", watchdog.__file__, str(read_end), self._token]
        self._watchdog = subprocess.Popen(
            command, pass_fds=[read_end], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        os.close(read_end)
        try:
            yield
        finally:
            self._kill_all()
            os.close(self._watch_pipe)
            self._watchdog.wait()

    def _tell_watchdog(self, change: str, process: SupervisedProcess) -> None:
        kind = " last" if process.spec.role is Role.REDIS else ""
        try:
            os.write(self._watch_pipe, f"{change} {process.group}{kind}\n".encode("ascii"))
        except BrokenPipeError:
            self._say("the watchdog has ended; should this process be killed, what it started will stay")
