"""The `workflows` section: which models the workflows use, how much they keep, and where they search."""

from collections.abc import Iterator
from typing import Literal

from muai_config.fields import Conflict, HttpUrl, Name, Section, setting


class WorkflowSettings(Section):
    chat_model: Name | None = setting(
        None,
        example="qwen-chat",
        describe="The model that writes answers; null takes the catalog's first for chat, else for text generation.",
    )
    embedding_model: Name | None = setting(
        None,
        example="all-minilm-l6-v2",
        describe="The model that documents, questions and routes are compared by; null takes the catalog's first.",
    )
    timeout_s: float = setting(
        120.0, gt=0.0, le=86_400.0, unit="s", example=30.0, describe="Longest that one run may take in all."
    )
    concurrency: int = setting(
        16,
        ge=1,
        le=1024,
        unit="steps",
        example=64,
        describe="Steps that one control worker runs, or waits for, at once.",
    )
    history_turns: int = setting(
        20, ge=0, le=10_000, unit="turns", example=6, describe="Turns of a conversation that a new one is told of."
    )
    history_ttl_s: int = setting(
        86_400, ge=1, le=31_536_000, unit="s", example=3600, describe="How long a silent conversation is remembered."
    )
    passage_words: int = setting(
        120, ge=10, le=2000, unit="words", example=80, describe="Length of the passages that documents are cut into."
    )
    max_passages: int = setting(
        100_000,
        ge=1,
        le=10_000_000,
        unit="passages",
        example=10_000,
        describe="Most passages in one collection of documents; one more is refused.",
    )
    retrieved_passages: int = setting(
        4, ge=1, le=100, unit="passages", example=8, describe="Passages or search results that an answer is given."
    )
    search_provider: Literal["local", "http"] = setting(
        "local",
        example="http",
        describe="What SearchQAWorkflow asks: the full text of the documents that were ingested (local), or a search "
        "service that answers JSON over HTTP.",
    )
    search_url: HttpUrl | None = setting(
        None,
        example="https://search.example.com/v1?q={query}&n={limit}",
        describe="Address of the search service; {query} and {limit} are filled in.",
    )
    search_results_path: str = setting(
        "results",
        example="web.results",
        describe="Where the list of results lies in the service's answer, keys parted by dots; each result has title, "
        "url and one of text, snippet, content or description.",
    )
    search_timeout_s: float = setting(
        10.0, gt=0.0, le=600.0, unit="s", example=3.0, describe="Longest that one search may take."
    )
    routing_threshold: float = setting(
        0.25,
        ge=0.0,
        le=1.0,
        unit="cosine similarity",
        example=0.4,
        describe="Least similarity to a workflow's examples for the router to choose it; below, it is a chat.",
    )

    def conflicts(self) -> Iterator[Conflict]:
        if self.search_provider == "http" and self.search_url is None:
            yield Conflict("search_url", None, "an address, as search_provider is http")
        if self.search_url is not None and "{query}" not in self.search_url:
            yield Conflict("search_url", self.search_url, "an address that holds {query}")
