"""From a PyTorch model to an ONNX graph, and the measure of how far the graph's answers are from the model's."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnxruntime import quantization
from transformers import AutoModelForCausalLM, DynamicCache

from muai_config.optimization import OnnxSettings
from muai_workers.engines.decoder import Decoder
from muai_workers.engines.onnx_session import OnnxDecoder, onnx_forward, open_session
from muai_workers.engines.padding import PaddedRows, pad_rows
from muai_workers.engines.torch_causal import CausalDecoder
from muai_workers.engines.torch_encoder import load_encoder, torch_forward
from muai_workers.engines.torch_loading import TorchPlan, load_module

GRAPH = "model.onnx"
QUANTIZED_GRAPH = "quantized.onnx"
SAMPLE_SHAPES = ((1, 1), (1, 9), (2, 5), (3, 17), (5, 33))
"""Rows and longest row of the inputs that a conversion is checked with."""
DECODED_STEPS = 4
_conversion_lock = threading.Lock()


def convert_encoder(plan: TorchPlan, folder: Path, settings: OnnxSettings) -> dict[str, Any]:
    """Write the graph of an encoder or classifier; returns `max_difference` and, quantized, `quantized_cosine`."""
    module, _ = load_encoder(plan)
    # Two tensors, not one twice: the exporter would take them for one input.
    ids, mask = torch.ones((2, 4), dtype=torch.int64), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    both = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    _export(
        module,
        (ids, mask),
        {"input_ids": both, "attention_mask": both},
        ["input_ids", "attention_mask"],
        ["values"],
        folder,
    )
    samples = sample_rows(plan, "right")
    reference = [torch_forward(module, plan)(rows) for rows in samples]

    def answers(graph: str) -> list[NDArray[np.float32]]:
        forward = onnx_forward(open_session(folder / graph, settings))
        return [forward(rows) for rows in samples]

    return _measure(reference, answers, folder, settings)


def convert_causal(plan: TorchPlan, folder: Path, settings: OnnxSettings) -> dict[str, Any]:
    """Write the graph of a causal model, keys and values in and out; returns what `convert_encoder` does."""
    model: Any = load_module(AutoModelForCausalLM, plan)
    module = CausalModule(model).eval()
    shapes = _cache_shapes(model)
    names = [f"{kind}_{index}" for index in range(len(shapes) // 2) for kind in ("key", "value")]
    dynamic = torch.export.Dim.DYNAMIC
    both = {0: dynamic, 1: dynamic}
    _export(
        module,
        (
            torch.ones((2, 3), dtype=torch.int64),
            torch.ones((2, 7), dtype=torch.int64),
            torch.arange(4, 7).repeat(2, 1),
            [torch.zeros((2, heads, 4, size)) for heads, size in shapes],
        ),
        {
            "input_ids": both,
            "attention_mask": both,
            "position_ids": both,
            "past": [{0: dynamic, 2: dynamic} for _ in shapes],
        },
        ["input_ids", "attention_mask", "position_ids", *(f"past_{name}" for name in names)],
        ["logits", *(f"present_{name}" for name in names)],
        folder,
    )
    samples = sample_rows(plan, "left")
    accepted = frozenset({"position_ids", "logits_to_keep"})
    reference = [
        logits
        for rows in samples
        for logits in _decode(lambda: CausalDecoder(model, plan.config, plan.device, accepted), rows)
    ]

    def answers(graph: str) -> list[NDArray[np.float32]]:
        session = open_session(folder / graph, settings)
        return [logits for rows in samples for logits in _decode(lambda: OnnxDecoder(session), rows)]

    return _measure(reference, answers, folder, settings)


class CausalModule(torch.nn.Module):
    """A causal model as a graph sees it: flat keys and values in, the last token's logits and all of them out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            past: key and value of each layer in turn, shape (num_rows, heads, past_tokens, head_size).
        """
        pairs = list(zip(past[::2], past[1::2], strict=True))
        cache: Any = DynamicCache(pairs, config=self.model.config)
        logits = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        present = [values for layer in cache.layers for values in (layer.keys, layer.values)]
        return (logits[:, -1].float(), *present)


def sample_rows(plan: TorchPlan, side: Any) -> list[PaddedRows]:
    """Inputs of several shapes, padding in most of them; the same ones every time."""
    config = plan.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None) or 512
    random = np.random.default_rng(0)
    samples = []
    for num_rows, length in SAMPLE_SHAPES:
        length = min(length, longest - DECODED_STEPS)
        lengths = [max(1, length - 3 * row) for row in range(num_rows)]
        # Ids from 4 on: below stand padding and other special tokens of most vocabularies.
        rows = [random.integers(4, config.vocab_size, size).tolist() for size in lengths]
        samples.append(pad_rows(rows, int(config.pad_token_id or 0), side))
    return samples


def _cache_shapes(model: Any) -> list[tuple[int, int]]:
    """Heads and head size of each layer's keys and values in turn, as one token's pass fills them."""
    cache: Any = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.ones((1, 1), dtype=torch.int64), past_key_values=cache, use_cache=True)
    return [(values.shape[1], values.shape[3]) for layer in cache.layers for values in (layer.keys, layer.values)]


def _decode(new_decoder: Callable[[], Decoder], rows: PaddedRows) -> Iterator[NDArray[np.float32]]:
    """Logits of the prompt and of a few steps, half of the rows leaving on the way."""
    decoder = new_decoder()
    yield decoder.start(rows).float().numpy()
    num_rows = len(rows.ids)
    for step in range(DECODED_STEPS - 1):
        if step == 1:
            kept = list(range(0, num_rows, 2))
            decoder.keep(kept)
            num_rows = len(kept)
        yield decoder.step([5 + step] * num_rows).float().numpy()


def _export(
    module: torch.nn.Module,
    arguments: tuple[Any, ...],
    dynamic_shapes: dict[str, Any],
    input_names: list[str],
    output_names: list[str],
    folder: Path,
) -> None:
    # One at a time: the exporter changes state of the whole process, and so does the filter on its warnings.
    with _conversion_lock, _quiet_exporter():
        program: Any = torch.onnx.export(
            module.eval(),
            arguments,
            dynamo=True,
            dynamic_shapes=dynamic_shapes,
            input_names=input_names,
            output_names=output_names,
            verbose=False,
        )
        program.save(folder / GRAPH)


_TALKATIVE = {
    "torch.onnx._internal.exporter._registration": logging.ERROR,  # operators of a library that is not used here
    "onnx_ir": logging.WARNING,  # a line for each weight
    "onnxscript": logging.WARNING,
}


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what the exporter and the quantizer say of their own insides, and nothing else."""
    root = logging.getLogger()
    before = {name: logging.getLogger(name).level for name in _TALKATIVE}
    for name, level in _TALKATIVE.items():
        logging.getLogger(name).setLevel(level)
    root.addFilter(_is_no_advice)
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        root.removeFilter(_is_no_advice)
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "pre-processing before quantization" not in str(record.msg)


