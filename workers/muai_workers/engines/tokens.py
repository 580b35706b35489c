"""From requests to token ids: the part of an engine that needs a tokenizer and nothing else."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from muai_config import ModelSpec
from muai_producers.errors import InputTooLongError, InvalidRequestError, RequestError, UnsupportedParameterError
from muai_producers.wire import INPUT_FIELD, InferenceRequest, check_inputs
from muai_workers.engines.base import Completion
from muai_workers.engines.parameters import check_tools, refuse_constraints, template_tools, template_turns

_PREFIX_TOKENS = 8
NO_LIMIT_TOKENS = 10**9
"""Tokenizers without a limit of their own state one above this."""
# Their position table starts behind the padding id, so it holds that many fewer tokens than it has rows.
_OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "xmod"})


@dataclass(frozen=True)
class TokenRow:
    """A request and the tokens of its input; at least one."""

    request: InferenceRequest
    ids: list[int]


class TextTokenizer:
    """A transformers tokenizer, made safe for threads and free of padding, which is ours to do."""

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        # Truncation is a state of the tokenizer: a thread that sets it while another encodes makes that one raise.
        self._lock = threading.Lock()

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    @property
    def chat_template(self) -> str | None:
        """None too where there are several by name: which of them serves depends on the request."""
        template = self._tokenizer.chat_template
        return template if isinstance(template, str) else None

    @property
    def transformers_tokenizer(self) -> Any:
        """For libraries that want one; to be left as it is."""
        return self._tokenizer

    @property
    def pad_id(self) -> int:
        """What fills rows up; masked out, so any id will do where the tokenizer has none."""
        known = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id)
        return int(next((one for one in known if one is not None), 0))

    @property
    def bos_id(self) -> int | None:
        return None if self._tokenizer.bos_token_id is None else int(self._tokenizer.bos_token_id)

    @property
    def eos_id(self) -> int | None:
        return None if self._tokenizer.eos_token_id is None else int(self._tokenizer.eos_token_id)

    @property
    def max_tokens(self) -> int | None:
        limit = int(self._tokenizer.model_max_length)
        return limit if limit < NO_LIMIT_TOKENS else None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, at full length."""
        with self._lock:
            encoded = self._tokenizer(
                list(texts), padding=False, truncation=False, return_attention_mask=False, verbose=False
            )
        rows: list[list[int]] = encoded["input_ids"]
        return rows

    def encode_start(self, text: str, max_tokens: int) -> list[int]:
        """Token ids of as much of the text, from its start, as fits together with the special tokens."""
        with self._lock:
            encoded = self._tokenizer(text, padding=False, truncation=True, max_length=max_tokens)
        ids: list[int] = encoded["input_ids"]
        return ids

    def encode_chat(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of a conversation in the model's own format, ready for the assistant's turn.

        Args:
            tools: written into the prompt where the model's template has a place for them.
        Raises:
            InvalidRequestError: the template refuses the conversation.
        """
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tools=tools, add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, TypeError) as error:
            raise InvalidRequestError(f"the model's chat template refuses the conversation: {error}") from error
        with self._lock:
            # The template writes the special tokens itself.
            encoded = self._tokenizer(
                text, padding=False, truncation=False, add_special_tokens=False, return_attention_mask=False
            )
        ids: list[int] = encoded["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, without special ones."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def decode_after(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        """The text by which `ids` continue the prompt.

        Decoded alone they would lose a blank at their start: some vocabularies keep it only between words.
        """
        prefix = list(prompt_ids[-_PREFIX_TOKENS:])
        before, after = self.decode(prefix), self.decode([*prefix, *ids])
        return after[len(before) :] if after.startswith(before) else self.decode(ids)


def admit(
    tokenizer: TextTokenizer,
    task: str,
    requests: Sequence[InferenceRequest],
    limit_tokens: int | None,
    *,
    structured_output: bool = False,
    keep: Literal["start", "end"] = "start",
    reserve_tokens: Callable[[InferenceRequest], int] = lambda _: 0,
) -> tuple[list[TokenRow], list[Completion]]:
    """Tokenise each request; those that cannot be run come back as completions with their error.

    Args:
        limit_tokens: longest admitted input, special tokens included.
        structured_output: whether the engine can hold answers to a shape; else requests that ask for one are refused.
        keep: the part that stays when the request lets its input be cut.
        reserve_tokens: how much shorter than the limit an input is cut, to leave room for its answer.
    """
    rows: list[TokenRow] = []
    refused: list[Completion] = []
    texts = [request.inputs.get(INPUT_FIELD[task]) for request in requests]
    plain = [text for text in texts if isinstance(text, str)]
    encoded = iter(tokenizer.encode(plain) if plain else [])
    for request, text in zip(requests, texts, strict=True):
        ids = next(encoded) if isinstance(text, str) else None
        try:
            if not structured_output:
                refuse_constraints(request.parameters)
            ids = _tokens(tokenizer, task, request, ids)
            if limit_tokens is not None and len(ids) > limit_tokens:
                _refuse_unless_cut(request, len(ids), limit_tokens)
                room_tokens = max(1, limit_tokens - reserve_tokens(request))
                ids = ids[-room_tokens:] if keep == "end" else tokenizer.encode_start(str(text), room_tokens)
            rows.append(TokenRow(request, ids))
        except (RequestError, UnsupportedParameterError) as error:
            refused.append(Completion(request.id, error=error))
    return rows, refused


def _tokens(tokenizer: TextTokenizer, task: str, request: InferenceRequest, ids: list[int] | None) -> list[int]:
    check_inputs(task, request.inputs)
    check_tools(task, request.parameters)
    if ids is None:
        ids = tokenizer.encode_chat(template_turns(request), template_tools(request.parameters))
    if ids:
        return ids
    if tokenizer.bos_id is None:
        raise InvalidRequestError("nothing is left of the input once it is tokenised")
    return [tokenizer.bos_id]


def _refuse_unless_cut(request: InferenceRequest, num_tokens: int, limit_tokens: int) -> None:
    if not request.parameters.truncate:
        raise InputTooLongError(
            f"the input has {num_tokens} tokens, {request.model} takes at most {limit_tokens}",
            {"input_tokens": num_tokens, "max_input_tokens": limit_tokens},
        )


def context_tokens(config: Any) -> int | None:
    """How many positions the model has; None when its configuration does not say.

    Args:
        config: the model's transformers configuration.
    """
    rows = getattr(config, "max_position_embeddings", None)
    if rows is None or rows <= 0:
        return None
    if config.model_type in _OFFSET_POSITIONS:
        return int(rows) - int(config.pad_token_id or 0) - 1
    return int(rows)


def input_limit(spec: ModelSpec, folder: Path, config: Any, tokenizer: TextTokenizer) -> int | None:
    """The longest input that the model takes: the least of what its files and the catalog say."""
    limits = [spec.max_input_tokens, context_tokens(config), tokenizer.max_tokens]
    if spec.task == "embedding":
        limits.append(_sentence_limit(folder))
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _sentence_limit(folder: Path) -> int | None:
    path = folder / "sentence_bert_config.json"
    if not path.is_file():
        return None
    limit = json.loads(path.read_text(encoding="utf-8")).get("max_seq_length")
    return limit if isinstance(limit, int) else None
