"""A model that PyTorch runs and vLLM does not know."""

from __future__ import annotations

from pathlib import Path


def build_strange_causal(folder: Path) -> Path:
    """Write a CodeGen of a few thousand parameters with seeded random weights."""
    import torch
    from transformers import CodeGenConfig, CodeGenForCausalLM

    from muai_workers.models.tiny import causal_tokenizer

    tokenizer = causal_tokenizer(256)
    config = CodeGenConfig(
        vocab_size=len(tokenizer), n_positions=256, n_ctx=256, n_embd=64, n_layer=2, n_head=4, rotary_dim=8,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = CodeGenForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
