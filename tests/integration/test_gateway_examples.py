"""The examples run as they stand."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import runpy
import sys
from collections.abc import Iterator
from types import ModuleType

import httpx
import pytest
from tests.gateway_support import GatewayStack, gateway_stack
from tests.transport_support import ROOT

pytestmark = pytest.mark.redis
EXAMPLES = ROOT / "producers" / "examples"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayStack]:
    with gateway_stack(tmp_path_factory.mktemp("examples")) as stack:
        stack.start_serving()
        yield stack


@pytest.fixture(autouse=True)
def configured(stack: GatewayStack, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MUAI_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MUAI_CONFIG", str(stack.config))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["sync_client", "async_client", "celery_producer"])
def test_given_a_running_installation_then_the_script_gets_its_results(
    name: str, stack: GatewayStack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["noop", stack.redis.url] if name == "celery_producer" else ["noop"]
    monkeypatch.setattr("sys.argv", [f"{name}.py", *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == {"sync_client": 3, "async_client": 8, "celery_producer": 1}[name]
    expected = "in a batch of" if name == "async_client" else "labels"
    assert all(expected in line for line in lines)


def test_given_the_fastapi_example_then_one_request_submits_and_another_polls(stack: GatewayStack) -> None:
    example = load("fastapi_app")

    async def scenario() -> None:
        transport = httpx.ASGITransport(app=example.app)
        async with (
            example.app.router.lifespan_context(example.app),
            httpx.AsyncClient(transport=transport, base_url="http://app") as http,
        ):
            submitted = await http.post("/sentences", params={"sentence": "hello", "model": "noop"})
            assert submitted.status_code == 202
            polled = await http.get(f"/sentences/{submitted.json()['id']}", params={"wait_s": 20})
            assert polled.json()["state"] == "SUCCESS"
            assert "labels" in polled.json()["outputs"]
            parked = await http.post("/sentences", params={"sentence": "hello", "model": "parked"})
            unfinished = await http.get(f"/sentences/{parked.json()['id']}")
            assert unfinished.json()["state"] in ("PENDING", "RECEIVED")

    asyncio.run(scenario())


def test_given_the_flask_example_then_one_request_submits_and_another_polls(stack: GatewayStack) -> None:
    app = load("flask_app").create_app()
    with app.test_client() as http, app.extensions["inference"]:
        submitted = http.post("/sentences", data={"sentence": "hello", "model": "noop"})
        assert submitted.status_code == 202
        polled = http.get(f"/sentences/{submitted.json['id']}", query_string={"wait_s": 20}).json
        assert polled["state"] == "SUCCESS"
        assert "labels" in polled["outputs"]
        parked = http.post("/sentences", data={"sentence": "hello", "model": "parked"}).json["id"]
        assert http.get(f"/sentences/{parked}").json["state"] in ("PENDING", "RECEIVED")
        wrong = http.get(f"/sentences/{parked}", query_string={"wait_s": 99})
        assert (wrong.status_code, wrong.json["code"]) == (400, "invalid_request")


def test_given_the_django_example_then_one_request_submits_and_another_polls(stack: GatewayStack) -> None:
    example = load("django_app")
    sys.modules["django_app"] = example  # by which name its own ROOT_URLCONF finds it
    from django.test import Client

    http = Client()
    with example.inference():
        submitted = http.post("/sentences", {"sentence": "hello", "model": "noop"})
        assert submitted.status_code == 202
        polled = http.get(f"/sentences/{submitted.json()['id']}", {"wait_s": 20}).json()
        assert polled["state"] == "SUCCESS"
        assert "labels" in polled["outputs"]
        parked = http.post("/sentences", {"sentence": "hello", "model": "parked"}).json()["id"]
        assert http.get(f"/sentences/{parked}").json()["state"] in ("PENDING", "RECEIVED")
        wrong = http.get(f"/sentences/{parked}", {"wait_s": "soon"})
        assert (wrong.status_code, wrong.json()["code"]) == (400, "invalid_request")
