"""Sentence encoders and classifiers as torch modules that answer in full: what PyTorch runs and ONNX exports."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoModelForSequenceClassification

from muai_config import ModelSpec
from muai_producers.errors import ModelLoadError
from muai_workers.engines.encoder import Forward
from muai_workers.engines.padding import PaddedRows
from muai_workers.engines.torch_loading import TorchPlan, load_module


class EncoderModule(torch.nn.Module):
    """Token ids and mask, shape (num_rows, length), to fp32 embeddings (num_rows, hidden_size)."""

    def __init__(self, model: torch.nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.model = model
        self.pooling = spec.pooling
        self.normalize = spec.normalize

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        return torch.nn.functional.normalize(pooled, dim=1) if self.normalize else pooled


class ClassifierModule(torch.nn.Module):
    """Token ids and mask, shape (num_rows, length), to fp32 probabilities (num_rows, num_labels)."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits.float().softmax(-1)


def load_encoder(plan: TorchPlan) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """The module that answers `plan.spec.task`, and its labels (none for embeddings).

    Raises:
        ModelLoadError: the model has no classes, or was trained for another task.
    """
    if plan.spec.task == "embedding":
        # Embeddings are pooled here; the pooler that came with pre-training goes unread.
        return EncoderModule(load_module(AutoModel, plan, dispensable=("pooler.",)), plan.spec), ()
    if plan.config.num_labels < 2:
        raise ModelLoadError(f"{plan.spec.name} is no classifier: it has {plan.config.num_labels} label")
    return ClassifierModule(load_module(AutoModelForSequenceClassification, plan)), class_labels(plan.config)


def class_labels(config: Any) -> tuple[str, ...]:
    """Names of the classes, in the order of the logits."""
    return tuple(str(config.id2label[index]) for index in range(config.num_labels))


def torch_forward(module: torch.nn.Module, plan: TorchPlan) -> Forward:
    """What `Encoder` calls."""
    compiled: Any = torch.compile(module, dynamic=True) if plan.compile else module

    def forward(rows: PaddedRows) -> NDArray[np.float32]:
        with torch.inference_mode():
            ids = torch.from_numpy(rows.ids).to(plan.device)
            mask = torch.from_numpy(rows.mask).to(plan.device)
            values: NDArray[np.float32] = compiled(ids, mask).cpu().numpy()
        return values

    return forward
