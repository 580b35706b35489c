"""One process of MuAI for the suite: `python -m benchmarks.muai_process collector | control | fake | pytorch CONFIG`.

BENCH_FAKE_ENGINE gives the fake engine its options, as JSON.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from muai_batching.app import run_collector
from muai_config import Settings, load_settings
from muai_workers.app import run_control, run_engine_worker
from muai_workers.engines import fake


def main(kind: str, config: str) -> None:
    settings = load_settings(Path(config))
    if kind == "collector":
        run_collector(settings, "bench-collector", log_level="WARNING")
        return
    if kind == "control":
        run_control(settings, "bench-control", log_level="WARNING")
        return
    options = fake.FakeOptions.from_env_value(os.environ.get("BENCH_FAKE_ENGINE", "{}"))

    def create(settings: Settings) -> fake.FakeEngine:
        return fake.FakeEngine(options)

    fake.create = create
    run_engine_worker(settings, kind, f"bench-{kind}", log_level="WARNING")  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
