"""`SearchQAWorkflow`: search, then answer from what was found."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from muai_producers.wire import Name
from muai_producers.workflows.base import RunContext, State, Step, Workflow, WorkflowParameters
from muai_producers.workflows.chat import Text
from muai_producers.workflows.rag import cited_answer
from muai_producers.workflows.search import SearchResult


class SearchParameters(WorkflowParameters, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A question to a search."""

    question: Text
    query: Text | None = None
    """What to search for; None: the question itself."""
    collection: Name = "default"
    """Of the local provider: the documents that are searched."""
    max_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None


class SearchQAWorkflow(Workflow):
    """Answers a question from search results, and cites them."""

    name = "search"
    description = "Searches, and answers from what was found, with citations."
    parameters = SearchParameters
    examples = (
        "Search for the latest release",
        "Look up who invented the telescope",
        "Find information on the opening hours",
    )

    def steps(self) -> tuple[Step, ...]:
        """Search, generate."""
        return Step("search", self._search), Step("generate", self._generate)

    def _search(self, parameters: SearchParameters, state: State, context: RunContext) -> State:
        limit = self.resources.settings.workflows.retrieved_passages
        query = parameters.query or parameters.question
        results = self.resources.search.search(context.tenant, parameters.collection, query, limit)
        return {"results": msgspec.to_builtins(results)}

    def _generate(self, parameters: SearchParameters, state: State, context: RunContext) -> State:
        results = msgspec.convert(state["results"], list[SearchResult])
        if not results:
            answer = "The search found nothing."
            return {"outputs": {"answer": answer, "citations": [], "finish_reason": "stop"}}
        citations = [{"number": number, **one} for number, one in enumerate(state["results"], 1)]
        return cited_answer(self, parameters.question, results, citations, parameters.max_tokens, context)
