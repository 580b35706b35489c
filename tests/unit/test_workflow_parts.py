"""The parts of workflows that need neither a model nor a server of ours."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muai_config import ConfigError, build_settings
from muai_producers.errors import InvalidRequestError, RequestNotFoundError
from muai_producers.vectors import as_bytes
from muai_producers.workflows import Orchestrator, Router
from muai_producers.workflows.index import PassageIndex
from muai_producers.workflows.passages import MemoryPassages, Passage, cut
from muai_producers.workflows.search import HttpSearch, SearchError

EXAMPLES = {"chat": ["hello"], "rag": ["what do our documents say"], "search": ["look it up"]}


@pytest.mark.parametrize(
    ("question", "workflow"),
    [
        ("Search for the tallest tower", "search"),
        ("please look up the weather in Rome", "search"),
        ("According to the handbook, how long is the break?", "rag"),
        ("What is in our documents about refunds?", "rag"),
    ],
)
def test_a_question_that_says_where_it_belongs_is_routed_by_rule(question: str, workflow: str) -> None:
    route = Router(EXAMPLES).route(question)
    assert (route.workflow, route.confidence) == (workflow, 1.0)


def test_without_a_rule_the_nearest_example_decides_and_says_how_sure_it_is() -> None:
    vectors = {"hello": [1.0, 0.0], "what do our documents say": [0.0, 1.0], "look it up": [-1.0, 0.0]}
    asked: list[int] = []

    def embed(texts: Sequence[str]) -> list[list[float]]:
        asked.append(len(texts))
        return [vectors.get(text, [0.6, 0.8]) for text in texts]

    router = Router(EXAMPLES, embed)
    route = router.route("a question")
    assert (route.workflow, route.confidence) == ("rag", 0.8)
    assert "what do our documents say" in route.reason
    router.route("another")
    assert asked == [3, 1, 1], "examples are embedded once"


def test_a_question_like_nothing_is_a_chat() -> None:
    def embed(texts: Sequence[str]) -> list[list[float]]:
        return [
            [1.0, 0.0] if text in ("hello", "look it up", "what do our documents say") else [0.1, 0.99]
            for text in texts
        ]

    assert Router(EXAMPLES, embed, threshold=0.5).route("zzz").workflow == "chat"


def test_an_unknown_workflow_is_refused_by_name() -> None:
    with pytest.raises(RequestNotFoundError, match="there are chat, rag, search, ingest, auto"):
        Orchestrator(build_settings({}, {})).workflow("summarise")


def test_a_catalog_without_a_chat_model_is_told_what_to_add() -> None:
    with pytest.raises(InvalidRequestError, match="needs a model for chat"):
        Orchestrator(build_settings({}, {})).workflow("chat").execute({"message": "hello"})


@pytest.mark.parametrize("parameters", [{}, {"message": ""}, {"message": "x", "colour": "red"}, {"message": 3}])
def test_wrong_parameters_name_workflow_and_field(parameters: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="workflow chat"):
        Orchestrator(build_settings({}, {})).workflow("chat").read(parameters)


def test_a_configured_model_that_the_catalog_lacks_stops_the_start() -> None:
    with pytest.raises(ConfigError, match="chat_model"):
        build_settings({"workflows": {"chat_model": "nobody"}}, {})


@given(
    st.lists(st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=12), max_size=300),
    st.integers(10, 60),
)
def test_passages_joined_are_the_document(words: list[str], length: int) -> None:
    text = " ".join(words)
    passages = cut(text, length)
    assert " ".join(passages).split() == text.split()
    assert all(len(passage.split()) <= length for passage in passages)


def passage(number: int, text: str, vector: Sequence[float] = (), document: str = "d") -> Passage:
    return Passage(id=f"{document}#{number}", document_id=document, title="t", text=text, vector=as_bytes(vector))


def test_a_document_that_is_put_again_replaces_its_older_self() -> None:
    passages = MemoryPassages()
    index = PassageIndex(passages)
    passages.put("a", "c", [passage(1, "red apples"), passage(2, "green pears")], 10)
    assert [one.passage.text for one in index.matching("a", "c", "Pears?", 5)] == ["green pears"]
    passages.put("a", "c", [passage(1, "blue plums")], 10)
    assert index.matching("a", "c", "pears apples", 5) == []
    assert [one.passage.text for one in index.matching("a", "c", "plum", 5)] == ["blue plums"]
    assert passages.remove("a", "c", "d") == 1
    assert index.matching("a", "c", "plum", 5) == []


def test_no_tenant_finds_what_is_anothers() -> None:
    passages = MemoryPassages()
    index = PassageIndex(passages)
    passages.put("a", "c", [passage(1, "secret apples", [1.0, 0.0])], 10)
    assert index.matching("b", "c", "apples", 5) == []
    assert index.nearest("b", "c", [1.0, 0.0], 5) == []
    assert len(index.nearest("a", "c", [1.0, 0.0], 5)) == 1


def test_a_full_collection_refuses_and_keeps_what_it_has() -> None:
    passages = MemoryPassages()
    passages.put("a", "c", [passage(1, "one")], 1)
    with pytest.raises(InvalidRequestError, match="max_passages is 1"):
        passages.put("a", "c", [passage(1, "two", document="e")], 1)
    assert [one.text for one in passages.changes("a", "c", 0).added] == ["one"]


@given(st.lists(st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=20))
def test_the_nearest_passage_to_a_vector_is_its_own(vectors: list[list[float]]) -> None:
    vectors = [[1.0 + number, *vector[1:]] for number, vector in enumerate(vectors)]
    passages = MemoryPassages()
    passages.put("a", "c", [passage(number, "x", vector) for number, vector in enumerate(vectors)], 100)
    index = PassageIndex(passages)
    for vector in vectors:
        assert index.nearest("a", "c", vector, 1)[0].score == pytest.approx(1.0, abs=1e-4)


def test_a_question_of_another_embedding_model_is_told_so() -> None:
    passages = MemoryPassages()
    passages.put("a", "c", [passage(1, "x", [1.0, 0.0])], 10)
    with pytest.raises(InvalidRequestError, match="another embedding model"):
        PassageIndex(passages).nearest("a", "c", [1.0, 0.0, 0.0], 1)


def test_words_of_a_question_are_no_operators_of_the_search() -> None:
    passages = MemoryPassages()
    passages.put("a", "c", [passage(1, "apples and pears")], 10)
    index = PassageIndex(passages)
    for query in ('apples" OR "', "NOT apples", "pears NEAR(", "* ^ : apples", "' ; DROP TABLE passages"):
        index.matching("a", "c", query, 5)
    assert len(index.matching("a", "c", "apples", 5)) == 1


@contextmanager
def service(answer: bytes, status: int = 200) -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/?q={{query}}&n={{limit}}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_search_service_is_asked_and_its_results_are_read() -> None:
    results = [{"title": "A", "url": "http://a", "snippet": "first"}, {"title": "no text"}, {"text": "second"}, "odd"]
    with service(json.dumps({"web": {"results": results}}).encode()) as (url, asked):
        found = HttpSearch(url, "web.results", 5.0).search("t", "c", "where & why?", 2)
    assert asked == ["/?q=where%20%26%20why%3F&n=2"]
    assert [(one.title, one.text, one.url) for one in found] == [("A", "first", "http://a"), ("", "second", "")]


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [(b"<html>", 200, "no JSON"), (b"{}", 200, "no list at 'results'"), (b"x", 500, "does not answer")],
)
def test_a_search_service_that_fails_is_named(answer: bytes, status: int, said: str) -> None:
    with service(answer, status) as (url, _), pytest.raises(SearchError, match=said):
        HttpSearch(url, "results", 5.0).search("t", "c", "q", 2)
