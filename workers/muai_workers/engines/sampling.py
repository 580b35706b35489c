"""From logits to the next token, for rows that each have parameters of their own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from muai_producers.wire import Parameters


class Sampler:
    """Chooses the tokens of one request; with a seed, the same ones whatever batch the request travels in."""

    def __init__(self, parameters: Parameters, prompt_ids: Sequence[int]) -> None:
        self._parameters = parameters
        self._seen = set(prompt_ids) if parameters.repetition_penalty != 1.0 else set()
        self._generated: Counter[int] | None = Counter() if _penalises_repeats(parameters) else None
        self._generator: torch.Generator | None = None
        if parameters.temperature > 0:
            self._generator = torch.Generator()
            if parameters.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(parameters.seed)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is always taken, as it stands in the logits."""
        return self._generator is None and self._generated is None and self._parameters.repetition_penalty == 1.0

    def choose(self, logits: torch.Tensor) -> int:
        """The next token.

        Args:
            logits: shape (vocabulary,); not changed.
        """
        scores = logits.detach().to("cpu", torch.float32, copy=True)
        if self._seen:
            _penalise(scores, self._seen, self._parameters.repetition_penalty)
        if self._generated:
            _take_for_repeats(scores, self._generated, self._parameters)
        token = int(scores.argmax()) if self._generator is None else self._draw(scores, self._generator)
        if self._parameters.repetition_penalty != 1.0:
            self._seen.add(token)
        if self._generated is not None:
            self._generated[token] += 1
        return token

    def _draw(self, scores: torch.Tensor, generator: torch.Generator) -> int:
        scores /= self._parameters.temperature
        if self._parameters.min_p > 0.0:
            # A share of the highest probability is a distance from the highest logit.
            scores[scores < scores.max() + math.log(self._parameters.min_p)] = -torch.inf
        if 0 < self._parameters.top_k < scores.numel():
            smallest_kept = scores.topk(self._parameters.top_k).values[-1]
            scores[scores < smallest_kept] = -torch.inf
        probabilities = scores.softmax(-1)
        if self._parameters.top_p < 1.0:
            ordered, order = probabilities.sort(descending=True, stable=True)
            # A token stays while those before it have not reached top_p, so the likeliest always stays.
            ordered[ordered.cumsum(-1) - ordered >= self._parameters.top_p] = 0.0
            probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered)
        return int(torch.multinomial(probabilities, 1, generator=generator))


def choose_tokens(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int | None]:
    """The next token of each row; None where the logits are no numbers.

    Args:
        logits: shape (num_rows, vocabulary).
    """
    highest, likeliest = logits.max(-1)
    broken: list[bool] = highest.isnan().tolist()
    tokens: list[int | None] = likeliest.tolist()
    for index, sampler in enumerate(samplers):
        if broken[index]:
            tokens[index] = None
        elif not sampler.plain:
            tokens[index] = sampler.choose(logits[index])
    return tokens


def _penalises_repeats(parameters: Parameters) -> bool:
    return parameters.presence_penalty != 0.0 or parameters.frequency_penalty != 0.0


def _take_for_repeats(scores: torch.Tensor, generated: Counter[int], parameters: Parameters) -> None:
    ids = torch.tensor(list(generated))
    counts = torch.tensor(list(generated.values()), dtype=scores.dtype)
    scores[ids] -= parameters.presence_penalty + parameters.frequency_penalty * counts


def _penalise(scores: torch.Tensor, seen: set[int], penalty: float) -> None:
    ids = torch.tensor(sorted(seen))
    of_seen = scores[ids]
    scores[ids] = torch.where(of_seen < 0, of_seen * penalty, of_seen / penalty)
