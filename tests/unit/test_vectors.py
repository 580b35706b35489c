"""Embeddings as they travel."""

from __future__ import annotations

import struct
from base64 import b64encode
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muai_producers.gateway.openai_api.answers import embedding_list
from muai_producers.vectors import as_bytes, from_base64, to_base64, unpack_embedding
from muai_producers.wire import InferenceResult


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=50))
def test_numbers_survive_base64_exactly(vector: list[float]) -> None:
    text = to_base64(as_bytes(vector))
    assert text == b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    assert from_base64(text) == vector


@pytest.mark.parametrize("text", ["no base64!", "AAA", b64encode(b"12345").decode()])
def test_what_is_no_vector_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"base64|padding|bytes|item"):
        from_base64(text)


@pytest.mark.parametrize("outputs", [{"text": "AAAA"}, {"labels": []}, {"embedding": [0.5]}, {}])
def test_outputs_without_base64_stay_as_they_are(outputs: dict[str, Any]) -> None:
    before = dict(outputs)
    unpack_embedding(outputs)
    assert outputs == before


@pytest.mark.parametrize("stored", ["float", "base64"])
@pytest.mark.parametrize("asked", ["float", "base64"])
def test_openai_clients_get_what_they_ask_for_however_it_is_stored(stored: str, asked: str) -> None:
    vector, packed = [0.5, -2.0], to_base64(as_bytes([0.5, -2.0]))
    result = InferenceResult(
        outputs={"embedding": packed if stored == "base64" else vector},
        engine_used="onnx",
        latency_ms=1.0,
        batch_size=1,
        cache_hit=False,
        metadata={},
    )
    (given_out,) = embedding_list("m", [result], asked).data
    assert given_out.embedding == (packed if asked == "base64" else vector)
