"""What the vLLM engine keeps beyond the contract: continuous batching, isolation, shapes of answers, its processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from tests import models
from tests.transport_support import wait_until

from muai_producers.errors import EngineUnavailableError, InvalidRequestError, ModelLoadError
from muai_producers.wire import InferenceRequest, Parameters
from muai_workers.engines.base import Completion, EngineOutput, Piece
from muai_workers.engines.vllm import VLLMEngine
from muai_workers.engines.vllm_tools import ToolReader

pytestmark = pytest.mark.engine
LONG = "Rain fell all night on the hills. In the morning the garden was green. " * 4
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"town": {"enum": ["Kiel", "Bonn"]}, "days": {"enum": [1, 2, 3]}},
            "required": ["town", "days"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}, "sure": {"type": "boolean"}},
    "required": ["mood", "sure"],
    "additionalProperties": False,
}


@cache
def spec() -> Any:
    from muai_workers.models.tiny import build_tiny_causal

    folder = build_tiny_causal(models.scratch_folder() / "vllm-chat", train=False, context_tokens=512)
    return models.folder_spec("tiny-chat", "chat", folder)


@cache
def engine() -> VLLMEngine:
    return VLLMEngine(models.settings([spec()], cache={"max_memory_mb": 64}))


def run(*requests: InferenceRequest, task: str = "text-generation") -> dict[str, Completion]:
    events = engine().run(spec(), task, requests)
    return {event.request_id: event for event in events if isinstance(event, Completion)}


def output(request: InferenceRequest, task: str = "text-generation") -> EngineOutput:
    completion = run(request, task=task)[request.id]
    assert completion.output is not None, completion.error
    return completion.output


def asked(text: Any, name: str = "1", task: str | None = "text-generation", **fields: Any) -> InferenceRequest:
    parameters = fields.pop("parameters", {"max_tokens": 2})
    request = models.request(name, spec(), text, task)
    return msgspec.structs.replace(request, parameters=msgspec.convert(parameters, Parameters), **fields)


def children() -> list[psutil.Process]:
    """The engine's processes; Python's own helper for shared memory is none."""
    return [one for one in psutil.Process().children(recursive=True) if is_vllms(one)]


def is_vllms(process: psutil.Process) -> bool:
    try:
        return "resource_tracker" not in " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # gone, or a zombie
        return False


def test_a_short_request_that_comes_later_is_answered_first() -> None:
    started, ended = threading.Event(), threading.Event()

    def long() -> None:
        request = asked(LONG, "long", parameters={"max_tokens": 300}, stream=True)
        for _ in engine().run(spec(), "text-generation", [request]):
            started.set()
        ended.set()

    thread = threading.Thread(target=long)
    thread.start()
    assert started.wait(timeout=120)
    assert output(asked("A", "short")).output_tokens <= 2
    assert not ended.is_set()
    engine().abort(["long"])
    thread.join(timeout=30)
    assert ended.is_set()


def test_while_its_processes_wait_for_each_other_they_sleep() -> None:
    """Else they take the cores from everything else on the machine: see `vllm_waiting`."""
    assert output(asked("A", "first"))  # loaded
    before = {one: one.num_ctx_switches().voluntary for one in children()}
    tokens = output(asked(LONG, "long", parameters={"max_tokens": 300})).output_tokens
    assert tokens > 50
    # Other tests' engines may be there too, and rest.
    slept = [one.num_ctx_switches().voluntary - count for one, count in before.items()]
    assert sum(count > tokens for count in slept) >= 2, (slept, tokens)


def test_what_one_has_asked_only_the_same_conversation_finds_again() -> None:
    text = "My secret number is 42. " + LONG
    assert not output(asked(text, tenant="ann", conversation_id="one")).cache_hit
    for tenant, conversation in (("ann", "two"), ("bob", "one"), ("ann", None), ("bob", None)):
        other = output(asked(text, tenant=tenant, conversation_id=conversation))
        assert (other.cache_hit, other.extra["cached_tokens"]) == (False, 0)
    again = output(asked(text + "And?", tenant="ann", conversation_id="one"))
    assert again.cache_hit
    assert again.extra["cached_tokens"] % 32 == 0
    # Without a conversation, what all of a tenant's requests begin with is computed once.
    assert output(asked(text, tenant="ann")).cache_hit


def test_a_conversation_that_has_ended_is_out_of_reach_and_counted() -> None:
    text = "The children walk to school. " + LONG
    before = engine().cache_statistics()[spec().name]
    output(asked(text, conversation_id="ends"))
    assert output(asked(text, conversation_id="ends")).cache_hit
    engine().end_conversation("default", "ends")
    assert not output(asked(text, conversation_id="ends")).cache_hit
    after = engine().cache_statistics()[spec().name]
    assert (after.hits - before.hits, after.misses - before.misses) == (1, 2)
    assert after.hit_tokens > before.hit_tokens
    assert after.max_bytes == 64_000_000


def test_tokens_are_the_same_with_and_without_the_cache() -> None:
    parameters = {"max_tokens": 20}
    first = output(asked(LONG, conversation_id="same", parameters=parameters))
    second = output(asked(LONG, conversation_id="same", parameters=parameters))
    assert (first.cache_hit, second.cache_hit) == (False, True)
    assert first.outputs == second.outputs


def test_an_answer_is_held_to_its_schema() -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "mood", "schema": SCHEMA}}
    answer = output(asked("How is it?", parameters={"max_tokens": 100, "response_format": shape}))
    told = json.loads(answer.outputs["text"])
    assert set(told) == {"mood", "sure"}
    assert told["mood"] in ("good", "bad")
    assert isinstance(told["sure"], bool)
    assert answer.outputs["finish_reason"] == "stop"


def test_a_schema_that_is_none_is_the_requests_own_fault() -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    wrong = asked("How is it?", "wrong", parameters={"max_tokens": 9, "response_format": shape})
    completions = run(wrong, asked("How is it?", "right"))
    assert isinstance(completions["wrong"].error, InvalidRequestError)
    assert completions["right"].output is not None


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_must_be_called_is_called_as_it_wants_to_be(stream: bool) -> None:
    parameters = {"max_tokens": 120, "tools": [WEATHER], "tool_choice": "required"}
    request = asked([{"role": "user", "content": "Rain?"}], task="chat", parameters=parameters, stream=stream)
    outputs = output(request, "chat").outputs
    assert (outputs["text"], outputs["finish_reason"]) == ("", "tool_calls")
    (call,) = outputs["tool_calls"]
    assert call["function"]["name"] == "weather"
    arguments = json.loads(call["function"]["arguments"])
    assert arguments["town"] in ("Kiel", "Bonn")
    assert arguments["days"] in (1, 2, 3)


def test_calls_are_found_in_what_a_model_writes() -> None:
    reader = ToolReader("hermes", any_tokenizer())
    written = 'Let me see.<tool_call>{"name": "weather", "arguments": {"town": "Kiel", "days": 2}}</tool_call>'
    text, (call,) = reader.read(written, [WEATHER])
    assert text == "Let me see."
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"town": "Kiel", "days": 2}
    assert reader.read("No call.", [WEATHER]) == ("No call.", [])


def test_a_tool_parser_that_there_is_not_is_a_load_error() -> None:
    with pytest.raises(ModelLoadError, match="no tool parser 'nonesuch'"):
        ToolReader("nonesuch", any_tokenizer())


def test_text_with_tools_is_told_in_one_piece_that_is_the_text() -> None:
    parameters = {"max_tokens": 8, "tools": [WEATHER]}
    request = asked([{"role": "user", "content": "Rain?"}], task="chat", parameters=parameters, stream=True)
    events = list(engine().run(spec(), "chat", [request]))
    told = "".join(event.text for event in events if isinstance(event, Piece))
    (completion,) = (event for event in events if isinstance(event, Completion))
    assert completion.output is not None
    assert told == completion.output.outputs["text"] != ""


def test_the_specifications_short_forms_work() -> None:
    assert engine().is_available()
    assert engine().load_model("tiny-chat")
    answers = engine().generate("tiny-chat", ["The river", "A"], Parameters(max_tokens=3))
    assert [set(answer) for answer in answers] == [{"text", "finish_reason"}] * 2


def test_a_model_that_vllm_does_not_know_is_a_load_error_that_names_it(tmp_path: Path) -> None:
    from tests.engines.strange import build_strange_causal

    folder = build_strange_causal(tmp_path / "strange")
    with pytest.raises(ModelLoadError, match="CodeGenForCausalLM"):
        engine().load(models.folder_spec("strange", "text-generation", folder))
    assert "strange" not in engine().loaded()


def test_an_encoder_is_refused() -> None:
    assert "embedding" in str(engine().refusal(models.encoder_spec()))


@pytest.mark.timeout(600)
def test_an_engine_that_is_killed_ends_its_requests_and_the_next_starts_another() -> None:
    requests = [asked(LONG, str(index), parameters={"max_tokens": 200}, stream=True) for index in range(3)]
    events = engine().run(spec(), "text-generation", requests)
    assert isinstance(next(events), Piece)
    kill(children())
    with pytest.raises(EngineUnavailableError, match="has died"):
        list(events)
    assert spec().name not in engine().loaded()
    assert output(asked("A")).output_tokens <= 2
    engine().close()
    wait_until(lambda: not children(), 30.0, "the end of vLLM's processes")
    assert engine().loaded() == ()


def kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)


@cache
def any_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(spec().source.local_folder()))


def teardown_module() -> None:
    engine().close()
    shutil.rmtree(str(spec().source.local_folder()), ignore_errors=True)
