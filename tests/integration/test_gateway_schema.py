"""Every call that the OpenAPI document allows, and many that it does not: no 5xx, and answers as documented.

The short form makes some hundred calls. `MUAI_TEST_SCHEMA_CALLS=10000` makes about so many.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.gateway_support import GatewayStack, gateway_stack
from tests.load_report import keep_figure

from muai_producers.gateway.reading import MAX_WAIT_S
from muai_producers.keys import Keys, new_key
from muai_producers.store import Store

pytestmark = pytest.mark.redis
CALLS = int(os.environ.get("MUAI_TEST_SCHEMA_CALLS", "60"))
SPARE = 1.15
"""Operations without a body have fewer different calls than are asked for."""
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "ignored_auth",
)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[GatewayStack]:
    gateway = {"require_keys": True, "files": {"folder": str(tmp_path / "files")}}
    models = {  # by the names that the document's examples use
        "all-minilm-l6-v2": {"task": "embedding", "source": "hub:none", "engines": ["fake"]},
        "qwen-chat": {"task": "chat", "source": "hub:none", "engines": ["fake"]},
    }
    with gateway_stack(tmp_path, queue_capacity=2000, sections={"gateway": gateway, "models": models}) as stack:
        stack.start_serving()
        stack.start_gateway()
        yield stack


@pytest.mark.timeout(120 + CALLS)
def test_given_any_calls_then_no_fault_of_ours_and_every_answer_is_as_documented(
    stack: GatewayStack, tmp_path: Path
) -> None:
    paths = httpx.get(f"{stack.url}/openapi.json").json()["paths"]
    generated = fuzz(stack, tmp_path, sum(len(methods) for methods in paths.values()), CALLS)
    keep_figure("schemathesis", calls=generated, operations=sum(len(methods) for methods in paths.values()))
    assert generated >= CALLS


@pytest.mark.timeout(120 + CALLS)
def test_given_an_operators_calls_then_what_runs_the_installation_is_as_documented_too(
    stack: GatewayStack, tmp_path: Path
) -> None:
    paths = httpx.get(f"{stack.url}/openapi.json").json()["paths"]
    num_operations = sum(len(methods) for path, methods in paths.items() if path.startswith("/api/v1/"))
    calls = max(3 * num_operations, CALLS // 2)
    assert fuzz(stack, tmp_path, num_operations, calls, "--include-path-regex", "^/api/v1/", operator=True) >= calls


def fuzz(
    stack: GatewayStack, folder: Path, num_operations: int, calls: int, *options: str, operator: bool = False
) -> int:
    """Make so many calls at least; returns how many were made."""
    key, record = new_key("fuzz", operator=operator)
    Keys(Store(stack.redis.client)).add(record)
    program = Path(sys.executable).with_name("schemathesis")
    assert program.exists() or shutil.which("schemathesis"), "schemathesis is not installed: pip install 'muai[dev]'"
    command = [
        str(program),
        "run",
        f"{stack.url}/openapi.json",
        "--header",
        f"Authorization: Bearer {key}",
        "--checks",
        ",".join(CHECKS),
        "--phases",
        "examples,fuzzing",
        "--max-examples",
        str(max(1, round(SPARE * calls / num_operations))),
        "--seed",
        "20" if CALLS < 1000 else str(os.getpid()),
        "--request-timeout",
        str(MAX_WAIT_S + 30.0),  # a call may wait for its answer
        "--suppress-health-check",
        "all",
        "--continue-on-failure",
        "--no-color",
        "--generation-database",
        "none",
        *options,
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    generated = re.search(r"([0-9]+) generated", done.stdout)
    assert generated is not None, done.stdout[-2000:]
    return int(generated[1])
