"""ONNX graphs in memory: sessions, and what encoders and decoders need of them."""

from __future__ import annotations

from collections.abc import Sequence
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


class OnnxDecoder:
    """One batch on its way through a causal model whose graph takes keys and values in and gives them out."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._past_inputs = [entry for entry in session.get_inputs() if entry.name.startswith("past_")]
        self._past: list[NDArray[np.float32]] = []
        self._mask = np.empty((0, 0), dtype=np.int64)
        self._next_position = np.empty((0, 1), dtype=np.int64)

    def start(self, rows: PaddedRows) -> torch.Tensor:
        num_rows = len(rows.ids)
        # The graph's dimensions are (rows, heads, tokens, numbers); rows and tokens are open.
        self._past = [
            np.zeros((num_rows, entry.shape[1], 0, entry.shape[3]), dtype=np.float32) for entry in self._past_inputs
        ]
        self._mask = rows.mask
        self._next_position = rows.positions[:, -1:] + 1
        return self._forward(rows.ids, rows.positions)

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

    def _forward(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> torch.Tensor:
        feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": self._mask, "position_ids": positions}
        for entry, values in zip(self._past_inputs, self._past, strict=True):
            feeds[entry.name] = values
        logits, *self._past = self._session.run(None, feeds)
        return torch.from_numpy(logits)
