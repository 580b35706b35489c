"""Causal language models in PyTorch: prompts padded on the left, keys and values kept between the steps."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from muai_workers.engines.decoding import DecodingModel
from muai_workers.engines.padding import PaddedRows
from muai_workers.engines.tokens import TextTokenizer, context_tokens, input_limit
from muai_workers.engines.torch_loading import TorchPlan, load_module
from muai_workers.kv_cache import KeysAndValues

SPARE_COLUMNS = 32
"""Columns of padding that a group may have before its keys and values are copied to do without."""


def load_causal(plan: TorchPlan, extra: dict[str, Any], **loop: Any) -> DecodingModel:
    """A model that continues text, and chats where its tokenizer has a template.

    Args:
        loop: `limits`, `cache` and `relieve` of `DecodingModel`.
    """
    model = load_module(AutoModelForCausalLM, plan)
    tokenizer = TextTokenizer(plan.folder, trust_remote_code=plan.spec.trust_remote_code)
    step: Any = torch.compile(model, dynamic=True) if plan.compile else model
    accepted = frozenset(inspect.signature(model.forward).parameters)
    joins = rows_can_join(plan.config, accepted)
    return DecodingModel(
        plan.spec,
        tokenizer,
        lambda: CausalDecoder(step, plan.config, plan.device, accepted, joins),
        end_ids=configured_end_ids(plan, tokenizer),
        context_tokens=context_tokens(plan.config),
        limit_tokens=input_limit(plan.spec, plan.folder, plan.config, tokenizer),
        padding_side="left",
        extra=extra,
        **loop,
    )


def configured_end_ids(plan: TorchPlan, tokenizer: TextTokenizer) -> frozenset[int]:
    """The tokens that end an answer, by the model's files."""
    return end_ids_of(plan.folder, plan.config, tokenizer)


def end_ids_of(folder: Path, config: Any, tokenizer: TextTokenizer) -> frozenset[int]:
    """As `configured_end_ids`, before anything is planned."""
    try:
        configured = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    except OSError:  # no generation_config.json
        configured = getattr(config, "eos_token_id", None)
    ids = [configured] if isinstance(configured, int) else list(configured or ())
    return frozenset(one for one in (*ids, tokenizer.eos_id) if one is not None)


def rows_can_join(config: Any, accepted: frozenset[str]) -> bool:
    """Whether keys and values of different texts can lie in one batch, with holes in its mask.

    They can where a token's position is told to the model, rather than counted by it, and where every layer keeps all
    of its keys and values: no sliding windows, no states that sum up the past.
    """
    layers = DynamicCache(config=config).layers
    return "position_ids" in accepted and bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


