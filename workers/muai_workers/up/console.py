"""Where a supervisor's lines and table go: a terminal with a live table, or plain lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.table import Table

    from muai_workers.up.observing import Observation

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "bright_cyan", "bright_magenta", "bright_green")
OWN_NAME = "muai"


@dataclass(frozen=True)
class Row:
    """One process, as the table shows it."""

    name: str
    pid: int | None
    state: str
    uptime_s: float | None
    restarts: int


class SupervisorConsole(Protocol):
    """Shows what a supervisor has to say."""

    def line(self, name: str, text: str) -> None:
        """A line of a process's output; `OWN_NAME` is the supervisor itself."""
        ...

    def table(self, rows: Sequence[Row], seen: Observation | None) -> None:
        """How things stand now."""
        ...

    def close(self) -> None:
        """The end."""
        ...


class PlainConsole:
    """Lines only: for files, pipes and service managers."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout

    def line(self, name: str, text: str) -> None:
        self._stream.write(f"{name:<12} | {text}\n")
        self._stream.flush()

    def table(self, rows: Sequence[Row], seen: Observation | None) -> None:
        """Not shown: each change of state has its own line."""

    def close(self) -> None:
        self._stream.flush()


class JsonConsole:
    """One JSON object a line, for machines: what processes log that way as it came, the rest put into one."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout

    def line(self, name: str, text: str) -> None:
        if not (text.startswith("{") and text.endswith("}")):
            moment = datetime.now(UTC).isoformat(timespec="milliseconds")
            told = {"time": moment, "level": "INFO", "logger": name, "message": text, "process": name}
            text = json.dumps(told, ensure_ascii=False)
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def table(self, rows: Sequence[Row], seen: Observation | None) -> None:
        """Not shown: each change of state has its own line."""

    def close(self) -> None:
        self._stream.flush()


class LiveConsole:
    """Lines that scroll by above a table that is kept current."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._live.start()
        self._colour_by_name: dict[str, str] = {OWN_NAME: "bold white"}

    def line(self, name: str, text: str) -> None:
        from rich.text import Text

        colour = self._colour_by_name.setdefault(name, COLOURS[len(self._colour_by_name) % len(COLOURS)])
        shown = Text(f"{name:<12} ", style=colour)
        shown.append(Text.from_ansi(text, style="" if name != OWN_NAME else "bold"))
        self._console.print(shown, soft_wrap=True)

    def table(self, rows: Sequence[Row], seen: Observation | None) -> None:
        self._live.update(render_table(rows, seen), refresh=True)

    def close(self) -> None:
        self._live.stop()


def console_for(log_format: str, *, plain: bool) -> SupervisorConsole:
    """The console that suits where the output goes and what `monitoring.logs.format` says."""
    if log_format == "json":
        return JsonConsole()
    return PlainConsole() if plain or not sys.stdout.isatty() else LiveConsole()


_STATE_STYLES = {"running": "green", "ready": "green", "starting": "yellow", "stopping": "yellow", "given up": "red"}


def render_table(rows: Sequence[Row], seen: Observation | None) -> Table:
    """The table of processes, with what is queued, in flight and answered below it."""
    from rich.table import Table

    table = Table("process", "pid", "state", "uptime", "restarts", caption=summary_line(seen), caption_justify="left")
    for row in rows:
        style = _STATE_STYLES.get(row.state, "yellow")
        table.add_row(
            row.name,
            "" if row.pid is None else str(row.pid),
            f"[{style}]{row.state}[/{style}]",
            "" if row.uptime_s is None else readable_duration(row.uptime_s),
            str(row.restarts),
        )
    return table


def summary_line(seen: Observation | None) -> str:
    """What is queued, in flight and answered, in one line."""
    if seen is None:
        return "nothing seen yet of broker and state store"
    queues = ", ".join(f"{queue} {depth}" for queue, depth in seen.depth_by_queue.items()) or "empty"
    answered = "" if seen.answered is None else f"   answered: {seen.answered}"
    return f"queues: {queues}   in flight: {seen.in_flight}{answered}"


def readable_duration(seconds: float) -> str:
    """Such as 7 s, 3:05 or 2:00:09."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"
