"""Answers from documents: `IngestWorkflow` takes them in, `RAGQAWorkflow` retrieves, answers and cites."""

from __future__ import annotations

import hashlib
from typing import Annotated

import msgspec
from msgspec import Meta

from muai_producers.vectors import as_bytes
from muai_producers.wire import Name
from muai_producers.workflows.base import Resources, RunContext, State, Step, Workflow, WorkflowParameters
from muai_producers.workflows.chat import Text, answer_of
from muai_producers.workflows.index import PassageIndex
from muai_producers.workflows.passages import Passage, cut
from muai_producers.workflows.search import SearchResult, numbered

INSTRUCTION = (
    "Answer the question from the numbered passages alone, and name the numbers that the answer rests on, like [2]. "
    "If they do not hold the answer, say so."
)


class Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A text to be answered from."""

    text: Annotated[str, Meta(min_length=1, max_length=5_000_000, pattern=r"\S")]
    id: Name | None = None
    """None: made from the text, so that the same text put twice is there once."""
    title: Annotated[str, Meta(max_length=1000)] = ""
    url: Annotated[str, Meta(max_length=4000)] = ""

    @property
    def key(self) -> str:
        """The id that it is kept under."""
        return self.id or hashlib.sha256(self.text.encode()).hexdigest()[:16]


class IngestParameters(WorkflowParameters, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Documents to take in."""

    documents: Annotated[list[Document], Meta(min_length=1, max_length=1000)]
    collection: Name = "default"


class IngestWorkflow(Workflow):
    """Cuts documents into passages, embeds them and keeps them."""

    name = "ingest"
    description = "Takes documents in, for rag and search to answer from."
    parameters = IngestParameters

    def steps(self) -> tuple[Step, ...]:
        """One step: embeddings are too many to travel from step to step, and to be asked for twice costs nothing."""
        return (Step("ingest", self._ingest),)

    def _ingest(self, parameters: IngestParameters, state: State, context: RunContext) -> State:
        settings = self.resources.settings.workflows
        passages = [
            Passage(
                id=f"{document.key}#{number}",
                document_id=document.key,
                title=document.title,
                text=text,
                url=document.url,
            )
            for document in parameters.documents
            for number, text in enumerate(cut(document.text, settings.passage_words), 1)
        ]
        model = self.model_for("embedding")
        asked = context.inference.infer(
            model, [{"text": passage.text} for passage in passages], step="embed", parameters={"truncate": True}
        )
        embedded = [
            msgspec.structs.replace(passage, vector=as_bytes(one.outputs["embedding"]))
            for passage, one in zip(passages, asked, strict=True)
        ]
        self.resources.passages.put(context.tenant, parameters.collection, embedded, settings.max_passages)
        outputs = {
            "collection": parameters.collection,
            "documents": [document.key for document in parameters.documents],
            "passages": len(passages),
        }
        return {"outputs": outputs}


class QuestionParameters(WorkflowParameters, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A question to documents."""

    question: Text
    collection: Name = "default"
    max_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None


class RAGQAWorkflow(Workflow):
    """Answers a question from the passages nearest to it in meaning, and cites them."""

    name = "rag"
    description = "Answers a question from the documents that were ingested, and cites them."
    parameters = QuestionParameters
    examples = (
        "What does our handbook say about holidays?",
        "According to the documentation, how is the service installed?",
        "What do our documents say about refunds?",
    )

    def __init__(self, *arguments: object, resources: Resources | None = None, **options: object) -> None:
        super().__init__(*arguments, resources=resources, **options)  # type: ignore[arg-type]
        self._index = PassageIndex(self.resources.passages)

    def steps(self) -> tuple[Step, ...]:
        """Embed the question, retrieve, generate."""
        return Step("embed", self._embed), Step("retrieve", self._retrieve), Step("generate", self._generate)

    def _embed(self, parameters: QuestionParameters, state: State, context: RunContext) -> State:
        question = [{"text": parameters.question}]
        (asked,) = context.inference.infer(
            self.model_for("embedding"), question, step="embed", parameters={"truncate": True}
        )
        return {"vector": asked.outputs["embedding"]}

    def _retrieve(self, parameters: QuestionParameters, state: State, context: RunContext) -> State:
        limit = self.resources.settings.workflows.retrieved_passages
        found = self._index.nearest(context.tenant, parameters.collection, state["vector"], limit)
        citations = [
            {
                "number": number,
                "document_id": one.passage.document_id,
                "passage_id": one.passage.id,
                "title": one.passage.title,
                "url": one.passage.url,
                "text": one.passage.text,
                "score": round(one.score, 4),
            }
            for number, one in enumerate(found, 1)
        ]
        return {"vector": None, "citations": citations}

    def _generate(self, parameters: QuestionParameters, state: State, context: RunContext) -> State:
        citations = state["citations"]
        if not citations:
            answer = f"Collection {parameters.collection!r} holds no documents yet."
            return {"outputs": {"answer": answer, "citations": [], "finish_reason": "stop"}}
        results = [SearchResult(title=one["title"], text=one["text"]) for one in citations]
        return cited_answer(self, parameters.question, results, citations, parameters.max_tokens, context)


def cited_answer(
    workflow: Workflow,
    question: str,
    results: list[SearchResult],
    citations: list[dict[str, object]],
    max_tokens: int | None,
    context: RunContext,
) -> State:
    """Have the chat model answer from `results`; the answer carries `citations`."""
    turns = [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": f"{numbered(results)}\n\nQuestion: {question}"},
    ]
    options = {} if max_tokens is None else {"max_tokens": max_tokens}
    answered = answer_of(workflow, turns, {**options, "truncate": True}, context)
    return {**answered, "outputs": {**answered["outputs"], "citations": citations}}
