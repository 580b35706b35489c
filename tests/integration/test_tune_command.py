"""`muai tune` as people run it: an installation of its own, interrupted, taken up again, and what it leaves."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.transport_support import wait_until

from muai_config import build_settings
from muai_workers.tuning.sweep import Header

pytestmark = pytest.mark.redis
CONFIG = "models: {m: {task: text-classification, source: 'hub:none', engines: [fake]}}"
CURVE = {"latency_per_request_ms": 1.0, "latency_per_batch_ms": 20.0}
LOADS = "0.3,0.35,0.4,0.45,0.5"
COMMAND = ["tune", "--model", "m", "--target-p95-ms", "400", "--sizes", "1,32", "--timeouts", "adaptive"]


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    config = folder / "muai.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if not name.startswith("MUAI_")}
    env |= {"MUAI_CONFIG": str(config), "MUAI_TEST_FAKE_ENGINE": json.dumps(CURVE), "COLUMNS": "120"}
    command = [sys.executable, "-m", "muai_producers", *COMMAND, "--seconds", "1", "--output", str(folder / "out")]
    return subprocess.Popen(
        [*command, *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    )


def test_given_a_sweep_that_is_interrupted_then_the_same_command_goes_on_and_finds_what_the_curve_says(
    tmp_path: Path,
) -> None:
    kept = tmp_path / "out" / "measurements.jsonl"
    with start(tmp_path, "--no-plot", "--loads", LOADS) as first:
        wait_until(lambda: kept.exists() and len(kept.read_bytes().splitlines()) >= 3, 100, "a measurement")
        first.send_signal(signal.SIGINT)
        _, told = first.communicate(timeout=60)
    assert first.returncode == 130, told
    assert "measurements are kept, and the same command goes on" in told
    before = kept.read_bytes()

    with start(tmp_path, "--no-plot", "--loads", LOADS) as second:
        output, told = second.communicate(timeout=110)
    assert second.returncode == 0, told + output
    assert "measurements are there already" in told
    assert kept.read_bytes().startswith(before), "nothing is measured twice"
    # Batches of one serve 48 a second, of 32 more than 600: the curve leaves no doubt.
    assert "best: 32 x adaptive" in output
    document = yaml.safe_load((tmp_path / "out" / "tuned.yaml").read_text(encoding="utf-8"))
    assert build_settings(document, {}).optimization.batcher.max_batch_size == 32
    told_json = json.loads((tmp_path / "out" / "measurements.json").read_text(encoding="utf-8"))
    assert Header(**told_json["sweep"]).engine == "fake"
    assert 100 < told_json["saturation_rps"] < 700
    with (tmp_path / "out" / "measurements.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    small = [row for row in rows if row["candidate"] == "1 x adaptive"]
    assert [row["load"] for row in small] == ["0.3"], "it cannot bear the lowest load, so no higher one was tried"
    assert float(small[0]["p95_ms"]) > 400

    pytest.importorskip("matplotlib")
    with start(tmp_path, "--loads", LOADS) as third:
        output, told = third.communicate(timeout=110)
    assert third.returncode == 0, told
    assert (tmp_path / "out" / "goodput.png").read_bytes().startswith(b"\x89PNG")
