"""`python -m tests.stand_in ENGINE NAME OPTIONS`: a worker of that engine's queue, run by a fake engine."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from muai_config import load_settings
from muai_workers import app, engine_worker
from muai_workers.engines.fake import FakeEngine, FakeOptions


class QuotingEngine(FakeEngine):
    """As engines' libraries do, it quotes in its errors what it was given, and says so in a line of its own."""

    def _misbehave(self, texts: Sequence[str]) -> None:
        for text in texts:
            if "QUOTE" in text:
                logging.getLogger("some.library").warning("strange input: %r", text)
                raise ValueError(f"cannot tokenise {text[:60]!r} of {len(text)} characters")
        super()._misbehave(texts)


def main() -> None:
    engine, name, options = sys.argv[1:]
    engine_worker.create_engine = lambda *_: QuotingEngine(FakeOptions.from_env_value(options), name=engine)
    app.run_engine_worker(load_settings(), engine, name)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
