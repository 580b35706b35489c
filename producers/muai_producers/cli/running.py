"""The note that a running `muai up` leaves of itself, so that other commands find its broker without being told."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FILE_NAME = "up.json"


@dataclass(frozen=True)
class RunningStack:
    """A `muai up` that is alive."""

    pid: int
    variables: Mapping[str, str]
    """The environment variables that lead a process to its broker and state store."""


def running_stack(home: Path) -> RunningStack | None:
    """The `muai up` that runs under `home`; None when none does."""
    try:
        note = json.loads((home / FILE_NAME).read_text(encoding="utf-8"))
        stack = RunningStack(int(note["pid"]), {str(name): str(value) for name, value in note["variables"].items()})
        os.kill(stack.pid, 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return stack


def note_running(home: Path, stack: RunningStack) -> None:
    """Leave the note; only its owner can read it, for it holds the broker's password."""
    home.mkdir(parents=True, exist_ok=True)
    scratch = home / f".{FILE_NAME}.{stack.pid}"
    scratch.touch(mode=0o600)
    scratch.write_text(json.dumps({"pid": stack.pid, "variables": dict(stack.variables)}), encoding="utf-8")
    scratch.replace(home / FILE_NAME)


def forget_running(home: Path, pid: int) -> None:
    """Take the note away, when it is that of `pid`."""
    stack = running_stack(home)
    if stack is not None and stack.pid == pid:
        (home / FILE_NAME).unlink(missing_ok=True)
