"""What vLLM is told of our configuration, and what it is asked for a request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests import models

from muai_config import Settings
from muai_config.slots import Slots, batches_continuously, slots_of
from muai_producers.chat import JsonSchema, ResponseFormat, Tool
from muai_producers.wire import Parameters, TaskName
from muai_workers.engines.cache_salts import CacheSalts
from muai_workers.engines.vllm_plan import Device, VLLMPlan, plan_vllm, thread_binding, tool_parser_of
from muai_workers.engines.vllm_requests import calls_in_list, sampling_fields, shape_fields

SPEC = models.model_spec("writer", "chat", "folder:/nowhere")
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}


def plan(device: Device, spec: Any = SPEC, **optimization: Any) -> VLLMPlan:
    return plan_vllm(spec, Path("/models/writer"), models.settings(**optimization), device)


def test_Given_a_CPU_Then_numbers_stay_fp32_and_short_prompts_can_be_found_again() -> None:
    arguments = plan("cpu").arguments
    assert arguments["dtype"] == "float32"
    assert arguments["block_size"] == 32
    assert arguments["enforce_eager"]
    assert "kv_offloading_size" not in arguments


def test_Given_a_GPU_Then_vLLM_chooses_what_the_configuration_leaves_open() -> None:
    arguments = plan("cuda").arguments
    assert arguments["dtype"] == "auto"
    assert not arguments["enforce_eager"]
    assert not {"block_size", "kv_cache_memory_bytes", "max_model_len"} & set(arguments)


def test_Given_limits_of_a_step_Then_vLLM_is_told_them_and_else_chooses_its_own() -> None:
    arguments = plan("cuda", vllm={"max_num_seqs": 48, "max_num_batched_tokens": 4096}).arguments
    assert (arguments["max_num_seqs"], arguments["max_num_batched_tokens"]) == (48, 4096)
    assert not {"max_num_seqs", "max_num_batched_tokens"} & set(plan("cuda").arguments)


def test_Given_swap_space_Then_it_is_main_memory_of_every_GPU_and_a_CPU_says_that_it_has_none() -> None:
    vllm = {"swap_space": 3, "tensor_parallel_size": 2}
    assert plan("cuda", vllm=vllm).arguments["kv_offloading_size"] == 6.0
    assert "kv_offloading_size" not in plan("cuda", vllm={"swap_space": 0}).arguments
    assert "swap_space" in plan("cpu", vllm=vllm).degraded[0]
    assert plan("cpu").degraded == ()


def test_Given_a_budget_for_keys_and_values_Then_the_processes_of_a_CPU_share_it() -> None:
    vllm = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    arguments = plan("cpu", vllm=vllm, cache={"max_memory_mb": 400}).arguments
    assert arguments["kv_cache_memory_bytes"] == 100_000_000


def test_Given_a_cache_that_vLLM_does_not_have_Then_it_says_so() -> None:
    assert "least recently used" in plan("cpu", cache={"eviction_policy": "fifo"}).degraded[0]
    assert not plan("cpu", cache={"enabled": False}).arguments["enable_prefix_caching"]


def test_Given_a_model_with_its_own_number_format_Then_it_goes_before_the_engines() -> None:
    spec = SPEC.model_copy(update={"dtype": "bf16"})
    assert plan("cpu", spec, vllm={"dtype": "fp16"}).arguments["dtype"] == "bfloat16"


def test_Given_any_model_Then_no_weights_are_read_that_can_hold_code() -> None:
    arguments = plan("cuda").arguments
    assert arguments["load_format"] == "safetensors"
    assert not arguments["trust_remote_code"]


@pytest.mark.parametrize(
    ("cores", "ranks", "binding"),
    [([0, 1], 1, None), ([0, 1], 2, "0|1"), ([2, 3, 5, 7, 9], 2, "2,3|5,7"), ([4], 2, "nobind")],
)
def test_Given_cores_for_several_processes_Then_each_has_its_own(
    cores: list[int], ranks: int, binding: str | None
) -> None:
    assert thread_binding(cores, ranks) == binding


@pytest.mark.parametrize(
    ("template", "named", "expected"),
    [
        ("{% ... %}<tool_call>{{ call }}</tool_call>", None, "hermes"),
        ("[TOOL_CALLS]", None, "mistral"),
        ("plain", None, None),
        (None, None, None),
        ("<tool_call>", "qwen3_coder", "qwen3_coder"),
    ],
)
def test_Given_a_chat_template_Then_it_shows_how_calls_are_written(
    template: str | None, named: str | None, expected: str | None
) -> None:
    assert tool_parser_of(SPEC.model_copy(update={"tool_parser": named}), template) == expected


def test_Given_parameters_Then_each_reaches_vLLM() -> None:
    given = Parameters(
        temperature=0.7, top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=0.4, seed=7, stop=("END",),
    )  # fmt: skip
    fields = sampling_fields(given, 12)
    assert fields.pop("max_tokens") == 12
    assert fields.pop("stop") == ["END"]
    assert fields == {name: getattr(given, name) for name in fields}
    assert len(fields) == 8


def test_Given_a_shape_for_the_answer_Then_vLLM_holds_it_to_that() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert shape_fields(Parameters()) is None
    assert shape_fields(Parameters(response_format=ResponseFormat(type="text"))) is None
    assert shape_fields(Parameters(response_format=ResponseFormat(type="json_object"))) == {
        "json_object": True,
    }
    by_schema = ResponseFormat(type="json_schema", json_schema=JsonSchema(name="s", schema=schema))
    assert shape_fields(Parameters(response_format=by_schema)) == {"json": schema}


def test_Given_a_tool_that_must_be_called_Then_the_answer_is_one_call_of_it() -> None:
    import msgspec

    tools = (msgspec.convert(WEATHER, Tool),)
    shape = shape_fields(Parameters(tools=tools, tool_choice="required"))
    assert shape is not None
    (call,) = shape["json"]["items"]["anyOf"]
    assert call["properties"]["name"]["enum"] == ["weather"]
    assert call["properties"]["arguments"] == WEATHER["function"]["parameters"]  # type: ignore[index]
    (read,) = calls_in_list('[{"name": "weather", "arguments": {"town": "Kiel"}}]') or []
    assert read["function"]["name"] == "weather"
    assert json.loads(read["function"]["arguments"]) == {"town": "Kiel"}
    assert calls_in_list('[{"name": "weather", "argu') is None


def test_Given_two_tenants_or_two_conversations_Then_they_share_no_secret() -> None:
    salts = CacheSalts()
    secrets = [salts.of(*who) for who in (("ann", "one"), ("ann", "two"), ("bob", "one"), ("ann", None), ("bob", None))]
    assert len(set(secrets)) == 5
    assert salts.of("ann", "one") == secrets[0]


def test_Given_a_conversation_that_has_ended_Then_its_name_finds_nothing_of_it() -> None:
    salts = CacheSalts()
    before = salts.of("ann", "one")
    salts.forget("bob", "one")
    assert salts.of("ann", "one") == before
    salts.forget("ann", "one")
    assert salts.of("ann", "one") != before


def catalog(*tasks: TaskName, **queue: int) -> Settings:
    specs = {task: models.model_spec(task, task, "folder:/nowhere") for task in tasks}
    return Settings.model_validate({"models": specs, "queue": queue})


def test_Given_an_engine_that_takes_requests_into_those_that_run_Then_it_has_many_slots_and_holds_none_back() -> None:
    settings = catalog("chat", "text-generation", worker_concurrency=2, worker_prefetch=3)
    for engine in ("vllm", "deepspeed", "pytorch", "onnx"):
        assert slots_of(settings, engine) == Slots(16, 0)  # type: ignore[arg-type]
    assert slots_of(settings, "fake") == Slots(2, 3)
    assert slots_of(catalog("chat", continuous_slots=4, worker_concurrency=8), "vllm") == Slots(8, 0)


def test_Given_an_encoder_among_its_models_Then_an_engine_takes_batches_as_encoders_want_them() -> None:
    settings = catalog("chat", "embedding")
    assert slots_of(settings, "pytorch") == Slots(1, 1)
    assert batches_continuously(settings, "vllm")
    assert not batches_continuously(catalog(), "fake")
