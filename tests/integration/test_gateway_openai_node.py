"""OpenAI's own JavaScript client against a gateway, a collector and a worker."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from tests.gateway_support import gateway_stack
from tests.node_support import node_script

pytestmark = [pytest.mark.redis, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return node_script(tmp_path_factory, "openai.mjs")


def test_given_the_javascript_client_then_answers_streams_embeddings_models_and_errors_are_as_it_expects(
    script: Path, tmp_path: Path
) -> None:
    with gateway_stack(tmp_path) as stack:
        document = yaml.safe_load(stack.config.read_text())
        document["models"]["vectors"] = {"task": "embedding", "source": "hub:none", "engines": ["fake"]}
        stack.config.write_text(yaml.safe_dump(document))
        stack.start_serving()
        stack.start_gateway()
        environment = {**os.environ, "MUAI_URL": stack.url}
        done = subprocess.run(
            ["node", str(script)], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["content"] == seen["streamed"] == "three two one"
    assert seen["numChunks"] >= 4
    assert seen["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert seen["dimensions"] == [8, 8]
    assert {"chatty", "vectors"} <= set(seen["models"])
    assert seen["error"] == {
        "kind": "BadRequestError",
        "status": 400,
        "code": "invalid_request",
        "param": "temperature",
    }
