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
from torch.nn.functional import pad

from muai_config.optimization import OnnxSettings
from muai_producers.errors import EngineUnavailableError
from muai_workers.engines.encoder import Forward
from muai_workers.engines.lanes import in_lane
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


def absent_providers(settings: OnnxSettings, session: Session | None = None) -> list[str]:
    """The configured execution providers that this build lacks, or that a session did without: their libraries or
    their device are missing, and ONNX Runtime then goes on to the next."""
    present = _runtime.get_available_providers() if session is None else session.get_providers()
    return [provider for provider in settings.execution_providers if provider not in present]


def open_session(path: Path, settings: OnnxSettings, num_threads: int | None = None) -> Session:
    """Load a graph.

    Args:
        num_threads: of each run, of which all but one are shared with other runs; None: as many as PyTorch takes, so
            that one setting bounds both.
    """
    options = _runtime.SessionOptions()
    options.graph_optimization_level = _LEVELS[settings.optimization_level]
    options.intra_op_num_threads = num_threads or torch.get_num_threads()
    options.log_severity_level = ERRORS_ONLY
    return _runtime.InferenceSession(str(path), options, providers=usable_providers(settings))


def onnx_forward(session: Session, in_lanes: Session | None = None) -> Forward:
    """What `Encoder` calls.

    Args:
        in_lanes: the same graph with a lane's threads, for passes that run beside others; None: there are no lanes.
    """

    def forward(rows: PaddedRows) -> NDArray[np.float32]:
        chosen = in_lanes if in_lanes is not None and in_lane() else session
        values: NDArray[np.float32] = chosen.run(None, {"input_ids": rows.ids, "attention_mask": rows.mask})[0]
        return values

    return forward


@dataclass(frozen=True)
class OnnxKept:
    """Keys and values of one row's first tokens: tensors (heads, tokens, numbers), in the order of the graph."""

    tensors: tuple[torch.Tensor, ...]

    @property
    def num_bytes(self) -> int:
        return sum(one.numel() * one.element_size() for one in self.tensors)

    @property
    def num_tokens(self) -> int:
        return int(self.tensors[0].shape[1])

    def first(self, num_tokens: int) -> OnnxKept:
        """A view: nothing is copied."""
        return OnnxKept(tuple(one[:, :num_tokens] for one in self.tensors))


