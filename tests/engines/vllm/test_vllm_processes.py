"""What a vLLM worker that is killed leaves behind, and who ends it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from tests.transport_support import wait_until

from muai_workers.up.decisions import Role
from muai_workers.up.plan import ProcessSpec
from muai_workers.up.process import SupervisedProcess

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
LIMIT_S = 300.0
PROGRAM = """
import sys, time
from pathlib import Path
from tests import models
from muai_workers.engines.vllm import VLLMEngine

def main():
    spec = models.folder_spec("small", "text-generation", Path(sys.argv[1]))
    engine = VLLMEngine(models.settings([spec], cache={"max_memory_mb": 64}))
    engine.load(spec)
    Path(sys.argv[2]).touch()
    time.sleep(600)

if __name__ == "__main__":
    main()
"""


def test_a_supervisor_ends_what_a_killed_worker_left(tmp_path: Path) -> None:
    from muai_workers.models.tiny import build_tiny_causal

    folder = build_tiny_causal(tmp_path / "model", train=False, context_tokens=128)
    program, loaded = tmp_path / "program.py", tmp_path / "loaded"
    program.write_text(PROGRAM)
    command = (sys.executable, str(program), str(folder), str(loaded))
    process = SupervisedProcess(ProcessSpec("worker-vllm", Role.ENGINE, command))
    output = process.start(time.monotonic(), {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert process.popen is not None
    # vLLM says more than a pipe holds.
    said: list[bytes] = []
    reader = threading.Thread(target=lambda: said.append(output.read()))
    reader.start()
    try:
        wait_until(lambda: loaded.exists() or process.popen is None or process.popen.poll() is not None, LIMIT_S)
        if not loaded.exists():
            process.kill()
            reader.join(timeout=30)
            pytest.fail(b"".join(said).decode(errors="replace")[-4000:])
        family = psutil.Process(process.popen.pid).children(recursive=True)
        assert len(family) >= 2
        os.kill(process.popen.pid, signal.SIGKILL)
        wait_until(lambda: process.ended() is not None, what="the worker's end")
        wait_until(lambda: not any(alive(one) for one in family), what="the end of what it had started")
    finally:
        process.kill()
        reader.join(timeout=30)
        output.close()


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
