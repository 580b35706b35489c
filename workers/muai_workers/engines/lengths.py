"""How long a prompt may be, and how long its answer. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from muai_config import ModelSpec
from muai_producers.wire import InferenceRequest

DEFAULT_NEW_TOKENS = 128
"""For models whose catalog entry does not say."""


@dataclass(frozen=True)
class Lengths:
    """Of the requests of one model."""

    spec: ModelSpec
    context_tokens: int | None
    """Prompt and answer together; None: unlimited, or the prompt does not count (seq2seq)."""
    limit_tokens: int | None
    """Longest prompt; None: only the context limits it."""

    def prompt_limit(self) -> int | None:
        """The longest prompt that is admitted."""
        # One position must be left for the answer.
        limits = [self.limit_tokens, None if self.context_tokens is None else self.context_tokens - 1]
        known = [limit for limit in limits if limit is not None]
        return min(known) if known else None

    def room(self, request: InferenceRequest, prompt_tokens: int) -> int:
        """Tokens that the answer may have."""
        wanted = self._wanted(request)
        return wanted if self.context_tokens is None else min(wanted, self.context_tokens - prompt_tokens)

    def reserve(self, request: InferenceRequest) -> int:
        """Tokens of the prompt that are given up for the answer when the prompt is cut: half of it at most."""
        limit = self.prompt_limit()
        if limit is None or self.context_tokens is None:
            return 0
        return max(0, min(limit + self._wanted(request) - self.context_tokens, limit // 2))

    def _wanted(self, request: InferenceRequest) -> int:
        return request.parameters.max_tokens or self.spec.max_new_tokens or DEFAULT_NEW_TOKENS