class OnnxDecoder:
    """A group of rows on its way through a causal model whose graph takes keys and values in and gives them out.

    Inputs and outputs are bound to tensors on the session's device, so that keys and values never leave it: what one
    step gives out is what the next takes in.
    """

    joins = True

    def __init__(self, session: Session, device: torch.device | None = None) -> None:
        """
        Args:
            device: where keys and values lie; None: where the session computes.
        """
        self._session = session
        self._device = session_device(session) if device is None else device
        self._past_inputs = [entry for entry in session.get_inputs() if entry.name.startswith("past_")]
        self._output_names = [entry.name for entry in session.get_outputs()]
        self._past: list[torch.Tensor] = []
        """Each of the shape (rows, heads, columns, numbers)."""
        self._mask = torch.empty((0, 0), dtype=torch.int64, device=self._device)
        """1 where a column holds a token of the row."""
        self._lengths: list[int] = []
        """Tokens of each row so far."""

    def start(self, rows: PaddedRows) -> torch.Tensor:
        return self.resume(rows, [None] * len(rows.ids))

    def resume(self, rows: PaddedRows, kept: Sequence[KeysAndValues | None]) -> torch.Tensor:
        lengths = [0 if one is None else one.num_tokens for one in kept]
        width = max(lengths)
        before = self._to_device(np.array(lengths, dtype=np.int64)[:, None])
        self._past = [self._stacked(kept, index, width) for index in range(len(self._past_inputs))]
        mask = self._to_device(rows.mask)
        held = (torch.arange(width, device=self._device) - width >= -before).to(torch.int64)
        self._mask = torch.cat([held, mask], dim=1)
        self._lengths = [before + num for before, num in zip(lengths, rows.mask.sum(1).tolist(), strict=True)]
        logits = self._forward(self._to_device(rows.ids), (self._to_device(rows.positions) + before) * mask)
        self._close_up()
        return logits

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor(tokens, device=self._device).unsqueeze(1)
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        positions = torch.tensor(self._lengths, device=self._device).unsqueeze(1)
        self._lengths = [length + 1 for length in self._lengths]
        return self._forward(ids, positions)

    def keep(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self._device)
        self._past = [values[index] for values in self._past]
        self._mask = self._mask[index]
        self._lengths = [self._lengths[row] for row in rows]
        self._close_up()

    def join(self, other: OnnxDecoder) -> None:
        width = max(self._mask.shape[1], other._mask.shape[1])
        past = [
            torch.cat([pad(one, (0, 0, width - one.shape[2], 0)) for one in both])
            for both in zip(self._past, other._past, strict=True)
        ]
        self._mask = torch.cat([pad(one, (width - one.shape[1], 0)) for one in (self._mask, other._mask)])
        self._lengths = [*self._lengths, *other._lengths]
        self._past = past

    def kept(self, row: int) -> OnnxKept:
        columns = self._mask[row].bool()
        return OnnxKept(tuple(values[row][:, columns] for values in self._past))

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        named = {"input_ids": ids, "attention_mask": self._mask, "position_ids": positions}
        named |= {entry.name: values for entry, values in zip(self._past_inputs, self._past, strict=True)}
        # What is bound by its address must stay alive, and lie in one piece, until the pass is over.
        inputs = {name: values.contiguous() for name, values in named.items()}
        binding = self._session.io_binding()
        for name, values in inputs.items():
            _bind(binding.bind_input, name, values)
        num_rows, columns = self._mask.shape
        present = []
        for name, entry in zip(self._output_names[1:], self._past_inputs, strict=True):
            # The graph's dimensions are (rows, heads, tokens, numbers); rows and tokens are open.
            shape = (num_rows, entry.shape[1], columns, entry.shape[3])
            present.append(torch.empty(shape, dtype=torch.float32, device=self._device))
            _bind(binding.bind_output, name, present[-1])
        # The logits are looked at on the CPU, whichever way; ONNX Runtime makes room for them.
        binding.bind_output(self._output_names[0], "cpu")
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # what is bound may still be on its way there
        self._session.run_with_iobinding(binding)
        self._past = present
        return torch.from_numpy(binding.get_outputs()[-1].numpy())

    def _to_device(self, values: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)

    def _stacked(self, kept: Sequence[Any], index: int, width: int) -> torch.Tensor:
        _, heads, _, numbers = self._past_inputs[index].shape
        values = torch.zeros((len(kept), heads, width, numbers), dtype=torch.float32, device=self._device)
        for row, one in enumerate(kept):
            if one is not None:
                values[row, :, width - one.num_tokens :] = one.tensors[index]
        return values

    def _close_up(self) -> None:
        """Do without columns that hold padding, where many do."""
        spare = self._mask.shape[1] - max(self._lengths)
        if spare <= SPARE_COLUMNS:
            return
        # Sorted by the mask alone, each row's tokens stay in order and move to the right.
        columns = self._mask.argsort(dim=1, stable=True)[:, spare:]
        self._mask = self._mask.gather(1, columns)
        index = columns[:, None, :, None]
        self._past = [values.gather(2, index.expand(-1, values.shape[1], -1, values.shape[3])) for values in self._past]


def session_device(session: Session) -> torch.device:
    """Where the tensors of a session are best bound: on the GPU that computes, where PyTorch can use it too."""
    on_gpu = session.get_providers()[0] in ("CUDAExecutionProvider", "TensorrtExecutionProvider")
    return (
        torch.device("cuda", torch.cuda.current_device())
        if on_gpu and torch.cuda.is_available()
        else torch.device("cpu")
    )


_ELEMENT_TYPES = {torch.int64: np.int64, torch.float32: np.float32}


def _bind(bind: Any, name: str, values: torch.Tensor) -> None:
    """Have ONNX Runtime read or write the memory of `values` itself."""
    device = values.device
    bind(name, device.type, device.index or 0, _ELEMENT_TYPES[values.dtype], tuple(values.shape), values.data_ptr())
