"""PyTorch on models of every kind, beyond what all engines share."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from tests import models

from muai_config import ModelSpec
from muai_producers.errors import InferenceFailedError, ModelLoadError, OutOfMemoryError, UnsupportedTaskError
from muai_workers.engines.base import EngineOutput
from muai_workers.engines.pytorch import PyTorchEngine

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def engine() -> PyTorchEngine:
    return PyTorchEngine(models.settings())


def outputs(engine: PyTorchEngine, spec: ModelSpec, texts: list[str], **parameters: object) -> list[EngineOutput]:
    requests = [models.request(str(index), spec, text, **parameters) for index, text in enumerate(texts)]
    completions = {one.request_id: one for one in engine.run(spec, spec.task, requests)}
    return [completions[one.id].output for one in requests]  # type: ignore[misc]


def test_summaries_do_not_depend_on_the_batch(engine: PyTorchEngine) -> None:
    spec = models.folder_spec("tiny-seq2seq", "summarization", models.seq2seq_folder(), max_new_tokens=8)
    together = outputs(engine, spec, list(models.SENTENCES))
    alone = [outputs(engine, spec, [text])[0] for text in models.SENTENCES]
    assert [one.outputs for one in together] == [one.outputs for one in alone]
    assert {one.outputs["finish_reason"] for one in together} <= {"stop", "length"}


def test_generation_equals_that_of_transformers(engine: PyTorchEngine) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = models.causal_folder()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    spec = models.folder_spec("tiny-causal", "text-generation", folder)
    prompts = ["The river", "Many small jobs are", "xyz"]
    for prompt, ours in zip(prompts, outputs(engine, spec, prompts, max_tokens=20), strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        mask = torch.ones_like(ids)
        theirs = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
        assert ours.outputs["text"] == tokenizer.decode(theirs, skip_special_tokens=True)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_the_number_format_is_that_of_the_catalog_and_reported(engine: PyTorchEngine, dtype: str) -> None:
    spec = models.encoder_spec(dtype=dtype)
    engine.unload(spec.name)
    (output,) = outputs(engine, spec, ["A cat sleeps."])
    assert output.extra["dtype"] == dtype
    assert engine.estimate_memory_bytes(spec) == pytest.approx(22.7e6 * (4 if dtype == "fp32" else 2), rel=0.01)
    engine.unload(spec.name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_computed_as_configured_and_says_the_same(engine: PyTorchEngine, attention: str) -> None:
    spec = models.folder_spec("tiny-causal", "text-generation", models.causal_folder())
    other = PyTorchEngine(models.settings(pytorch={"attention": attention}))
    prompts = ["The river", "Many small jobs are"]
    ours = outputs(other, spec, prompts, max_tokens=12)
    assert [one.outputs for one in ours] == [one.outputs for one in outputs(engine, spec, prompts, max_tokens=12)]
    assert ours[0].extra["attention"] == attention


def test_attention_whose_package_is_absent_is_a_load_error() -> None:
    spec = models.folder_spec("tiny-causal", "text-generation", models.causal_folder())
    with pytest.raises(ModelLoadError, match="FlashAttention2"):
        PyTorchEngine(models.settings(pytorch={"attention": "flash_attention_2"})).load(spec)


def test_a_model_whose_code_is_not_trusted_is_not_run(engine: PyTorchEngine, tmp_path: Path) -> None:
    for file in models.classifier_folder().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('this code ran')\n")
    with pytest.raises(ModelLoadError):
        engine.load(models.folder_spec("own", "text-classification", tmp_path))


# The compiler itself uses what torch has deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_a_compiled_model_says_the_same(engine: PyTorchEngine) -> None:
    spec = models.folder_spec("tiny-classifier", "text-classification", models.classifier_folder())
    compiled = PyTorchEngine(models.settings(pytorch={"compile": True}))
    texts = ["what a wonderful film", "terrible"]
    (ours, theirs) = (outputs(one, spec, texts) for one in (compiled, engine))
    assert ours[0].extra["compiled"] is True
    for mine, plain in zip(ours, theirs, strict=True):
        assert mine.outputs["labels"][0]["label"] == plain.outputs["labels"][0]["label"]
        assert mine.outputs["labels"][0]["score"] == pytest.approx(plain.outputs["labels"][0]["score"], abs=1e-4)


def test_pooling_and_normalisation_follow_the_catalog(engine: PyTorchEngine) -> None:
    vectors = {}
    for pooling, normalize in (("mean", True), ("mean", False), ("cls", True)):
        source = str(models.encoder_spec().source)
        spec = models.model_spec(f"{pooling}-{normalize}", "embedding", source, pooling=pooling, normalize=normalize)
        vectors[pooling, normalize] = np.array(outputs(engine, spec, ["A cat sleeps."])[0].outputs["embedding"])
        engine.unload(spec.name)
    plain = vectors["mean", False]
    assert np.allclose(plain / np.linalg.norm(plain), vectors["mean", True], atol=1e-6)
    assert np.linalg.norm(plain) != pytest.approx(1.0, abs=0.01)
    assert not np.allclose(vectors["cls", True], vectors["mean", True], atol=0.01)


def test_a_model_without_a_chat_template_does_not_chat(engine: PyTorchEngine, tmp_path: Path) -> None:
    for file in models.causal_folder().iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    spec = models.folder_spec("no-template", "text-generation", tmp_path)
    request = models.request("chat", spec, [{"role": "user", "content": "Hello!"}], task="chat")
    (completion,) = engine.run(spec, "chat", [request])
    assert isinstance(completion.error, UnsupportedTaskError)
    assert "no chat template" in str(completion.error)


def test_weights_that_are_not_safetensors_are_not_read(engine: PyTorchEngine, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((models.causal_folder() / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle may hold code")
    with pytest.raises(ModelLoadError, match=r"no \.safetensors weights"):
        engine.load(models.folder_spec("pickled", "text-generation", tmp_path))


def test_too_little_memory_is_told_apart_from_other_failures(
    engine: PyTorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    spec = models.encoder_spec()
    engine.load(spec)

    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    monkeypatch.setattr(torch, "from_numpy", exhausted)
    with pytest.raises(OutOfMemoryError):
        list(engine.run(spec, "embedding", [models.request("one", spec, "A cat sleeps.")]))


def _build_all(folder: Path) -> None:
    import torch

    from muai_workers.models.tiny import build_tiny_causal, build_tiny_classifier, build_tiny_seq2seq

    torch.set_num_threads(1)
    build_tiny_causal(folder / "causal", train=False)
    build_tiny_classifier(folder / "classifier")
    build_tiny_seq2seq(folder / "seq2seq")


def test_tiny_models_are_the_same_in_every_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_build_all, args=(tmp_path / name,)) for name in ("first", "second")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=100)
    first, second = tmp_path / "first", tmp_path / "second"
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len([file for file in files if file.suffix == ".safetensors"]) == 3
    assert [file for file in files if (first / file).read_bytes() != (second / file).read_bytes()] == []


def test_a_cut_prompt_leaves_room_for_its_answer(engine: PyTorchEngine) -> None:
    spec = models.folder_spec("tiny-causal", "text-generation", models.causal_folder())
    prompt = "The bread is good. " * 60 + "The train leaves the city"
    (output,) = outputs(engine, spec, [prompt], truncate=True, max_tokens=20)
    assert output.input_tokens == 96 - 20
    assert 1 < output.output_tokens <= 20


def test_an_answer_of_nan_fails_its_own_request_only(engine: PyTorchEngine, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    for file in models.classifier_folder().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    spec = models.folder_spec("overflowing", "text-classification", tmp_path)
    broken_id = AutoTokenizer.from_pretrained(tmp_path)("terrible", add_special_tokens=False)["input_ids"][0]
    weights["bert.embeddings.word_embeddings.weight"][broken_id] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    requests = [models.request(text, spec, text) for text in ("a terrible film", "a lovely film")]
    completions = {one.request_id: one for one in engine.run(spec, spec.task, requests)}
    assert isinstance(completions["a terrible film"].error, InferenceFailedError)
    assert completions["a lovely film"].output is not None
