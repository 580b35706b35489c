"""OpenAI's own Python client against a gateway, a collector and workers: the fake engine and PyTorch.

Were it to fail, people who point their OpenAI client at MuAI would meet an exception that is none of their making.
"""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import yaml
from openai import AsyncOpenAI, OpenAI
from tests.gateway_support import GatewayStack, gateway_stack
from tests.transport_support import free_port, wait_until

from muai_config import build_settings
from muai_producers import InferenceClient
from muai_producers.fleet import Fleet
from muai_producers.store import Store

pytestmark = [pytest.mark.redis, pytest.mark.timeout(180)]
TURNS: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one two three"}]
ANSWER = "three two one brief be"
LONG = " ".join(f"word{number}" for number in range(400))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayStack]:
    from muai_workers.models.tiny import build_tiny_causal

    folder = tmp_path_factory.mktemp("openai")
    models = {
        "tiny": {
            "task": "chat",
            "source": f"folder:{build_tiny_causal(folder / 'tiny', train=False, context_tokens=96)}",
            "engines": ["pytorch"],
        },
        "chatty-text": {"task": "text-generation", "source": "hub:none", "engines": ["fake"]},
        "vectors": {"task": "embedding", "source": "hub:none", "engines": ["fake"]},
    }
    with pytest.MonkeyPatch.context() as patch, gateway_stack(folder, queue_capacity=3000) as stack:
        document = yaml.safe_load(stack.config.read_text())
        document["models"] |= models
        stack.config.write_text(yaml.safe_dump(document))
        stack.settings = build_settings(document, {})
        patch.setenv("MUAI_TEST_FAKE_ENGINE", json.dumps({"latency_per_piece_ms": 10.0}))
        patch.setenv("OMP_NUM_THREADS", "1")
        stack.start_serving()
        stack.start("worker", "--engine", "pytorch", "--name", "w2")
        stack.start_gateway()
        fleet = Fleet(Store(stack.redis.client))
        wait_until(lambda: len(fleet.view(()).workers) == 2, 60.0, "both workers")
        yield stack


@pytest.fixture
def client(stack: GatewayStack) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=60.0) as client:
        yield client


@pytest.fixture
def store(stack: GatewayStack) -> Store:
    return Store(stack.redis.client)


def test_given_a_chat_then_the_client_gets_its_answer_and_the_tokens_used(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="chatty", messages=TURNS)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "chatty"
    (choice,) = answer.choices
    assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", ANSWER)
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 5, 10)


def test_given_an_answers_message_when_it_comes_back_in_the_next_turn_then_it_is_taken(client: OpenAI) -> None:
    first = client.chat.completions.create(model="chatty", messages=TURNS).choices[0].message
    turns = [*TURNS, first, {"role": "user", "content": [{"type": "text", "text": "four"}]}]
    answer = client.chat.completions.create(model="chatty", messages=turns)
    assert answer.choices[0].message.content == f"four {' '.join(reversed(ANSWER.split()))} {ANSWER}"
    whole = client.chat.completions.create(model="chatty", messages=[*TURNS, first.model_dump()])
    assert whole.choices[0].message.content


def test_given_a_stream_then_chunks_come_one_by_one_and_the_usage_last(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="chatty", messages=TURNS, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
    assert len(chunks) > 4
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 10
    assert len({chunk.id for chunk in chunks}) == 1


def test_given_several_answers_then_each_has_its_index_streamed_or_not(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="chatty", messages=TURNS, n=3)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(n, ANSWER) for n in range(3)]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 15)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model="chatty", messages=TURNS, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [ANSWER] * 3


def test_given_limits_and_stops_then_the_reason_to_finish_is_told(client: OpenAI) -> None:
    cut = client.chat.completions.create(model="chatty", messages=TURNS, max_completion_tokens=2)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("three two", "length")
    stopped = client.chat.completions.create(model="chatty", messages=TURNS, stop="one")
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("three two", "stop")


def test_given_prompts_then_completions_come_in_order_streamed_or_not(client: OpenAI) -> None:
    answer = client.completions.create(model="chatty-text", prompt=["a b", "c d"], n=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (0, "b a"),
        (1, "b a"),
        (2, "d c"),
        (3, "d c"),
    ]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 8)
    chunks = list(client.completions.create(model="chatty-text", prompt="a b c", stream=True, max_tokens=2))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "c b"
    assert chunks[-1].choices[0].finish_reason == "length"


