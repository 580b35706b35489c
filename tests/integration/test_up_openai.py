"""OpenAI's own clients, Python's and JavaScript's, against `muai up`, with no change but the base URL."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator

import pytest
from openai import OpenAI
from tests.node_support import node_script
from tests.up_support import Up

pytestmark = [pytest.mark.redis, pytest.mark.timeout(240)]
MODELS = {
    "chatty": {"task": "chat", "source": "hub:none", "engines": ["fake"]},
    "vectors": {"task": "embedding", "source": "hub:none", "engines": ["fake"]},
}
WORDS, ANSWER = "one two three", "three two one"
USAGE = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    up = Up(tmp_path_factory.mktemp("openai"), sections={"models": MODELS}, fake={"latency_per_piece_ms": 10.0})
    try:
        up.wait_for_gateway()
        yield up
    finally:
        up.stop()


def test_given_the_python_client_then_answers_streams_and_embeddings_are_as_it_expects(up: Up) -> None:
    with OpenAI(base_url=f"{up.url}/v1", api_key="none", max_retries=0, timeout=60.0) as client:
        answer = client.chat.completions.create(model="chatty", messages=[{"role": "user", "content": WORDS}])
        assert answer.choices[0].message.content == ANSWER
        assert answer.usage is not None
        assert answer.usage.model_dump(include=set(USAGE)) == USAGE
        stream = client.chat.completions.create(
            model="chatty", messages=[{"role": "user", "content": WORDS}], stream=True
        )
        texts = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(texts) == ANSWER
        assert len(texts) >= 4
        embeddings = client.embeddings.create(model="vectors", input=["one", "two"])
        assert [(one.index, len(one.embedding)) for one in embeddings.data] == [(0, 8), (1, 8)]


def test_given_the_javascript_client_then_answers_streams_embeddings_models_and_errors_are_as_it_expects(
    up: Up, tmp_path_factory: pytest.TempPathFactory
) -> None:
    script = node_script(tmp_path_factory, "openai.mjs")
    environment = {**os.environ, "MUAI_URL": up.url}
    done = subprocess.run(
        ["node", str(script)], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["content"] == seen["streamed"] == ANSWER
    assert seen["numChunks"] >= 4
    assert seen["usage"] == USAGE
    assert seen["dimensions"] == [8, 8]
    assert {"chatty", "vectors"} <= set(seen["models"])
    assert seen["error"] == {
        "kind": "BadRequestError",
        "status": 400,
        "code": "invalid_request",
        "param": "temperature",
    }
