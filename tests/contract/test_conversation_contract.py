"""Conversations on the engines that keep keys and values: what is reused changes no token."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tests import models
from tests.engines_here import REAL

from muai_config import ModelSpec
from muai_workers.engines.base import CacheStatistics, Completion, Engine, EngineOutput
from muai_workers.engines.registry import create_engine

pytestmark = pytest.mark.engine
KEEPING = [name for name in REAL if name in ("pytorch", "onnx", "deepspeed")]
"""The engines of this run that keep conversations by themselves."""
QUESTIONS = ("Where is the boat?", "Who are you?", "What is a queue?", "When does the train leave?")
TURNS = st.lists(
    st.tuples(
        st.sampled_from(("ann", "bob")),
        st.sampled_from(("one", "two")),
        st.sampled_from(("ask", "ask", "ask", "shorten", "end", "edit")),
        st.sampled_from(QUESTIONS),
    ),
    min_size=2,
    max_size=10,
)


@dataclass(frozen=True)
class Chat:
    """An engine with a chat model, and the same engine without any cache."""

    engine: Engine
    fresh: Engine
    spec: ModelSpec
    before: CacheStatistics
    """What the engine had counted when the test began."""

    def ask(self, messages: Any, conversation_id: str | None = "one", tenant: str = "ann", **options: Any) -> Any:
        return outcome(self.engine, self.spec, messages, conversation_id, tenant, **options)

    def ask_fresh(self, messages: Any) -> EngineOutput:
        return outcome(self.fresh, self.spec, messages, None, "ann")

    @property
    def statistics(self) -> CacheStatistics:
        """Of this test alone."""
        return counted_since(self.before, self.engine)


def outcome(
    engine: Engine, spec: ModelSpec, messages: Any, conversation_id: str | None, tenant: str, **options: Any
) -> EngineOutput:
    task = "chat" if isinstance(messages, list) else "text-generation"
    request = models.request("1", spec, messages, task=task, **{"max_tokens": 12, **options})
    request = msgspec.structs.replace(request, conversation_id=conversation_id, tenant=tenant)
    (completion,) = (one for one in engine.run(spec, task, [request]) if isinstance(one, Completion))
    assert completion.output is not None, completion.error
    return completion.output


@cache
def spec() -> ModelSpec:
    from muai_workers.models.tiny import build_tiny_causal

    folder = build_tiny_causal(models.scratch_folder() / "chat", train=False, context_tokens=512)
    return models.folder_spec("tiny-chat", "chat", folder)


@cache
def engine_named(name: str, **cache_settings: Any) -> Engine:
    return create_engine(name, models.settings(cache=dict(cache_settings)))


@pytest.fixture(params=KEEPING)
def chat(request: pytest.FixtureRequest) -> Chat:
    engine = engine_named(request.param)
    return Chat(engine, engine_named(request.param, enabled=False), spec(), emptied(engine))


def emptied(engine: Any) -> CacheStatistics:
    """Have an engine forget all conversations; what it has counted so far.

    Its models stay loaded: ranks of DeepSpeed take ten seconds to start.
    """
    engine.relieve()
    return engine.cache_statistics().get(spec().name, CacheStatistics())


def counted_since(before: CacheStatistics, engine: Engine) -> CacheStatistics:
    """What is kept now, and what was counted after `before`."""
    now = engine.cache_statistics()[spec().name]
    counts = ("hits", "misses", "hit_tokens", "prompt_tokens", "evictions")
    return replace(now, **{name: getattr(now, name) - getattr(before, name) for name in counts})


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# Property 10: Cache is enabled for compatible models
@pytest.mark.property(10)
def test_engines_say_whether_they_keep_conversations(chat: Chat) -> None:
    assert chat.engine.capabilities.kv_reuse
    assert not chat.fresh.capabilities.kv_reuse
    chat.ask([user("Where is the boat?")])
    assert chat.statistics.entries == 1
    assert chat.statistics.used_bytes > 0
    assert chat.fresh.cache_statistics() == {}


# Property 11: Multi-turn conversations reuse cache
@pytest.mark.property(11)
def test_every_turn_but_the_first_reuses_the_one_before(chat: Chat) -> None:
    messages: list[dict[str, str]] = []
    before = 0
    for number, question in enumerate(QUESTIONS):
        messages.append(user(question))
        ours, theirs = chat.ask(messages), chat.ask_fresh(messages)
        assert ours.outputs == theirs.outputs
        assert ours.cache_hit == (number > 0)
        # All of the turn before's prompt at least; its answer may be written in other tokens.
        assert ours.extra["cached_tokens"] >= before - 3
        assert "cached_tokens" not in theirs.extra
        before = ours.input_tokens
        messages.append(assistant(ours.outputs["text"]))
    assert (chat.statistics.hits, chat.statistics.misses) == (3, 1)
    assert chat.statistics.hit_tokens > chat.statistics.prompt_tokens / 2


def test_bytes_are_those_of_the_tensors(chat: Chat) -> None:
    output = chat.ask([user("Where is the boat?")], max_tokens=5)
    tokens = output.input_tokens + output.output_tokens - (output.outputs["finish_reason"] == "length")
    # Layers, keys and values, heads, numbers in each, bytes of a number.
    assert chat.statistics.used_bytes == tokens * 4 * 2 * 2 * 32 * 4


def test_what_is_kept_holds_no_memory_beside_what_is_counted(chat: Chat) -> None:
    if chat.engine.name == "deepspeed":
        pytest.skip("its keys and values lie in the ranks")
    for index, question in enumerate(QUESTIONS):
        chat.ask([user(question)], f"conversation {index}")
        chat.ask([user(question), assistant("So."), user("Who are you?")], f"conversation {index}")
    entries: Any = chat.engine._kv_cache._entries  # type: ignore[attr-defined]
    stored = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for entry in entries.values()
        for tensor in tensors_of(entry.kept)
    }
    assert sum(stored.values()) == chat.statistics.used_bytes


def tensors_of(kept: Any) -> list[Any]:
    return list(kept.tensors) if hasattr(kept, "tensors") else [one for layer in kept.layers for one in layer]


@pytest.mark.parametrize(("conversation_id", "tenant"), [("two", "ann"), ("one", "bob"), (None, "ann")])
def test_no_other_conversation_or_tenant_finds_it(chat: Chat, conversation_id: str | None, tenant: str) -> None:
    messages = [user("My secret number is 42."), assistant("I keep it."), user("Where is the boat?")]
    chat.ask(messages)
    other = chat.ask(messages, conversation_id, tenant)
    assert not other.cache_hit
    assert other.extra.get("cached_tokens", 0) == 0
    assert chat.ask(messages).cache_hit


# Property 13: Cache is released on conversation end
@pytest.mark.property(13)
def test_a_conversation_that_ends_frees_its_memory(chat: Chat) -> None:
    chat.ask([user("Where is the boat?")])
    chat.ask([user("Where is the boat?")], "two")
    chat.engine.end_conversation("bob", "one")
    assert chat.statistics.entries == 2
    chat.engine.end_conversation("ann", "one")
    assert chat.statistics.entries == 1
    assert not chat.ask([user("Where is the boat?")]).cache_hit
    chat.engine.unload(chat.spec.name)
    assert chat.engine.cache_statistics() == {}
    assert not chat.ask([user("Where is the boat?")], "two").cache_hit


def test_a_conversation_that_ends_while_its_turn_runs_leaves_nothing(chat: Chat) -> None:
    request = models.request("1", chat.spec, [user("Who are you?")], task="chat", max_tokens=200)
    request = msgspec.structs.replace(request, conversation_id="one", tenant="ann", stream=True)
    for index, _ in enumerate(chat.engine.run(chat.spec, "chat", [request])):
        if index == 0:
            chat.engine.end_conversation("ann", "one")
    assert chat.statistics.entries == 0


def test_turns_of_many_conversations_in_one_batch_are_as_if_alone(chat: Chat) -> None:
    histories = [[user(" ".join(QUESTIONS[: index + 1]))] for index in range(4)]
    for round_number in range(3):
        requests = [
            msgspec.structs.replace(
                models.request(str(index), chat.spec, list(history), task="chat", max_tokens=6 + 5 * index),
                # The last is new in each round, so hits and misses share a batch.
                conversation_id=f"{index}" if index < 3 else f"new {round_number}",
            )
            for index, history in enumerate(histories)
        ]
        completions = {one.request_id: one for one in chat.engine.run(chat.spec, "chat", requests)}
        for index, request in enumerate(requests):
            output = completions[request.id].output  # type: ignore[union-attr]
            assert output is not None
            alone = outcome(
                chat.fresh, chat.spec, request.inputs["messages"], None, "ann", max_tokens=request.parameters.max_tokens
            )
            assert output.outputs == alone.outputs
            assert output.cache_hit == (round_number > 0 and index < 3)
            histories[index] += [assistant(output.outputs["text"]), user(QUESTIONS[round_number])]


def test_requests_that_join_a_running_batch_are_as_if_alone(chat: Chat) -> None:
    prompts = [" ".join(QUESTIONS[: 1 + index % 4]) * (1 + index % 3) for index in range(9)]
    answers: dict[int, EngineOutput] = {}
    started = threading.Event()

    def run(index: int) -> None:
        request = models.request(str(index), chat.spec, prompts[index], "text-generation", max_tokens=30 + 9 * index)
        request = msgspec.structs.replace(request, stream=True)
        for event in chat.engine.run(chat.spec, "text-generation", [request]):
            started.set()
            if isinstance(event, Completion) and event.output is not None:
                answers[index] = event.output

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(prompts))]
    threads[0].start()
    assert started.wait(timeout=60)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for index, prompt in enumerate(prompts):
        alone = outcome(chat.fresh, chat.spec, prompt, None, "ann", max_tokens=30 + 9 * index)
        assert answers[index].outputs == alone.outputs


@pytest.mark.property(11)
@pytest.mark.property(12)
def test_whatever_is_reused_shortened_ended_or_evicted_the_tokens_stay_the_same(chat: Chat) -> None:
    small = engine_named(chat.engine.name, max_memory_mb=1)  # room for two or three of these conversations

    @hypothesis_settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @given(TURNS)
    def check(turns: Sequence[tuple[str, str, str, str]]) -> None:
        emptied(small)
        histories: dict[tuple[str, str], list[dict[str, str]]] = {}
        for tenant, conversation, action, question in turns:
            history = histories.setdefault((tenant, conversation), [user("Good morning. " * 12)])
            if action == "end":
                small.end_conversation(tenant, conversation)
            elif action == "shorten":
                del history[1:]
            elif action == "edit":
                history[0] = user(question)
            messages = [*history, user(question)]
            ours = outcome(small, chat.spec, messages, conversation, tenant)
            assert ours.outputs == chat.ask_fresh(messages).outputs
            assert small.cache_statistics()[chat.spec.name].used_bytes <= 1_000_000
            histories[tenant, conversation] = [*messages, assistant(ours.outputs["text"])][-6:]

    check()


# Property 12: LRU eviction occurs on memory overflow
@pytest.mark.property(12)
def test_a_hundred_conversations_stay_within_a_budget_for_twenty(chat: Chat) -> None:
    chat.ask([user("Who are you?")])
    one = chat.statistics.used_bytes
    engine = engine_named(chat.engine.name, max_memory_mb=1)
    before = emptied(engine)
    words = "Good morning. " * round(1_000_000 / 20 / one * 2)
    for index in range(100):
        outcome(engine, chat.spec, [user(words)], f"conversation {index}", "ann", max_tokens=1)
        assert engine.cache_statistics()[chat.spec.name].used_bytes <= 1_000_000
    statistics = counted_since(before, engine)
    assert statistics.entries + statistics.evictions == 100
    assert 10 <= statistics.entries <= 30
    for index, expected in ((99, True), (99 - statistics.entries, False)):
        answer = outcome(engine, chat.spec, [user(words), user("So?")], f"conversation {index}", "ann", max_tokens=1)
        assert answer.cache_hit == expected
