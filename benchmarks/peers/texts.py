"""Seeded inputs, the same for every contestant. Standard library only: it runs in every peer's environment."""

from __future__ import annotations

import random
from pathlib import Path

SHORTEST_WORDS = 5
LONGEST_WORDS = 60
VOCABULARY = Path(__file__).with_name("words.txt").read_text().split()
"""Common English words."""


def sentences(count: int, seed: int) -> list[str]:
    """`count` sentences of 5 to 60 common English words, every length equally likely."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(VOCABULARY, k=rng.randint(SHORTEST_WORDS, LONGEST_WORDS))) for _ in range(count)]


def inputs(model: str, count: int, seed: int) -> list[str]:
    """What is sent to `model`: sentences to a real one, a few words to the one that does nothing."""
    if model == "noop":
        return [f"hello there {number}" for number in range(count)]
    return sentences(count, seed)
