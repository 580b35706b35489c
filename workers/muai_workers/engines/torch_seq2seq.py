"""Encoder-decoder models in PyTorch: the input is read once, the answer is decoded from a start token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, DynamicCache, EncoderDecoderCache

from muai_producers.errors import ModelLoadError
from muai_workers.engines.decoding import DecodingModel
from muai_workers.engines.padding import PaddedRows
from muai_workers.engines.tokens import TextTokenizer, input_limit
from muai_workers.engines.torch_causal import configured_end_ids
from muai_workers.engines.torch_loading import TorchPlan, load_module


def load_seq2seq(plan: TorchPlan, extra: dict[str, Any], **loop: Any) -> DecodingModel:
    """A model that summarises.

    Args:
        loop: `limits` and `relieve` of `DecodingModel`.
    Raises:
        ModelLoadError: its configuration does not name the token that an answer starts with.
    """
    model: Any = load_module(AutoModelForSeq2SeqLM, plan)
    tokenizer = TextTokenizer(plan.folder, trust_remote_code=plan.spec.trust_remote_code)
    start_id = model.generation_config.decoder_start_token_id
    if start_id is None:
        start_id = getattr(plan.config, "decoder_start_token_id", None)
    if start_id is None:
        raise ModelLoadError(f"{plan.spec.name} does not say which token an answer starts with", {})
    forward: Any = torch.compile(model, dynamic=True) if plan.compile else model
    return DecodingModel(
        plan.spec,
        tokenizer,
        lambda: Seq2SeqDecoder(model, forward, plan.device, int(start_id)),
        end_ids=configured_end_ids(plan, tokenizer),
        context_tokens=None,
        limit_tokens=input_limit(plan.spec, plan.folder, plan.config, tokenizer),
        padding_side="right",
        extra=extra,
        **loop,
    )


class Seq2SeqDecoder:
    """A group of rows on its way through an encoder-decoder model."""

    def __init__(self, model: Any, forward: Any, device: torch.device, start_id: int) -> None:
        """
        Args:
            forward: the model, or its compiled form.
        """
        self._model = model
        self._forward = forward
        self._device = device
        self._start_id = start_id
        decoder_config = model.config.get_text_config(decoder=True)
        self._cache: Any = EncoderDecoderCache(DynamicCache(config=decoder_config), DynamicCache(config=decoder_config))
        self._mask = torch.empty(0)
        self._encoded = torch.empty(0)

    @torch.inference_mode()
    def start(self, rows: PaddedRows) -> torch.Tensor:
        self._mask = torch.from_numpy(rows.mask).to(self._device)
        ids = torch.from_numpy(rows.ids).to(self._device)
        self._encoded = self._model.get_encoder()(input_ids=ids, attention_mask=self._mask).last_hidden_state
        return self.step([self._start_id] * len(rows.ids))

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        logits: torch.Tensor = self._forward(
            encoder_outputs=(self._encoded,),
            attention_mask=self._mask,
            decoder_input_ids=torch.tensor(tokens, device=self._device).unsqueeze(1),
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        return logits[:, -1]

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self._device)
        self._cache.batch_select_indices(index)
        self._mask = self._mask[index]
        self._encoded = self._encoded[index]
