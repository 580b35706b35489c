"""A large batch beside people who wait for answers, and `kill -9` of everything in its middle.

The short form has some thousand lines and looks at what must hold on any machine. `make test-load` has 50,000 lines in
200 MB, and looks at the times as well: it wants a machine that does nothing else.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from openai.types import Batch
from tests.http_support import Load, steady_load
from tests.load_report import keep_figure
from tests.transport_support import wait_until
from tests.up_support import Up

IS_LONG = os.environ.get("MUAI_TEST_LOAD") == "long"
LINES, LINE_BYTES = (50_000, 3900) if IS_LONG else (1500, 300)
LOAD_S, RATE_PER_S = (30.0, 40.0) if IS_LONG else (4.0, 20.0)
MAX_GATEWAY_MB, MAX_RATIO = 300.0, 1.2
FAKE = {"latency_per_batch_ms": 10.0, "latency_per_request_ms": 1.0}
pytestmark = [pytest.mark.redis, pytest.mark.timeout(1800 if IS_LONG else 240)]


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    models = {"vectors": {"task": "embedding", "source": "hub:none", "engines": ["fake"]}}
    up = Up(tmp_path, sections={"models": models, "queue": {"lease_ttl_s": 3.0}}, fake=FAKE)
    try:
        up.wait_for_gateway()
        yield up
    finally:
        up.stop()


def peak_mb(pid: int) -> float:
    """The most memory that a process has had resident."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def write_input(path: Path) -> None:
    padding = "x" * (LINE_BYTES - 150)
    with path.open("w") as file:
        for number in range(LINES):
            body = {"model": "vectors", "input": f"{number} {padding}"}
            file.write(
                json.dumps({"custom_id": f"line-{number}", "method": "POST", "url": "/v1/embeddings", "body": body})
            )
            file.write("\n")


def interactive(up: Up, seconds: float = LOAD_S) -> Load:
    load = asyncio.run(
        steady_load(up.port, RATE_PER_S, lambda s: s > seconds, lambda n: {"model": "vectors", "inputs": f"hello {n}"})
    )
    assert load.problems == []
    return load


def completed(client: OpenAI, batch: Batch) -> int:
    counts = client.batches.retrieve(batch.id).request_counts
    return 0 if counts is None else counts.completed


def test_given_a_large_batch_then_it_keeps_out_of_the_way_and_survives_the_death_of_everything(
    up: Up, tmp_path: Path
) -> None:
    input_file = tmp_path / "input.jsonl"
    write_input(input_file)
    interactive(up, 2.0)
    before = interactive(up)
    client = OpenAI(base_url=f"{up.url}/v1", api_key="none", timeout=120.0)
    with input_file.open("rb") as content:
        file = client.files.create(file=content, purpose="batch")
    assert file.bytes == input_file.stat().st_size
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    wait_until(lambda: completed(client, batch) > 0, 60.0, "the first lines")
    beside = interactive(up)
    assert 0 < completed(client, batch) < LINES
    peaks = [peak_mb(up.pid_of("gateway"))]
    alone_from, began_s = completed(client, batch), time.monotonic()
    wait_until(lambda: completed(client, batch) > LINES // 2, 600.0, "half of the lines")
    lines_per_s = (completed(client, batch) - alone_from) / (time.monotonic() - began_s)

    up.kill_everything()
    up.start()
    up.wait_for_gateway()
    wait_until(lambda: client.batches.retrieve(batch.id).status == "completed", 900.0, "the batch to complete")
    ended = client.batches.retrieve(batch.id)
    assert ended.request_counts is not None
    assert (ended.request_counts.completed, ended.request_counts.failed) == (LINES, 0)
    with client.files.with_streaming_response.content(ended.output_file_id or "") as answer:
        seen: Counter[Any] = Counter(json.loads(line)["custom_id"] for line in answer.iter_lines())
    assert seen == Counter(f"line-{number}" for number in range(LINES))
    after = interactive(up)
    peaks.append(peak_mb(up.pid_of("gateway")))
    client.close()

    p95_ms = [load.percentile_ms(0.95) for load in (before, beside, after)]
    without_ms = (p95_ms[0] + p95_ms[2]) / 2
    keep_figure(
        "batch",
        lines=LINES,
        megabytes=round(input_file.stat().st_size / 1e6),
        gateway_peak_mb=round(max(peaks), 1),
        p95_without_ms=round(without_ms, 1),
        p95_beside_ms=round(p95_ms[1], 1),
        lines_per_s_alone=round(lines_per_s),
    )
    assert max(peaks) < MAX_GATEWAY_MB
    if IS_LONG:
        assert p95_ms[1] <= MAX_RATIO * without_ms, p95_ms
