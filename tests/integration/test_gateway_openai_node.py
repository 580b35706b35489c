"""OpenAI's own JavaScript client against a gateway, a collector and a worker."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from tests.gateway_support import gateway_stack
from tests.transport_support import ROOT

pytestmark = [pytest.mark.redis, pytest.mark.timeout(240)]
CLIENTS = ROOT / "tests" / "clients"
OLDEST_NODE = 18
INSTALL_LIMIT_S = 120


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script beside an installed client; skips where that cannot be had."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not there (Debian: apt install nodejs npm)")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.lstrip("v").partition(".")[0]) < OLDEST_NODE:
        pytest.skip(f"node is {version}, the client wants {OLDEST_NODE}")
    if (CLIENTS / "node_modules" / "openai").is_dir():
        return CLIENTS / "openai.mjs"
    folder = tmp_path_factory.mktemp("clients")
    for name in ("package.json", "package-lock.json", "openai.mjs"):
        shutil.copy(CLIENTS / name, folder)
    command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=1"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm did not install the client within {INSTALL_LIMIT_S} s")
    if done.returncode:
        pytest.skip(f"npm cannot install the client: {done.stderr.strip()[-300:]}")
    return folder / "openai.mjs"


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
