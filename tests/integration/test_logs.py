"""The logs of a whole installation: every line readable by machines, none with what does not belong in it; and a full
disk, which no request notices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from celery import Celery
from tests.traced_stack import TracedStack
from tests.tracing_support import grpc_receiver
from tests.transport_support import ROOT, free_port, own_redis, wait_until

from muai_config import build_settings
from muai_producers import InferenceClient
from muai_producers.errors import EnginesExhaustedError

pytestmark = [pytest.mark.redis, pytest.mark.timeout(240)]
PASSWORD = "planted-pass-7319"
PROMPT = "QUOTE the confidential merger of Initech and Initrode"
KEY = f"muai_0123456789ab_{'planted' * 6}x"


def _lines(folder: Path) -> list[dict[str, Any]]:
    found = []
    for file in sorted(folder.glob("*.log")):
        for line in file.read_text().splitlines():
            try:
                found.append({**json.loads(line), "file": file.name})
            except json.JSONDecodeError:
                pytest.fail(f"{file.name} has a line that is no JSON: {line[:300]}")
    return found


def test_Given_a_stack_in_trouble_Then_each_line_is_JSON_says_whose_it_is_and_gives_nothing_away(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "logs"
    with own_redis(tmp_path) as redis, grpc_receiver() as (endpoint, inbox):
        redis.client.config_set("requirepass", PASSWORD)
        url = f"redis://:{PASSWORD}@127.0.0.1:{redis.port}/0"
        stack = TracedStack(tmp_path, url, url, endpoint, logs={"format": "json", "folder": str(folder)})
        try:
            stack.start()
            with InferenceClient(stack.settings) as client:
                request_id = client.submit("plain", PROMPT, tenant="shop")
                with pytest.raises(EnginesExhaustedError) as caught:
                    client.result(request_id, timeout_s=40)
                assert PROMPT[:15] in str(caught.value.details), "whoever asked is told all of it"
            _misuse(stack)
            wait_until(lambda: inbox.of_request(request_id), what="the request's spans")
            spans = str(inbox.now())
            redis.kill()
            quiet = ("the state store does not answer", "cannot hear", "watching the fleet", "could not announce")
            wait_until(lambda: any(text in stack.logs() for text in quiet), what="complaints about Redis")
        finally:
            stack.stop()
        lines = _lines(folder)
        everything = stack.logs() + "".join(file.read_text() for file in folder.iterdir()) + spans
    for planted in (PASSWORD, "confidential merger", "Initrode", "planted" * 6):
        assert planted not in everything, planted
    assert {line["file"].split("-")[0].removesuffix(".log") for line in lines} >= {"c1", "k1", "w1", "w2", "gateway"}
    about = [line for line in lines if line.get("request_id") == request_id]
    failed = [line for line in about if line["message"].startswith(f"request {request_id} failed")]
    assert {"model_name": "plain", "engine": "onnx", "tenant": "shop"}.items() <= failed[0].items()
    assert failed[0]["batch_id"]
    assert failed[0]["batch_size"] == 1
    assert len(failed[0]["trace_id"]) == 32
    assert failed[0]["error_type"] == "EnginesExhaustedError"
    assert "[withheld]" in failed[0]["message"]
    assert any(line["logger"] == "some.library" and line["batch_id"] for line in about), "a library's line too"
    assert any(line["logger"].startswith("uvicorn") for line in lines)
    assert any(line["logger"].startswith("celery") for line in lines)


def _misuse(stack: TracedStack) -> None:
    """What goes wrong in other ways: a key, bodies and messages that are none."""
    url = f"http://127.0.0.1:{stack.port}"
    headers = {"Authorization": f"Bearer {KEY}"}
    httpx.post(f"{url}/v1/inference", json={"model": "plain", "inputs": 7, "prompt": PROMPT}, headers=headers)
    httpx.post(f"{url}/v1/inference", content=PROMPT.encode(), headers={"Content-Type": "application/json"})
    httpx.post(f"{url}/v1/inference?wait=20", json={"model": "unloadable", "inputs": PROMPT}, timeout=30)
    queue = stack.settings.queue
    app = Celery("shop", broker=queue.broker_url, backend=queue.state_url, set_as_current=False)
    app.send_task("muai.infer", args=[PROMPT], queue="inference")
    app.send_task("muai.infer", kwargs={"model": "plain", "inputs": PROMPT}, queue="inference")
    app.send_task("no.such.task", args=[PROMPT], queue="inference")
    app.close()


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A disk of so many megabytes; where none can be mounted, a skip on a laptop and a failure in CI."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False) if os.geteuid() == 0 else None
    if done is None or done.returncode:
        reason = "a small disk cannot be mounted here: " + ("not root" if done is None else done.stderr.strip())
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill(folder: Path) -> None:
    """Leave nothing free."""
    with (folder / "somebody-elses").open("wb", buffering=0) as file:
        for size in (65_536, 4_096, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                continue


def test_Given_a_disk_that_fills_up_Then_old_logs_go_an_alert_is_raised_and_requests_go_on(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 8) as disk, own_redis(tmp_path) as redis:
        logs = disk / "logs"
        logs.mkdir()
        (logs / "w9.log.1").write_bytes(b"x" * 2_000_000)
        (logs / "w9.log.2").write_bytes(b"x" * 2_000_000)
        an_hour_ago_s = time.time() - 3600
        os.utime(logs / "w9.log.2", (an_hour_ago_s, an_hour_ago_s))
        config = tmp_path / "muai.yaml"
        document = {
            "queue": {"broker_url": redis.url},
            "monitoring": {
                "tracing": {"enabled": False},
                "prometheus": {"enabled": False},
                "server": {"port": free_port(), "queue_capacity": 10_000},
                "logs": {"folder": str(logs), "min_free_mb": 1, "contents": True},
            },
            "models": {"plain": {"task": "chat", "source": "hub:none", "engines": ["fake"]}},
        }
        config.write_bytes(msgspec.yaml.encode(document))
        packages = os.pathsep.join(str(ROOT / part) for part in ("config", "producers", "batching", "workers", "."))
        env = {**os.environ, "PYTHONPATH": packages, "MUAI_CONFIG": str(config), "MUAI_HOME": str(disk)}
        output = tmp_path / "worker.out"
        commands = [
            ["-m", "muai_producers", "collector", "--name", "c1"],
            ["-m", "tests.stand_in", "fake", "w1", "{}"],
        ]
        with output.open("wb") as stream:
            processes = [
                subprocess.Popen([sys.executable, *command], env=env, cwd=ROOT, stdout=stream, stderr=stream)
                for command in commands
            ]
        try:
            with InferenceClient(build_settings(document, {})) as client:
                client.infer("plain", "before", timeout_s=90)
                _fill(disk)
                ids = client.submit_many({"model": "plain", "inputs": f"while full {n}"} for n in range(300))
                outcomes = dict(client.results(ids, timeout_s=60))
                assert all(not isinstance(one, Exception) for one in outcomes.values())
                wait_until(lambda: not (logs / "w9.log.2").exists(), 60, "the oldest log to go")
                assert (logs / "w9.log.1").exists(), "no more goes than what is needed"
                wait_until(lambda: "the disk is full" in output.read_text(), what="the alert")
                client.infer("plain", "after", timeout_s=60)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(20)
        said = output.read_text()
        assert "MB freed (old logs)" in said
        assert "Logging error" not in said, "each line that does not fit would be two on stderr"
        assert said.count("the disk is full (") <= 2 * len(commands) * 2, "said once for each that did something"
