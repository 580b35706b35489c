"""One rank: a process that holds a share of one model, and computes what its engine tells all ranks alike.

    python -m muai_workers.engines.deepspeed_rank SOCKET LIFELINE RANK WORLD_SIZE RENDEZVOUS

It is started by `RankGroup`, with the file descriptors of its two sockets; it ends when either is closed at the other
side, whatever it does at that moment.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from muai_workers.engines.deepspeed_messages import (
    Command,
    Drop,
    Failed,
    Forward,
    Join,
    Keep,
    Resume,
    Start,
    Step,
    TakeOut,
)
from muai_workers.engines.failures import raising_load_errors

log = logging.getLogger(__name__)


class RankModel:
    """A loaded model and the groups of rows that are under way."""

    def __init__(self, loaded: Any, rank: int) -> None:
        """
        Args:
            loaded: a `deepspeed_loading.LoadedShare`.
        """
        self._loaded = loaded
        self._rank = rank
        self._groups: dict[int, Any] = {}
        self._kept: dict[int, Any] = {}

    def answer(self, command: Command) -> Any:
        """Do what is asked; tensors are answered as arrays, and by rank 0 alone, for all ranks have the same."""
        match command:
            case Forward(rows):
                return self._told(self._loaded.forward(rows))
            case Resume(group, rows, kept):
                decoder = self._groups[group] = self._loaded.new_decoder()
                parts = [None if one is None else self._kept[one.kept].first(one.num_tokens) for one in kept]
                return self._logits(decoder.resume(rows, parts))
            case Step(group, tokens):
                return self._logits(self._groups[group].step(tokens))
            case Keep(group, rows):
                return self._groups[group].keep(rows)
            case Join(group, other):
                return self._groups[group].join(self._groups[other])
            case TakeOut(group, row, kept):
                taken = self._kept[kept] = self._groups[group].kept(row)
                return taken.num_bytes, taken.num_tokens
            case Drop(group, kept):
                # A group whose first pass failed, or that was never begun, is not here.
                self._groups.pop(group, None)  # type: ignore[arg-type]
                self._kept.pop(kept, None)  # type: ignore[arg-type]
        return None

    def _logits(self, logits: Any) -> Any:
        # In fp32, as arrays know no bf16.
        return self._told(logits.float().cpu().numpy()) if self._rank == 0 else None

    def _told(self, values: Any) -> Any:
        return values if self._rank == 0 else None


def serve(connection: Connection, load: Callable[[Start], Any], rank: int) -> None:
    """Load what the first message names, then answer every command until the engine hangs up."""
    start = connection.recv()
    try:
        with raising_load_errors(start.spec.name, "deepspeed"):
            loaded = load(start)
    except Exception as error:
        connection.send(Failed.of(error))
        raise SystemExit(1) from error
    connection.send(loaded.ready)
    model = RankModel(loaded, rank)
    while True:
        command = connection.recv()
        try:
            answer = model.answer(command)
        except Exception as error:
            log.exception("rank %d failed", rank)
            answer = Failed.of(error)
        if not isinstance(command, Drop):
            connection.send(answer)


def _end_with_the_engine(lifeline: socket.socket) -> None:
    """End the process when the other end is closed, as the kernel closes it however the engine ends.

    A rank may hang in a collective operation just then, or in a compiler; it has nothing that is worth tidying up.
    """

    def wait() -> None:
        lifeline.recv(1)
        os._exit(1)

    threading.Thread(target=wait, name="muai-lifeline", daemon=True).start()


def main(arguments: list[str]) -> None:
    socket_fd, lifeline_fd, rank, world_size = map(int, arguments[:4])
    _end_with_the_engine(socket.socket(fileno=lifeline_fd))
    # What libraries print belongs to the worker's log.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    connection = Connection(socket_fd)
    logging.basicConfig(level=logging.WARNING, format=f"%(levelname)s rank {rank}: %(message)s")

    def load(start: Start) -> Any:
        from muai_workers.engines.deepspeed_loading import load_share

        return load_share(start, rank, world_size, Path(arguments[4]))

    with contextlib.suppress(EOFError, ConnectionError):  # the engine has no more use for this rank
        serve(connection, load, rank)
    # Without the interpreter's end, which waits for the threads of collectives whose peers are gone.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
