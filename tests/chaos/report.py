"""`python -m tests.chaos.report`: the figures of the last run as a table in Markdown."""

from __future__ import annotations

import sys

from tests.chaos.figures import Figures, kept

HEAD = (
    "| fault | broker | requests | lost | second results | offered and refused | longest pause |",
    "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
)
BROKERS = {"redis": "Redis", "rabbitmq": "RabbitMQ"}


def row(figures: Figures) -> str:
    cells = (
        figures.scenario,
        BROKERS[figures.broker],
        f"{figures.requests:,}",
        f"{figures.lost:,}",
        f"{figures.second_results:,}",
        f"{figures.refused:,}",
        f"{figures.longest_pause_s:.1f} s",
    )
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """The table; empty but for its head where no figures are kept."""
    return "\n".join([*HEAD, *map(row, kept())]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
