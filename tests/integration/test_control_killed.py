"""A control worker that is killed leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from tests.chaos.supervisor import READY, ROOT, child_environment
from tests.transport_support import OwnRedis, wait_until

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]


def test_given_a_control_worker_with_beat_when_killed_then_nobody_keeps_its_output_open(
    clean_redis: OwnRedis, tmp_path: Path
) -> None:
    config_file = tmp_path / "muai.yaml"
    config_file.write_bytes(msgspec.yaml.encode({"queue": {"broker_url": clean_redis.url}}))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.role", "control", str(config_file), "control"],
        env=child_environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    said: list[bytes] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: said.extend(process.stdout), daemon=True)  # type: ignore[arg-type]
    reader.start()
    try:
        wait_until(lambda: any(READY in line for line in said), what="the control worker")
        process.send_signal(signal.SIGKILL)
        process.wait()
        reader.join(10.0)  # the pipe ends when the last process that holds it has ended
        assert not reader.is_alive()
    finally:
        if reader.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            reader.join()
        process.stdout.close()
