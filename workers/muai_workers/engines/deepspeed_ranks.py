"""The ranks of one model, seen from the engine: started together, told the same, and ended together."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from muai_producers.errors import InferenceFailedError, ModelLoadError, MuaiError
from muai_workers.engines.deepspeed_messages import Command, Drop, Failed, Ready, Start

log = logging.getLogger(__name__)
START_TIMEOUT_S = 1800.0
"""Weights of hundreds of gigabytes are read in this time, and the compiler has long been done."""
GRACE_S = 10.0
"""How long ranks may take to answer after another of them has failed. One that waits for that one's part in a
collective operation never will."""
SHARED_MEMORY = Path("/dev/shm")
_numbers = itertools.count()


@dataclass(frozen=True)
class _Lost:
    """In place of an answer: the rank died, or waits for one that did."""

    message: str


@dataclass
class _Rank:
    process: subprocess.Popen[bytes]
    connection: Connection
    lifeline: socket.socket
    """Closed by the kernel when this process ends, however it does; the rank then ends too."""


class RankGroup:
    """The processes that hold one model. Thread-safe.

    One thread talks to them, one command after the other, in the order of the calls. It notices at once when a rank
    dies: every call then fails, and `alive` is false for ever.
    """

    def __init__(self, start: Start, world_size: int, device: str) -> None:
        """
        Start the ranks and wait until the model is loaded.

        Args:
            device: cpu or cuda, what they are to compute on.
        Raises:
            MuaiError: as a rank raised it.
            ModelLoadError: a rank died, or they took too long.
        """
        self._model = start.spec.name
        self._ranks: list[_Rank] = []
        self._calls: queue.SimpleQueue[tuple[Command, Future[list[Any]] | None]] = queue.SimpleQueue()
        self._wake, self._woken = socket.socketpair()
        self._death: MuaiError | None = None
        self._closing = False
        self._ended = False
        """Whether the thread takes no call any more."""
        token = f"muai-{os.getpid()}-{next(_numbers)}"
        try:
            with tempfile.TemporaryDirectory(prefix="muai-ranks-") as folder, _compiling(device):
                for rank in range(world_size):
                    self._ranks.append(_start(rank, world_size, token, Path(folder) / "meet", device, start))
                self.ready = self._await_ready()
        except BaseException:
            self._end()
            raise
        finally:
            # All ranks have them open by now, and what has no name is gone with the last of them.
            _unlink_shared_memory(token)
        self._thread = threading.Thread(target=self._serve, name=f"muai-ranks-{self._model}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._death is None and not self._closing

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(rank.process.pid for rank in self._ranks)

    @property
    def weights_bytes(self) -> int:
        """Of all ranks together."""
        return sum(ready.weights_bytes for ready in self.ready)

    def call(self, command: Command) -> list[Any]:
        """Have all ranks do it; returns their answers, rank 0's first.

        Raises:
            MuaiError: as the ranks raised it, all alike.
            InferenceFailedError: a rank died, or failed otherwise than the others, and all of them were ended.
        """
        future: Future[list[Any]] = Future()
        self._put(command, future)
        return future.result()

    def drop(self, command: Drop) -> None:
        """Tell the ranks that something is not needed any more; waits for nothing, and may be called by finalizers."""
        self._put(command, None)

    def close(self) -> None:
        """End the ranks, after what was called before; what is called later fails."""
        self._closing = True
        self._wake_up()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _put(self, command: Command, future: Future[list[Any]] | None) -> None:
        self._calls.put((command, future))
        self._wake_up()
        if self._ended:
            self._refuse_what_waits()

    def _wake_up(self) -> None:
        with contextlib.suppress(OSError):  # ended, or woken so often already that no more is needed
            self._wake.send(b".", socket.MSG_DONTWAIT)

    # -- starting ------------------------------------------------------------------------------------------------

    def _await_ready(self) -> list[Ready]:
        answers = self._answers(time.monotonic() + START_TIMEOUT_S)
        if answers is None:
            raise ModelLoadError(
                f"the ranks of {self._model} were not ready within {START_TIMEOUT_S:.0f} s", {"model": self._model}
            )
        for told in answers:
            if isinstance(told, Failed):
                raise told.error()
        for told in answers:
            if isinstance(told, _Lost):
                raise ModelLoadError(f"deepspeed could not load {self._model}: {told.message}", {"model": self._model})
        return answers

    # -- the thread ----------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while self._death is None:
                ready = wait([self._woken, *(rank.connection for rank in self._ranks)])
                if self._woken not in ready:
                    # Nothing was asked, so there is nothing that a rank could say.
                    self._died("between two batches")
                    break
                self._woken.recv(4096)
                self._take_calls()
                if self._closing:
                    break
        finally:
            self._end()
            if self._death is None:
                self._death = InferenceFailedError(f"{self._model} was unloaded", {"model": self._model})
            self._ended = True
            self._refuse_what_waits()

    def _take_calls(self) -> None:
        while self._death is None:
            try:
                command, future = self._calls.get_nowait()
            except queue.Empty:
                return
            self._one(command, future)

    def _one(self, command: Command, future: Future[list[Any]] | None) -> None:
        try:
            for rank in self._ranks:
                rank.connection.send(command)
        except OSError:
            self._died("in the middle of a batch")
        if future is None:
            return
        answers = None if self._death else self._answers(None)
        failed = [one for one in answers or () if isinstance(one, Failed)]
        if answers is None or any(isinstance(one, _Lost) for one in answers) or 0 < len(failed) < len(answers):
            # Out of step with each other, they cannot go on.
            self._died(f"in the middle of a batch{f': {failed[0].message}' if failed else ''}")
            assert self._death is not None
            future.set_exception(self._death)
        elif failed:
            future.set_exception(failed[0].error())
        else:
            future.set_result(answers)

    def _answers(self, until_s: float | None) -> list[Any] | None:
        """What each rank answers, `_Lost` for one that has died, or that did not answer after another died or failed;
        None: the time was over."""
        answers: dict[int, Any] = {}
        number_of = {rank.connection: number for number, rank in enumerate(self._ranks)}
        while len(answers) < len(self._ranks):
            left_s = None if until_s is None else max(0.0, until_s - time.monotonic())
            waiting = [one for one, number in number_of.items() if number not in answers]
            ready = wait(waiting, left_s)
            if not ready:
                if not any(isinstance(one, Failed | _Lost) for one in answers.values()):
                    return None
                break
            for connection in ready:
                number = number_of[connection]  # type: ignore[index]
                answers[number] = self._receive(number)
                if isinstance(answers[number], Failed | _Lost):
                    grace_s = time.monotonic() + GRACE_S * isinstance(answers[number], Failed)
                    until_s = grace_s if until_s is None else min(until_s, grace_s)
        for number in range(len(self._ranks)):
            answers.setdefault(number, _Lost(f"rank {number} did not answer"))
        return [answers[number] for number in range(len(self._ranks))]

    def _receive(self, number: int) -> Any:
        rank = self._ranks[number]
        try:
            return rank.connection.recv()
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(timeout=1)
            code = rank.process.returncode
            return _Lost(f"rank {number} (process {rank.process.pid}) died with code {code}")

    def _died(self, when: str) -> None:
        dead = [f"{number}" for number, rank in enumerate(self._ranks) if rank.process.poll() is not None]
        who = (
            f"rank {', '.join(dead)} of {self._model} died" if dead else f"the ranks of {self._model} fell out of step"
        )
        message = f"{who} {when}"
        log.error("%s; all of its ranks are ended", message)
        self._death = InferenceFailedError(message, {"model": self._model, "ranks": dead})

    def _refuse_what_waits(self) -> None:
        assert self._death is not None
        while True:
            try:
                _, future = self._calls.get_nowait()
            except queue.Empty:
                return
            if future is not None:
                future.set_exception(self._death)

    def _end(self) -> None:
        self._wake.close()
        self._woken.close()
        for rank in self._ranks:
            rank.connection.close()
            rank.lifeline.close()
        for rank in self._ranks:
            try:
                rank.process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                rank.process.kill()
                rank.process.wait()


def _start(rank: int, world_size: int, token: str, rendezvous: Path, device: str, start: Start) -> _Rank:
    ours, theirs = socket.socketpair()
    lifeline, their_lifeline = socket.socketpair()
    command = [sys.executable, "-m", "muai_workers.engines.deepspeed_rank"]
    command += [str(theirs.fileno()), str(their_lifeline.fileno()), str(rank), str(world_size), str(rendezvous)]
    with theirs, their_lifeline:
        process = subprocess.Popen(
            command,
            env={**os.environ, **_environment(rank, world_size, token, device, start)},
            pass_fds=(theirs.fileno(), their_lifeline.fileno()),
            stdin=subprocess.DEVNULL,
        )
    connection = Connection(ours.detach())
    connection.send(start)
    return _Rank(process, connection, lifeline)


def _environment(rank: int, world_size: int, token: str, device: str, start: Start) -> dict[str, str]:
    num_threads = start.num_threads or max(1, (os.cpu_count() or 1) // world_size)
    return {
        "DS_ACCELERATOR": device,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        # Else the reduction through shared memory runs into memory that is not there.
        "LOCAL_SIZE": str(world_size),
        # The ranks meet over a file; of these two DeepSpeed makes the name of its shared memory.
        "MASTER_ADDR": token,
        "MASTER_PORT": "0",
        # Ranks talk to each other on this machine alone.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "OMP_NUM_THREADS": str(num_threads),
        # What DeepSpeed keeps in sets comes in the same order everywhere.
        "PYTHONHASHSEED": "0",
        "TORCH_EXTENSIONS_DIR": str(_extensions_folder()),
        # ninja comes as a package, and lies beside this Python.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONUNBUFFERED": "1",
        "TQDM_DISABLE": "1",
    }


def _extensions_folder() -> Path:
    """Where what DeepSpeed compiles is kept."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return Path(given) if given else Path.home() / ".cache" / "muai" / "torch_extensions" / python


@contextmanager
def _compiling(device: str) -> Iterator[None]:
    """Let one process at a time on this machine start ranks that may have something to compile.

    torch's own lock is a file that stays when the process that made it is killed, and everyone then waits for ever.
    """
    folder = _extensions_folder()
    folder.mkdir(parents=True, exist_ok=True)
    if device != "cpu" or any(folder.rglob("deepspeed_shm_comm*.so")):
        yield
        return
    with (folder / "muai.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in folder.rglob("deepspeed_shm_comm*/lock"):
            stale.unlink(missing_ok=True)
        yield


def _unlink_shared_memory(token: str) -> None:
    for file in SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_{token}_*"):
        file.unlink(missing_ok=True)


def compiler_missing() -> Sequence[str]:
    """What DeepSpeed's one compilation needs and is not here."""
    with_ours = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return [program for program in ("g++", "ninja") if shutil.which(program, path=with_ours) is None]
