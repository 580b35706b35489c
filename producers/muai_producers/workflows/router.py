"""`Router`: which workflow a question is for. Rules first; where none fits, likeness to each workflow's examples."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import mul

CHAT = "chat"
Embed = Callable[[Sequence[str]], Sequence[Sequence[float]]]
"""Texts to vectors of length one."""
RULES: tuple[tuple[str, str], ...] = (
    ("search", r"^\s*(?:please\s+)?(?:search|google|look\s+up|find\s+(?:me\s+)?(?:information|news|articles))\b"),
    (
        "rag",
        r"\b(?:according to|based on|in)\s+(?:the|my|our|these|this)\s+(?:documents?|docs|manual|handbook|files?)\b",
    ),
)
"""Workflow and the pattern that says so beyond doubt."""


@dataclass(frozen=True)
class Route:
    """Where a question goes."""

    workflow: str
    confidence: float
    """From 0 to 1: 1 for a rule; else the likeness to the nearest example, over what chance would give."""
    reason: str


class Router:
    """Chooses a workflow. Pure but for `embed`.

    Args:
        examples: questions that each workflow is for.
        embed: None: rules alone decide.
        threshold: least cosine similarity to an example; below it, a question is a chat.
    """

    def __init__(
        self,
        examples: Mapping[str, Sequence[str]],
        embed: Embed | None = None,
        *,
        threshold: float = 0.25,
        rules: Sequence[tuple[str, str]] = RULES,
    ) -> None:
        self._examples = [(name, text) for name, texts in examples.items() for text in texts]
        self._embed = embed
        self._threshold = threshold
        self._rules = [(name, re.compile(pattern, re.IGNORECASE)) for name, pattern in rules]
        self._vectors: Sequence[Sequence[float]] | None = None

    def route(self, question: str) -> Route:
        """The workflow for a question.

        Raises:
            MuaiError: what `embed` raises.
        """
        for name, pattern in self._rules:
            found = pattern.search(question)
            if found is not None:
                return Route(name, 1.0, f"the question says {found[0].strip()!r}")
        if self._embed is None or not self._examples:
            return Route(CHAT, 0.5, "no rule fits, and there is no model to compare it by")
        return self._nearest(question, self._embed)

    def _nearest(self, question: str, embed: Embed) -> Route:
        if self._vectors is None:
            self._vectors = embed([text for _, text in self._examples])
        (vector,) = embed([question])
        likeness = [sum(map(mul, example, vector)) for example in self._vectors]
        similarity = max(likeness)
        best = likeness.index(similarity)
        if similarity < self._threshold:
            confidence = min(1.0, max(0.0, 1.0 - similarity / max(self._threshold, 1e-9)) * 0.5 + 0.5)
            return Route(CHAT, round(confidence, 4), f"it is like no example ({similarity:.2f} at best)")
        name, example = self._examples[best]
        return Route(name, round(min(1.0, similarity), 4), f"it is like {example!r} ({similarity:.2f})")
