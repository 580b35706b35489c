"""The sentences of the demonstration: twenty on each of twenty topics."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass


@dataclass(frozen=True)
class Sentence:
    """A sentence and what it is about."""

    text: str
    topic: str


@dataclass(frozen=True)
class Question:
    """What is searched for, and the sentence that answers it: a person who reads all of them would choose that one."""

    text: str
    answer: str


QUESTIONS = (
    Question(
        "Why does the moon look different from one week to the next?",
        "The moon shows phases because we see a changing share of its sunlit half.",
    ),
    Question(
        "Why does my bread dough stay flat?",
        "Dough that does not rise has often been kept too cold or mixed with tired yeast.",
    ),
    Question(
        "What is the best thing to do after burning a finger on the stove?",
        "A shallow burn should be cooled under running water for a good ten minutes.",
    ),
)
PROMPTS = tuple(
    f"{opening} {subject}"
    for opening in ("The little train", "In the morning", "A queue of requests", "The old baker", "Once upon a time")
    for subject in ("went to", "was", "and the", "said that")
)


def load_sentences() -> list[Sentence]:
    """All sentences, topic by topic."""
    text = importlib.resources.files(__package__).joinpath("sentences.txt").read_text(encoding="utf-8")
    sentences: list[Sentence] = []
    topic = ""
    for line in text.splitlines():
        if line.startswith("# "):
            topic = line[2:]
        else:
            sentences.append(Sentence(line, topic))
    return sentences
