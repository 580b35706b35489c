"""Causal language models in PyTorch: prompts padded on the left, keys and values kept between the steps."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from muai_workers.engines.decoding import DecodingModel
from muai_workers.engines.padding import PaddedRows
from muai_workers.engines.tokens import TextTokenizer, context_tokens, input_limit
from muai_workers.engines.torch_loading import TorchPlan, load_module


def load_causal(plan: TorchPlan, extra: dict[str, Any]) -> DecodingModel:
    """A model that continues text, and chats where its tokenizer has a template."""
    model = load_module(AutoModelForCausalLM, plan)
    tokenizer = TextTokenizer(plan.folder, trust_remote_code=plan.spec.trust_remote_code)
    step: Any = torch.compile(model, dynamic=True) if plan.compile else model
    accepted = frozenset(inspect.signature(model.forward).parameters)
    return DecodingModel(
        plan.spec,
        tokenizer,
        lambda: CausalDecoder(step, plan.config, plan.device, accepted),
        end_ids=configured_end_ids(plan, tokenizer),
        context_tokens=context_tokens(plan.config),
        limit_tokens=input_limit(plan.spec, plan.folder, plan.config, tokenizer),
        padding_side="left",
        extra=extra,
    )


def configured_end_ids(plan: TorchPlan, tokenizer: TextTokenizer) -> frozenset[int]:
    """The tokens that end an answer, by the model's files."""
    try:
        configured = GenerationConfig.from_pretrained(plan.folder, local_files_only=True).eos_token_id
    except OSError:  # no generation_config.json
        configured = getattr(plan.config, "eos_token_id", None)
    ids = [configured] if isinstance(configured, int) else list(configured or ())
    return frozenset(one for one in (*ids, tokenizer.eos_id) if one is not None)


class CausalDecoder:
    """One batch on its way through a causal model."""

    def __init__(self, model: Any, config: Any, device: torch.device, accepted: frozenset[str]) -> None:
        """
        Args:
            accepted: names of the arguments that the model's forward takes; not every architecture takes positions.
        """
        self._model = model
        self._device = device
        self._accepted = accepted
        self._cache: Any = DynamicCache(config=config)
        self._mask = torch.empty(0)
        self._next_position = torch.empty(0)

    @torch.inference_mode()
    def start(self, rows: PaddedRows) -> torch.Tensor:
        self._mask = torch.from_numpy(rows.mask).to(self._device)
        positions = torch.from_numpy(rows.positions).to(self._device)
        self._next_position = positions[:, -1:] + 1
        return self._forward(torch.from_numpy(rows.ids).to(self._device), positions)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor(tokens, device=self._device).unsqueeze(1)
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        positions = self._next_position
        self._next_position = positions + 1
        return self._forward(ids, positions)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self._device)
        self._cache.batch_select_indices(index)
        self._mask = self._mask[index]
        self._next_position = self._next_position[index]

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
