"""Ends what a supervisor started when the supervisor itself is killed: a small process at the end of a pipe.

The supervisor writes the process group of everything that it starts; when it dies, by whatever signal, the kernel
closes the pipe, and the watchdog ends those groups. Linux's PR_SET_PDEATHSIG would be simpler, but it reaches direct
children only, not the processes that an engine starts itself; it ends everything at one moment, the broker before the
workers that still write to it; it fires when the forking thread ends; and it needs code between fork and exec, which is
not safe in a process with threads.

A group whose number was not written yet is found by a token in its environment.

Run as a file, with the standard library alone: it starts in milliseconds.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

TOKEN_VARIABLE = "_MUAI_UP_TOKEN"
GRACE_S = 3.0
POLL_S = 0.05


def main(pipe: int, token: str) -> None:
    """Wait until the pipe closes, then end what is left."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)  # it ends when its supervisor does
    workers: set[int] = set()
    brokers: set[int] = set()
    with os.fdopen(pipe, encoding="ascii") as lines:
        for line in lines:
            apply(line, workers, brokers)
    end_groups(workers | stray_groups(token, workers | brokers))
    end_groups(brokers)


def apply(line: str, workers: set[int], brokers: set[int]) -> None:
    """Take in one line: `+` or `-`, the number of a process group, and `last` for what others still write to."""
    change, number, *kind = line.split()
    groups = brokers if kind == ["last"] else workers
    if change == "+":
        groups.add(int(number))
    else:
        groups.discard(int(number))


def end_groups(groups: set[int]) -> None:
    """SIGTERM, and SIGKILL for what is there after `GRACE_S`."""
    for group in groups:
        _send(group, signal.SIGTERM)
    deadline_s = time.monotonic() + GRACE_S
    while any(_send(group, 0) for group in groups) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    for group in groups:
        _send(group, signal.SIGKILL)


def stray_groups(token: str, known: set[int]) -> set[int]:
    """Process groups, outside `known`, of processes that have the token in their environment."""
    wanted = f"{TOKEN_VARIABLE}={token}".encode()
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.add(os.getpgid(int(folder.name)))
        except OSError:
            continue  # gone, or another user's
    return found - known - {os.getpgrp()}


def _send(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
