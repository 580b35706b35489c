"""Embedding and classification, whatever computes the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muai_config import ModelSpec
from muai_producers.vectors import to_base64
from muai_producers.wire import InferenceRequest
from muai_workers.engines.base import Completion, EngineOutput
from muai_workers.engines.failures import not_a_number
from muai_workers.engines.lanes import Lanes, OneLane
from muai_workers.engines.padding import PaddedRows, group_by_length, pad_rows, share_out
from muai_workers.engines.tokens import TextTokenizer, TokenRow, admit

DECIMALS = 9
"""Of an embedding's numbers: finer than fp32 at the size that they have, and half as long on the wire as all digits."""
Forward = Callable[[PaddedRows], NDArray[np.float32]]
"""Embeddings (num_rows, hidden_size), or probabilities (num_rows, num_labels)."""


class Encoder:
    """A sentence encoder or a classifier in memory. Thread-safe as far as `forward` is."""

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: TextTokenizer,
        forward: Forward,
        *,
        labels: Sequence[str],
        limit_tokens: int | None,
        max_padded_tokens: int,
        call_overhead_tokens: int,
        extra: Mapping[str, Any],
        lanes: Lanes | None = None,
    ) -> None:
        """
        Args:
            labels: names of the columns of a classifier; empty for embeddings.
            max_padded_tokens: most tokens, padding included, in one forward pass.
            call_overhead_tokens: see `group_by_length`.
            extra: goes into every output.
            lanes: where forward passes run; None: one after the other, in the caller's thread.
        """
        self._task = spec.task
        self._tokenizer = tokenizer
        self._forward = forward
        self._labels = labels
        self._limit_tokens = limit_tokens
        self._max_padded_tokens = max_padded_tokens
        self._call_overhead_tokens = call_overhead_tokens
        self._extra = extra
        self._lanes: Lanes = lanes or OneLane()

    def serves(self, task: str) -> bool:
        return task == self._task

    def abort(self, request_ids: Collection[str]) -> None:
        """A forward pass over a few texts cannot be stopped, and is soon over."""

    def end_conversation(self, tenant: str, conversation_id: str) -> None:
        """Texts are read whole, and nothing of them is kept."""

    def relimit(self, max_rows: int, max_tokens: int) -> None:
        self._max_padded_tokens = max_tokens

    def close(self) -> None:
        """Nothing outlives a request here."""

    def run(self, task: str, requests: Sequence[InferenceRequest]) -> Iterator[Completion]:
        rows, refused = admit(self._tokenizer, task, requests, self._limit_tokens)
        yield from refused
        groups = self._groups([len(row.ids) for row in rows])
        padded = [pad_rows([rows[index].ids for index in group], self._tokenizer.pad_id, "right") for group in groups]
        for position, values in self._lanes.run([partial(self._forward, one) for one in padded]):
            yield from self._completions([rows[index] for index in groups[position]], values)

    def _groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows of one forward pass each, the costliest first."""
        groups = []
        num_parts = self._lanes.count_for(sum(lengths))
        # Beside others a pass takes its tokens more slowly, and its own cost is partly theirs to use: with MiniLM on
        # two cores a quarter served 6 % more sentences than a half, and 7 % more than none.
        share = 2 * self._lanes.width if num_parts > 1 else 1
        for part in share_out(lengths, num_parts):
            own = group_by_length(
                [lengths[index] for index in part],
                call_overhead_tokens=self._call_overhead_tokens // share,
                max_padded_tokens=self._max_padded_tokens,
            )
            groups += [[part[index] for index in group] for group in own]
        return sorted(groups, key=lambda group: -len(group) * lengths[group[0]])

    def _completions(self, rows: Sequence[TokenRow], values: NDArray[np.float32]) -> Iterator[Completion]:
        """Of one forward pass; whole arrays are converted at once, as other passes wait for the interpreter."""
        is_wrong = np.isnan(values.sum(axis=1))
        written = self._scored(values) if self._labels else _embeddings(rows, values)
        for row, wrong, outputs in zip(rows, is_wrong, written, strict=True):
            request = row.request
            if wrong:
                yield Completion(request.id, error=not_a_number(request.model, self._extra))
            else:
                yield Completion(request.id, output=EngineOutput(outputs, len(row.ids), extra=self._extra))

    def _scored(self, values: NDArray[np.float32]) -> Iterator[dict[str, Any]]:
        for numbers in values.tolist():
            scored = [{"label": label, "score": score} for label, score in zip(self._labels, numbers, strict=True)]
            yield {"labels": sorted(scored, key=lambda one: -one["score"])}


def _embeddings(rows: Sequence[TokenRow], values: NDArray[np.float32]) -> Iterator[dict[str, Any]]:
    """As each request wants its own written."""
    is_packed = np.array([row.request.parameters.encoding_format == "base64" for row in rows])
    numbers = iter(np.round(values[~is_packed].astype(np.float64), DECIMALS).tolist())
    for own, packed in zip(values.astype("<f4", copy=False), is_packed, strict=True):
        yield {"embedding": to_base64(own.tobytes()) if packed else next(numbers)}
