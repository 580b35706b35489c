"""The table of metrics in docs/monitoring.md, written from the instruments by `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

from muai_producers.monitoring.instruments import INSTRUMENTS

BEGIN = "<!-- the table is written by make docs -->"
END = "<!-- end of the table -->"


def table() -> str:
    """Every metric, in Markdown."""
    rows = ["| metric | kind | labels | what it says |", "| --- | --- | --- | --- |"]
    for one in INSTRUMENTS:
        labels = ", ".join(f"`{label}`" for label in one.labels)
        rows.append(f"| `{one.name}` | {one.kind} | {labels} | {one.help} |")
    return "\n".join(rows)


def with_table(text: str) -> str:
    """A document with the table between its two marks.

    Raises:
        ValueError: it lacks a mark.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the document must have the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    """Write the table into the document that the command line names."""
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
