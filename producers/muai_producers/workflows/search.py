"""Where SearchQAWorkflow looks: the full text of what was ingested, or a service that answers JSON over HTTP."""

from __future__ import annotations

import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from muai_config.workflows import WorkflowSettings
from muai_producers.errors import InferenceFailedError
from muai_producers.workflows.index import PassageIndex
from muai_producers.workflows.passages import Passages

MAX_ANSWER_BYTES = 4_000_000
TEXT_FIELDS = ("text", "snippet", "content", "description")


class SearchError(InferenceFailedError):
    """The search service did not answer as it should."""

    code = "search_failed"
    retryable = True
    http_status = 502


class SearchResult(msgspec.Struct, frozen=True, kw_only=True):
    """One thing found."""

    title: str
    text: str
    url: str = ""


class SearchProvider(Protocol):
    """Finds texts that may hold an answer."""

    def search(self, tenant: str, collection: str, query: str, limit: int) -> list[SearchResult]:
        """The best `limit` results, best first.

        Raises:
            SearchError: the provider does not answer, or not with results.
        """
        ...


class LocalSearch:
    """The full text of the documents that were ingested."""

    def __init__(self, passages: Passages) -> None:
        self._index = PassageIndex(passages)

    def search(self, tenant: str, collection: str, query: str, limit: int) -> list[SearchResult]:
        """See `SearchProvider.search`."""
        found = [one.passage for one in self._index.matching(tenant, collection, query, limit)]
        return [SearchResult(title=one.title, text=one.text, url=one.url) for one in found]


class HttpSearch:
    """A service that answers JSON over HTTP.

    Args:
        url: with `{query}` and `{limit}`.
        results_path: where in the answer the list of results lies, keys parted by dots.
    """

    def __init__(self, url: str, results_path: str, timeout_s: float) -> None:
        self._url = url
        self._path = [key for key in results_path.split(".") if key]
        self._timeout_s = timeout_s

    def search(self, tenant: str, collection: str, query: str, limit: int) -> list[SearchResult]:
        """See `SearchProvider.search`. The service is the same for every tenant and collection."""
        url = self._url.replace("{query}", urllib.parse.quote(query, safe="")).replace("{limit}", str(limit))
        where = urllib.parse.urlsplit(url).hostname
        request = urllib.request.Request(url, headers={"Accept": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
                document = msgspec.json.decode(answer.read(MAX_ANSWER_BYTES))
        except (OSError, urllib.error.URLError) as error:
            raise SearchError(f"the search service at {where} does not answer: {error}") from error
        except msgspec.DecodeError as error:
            raise SearchError(f"the search service at {where} answered no JSON: {error}") from error
        return self._read(document, str(where))[:limit]

    def _read(self, document: Any, where: str) -> list[SearchResult]:
        for key in self._path:
            document = document.get(key) if isinstance(document, dict) else None
        if not isinstance(document, list):
            raise SearchError(
                f"the answer of the search service at {where} has no list at {'.'.join(self._path)!r}: see "
                "workflows.search_results_path"
            )
        results = [_result(entry) for entry in document if isinstance(entry, dict)]
        return [result for result in results if result.text]


def _result(entry: dict[str, Any]) -> SearchResult:
    text = next((str(entry[field]) for field in TEXT_FIELDS if entry.get(field)), "")
    return SearchResult(title=str(entry.get("title") or ""), text=text, url=str(entry.get("url") or ""))


def search_provider(settings: WorkflowSettings, passages: Passages) -> SearchProvider:
    """The provider that the configuration names."""
    if settings.search_provider == "http" and settings.search_url is not None:
        return HttpSearch(settings.search_url, settings.search_results_path, settings.search_timeout_s)
    return LocalSearch(passages)


def numbered(results: Sequence[SearchResult]) -> str:
    """Results as a prompt shows them, each with the number that an answer cites it by."""
    return "\n\n".join(f"[{number}] {one.title}\n{one.text}".strip() for number, one in enumerate(results, 1))
