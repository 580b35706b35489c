"""Small real models, built on the spot: for demonstrations and tests on machines that reach no model hub.

They have real architectures, tokenizers and files, so that every engine loads them as it loads large ones; what they
say is no more than their few sentences of training allow. The same call gives the same model on the same machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from muai_workers.models.tiny_texts import CHAT_TEMPLATE, DIALOGUES, PROSE, judgements

SEED = 20
PAD, END = "<pad>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")


def build_tiny_causal(folder: Path, *, train: bool = True, context_tokens: int = 512, endless: bool = False) -> Path:
    """Write a Llama of under a million parameters that continues and chats.

    Args:
        folder: made if it is not there.
        train: False: seeded random weights, in a fraction of the time.
        context_tokens: positions that the model has.
        endless: it never says that it has ended, so that its answers have as many tokens as are asked for, whatever
            this machine's rounding makes of its other words.
    """
    tokenizer = causal_tokenizer(context_tokens)
    with _seeded():
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=352,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=context_tokens,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                # A spread wider than the usual one keeps untrained logits apart, far beyond rounding.
                initializer_range=0.02 if train else 0.2,
            )
        )
        if train:
            _train_causal(model, tokenizer)
    if endless:
        with torch.no_grad():
            model.lm_head.weight[tokenizer.eos_token_id] = 0.0  # of several hundred others one is always likelier
    return _save(folder, model, tokenizer)


def build_tiny_classifier(folder: Path, *, train: bool = True) -> Path:
    """Write a BERT of some 100,000 parameters that tells praise from blame: labels NEGATIVE and POSITIVE."""
    examples = judgements()
    tokenizer = _word_tokenizer(text for text, _ in examples)
    with _seeded():
        model = BertForSequenceClassification(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=128,
                pad_token_id=tokenizer.pad_token_id,
                id2label={0: "NEGATIVE", 1: "POSITIVE"},
                label2id={"NEGATIVE": 0, "POSITIVE": 1},
                initializer_range=0.02 if train else 0.2,
            )
        )
        if train:
            _train_classifier(model, tokenizer, examples)
    return _save(folder, model, tokenizer)


def build_tiny_seq2seq(folder: Path) -> Path:
    """Write a T5 with seeded random weights: it runs as a summarizer does, and what it says means nothing."""
    tokenizer = causal_tokenizer(512)
    with _seeded():
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=64,
                d_kv=16,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                initializer_factor=4.0,
            )
        )
    model.generation_config.decoder_start_token_id = tokenizer.pad_token_id
    return _save(folder, model, tokenizer)


@contextmanager
def _seeded() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


def _dialogue_texts() -> list[str]:
    return [f"<|user|>{question}{END}<|assistant|>{answer}{END}" for question, answer in DIALOGUES]


def causal_tokenizer(context_tokens: int) -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*PROSE, *(text for pair in DIALOGUES for text in pair)], trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=context_tokens,
        clean_up_tokenization_spaces=False,
    )


def _word_tokenizer(texts: Iterable[str]) -> Any:
    # Whole words in alphabetical order: a trainer of word pieces gives another vocabulary at each run.
    words = sorted({word for text in texts for word in text.split()} | set(".,!?"))
    vocabulary = {word: index for index, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=128,
    )


def _train_causal(model: Any, tokenizer: Any, *, steps: int = 120, width: int = 64) -> None:
    """Show the model its sentences over and over, in a new order each time, cut into rows of equal width."""
    texts = [tokenizer(text)["input_ids"] for text in (*(text + END for text in PROSE), *_dialogue_texts())]
    generator = torch.Generator().manual_seed(SEED)
    rows: list[list[int]] = []
    while len(rows) < steps * 8:
        order = torch.randperm(len(texts), generator=generator).tolist()
        stream = [token for index in order for token in texts[index]]
        rows.extend(stream[start : start + width] for start in range(0, len(stream) - width, width))
    with _training(model, learning_rate=3e-3, steps=steps) as update:
        for step in range(steps):
            ids = torch.tensor(rows[step * 8 : step * 8 + 8])
            update(model(input_ids=ids, labels=ids).loss)


def _train_classifier(model: Any, tokenizer: Any, examples: list[tuple[str, int]], *, steps: int = 60) -> None:
    generator = torch.Generator().manual_seed(SEED)
    with _training(model, learning_rate=2e-3, steps=steps) as update:
        for _ in range(steps):
            chosen = [examples[index] for index in torch.randint(len(examples), (64,), generator=generator).tolist()]
            batch = tokenizer([text for text, _ in chosen], padding=True, return_tensors="pt")
            labels = torch.tensor([label for _, label in chosen])
            update(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss)


@contextmanager
def _training(model: Any, *, learning_rate: float, steps: int) -> Any:
    """Yields the function that takes one step of descent for a loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)

    def update(loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    model.train()
    yield update
    model.eval()


def _save(folder: Path, model: Any, tokenizer: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