def test_given_texts_then_their_embeddings_come_in_order_as_numbers_or_base64(client: OpenAI) -> None:
    texts = [f"text {number}" for number in range(300)]
    answer = client.embeddings.create(model="vectors", input=texts)  # the client asks for base64
    assert [one.index for one in answer.data] == list(range(300))
    single = client.embeddings.create(model="vectors", input=texts[17], encoding_format="float")
    assert answer.data[17].embedding == pytest.approx(single.data[0].embedding, abs=1e-6)
    assert len({tuple(one.embedding) for one in answer.data}) == 300
    assert answer.usage.prompt_tokens == 600
    raw = client.embeddings.with_raw_response.create(model="vectors", input="x", encoding_format="base64")
    packed = base64.b64decode(json.loads(raw.text)["data"][0]["embedding"])
    assert len(struct.unpack("<8f", packed)) == 8


def test_given_models_then_they_are_listed_and_found_by_name(client: OpenAI) -> None:
    assert {"chatty", "tiny", "vectors"} < {model.id for model in client.models.list()}
    assert client.models.retrieve("vectors").owned_by == "muai"
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("gpt-9")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")


@pytest.mark.engine
def test_given_pytorch_then_streams_and_seeds_say_the_same_each_time(client: OpenAI) -> None:
    turns: list[Any] = [{"role": "user", "content": "Where is the boat?"}]
    answer = client.chat.completions.create(model="tiny", messages=turns, temperature=0, max_tokens=20)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    chunks = client.chat.completions.create(model="tiny", messages=turns, temperature=0, max_tokens=20, stream=True)
    told = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert told == answer.choices[0].message.content
    text = client.completions.create(model="tiny", prompt="Rain", temperature=0)
    assert text.usage is not None
    assert text.usage.completion_tokens == 16
    first, second = (
        client.chat.completions.create(model="tiny", messages=turns, temperature=1.5, seed=7, n=2, max_tokens=20)
        for _ in range(2)
    )
    assert first.choices == second.choices
    assert first.choices[0].message != first.choices[1].message


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"model": "gpt-9"}, "model", "model_not_found"),
        ({"model": "vectors"}, "task", "unsupported_task"),
        ({"temperature": 9}, "temperature", "invalid_request"),
        ({"n": 0}, "n", "invalid_request"),
        ({"max_tokens": "many"}, "max_tokens", "invalid_request"),
        ({"max_tokens": 0}, "max_tokens", "invalid_request"),
        ({"messages": []}, "messages", "invalid_request"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role", "invalid_request"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
            "invalid_request",
        ),
        ({"messages": [{"role": "user", "content": "  "}]}, "messages", "invalid_request"),
        ({"logprobs": True}, "logprobs", "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"extra_body": {"colour": "red"}}, "colour", "invalid_request"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_request"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"response_format": {"type": "poem"}}, "response_format.type", "invalid_request"),
        ({"presence_penalty": 3}, "presence_penalty", "invalid_request"),
        ({"extra_body": {"priority": 11}}, "priority", "invalid_request"),
    ],
)
def test_given_a_wrong_call_then_the_error_names_the_field_in_openais_shape(
    client: OpenAI, options: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(openai.APIStatusError) as wrong:
        client.chat.completions.create(**{"model": "chatty", "messages": TURNS, **options})
    assert wrong.value.status_code == (404 if code == "model_not_found" else 400)
    assert (wrong.value.param, wrong.value.code, wrong.value.type) == (param, code, "invalid_request_error")


@pytest.mark.parametrize("tokens", [[1, 2], [[1, 2], [3]], [], ["a", 1]])
def test_given_lists_of_tokens_then_they_are_refused_by_name(client: OpenAI, tokens: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model="vectors", input=tokens)
    assert refused.value.param == "input"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="chatty-text", prompt=tokens)
    assert refused.value.param == "prompt"


