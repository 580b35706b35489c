"""Advice on a vLLM server that runs: its metrics have the names that are read, in the version that is installed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from tests import models
from tests.transport_support import free_port, wait_until

from muai_config import build_settings
from muai_producers.advice.bottlenecks import bottlenecks
from muai_producers.advice.engine import plan_of
from muai_producers.advice.scraping import scrape, target_of
from muai_producers.advice.situation import Situation
from muai_producers.advice.vllm_metrics import COUNTERS, GAUGES, HISTOGRAMS, read_metrics, with_scrape

pytestmark = pytest.mark.engine
START_LIMIT_S = 200.0
ADVICE = build_settings({}, {}).gateway.advice


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    from muai_workers.models.tiny import build_tiny_causal

    folder = build_tiny_causal(models.scratch_folder() / "vllm-advice", train=False, context_tokens=512)
    port, log = free_port(), tmp_path_factory.mktemp("vllm") / "server.log"
    options = ["--dtype", "float32", "--block-size", "32", "--kv-cache-memory-bytes", "67108864", "--enforce-eager"]
    options += ["--max-num-seqs", "2", "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    with log.open("wb") as output:
        server = subprocess.Popen([*program, *options], stdout=output, stderr=output)
    try:
        wait_until(lambda: server.poll() is not None or answers(port), START_LIMIT_S, "the server")
        assert server.poll() is None, log.read_text()[-5000:]
        yield port
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False


def complete(port: int, number: int) -> None:
    body = {"model": "tiny", "prompt": f"In the garden {number} ", "max_tokens": 60, "ignore_eos": True}
    response = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=120.0)
    assert response.status_code == 200, response.text


@pytest.mark.timeout(400)
def test_given_a_server_with_more_requests_than_places_then_its_metrics_show_the_queue_and_the_plan_makes_places(
    port: int,
) -> None:
    for number in range(2):
        complete(port, number)
    target = target_of(f"127.0.0.1:{port}", ADVICE)
    base = Situation(f"127.0.0.1:{port}", "vllm", False, "vllm", config={"max_num_seqs": 2})
    with ThreadPoolExecutor(24) as pool:
        calls = [pool.submit(complete, port, number) for number in range(24)]
        seen: list[Situation] = []

        def is_full() -> bool:
            seen.append(with_scrape(base, read_metrics(scrape(target, 5.0))))
            return (seen[-1].waiting or 0) >= 8 and seen[-1].running == 2

        wait_until(is_full, 60.0, "a queue")
        for call in calls:
            call.result()
    full = seen[-1]
    assert "queueing" in {one.kind for one in bottlenecks(full)}
    plan = plan_of(full, "")
    assert plan.batching_config is not None
    assert plan.batching_config.max_batch_size == 4


def test_given_a_server_then_every_figure_that_is_read_of_one_is_there(port: int) -> None:
    complete(port, 1)
    found = read_metrics(scrape(target_of(f"127.0.0.1:{port}", ADVICE), 5.0))
    assert found.model == "tiny"
    assert {*GAUGES, *COUNTERS} <= set(found.values)
    assert set(HISTOGRAMS) == set(found.means)
    assert all(count > 0 for _, count in found.means.values())
    situation = with_scrape(Situation("x", "vllm", False, "vllm"), found)
    assert situation.kv_bytes_per_token == 2048, "4 layers, 2 heads of 32, keys and values, 4 bytes each"
    assert situation.prefix_caching is True


def test_the_recorded_page_is_like_the_one_that_the_server_sends(port: int) -> None:
    recorded = read_metrics((Path(__file__).parents[2] / "data" / "vllm_metrics.txt").read_text(encoding="utf-8"))
    found = read_metrics(scrape(target_of(f"127.0.0.1:{port}", ADVICE), 5.0))
    assert set(recorded.values) == set(found.values)
    assert set(recorded.means) == set(found.means)
    assert set(recorded.cache) == set(found.cache)