@dataclass(frozen=True)
class TorchKept:
    """Keys and values of one row's first tokens: for each layer two tensors (heads, tokens, numbers)."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @property
    def num_bytes(self) -> int:
        return sum(one.numel() * one.element_size() for layer in self.layers for one in layer)

    @property
    def num_tokens(self) -> int:
        return int(self.layers[0][0].shape[1])

    def first(self, num_tokens: int) -> TorchKept:
        """A view: nothing is copied."""
        return TorchKept(tuple((keys[:, :num_tokens], values[:, :num_tokens]) for keys, values in self.layers))


class CausalDecoder:
    """A group of rows on its way through a causal model."""

    def __init__(
        self, model: Any, config: Any, device: torch.device, accepted: frozenset[str], joins: bool = False
    ) -> None:
        """
        Args:
            accepted: names of the arguments that the model's forward takes; not every architecture takes positions.
            joins: see `rows_can_join`.
        """
        self.joins = joins
        self._model = model
        self._config = config
        self._device = device
        self._accepted = accepted
        self._cache: Any = DynamicCache(config=config)
        self._mask = torch.empty((0, 0), dtype=torch.int64, device=device)
        """1 where a column holds a token of the row, shape (num_rows, columns)."""
        self._lengths: list[int] = []
        """Tokens of each row so far."""

    def start(self, rows: PaddedRows) -> torch.Tensor:
        return self.resume(rows, [None] * len(rows.ids))

    @torch.inference_mode()
    def resume(self, rows: PaddedRows, kept: Sequence[KeysAndValues | None]) -> torch.Tensor:
        lengths = [0 if one is None else one.num_tokens for one in kept]
        before = torch.tensor(lengths, device=self._device).unsqueeze(1)
        columns = torch.arange(max(lengths), device=self._device) - max(lengths)
        mask = torch.from_numpy(rows.mask).to(self._device)
        self._mask = torch.cat([(columns >= -before).to(mask.dtype), mask], dim=1)
        if any(lengths):
            self._cache = DynamicCache(self._stacked(kept, max(lengths)), config=self._config)
        positions = (torch.from_numpy(rows.positions).to(self._device) + before) * mask
        logits = self._forward(torch.from_numpy(rows.ids).to(self._device), positions)
        self._lengths = [before + num for before, num in zip(lengths, rows.mask.sum(1).tolist(), strict=True)]
        self._close_up()
        return logits

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor(tokens, device=self._device).unsqueeze(1)
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        logits = self._forward(ids, torch.tensor(self._lengths, device=self._device).unsqueeze(1))
        self._lengths = [length + 1 for length in self._lengths]
        return logits

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self._device)
        self._cache.batch_select_indices(index)
        self._mask = self._mask[index]
        self._lengths = [self._lengths[row] for row in rows]
        self._close_up()

    @torch.inference_mode()
    def join(self, other: CausalDecoder) -> None:
        width = max(self._mask.shape[1], other._mask.shape[1])

        def together(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
            return torch.cat([pad(one, (0, 0, width - one.shape[2], 0)) for one in (ours, theirs)])

        layers = [
            (together(ours.keys, theirs.keys), together(ours.values, theirs.values))
            for ours, theirs in zip(self._cache.layers, other._cache.layers, strict=True)
        ]
        self._mask = torch.cat([pad(one, (width - one.shape[1], 0)) for one in (self._mask, other._mask)])
        for layer, (keys, values) in zip(self._cache.layers, layers, strict=True):
            layer.keys, layer.values = keys, values
        self._lengths += other._lengths

    @torch.inference_mode()
    def kept(self, row: int) -> TorchKept:
        columns = self._mask[row].bool()
        return TorchKept(
            tuple((layer.keys[row][:, columns], layer.values[row][:, columns]) for layer in self._cache.layers)
        )

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        optional = {"position_ids": positions, "logits_to_keep": 1}
        logits: torch.Tensor = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self._accepted},
        ).logits
        return logits[:, -1]

    def _stacked(self, kept: Sequence[Any], width: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Every layer's keys and values for all rows, filled up on the left."""
        layers = next(one for one in kept if one is not None).layers

        def filled(layer: int, part: int) -> torch.Tensor:
            heads, _, numbers = layers[layer][part].shape
            empty = layers[layer][part].new_zeros((heads, width, numbers))
            return torch.stack(
                [
                    empty if one is None else pad(one.layers[layer][part], (0, 0, width - one.num_tokens, 0))
                    for one in kept
                ]
            )

        return [(filled(layer, 0), filled(layer, 1)) for layer in range(len(layers))]

    def _close_up(self) -> None:
        """Do without columns that hold padding, where many do."""
        spare = self._mask.shape[1] - max(self._lengths)
        if not self.joins or spare <= SPARE_COLUMNS:
            return
        # Sorted by the mask alone, each row's tokens stay in order and move to the right.
        columns = self._mask.argsort(dim=1, stable=True)[:, spare:]
        self._mask = self._mask.gather(1, columns)
        index = columns[:, None, :, None]
        for layer in self._cache.layers:
            layer.keys = layer.keys.gather(2, index.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3]))
            layer.values = layer.values.gather(2, index.expand(-1, layer.values.shape[1], -1, layer.values.shape[3]))
