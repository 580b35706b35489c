"""ONNX graphs in memory: sessions, and what encoders and decoders need of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from muai_config.optimization import OnnxSettings
from muai_producers.errors import EngineUnavailableError
from muai_workers.engines.encoder import Forward
from muai_workers.engines.padding import PaddedRows
from muai_workers.kv_cache import KeysAndValues

# onnxruntime takes its names from a binary module without types.
_runtime: Any = onnxruntime
Session = Any
"""An `onnxruntime.InferenceSession`."""
_LEVELS = {
    "none": _runtime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": _runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": _runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": _runtime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
ERRORS_ONLY = 3
SPARE_COLUMNS = 32
"""Columns of padding that a group may have before its keys and values are copied to do without."""


def usable_providers(settings: OnnxSettings) -> list[str]:
    """The configured execution providers that this build of ONNX Runtime has, preferred first.

    Raises:
        EngineUnavailableError: it has none of them.
    """
    here = _runtime.get_available_providers()
    usable: list[str] = [provider for provider in settings.execution_providers if provider in here]
    if not usable:
        raise EngineUnavailableError(
            f"onnxruntime has none of the execution providers {', '.join(settings.execution_providers)}; "
            f"it has {', '.join(here)}"
        )
    return usable


def open_session(path: Path, settings: OnnxSettings) -> Session:
    """Load a graph. It takes as many threads as PyTorch does, so that one setting bounds both."""
    options = _runtime.SessionOptions()
    options.graph_optimization_level = _LEVELS[settings.optimization_level]
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = ERRORS_ONLY
    return _runtime.InferenceSession(str(path), options, providers=usable_providers(settings))


def onnx_forward(session: Session) -> Forward:
    """What `Encoder` calls."""

    def forward(rows: PaddedRows) -> NDArray[np.float32]:
        values: NDArray[np.float32] = session.run(None, {"input_ids": rows.ids, "attention_mask": rows.mask})[0]
        return values

    return forward


@dataclass(frozen=True)
class OnnxKept:
    """Keys and values of one row's first tokens: arrays (heads, tokens, numbers), in the order of the graph."""

    arrays: tuple[NDArray[np.float32], ...]

    @property
    def num_bytes(self) -> int:
        return sum(one.nbytes for one in self.arrays)

    @property
    def num_tokens(self) -> int:
        return int(self.arrays[0].shape[1])

    def first(self, num_tokens: int) -> OnnxKept:
        """A view: nothing is copied."""
        return OnnxKept(tuple(one[:, :num_tokens] for one in self.arrays))


class OnnxDecoder:
    """A group of rows on its way through a causal model whose graph takes keys and values in and gives them out."""

    joins = True

    def __init__(self, session: Session) -> None:
        self._session = session
        self._past_inputs = [entry for entry in session.get_inputs() if entry.name.startswith("past_")]
        self._past: list[NDArray[np.float32]] = []
        """Each of the shape (rows, heads, columns, numbers)."""
        self._mask = np.empty((0, 0), dtype=np.int64)
        """1 where a column holds a token of the row."""
        self._next_position = np.empty((0, 1), dtype=np.int64)

    def start(self, rows: PaddedRows) -> torch.Tensor:
        return self.resume(rows, [None] * len(rows.ids))

    def resume(self, rows: PaddedRows, kept: Sequence[KeysAndValues | None]) -> torch.Tensor:
        lengths = [0 if one is None else one.num_tokens for one in kept]
        width = max(lengths)
        before = np.array(lengths, dtype=np.int64)[:, None]
        self._past = [self._stacked(kept, index, width) for index in range(len(self._past_inputs))]
        self._mask = np.concatenate([(np.arange(width) - width >= -before).astype(np.int64), rows.mask], axis=1)
        self._next_position = before + rows.mask.sum(axis=1, keepdims=True)
        logits = self._forward(rows.ids, (rows.positions + before) * rows.mask)
        self._close_up()
        return logits

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        ids = np.asarray(tokens, dtype=np.int64)[:, None]
        self._mask = np.concatenate([self._mask, np.ones_like(ids)], axis=1)
        positions = self._next_position
        self._next_position = positions + 1
        return self._forward(ids, positions)

    def keep(self, rows: Sequence[int]) -> None:
        index = np.asarray(rows)
        self._past = [values[index] for values in self._past]
        self._mask = self._mask[index]
        self._next_position = self._next_position[index]
        self._close_up()

    def join(self, other: OnnxDecoder) -> None:
        width = max(self._mask.shape[1], other._mask.shape[1])
        past = [
            np.concatenate([_widened(one, 2, width) for one in both])
            for both in zip(self._past, other._past, strict=True)
        ]
        self._mask = np.concatenate([_widened(one, 1, width) for one in (self._mask, other._mask)])
        self._next_position = np.concatenate([self._next_position, other._next_position])
        self._past = past

    def kept(self, row: int) -> OnnxKept:
        columns = self._mask[row].astype(bool)
        return OnnxKept(tuple(values[row][:, columns] for values in self._past))

    def _forward(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> torch.Tensor:
        feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": self._mask, "position_ids": positions}
        for entry, values in zip(self._past_inputs, self._past, strict=True):
            feeds[entry.name] = values
        logits, *self._past = self._session.run(None, feeds)
        return torch.from_numpy(logits)

    def _stacked(self, kept: Sequence[Any], index: int, width: int) -> NDArray[np.float32]:
        # The graph's dimensions are (rows, heads, tokens, numbers); rows and tokens are open.
        _, heads, _, numbers = self._past_inputs[index].shape
        values = np.zeros((len(kept), heads, width, numbers), dtype=np.float32)
        for row, one in enumerate(kept):
            if one is not None:
                values[row, :, width - one.num_tokens :] = one.arrays[index]
        return values

    def _close_up(self) -> None:
        """Do without columns that hold padding, where many do."""
        spare = self._mask.shape[1] - int(self._mask.sum(axis=1).max())
        if spare <= SPARE_COLUMNS:
            return
        # Sorted by the mask alone, each row's tokens stay in order and move to the right.
        columns = self._mask.argsort(axis=1, kind="stable")[:, spare:]
        self._mask = np.take_along_axis(self._mask, columns, axis=1)
        self._past = [np.take_along_axis(values, columns[:, None, :, None], axis=2) for values in self._past]


def _widened(values: NDArray[Any], axis: int, width: int) -> NDArray[Any]:
    """Filled up with zeros at the start of `axis`."""
    return np.pad(values, [(width - values.shape[axis] if one == axis else 0, 0) for one in range(values.ndim)])
