"""Conversations on an engine of MuAI, BENCH_ENGINE, without any queue. Commands as in `driver.py`, others by name."""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil

from muai_config import ModelSpec, Settings
from muai_producers.wire import InferenceRequest, Parameters
from muai_workers.engines.base import Completion, Engine
from muai_workers.engines.registry import create_engine
from muai_workers.models.tiny import build_tiny_causal
from muai_workers.models.tiny_texts import DIALOGUES, PROSE

FOLDER = Path(os.environ["BENCH_FOLDER"])
CONTEXT_TOKENS = 2048
ANSWER_TOKENS = 16
MB = 1_000_000


class Chats:
    def __init__(self) -> None:
        folder = build_tiny_causal(FOLDER / "model", context_tokens=CONTEXT_TOKENS)
        self.spec = ModelSpec.model_validate({"name": "chat", "task": "chat", "source": f"folder:{folder}"})
        self.cached, self.fresh = self._engine(), self._engine(enabled=False)
        for engine in (self.cached, self.fresh):
            self._turn(engine, [{"role": "user", "content": "Hello!"}], "warm-up")

    def chat(self, number: int, turns: int, history_tokens: int) -> dict[str, Any]:
        """A conversation; times to first token, turn by turn, with the cache and without."""
        chosen = random.Random(number)
        messages = [{"role": "user", "content": self._history(chosen, history_tokens)}]
        cached_ms, fresh_ms, told = [], [], []
        identical = True
        for turn in range(turns):
            if turn:
                messages.append({"role": "user", "content": chosen.choice(DIALOGUES)[0]})
            ours_ms, ours = self._turn(self.cached, messages, f"chat {number}")
            theirs_ms, theirs = self._turn(self.fresh, messages, f"chat {number}")
            assert ours.output is not None
            assert theirs.output is not None
            identical = identical and ours.output.outputs == theirs.output.outputs
            assert ours.output.cache_hit == (turn > 0)
            cached_ms.append(ours_ms)
            fresh_ms.append(theirs_ms)
            told.append(ours.output.input_tokens)
            messages.append({"role": "assistant", "content": ours.output.outputs["text"]})
        self.cached.end_conversation("default", f"chat {number}")
        return {"cached_ms": cached_ms, "fresh_ms": fresh_ms, "identical": identical, "history_tokens": told[0]}

    def budget(self, conversations: int, room_for: int) -> dict[str, Any]:
        """As many conversations, one turn each, with memory for `room_for` of them."""
        messages = [{"role": "user", "content": self._history(random.Random(0), 1000)}]
        self._turn(self.cached, messages, "measure")
        one = self.cached.cache_statistics()[self.spec.name].used_bytes
        self.cached.end_conversation("default", "measure")
        max_memory_mb = -(-one * room_for // MB)
        engine = self._engine(max_memory_mb=max_memory_mb)
        most = full_at = 0
        for number in range(conversations):
            self._turn(engine, messages, f"conversation {number}")
            statistics = engine.cache_statistics()[self.spec.name]
            most = max(most, statistics.used_bytes)
            if statistics.evictions and not full_at:
                full_at = _resident_bytes()
        return {
            "conversation_bytes": one,
            "budget_bytes": max_memory_mb * MB,
            "most_bytes": most,
            "entries": statistics.entries,
            "evictions": statistics.evictions,
            "grown_bytes": _resident_bytes() - full_at,
            "unbounded_bytes": one * conversations,
        }

    def _engine(self, **cache: Any) -> Engine:
        onnx = {"cache_dir": str(FOLDER / "onnx")}
        settings = Settings.model_validate({"optimization": {"cache": cache, "onnx": onnx}})
        engine = create_engine(os.environ["BENCH_ENGINE"], settings)
        engine.load(self.spec)
        return engine

    def _history(self, chosen: random.Random, tokens: int) -> str:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.spec.source.local_folder())
        words: list[str] = []
        while len(tokenizer(" ".join(words))["input_ids"]) < tokens:
            words.append(chosen.choice(PROSE))
        return " ".join(words)

    def _turn(self, engine: Engine, messages: list[dict[str, str]], conversation: str) -> tuple[float, Completion]:
        request = InferenceRequest(
            id="turn",
            model=self.spec.name,
            task="chat",
            inputs={"messages": list(messages)},
            parameters=Parameters(max_tokens=ANSWER_TOKENS),
        )
        request = msgspec.structs.replace(request, conversation_id=conversation, stream=True)
        started_s = time.perf_counter()
        first_ms, last = 0.0, None
        for event in engine.run(self.spec, "chat", [request]):
            first_ms = first_ms or (time.perf_counter() - started_s) * 1000
            last = event
        assert isinstance(last, Completion)
        assert last.output is not None, last.error
        return first_ms, last


def _resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    replies.write(json.dumps({"versions": {}}) + "\n")
    chats = Chats()  # builds and trains its model, before the first answer
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(chats, command.pop("do"))(**command)
        replies.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