def _measure(
    reference: list[NDArray[np.float32]],
    answers: Callable[[str], list[NDArray[np.float32]]],
    folder: Path,
    settings: OnnxSettings,
) -> dict[str, Any]:
    """Compare the graph's answers with the model's and, where asked for, make a quantized graph and compare that."""
    differences = [float(np.abs(ours - theirs).max()) for ours, theirs in zip(answers(GRAPH), reference, strict=True)]
    # A NaN anywhere is infinitely wrong; JSON and max() would both let it pass.
    worst = max(value if np.isfinite(value) else float(np.finfo(np.float64).max) for value in differences)
    facts: dict[str, Any] = {"max_difference": worst}
    if settings.enable_quantization:
        _quantize(folder)
        pairs = zip(answers(QUANTIZED_GRAPH), reference, strict=True)
        facts["quantized_cosine"] = min(_least_cosine(ours, theirs) for ours, theirs in pairs)
    return facts


def _quantize(folder: Path) -> None:
    model = onnx.load(folder / GRAPH)
    # The quantizer turns matrices round and then trips over the shapes that were noted for them.
    del model.graph.value_info[:]
    quantizer: Any = quantization  # a module without types
    with _conversion_lock, _quiet_exporter():
        quantizer.quantize_dynamic(
            model, folder / QUANTIZED_GRAPH, per_channel=True, weight_type=quantizer.QuantType.QInt8
        )


def _least_cosine(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """The cosine of the pair of rows that differ most in direction; 0 where one is no number."""
    scale = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return float(np.nan_to_num((ours * theirs).sum(1) / scale).min())
