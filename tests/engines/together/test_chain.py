"""Real engines that fail, one after the other: every request is answered, and its attempts say why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.engines.fleet import EngineFleet, running_fleet
from tests.engines.strange import build_strange_causal

from muai_producers.wire import InferenceResult

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
LIMIT_S = 240.0
PROMPT = "Rain"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineFleet]:
    from muai_workers.models.tiny import build_tiny_causal

    folder: Path = tmp_path_factory.mktemp("chain")
    writer = f"folder:{build_tiny_causal(folder / 'writer', train=False, context_tokens=4096, endless=True)}"
    strange = f"folder:{build_strange_causal(folder / 'strange')}"

    def model(source: str, *engines: str) -> dict[str, Any]:
        return {"task": "text-generation", "source": source, "engines": list(engines), "dtype": "fp32"}

    catalog = {
        "writer": model(writer, "vllm", "pytorch"),
        "plain": model(writer, "pytorch"),
        "strange": model(strange, "vllm", "pytorch"),
        "spread": model(writer, "deepspeed", "pytorch"),
        "converted": model(writer, "onnx", "pytorch"),
    }
    # No conversion is as exact as that, so the export fails its check.
    onnx = {"tolerance": 1e-12, "cache_dir": str(folder / "onnx")}
    with running_fleet(folder, catalog, "vllm", "onnx", "pytorch", onnx=onnx) as running:
        yield running


def served(fleet: EngineFleet, model: str, **parameters: Any) -> InferenceResult:
    request_id = fleet.client.submit(model, PROMPT, parameters={"max_tokens": 8, **parameters})
    return fleet.client.result(request_id, timeout_s=LIMIT_S)


def reasons(result: InferenceResult) -> dict[str, str]:
    return {one["engine"]: one["error"]["message"] for one in result.metadata["attempts"]}


def test_given_vllm_then_it_serves_and_says_the_same_as_pytorch(fleet: EngineFleet) -> None:
    ours, theirs = served(fleet, "writer"), served(fleet, "plain")
    assert (ours.engine_used, theirs.engine_used) == ("vllm", "pytorch")
    assert ours.outputs == theirs.outputs


@pytest.mark.parametrize("model", ["writer", "plain"])
def test_given_a_long_request_when_a_short_one_follows_then_the_short_one_is_answered_first(
    fleet: EngineFleet, model: str
) -> None:
    served(fleet, model)  # loaded
    long = fleet.client.submit(model, PROMPT, stream=True, parameters={"max_tokens": 3000})
    stream = fleet.client.stream(long, timeout_s=LIMIT_S)
    assert next(stream).kind == "text"
    short = fleet.client.submit(model, PROMPT, parameters={"max_tokens": 1})
    assert fleet.client.result(short, timeout_s=LIMIT_S).outputs["finish_reason"] == "length"
    assert fleet.client.status(long).state not in ("SUCCESS", "FAILURE")
    fleet.client.cancel(long)


def test_given_a_model_that_vllm_cannot_load_then_the_next_engine_serves_and_the_attempts_say_why(
    fleet: EngineFleet,
) -> None:
    result = served(fleet, "strange")
    assert result.engine_used == "pytorch"
    assert "CodeGenForCausalLM" in reasons(result)["vllm"]


def test_given_no_deepspeed_then_the_next_engine_serves_and_the_attempts_say_why(fleet: EngineFleet) -> None:
    result = served(fleet, "spread")
    assert result.engine_used == "pytorch"
    assert reasons(result) == {"deepspeed": "no deepspeed worker is running"}


def test_given_an_export_that_is_not_exact_enough_then_the_original_serves_and_the_attempts_say_why(
    fleet: EngineFleet,
) -> None:
    result = served(fleet, "converted")
    assert result.engine_used == "pytorch"
    assert "1e-12" in reasons(result)["onnx"]


def test_given_vllm_killed_in_mid_generation_then_the_next_engine_answers_what_it_had_not(fleet: EngineFleet) -> None:
    served(fleet, "writer")
    family = fleet.family("vllm")
    long = {"max_tokens": 3000}
    ids = [fleet.client.submit("writer", f"{PROMPT} {n}", parameters=long) for n in range(3)]
    told = fleet.client.submit("writer", PROMPT, stream=True, parameters=long)
    stream = fleet.client.stream(told, timeout_s=LIMIT_S)
    events = [next(stream)]
    fleet.kill("vllm")
    events += stream
    results = [fleet.client.result(one, timeout_s=LIMIT_S) for one in (*ids, told)]
    assert {result.engine_used for result in results} == {"pytorch"}
    for result in results:
        assert reasons(result)["vllm"] == "its vllm worker died while it ran, and no vllm worker is running"
    page = ""
    for event in events:
        page = "" if event.kind == "restart" else page + event.text
    assert page == results[-1].outputs["text"]
    for process in family:  # whoever supervises a worker kills its group; here nobody does
        process.kill()
