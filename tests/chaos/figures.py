"""What a scenario measured, kept for the table in `docs/guarantees.md`."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Figures:
    """One scenario on one broker."""

    scenario: str
    broker: str
    requests: int
    lost: int
    second_results: int
    """Terminal states that were written again: there must be none."""
    refused: int
    """Second results that were offered, and refused."""
    longest_pause_s: float
    """The longest time without any result between the fault and the last result."""


def figures_folder() -> Path:
    """Where scenarios leave their figures: `MUAI_TEST_FIGURES`, else `.muai/chaos` in the working tree."""
    return Path(os.environ.get("MUAI_TEST_FIGURES", ROOT / ".muai" / "chaos"))


def keep(figures: Figures) -> None:
    folder = figures_folder()
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{figures.scenario}-{figures.broker}".replace(" ", "-").replace(",", "")
    (folder / f"{name}.json").write_bytes(msgspec.json.encode(asdict(figures)))


def kept() -> list[Figures]:
    """All figures of the folder, by scenario and broker."""
    found = [msgspec.json.decode(path.read_bytes(), type=Figures) for path in sorted(figures_folder().glob("*.json"))]
    return sorted(found, key=lambda figures: (figures.scenario, figures.broker))