def test_given_what_is_no_json_or_no_path_then_the_error_has_openais_shape_too(stack: GatewayStack) -> None:
    with httpx.Client(base_url=stack.url) as http:
        answers = [
            (http.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}), 400),
            (http.get("/v1/embeddings"), 405),
            (http.post("/v1/completions", content=b"x", headers={"content-type": "text/plain"}), 415),
        ]
        for answer, status in answers:
            assert answer.status_code == status
            error = answer.json()["error"]
            assert {"message", "type", "param", "code"} <= set(error)
            assert error["type"] == "invalid_request_error"
            assert error["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("stream", [False, True])
def test_given_a_request_that_fails_in_the_engine_then_the_status_says_so(client: OpenAI, stream: bool) -> None:
    def chat(text: str) -> None:
        client.chat.completions.create(model="chatty", messages=[{"role": "user", "content": text}], stream=stream)

    with pytest.raises(openai.BadRequestError, match="holds BAD"):
        chat("BAD")
    with pytest.raises(openai.InternalServerError) as spent:
        chat("POISON")
    assert (spent.value.status_code, spent.value.code) == (502, "engines_exhausted")


def test_given_a_full_queue_then_a_rate_limit_error_and_nothing_of_the_call_stays(
    stack: GatewayStack, client: OpenAI, store: Store
) -> None:
    with InferenceClient(stack.settings) as other:
        ids = other.submit_many([{"model": "parked", "inputs": "x"}] * 1000)
        with pytest.raises(openai.RateLimitError) as full:
            client.embeddings.create(model="parked", input=["x"] * 2048)
        assert full.value.code == "queue_full"
        assert int(full.value.response.headers["retry-after"]) >= 1
        wait_until(lambda: store.in_flight() == len(ids), what="what was accepted of the call to be cancelled")
        assert all(other.cancel(request_id) for request_id in ids)


@pytest.mark.parametrize("stream", [False, True])
def test_given_a_client_that_goes_away_then_its_requests_are_cancelled(
    stack: GatewayStack, store: Store, stream: bool
) -> None:
    async def scenario() -> None:
        async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
            if stream:
                turns: list[Any] = [{"role": "user", "content": LONG}]
                chunks = await client.chat.completions.create(
                    model="chatty", messages=turns, max_tokens=400, n=2, stream=True
                )
                await anext(aiter(chunks))
                await chunks.close()
                return
            call = asyncio.ensure_future(client.embeddings.create(model="parked", input=["x", "y"]))
            async with asyncio.timeout(20):
                while store.in_flight() < 2:
                    await asyncio.sleep(0.01)
            call.cancel()

    answered = int(stack.redis.client.hget(store.keys.stats, "answered") or 0)
    asyncio.run(scenario())
    wait_until(lambda: store.in_flight() == 0, 3.0, "both to be cancelled; the streams would run for 8 s")
    assert int(stack.redis.client.hget(store.keys.stats, "answered") or 0) == answered + 2


def test_given_an_idempotency_key_then_a_repeated_call_gets_the_first_ones_answers(client: OpenAI) -> None:
    headers = {"Idempotency-Key": "once"}
    calls = [
        client.chat.completions.create(model="chatty", messages=TURNS, n=2, temperature=0, extra_headers=headers)
        for _ in range(2)
    ]
    assert calls[0].choices == calls[1].choices


def test_given_a_call_that_ends_badly_in_mid_stream_then_the_client_raises(stack: GatewayStack, client: OpenAI) -> None:
    turns: list[Any] = [{"role": "user", "content": LONG}]
    with client.chat.completions.create(model="chatty", messages=turns, max_tokens=400, stream=True) as chunks:
        first = next(chunks)
        with InferenceClient(stack.settings) as other:
            assert other.cancel(first.id.removeprefix("chatcmpl-"))
        with pytest.raises(openai.APIError, match="was cancelled"):
            list(chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_given_a_gateway_that_stops_then_whoever_still_waits_is_told_to_send_again_and_nothing_runs_on(
    stack: GatewayStack, store: Store, stream: bool
) -> None:
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUAI_MON_SERVER_GRACEFUL_SHUTDOWN_TIMEOUT", "1")
        gateway = stack.start("gateway", "--port", str(port))
    wait_until(lambda: "Uvicorn running" in gateway.log.read_text(), what="the second gateway")

    async def scenario() -> None:
        async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            if stream:
                turns: list[Any] = [{"role": "user", "content": LONG}]
                chunks = await client.chat.completions.create(
                    model="chatty", messages=turns, max_tokens=400, stream=True
                )
                await anext(aiter(chunks))
                gateway.terminate()
                with pytest.raises(openai.APIError, match="is stopping"):
                    [chunk async for chunk in chunks]
                return
            call = asyncio.ensure_future(client.embeddings.create(model="parked", input=["x", "y"]))
            async with asyncio.timeout(20):
                while store.in_flight() < 2:
                    await asyncio.sleep(0.01)
            gateway.terminate()
            with pytest.raises(openai.InternalServerError) as refused:
                await call
            assert (refused.value.status_code, refused.value.code) == (503, "shutting_down")

    asyncio.run(scenario())
    assert gateway.popen.wait(timeout=15) == 0
    wait_until(lambda: store.in_flight() == 0, 3.0, "what was given up to be cancelled")
