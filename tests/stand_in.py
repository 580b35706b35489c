"""`python -m tests.stand_in ENGINE NAME OPTIONS`: a worker of that engine's queue, run by a fake engine."""

from __future__ import annotations

import sys

from muai_config import load_settings
from muai_workers import app, engine_worker
from muai_workers.engines.fake import FakeEngine, FakeOptions


def main() -> None:
    engine, name, options = sys.argv[1:]
    engine_worker.create_engine = lambda *_: FakeEngine(FakeOptions.from_env_value(options), name=engine)
    app.run_engine_worker(load_settings(), engine, name)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
