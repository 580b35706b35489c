"""The OpenAPI document agrees with itself and with the types that the gateway decodes and encodes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from muai_config import build_settings
from muai_producers.gateway import openapi_advice, openapi_batches, openapi_config, openapi_files, openapi_watch
from muai_producers.gateway.answers import ManyReceipts, ModelList, Receipt
from muai_producers.gateway.app import create_gateway
from muai_producers.gateway.console import document as console_document
from muai_producers.gateway.failures import ErrorBody
from muai_producers.gateway.health import Health, Readiness
from muai_producers.gateway.openai_api import document as openai_document
from muai_producers.gateway.server import is_loopback
from muai_producers.gateway.standing import Standing
from muai_producers.gateway.submission import InferenceBody, ManyBody
from muai_producers.gateway.workflow_bodies import WorkflowBody, WorkflowList, WorkflowReceipt
from muai_producers.runtime_config.versions import ConfigVersion
from muai_producers.wire import InferenceResult

KINDS = (
    *(Receipt, ManyReceipts, ModelList, ErrorBody, Health, Readiness, InferenceBody, ManyBody),
    *(WorkflowBody, WorkflowList, WorkflowReceipt),
    *openapi_files.TYPES,
    *openapi_batches.TYPES,
    *openapi_watch.TYPES,
    *openapi_config.TYPES,
    *openapi_advice.TYPES,
    ConfigVersion,
    *console_document.TYPES,
)
TYPES = {kind.__name__: kind for kind in (*KINDS, *openai_document.ANSWERS)}
BODIES = {kind.__name__: kind for kind in openai_document.BODIES}


@pytest.fixture(scope="module")
def document() -> Any:
    server = {"health_check_path": "/healthz", "readiness_check_path": "/readyz"}
    settings = build_settings({"queue": {"broker_url": "redis://127.0.0.1:1/0"}, "monitoring": {"server": server}}, {})
    return msgspec.json.decode(msgspec.json.encode(create_gateway(settings).openapi()))


def objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects(item)


def test_every_reference_leads_somewhere_and_every_schema_is_used(document: Any) -> None:
    used = {item["$ref"].removeprefix("#/components/schemas/") for item in objects(document) if "$ref" in item}
    assert used == set(document["components"]["schemas"])


def test_every_operation_is_documented_with_examples_that_its_own_types_accept(document: Any) -> None:
    num_examples = 0
    for media in (item["application/json"] for item in objects(document["paths"]) if "application/json" in item):
        name = media["schema"]["$ref"].rpartition("/")[2]
        examples = [media["example"]] if "example" in media else [one["value"] for one in media["examples"].values()]
        for example in examples:
            num_examples += 1
            if name == "Standing":
                assert set(example) == set(Standing.__struct_fields__)
                assert example["result"] is None or msgspec.convert(example["result"], InferenceResult)
            elif name in BODIES:
                BODIES[name].model_validate_json(msgspec.json.encode(example))
            elif name == "ManyBody":
                assert set(example) == set(ManyBody.__struct_fields__)
                assert msgspec.convert(example["requests"], list[InferenceBody])
            else:
                msgspec.convert(example, TYPES[name], strict=True)
    assert num_examples > 25


def test_the_paths_are_those_of_the_configuration_and_parameters_in_them_are_declared(document: Any) -> None:
    assert {"/healthz", "/readyz"} < set(document["paths"])
    for path, operations in document["paths"].items():
        for operation in operations.values():
            declared = {one["name"] for one in operation["parameters"] if one["in"] == "path"}
            assert declared == set(re.findall(r"{(\w+)", path))


@pytest.mark.parametrize(
    ("host", "verdict"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.7", False),
        ("gateway.example", False),
        ("localhost.example", False),
    ],
)
def test_only_loopback_addresses_need_no_word_on_authentication(host: str, verdict: bool) -> None:
    assert is_loopback(host) is verdict
