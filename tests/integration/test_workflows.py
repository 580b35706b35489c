"""Workflows in process, and over the queue with a control worker, a collector and workers as processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from celery import Celery
from tests import models
from tests.gateway_support import GatewayStack, gateway_stack
from tests.transport_support import OwnRedis, wait_until

from muai_config import build_settings, celery_settings
from muai_producers.client import InferenceClient
from muai_producers.errors import DeadlineExceededError, InvalidRequestError, QueueFullError, RequestCancelledError
from muai_producers.runtime_config.editing import ConfigEditor
from muai_producers.runtime_config.versions import ConfigVersions
from muai_producers.workflows import ChatGenerateWorkflow, Orchestrator, RAGQAWorkflow
from muai_producers.workflows.history import RedisHistory
from muai_producers.workflows.index import PassageIndex
from muai_producers.workflows.inference import Asked, QueueInference
from muai_producers.workflows.passages import RedisPassages
from muai_producers.workflows.runs import WorkflowRuns
from muai_workers.engines.fake import FakeEngine
from muai_workers.model_manager import ModelManager
from muai_workers.optimization_manager import OptimizationManager

pytestmark = [pytest.mark.redis, pytest.mark.timeout(180)]
CATALOG: dict[str, Any] = {
    "talker": {"task": "chat", "source": "hub:none", "engines": ["fake"]},
    "embedder": {"task": "embedding", "source": "hub:none", "engines": ["fake"]},
}
DOCUMENTS = [
    {"id": "hours", "title": "Opening hours", "text": "The office opens at nine in the morning."},
    {"id": "lunch", "title": "Lunch", "text": "Lunch is served in the garden at noon."},
]


def test_workflows_run_in_process_on_an_optimization_manager() -> None:
    settings = build_settings({"models": CATALOG}, {})
    manager = OptimizationManager(settings, engines={"fake": FakeEngine()})
    orchestrator = Orchestrator(settings, opt_manager=manager)
    chat = {"message": "one two", "conversation_id": "c"}
    assert orchestrator.execute_workflow("chat", chat).outputs["answer"] == "two one"
    again = orchestrator.execute_workflow("chat", {**chat, "message": "three"})
    assert again.outputs["answer"] == "three one two two one", "the fake engine gives back what it was told, reversed"
    assert [step.name for step in again.steps] == ["recall", "generate", "remember"]
    orchestrator.execute_workflow("ingest", {"documents": DOCUMENTS})
    answer = orchestrator.execute_workflow("rag", {"question": DOCUMENTS[1]["text"]}).outputs
    assert answer["citations"][0]["document_id"] == "lunch"
    found = orchestrator.execute_workflow("search", {"question": "When does the office open?"}).outputs
    assert found["citations"][0]["title"] == "Opening hours"


# Property 53: Existing APIs remain unchanged
@pytest.mark.property(53)
def test_a_workflow_runs_on_a_plain_model_manager_with_optimisation_off() -> None:
    settings = build_settings({"models": CATALOG, "optimization": {"enabled": False}}, {})
    manager = ModelManager(settings, FakeEngine(name="pytorch"))
    assert ChatGenerateWorkflow(manager, settings=settings).execute({"message": "a b"}).outputs["answer"] == "b a"


@pytest.mark.engine
def test_a_real_encoder_retrieves_and_routes_by_meaning() -> None:
    real = OptimizationManager(models.settings())
    name = models.encoder_spec().name

    class Both:
        """The real encoder, and the fake engine to talk."""

        def infer_many(self, model: str, inputs: Any, **options: Any) -> Any:
            if model == "embedder":
                return real.infer_many(name, inputs, **options)
            return talker.infer_many(model, inputs, **options)

    talker = OptimizationManager(build_settings({"models": CATALOG}, {}), engines={"fake": FakeEngine()})
    orchestrator = Orchestrator(build_settings({"models": CATALOG}, {}), opt_manager=Both())
    orchestrator.execute_workflow("ingest", {"documents": DOCUMENTS})
    answer = orchestrator.execute_workflow("rag", {"question": "Where do people eat at midday?"}).outputs
    assert answer["citations"][0]["document_id"] == "lunch"
    assert orchestrator.route("Please tell me a tale about a dragon").workflow == "chat"
    assert orchestrator.route("What does the employee handbook say on vacation days?").workflow == "rag"
    real.close()


def test_passages_in_redis_are_followed_by_every_index(clean_redis: OwnRedis) -> None:
    from tests.unit.test_workflow_parts import passage

    passages = RedisPassages(clean_redis.client, "muai")
    one, other = PassageIndex(passages), PassageIndex(passages)
    passages.put("a", "c", [passage(1, "red apples", [1.0, 0.0]), passage(2, "green pears", [0.0, 1.0])], 10)
    assert [found.passage.id for found in one.nearest("a", "c", [0.0, 1.0], 1)] == ["d#2"]
    passages.put("a", "c", [passage(1, "blue plums", [0.0, 1.0])], 10)
    for index in (one, other):
        assert [found.passage.text for found in index.nearest("a", "c", [0.0, 1.0], 5)] == ["blue plums"]
    with pytest.raises(InvalidRequestError, match="max_passages"):
        passages.put("a", "c", [passage(1, "x", document="e")], 1)
    assert passages.remove("a", "c", "d") == 1
    assert one.matching("a", "c", "plums", 5) == []


def test_a_turn_is_remembered_once_for_each_run(clean_redis: OwnRedis) -> None:
    history = RedisHistory(clean_redis.client, "muai", 60)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for run in ("r1", "r1", "r2"):
        history.append("t", "c", run, turns)
    assert [turn["content"] for turn in history.turns("t", "c", 3)] == ["b", "a", "b"]
    assert history.turns("other", "c", 3) == []
    history.forget("t", "c")
    assert history.turns("t", "c", 3) == []


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayStack]:
    with gateway_stack(tmp_path_factory.mktemp("workflows")) as stack:
        document = yaml.safe_load(stack.config.read_text())
        document["models"] = CATALOG
        document["queue"]["lease_ttl_s"] = 2.0
        stack.config.write_text(yaml.safe_dump(document))
        stack.settings = build_settings(document, {})
        stack.start_serving()
        stack.start_gateway()
        stack.start("control", "--name", "k1")
        yield stack


@pytest.fixture
def client(stack: GatewayStack) -> Iterator[InferenceClient]:
    with InferenceClient(stack.settings) as client:
        yield client


@pytest.fixture
def runs(stack: GatewayStack, client: InferenceClient) -> WorkflowRuns:
    app = Celery("test", set_as_current=False)
    app.conf.update(celery_settings(stack.settings, "producer"))
    return WorkflowRuns(stack.settings, client, app)


def test_over_http_documents_go_in_and_answers_come_out(stack: GatewayStack) -> None:
    with httpx.Client(base_url=stack.url, timeout=60.0) as http:

        def run(name: str, **parameters: Any) -> dict[str, Any]:
            started = http.post(f"/v1/workflows/{name}", json={"parameters": parameters})
            assert started.status_code == 202, started.text
            standing = http.get(started.json()["status_url"], params={"wait": 50}).json()
            assert standing["state"] == "SUCCESS", standing
            found: dict[str, Any] = standing["result"]
            return found

        names = [entry["name"] for entry in http.get("/v1/workflows").json()["data"]]
        assert names == ["chat", "rag", "search", "ingest", "auto"]
        assert run("ingest", documents=DOCUMENTS)["outputs"]["passages"] == 2
        answer = run("rag", question=DOCUMENTS[0]["text"])
        assert answer["outputs"]["citations"][0]["document_id"] == "hours"
        assert [step["name"] for step in answer["metadata"]["steps"]] == ["embed", "retrieve", "generate"]
        assert run("chat", message="one two", conversation_id="c1")["outputs"]["answer"] == "two one"
        assert run("chat", message="three", conversation_id="c1")["outputs"]["answer"] == "three one two two one"
        routed = run("auto", question="Search for the garden lunch")
        assert routed["metadata"]["route"]["workflow"] == "search"
        assert routed["outputs"]["citations"][0]["title"] == "Lunch"


def test_wrong_runs_are_refused_before_anything_is_started(stack: GatewayStack) -> None:
    with httpx.Client(base_url=stack.url) as http:
        for name, body, status, said in [
            ("nope", {"parameters": {}}, 404, "there is no workflow 'nope'"),
            ("rag", {"parameters": {}}, 400, "question"),
            ("rag", {"parameters": {"question": "x"}, "colour": 1}, 400, "colour"),
            ("auto", {"parameters": {}}, 400, "question"),
            ("rag", [], 400, "object"),
        ]:
            answer = http.post(f"/v1/workflows/{name}", json=body)
            assert (answer.status_code, said in answer.json()["error"]["message"]) == (status, True), answer.text


def test_a_control_worker_that_is_killed_in_mid_run_leaves_it_to_another(
    stack: GatewayStack, runs: WorkflowRuns, client: InferenceClient
) -> None:
    control = next(process for process in stack.processes if "control" in process.log.name)
    count = 40
    ids = [runs.submit("chat", {"message": f"word{number} end", "conversation_id": "k"}) for number in range(count)]
    wait_until(lambda: any(client.status(one).finished for one in ids), what="a first answer")
    control.stop()
    stack.start("control", "--name", "k2")
    outcomes = dict(client.results(ids, timeout_s=90))
    assert len(outcomes) == count
    answers = {one.outputs["answer"].split()[0] for one in outcomes.values()}  # type: ignore[union-attr]
    assert answers == {"end"}, "the fake engine gives back what it was told, reversed"
    turns = RedisHistory(stack.redis.client, "muai", 60).turns("default", "k", 1000)
    assert len(turns) == 2 * count, "each run is remembered once"


def test_a_step_that_runs_again_from_another_state_gets_the_first_answer(
    stack: GatewayStack, client: InferenceClient
) -> None:
    inference = QueueInference(client, "run-1", "default", time.time() + 60)

    def ask(*messages: str) -> list[Asked]:
        inputs = [{"messages": [{"role": "user", "content": message}]} for message in messages]
        return inference.infer("talker", inputs, step="generate")

    first = ask("one two", "three four")
    again = ask("one two and what was said since", "three four")
    assert [one.outputs["text"] for one in first] == ["two one", "four three"]
    assert again == first


def test_a_run_that_is_cancelled_or_too_late_ends_as_such(runs: WorkflowRuns, client: InferenceClient) -> None:
    late = runs.submit("chat", {"message": "a"}, timeout_s=0.000001)
    with pytest.raises(DeadlineExceededError):
        client.result(late, timeout_s=60)
    cancelled = runs.submit("chat", {"message": "a"})
    if client.cancel(cancelled):
        with pytest.raises(RequestCancelledError):
            client.result(cancelled, timeout_s=60)


def test_more_runs_than_the_capacity_are_refused(stack: GatewayStack, client: InferenceClient) -> None:
    app = Celery("test", set_as_current=False)
    settings = build_settings(
        {
            "queue": {"broker_url": stack.redis.url, "key_prefix": "other"},
            "monitoring": {"server": {"queue_capacity": 2}},
            "models": CATALOG,
        },
        {},
    )
    app.conf.update(celery_settings(settings, "producer"))
    with InferenceClient(settings) as other:
        runs = WorkflowRuns(settings, other, app)
        deadline_s = time.time() + 60
        for number in range(2):
            stack.redis.client.zadd("other:workflows", {f"r{number}": deadline_s})
        with pytest.raises(QueueFullError, match="2 of 2 workflow runs"):
            runs.submit("chat", {"message": "a"})
        stack.redis.client.zadd("other:workflows", {"r0": time.time() - 120})
        assert runs.submit("chat", {"message": "a"})
        with pytest.raises(QueueFullError):
            runs.submit("chat", {"message": "a"})
        ConfigEditor(settings, ConfigVersions(other.store)).set({"monitoring.server.queue_capacity": 9}, by="ada")
        other.submit("embedder", "a")  # a client looks for changes when it submits
        assert runs.submit("chat", {"message": "a"})


def test_answers_with_citations_need_no_more_than_ours(tmp_path: Path) -> None:
    settings = build_settings({"models": CATALOG}, {})
    manager = OptimizationManager(settings, engines={"fake": FakeEngine()})
    empty = RAGQAWorkflow(None, manager, settings=settings).execute({"question": "anything?"})
    assert empty.outputs == {
        "answer": "Collection 'default' holds no documents yet.",
        "citations": [],
        "finish_reason": "stop",
    }
