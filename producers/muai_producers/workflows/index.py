"""Finding passages: by meaning with a faiss index, by words with SQLite's full-text search. Both follow the changes
of a collection; the collection itself is what is durable.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from muai_producers.errors import InvalidRequestError
from muai_producers.vectors import as_bytes
from muai_producers.workflows.passages import Passage, Passages

_WORD = re.compile(r"\w+")
BYTES_PER_NUMBER = 4


@dataclass(frozen=True)
class Found:
    """A passage and how well it fits, better is higher."""

    passage: Passage
    score: float


@dataclass
class _Collection:
    """The indexes of one collection."""

    version: int = 0
    passages: dict[str, Passage] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    """faiss knows passages by number."""
    ids: dict[int, str] = field(default_factory=dict)
    vectors: Any = None
    words: sqlite3.Connection | None = None
    next_number: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class PassageIndex:
    """Indexes over collections, brought up to date whenever they are asked. Thread-safe."""

    def __init__(self, passages: Passages) -> None:
        self._passages = passages
        self._collections: dict[tuple[str, str], _Collection] = {}
        self._lock = threading.Lock()

    def nearest(self, tenant: str, collection: str, vector: Sequence[float], limit: int) -> list[Found]:
        """The passages nearest in meaning to `vector`, by cosine similarity.

        Raises:
            InvalidRequestError: the collection was embedded by a model of another size.
        """
        kept = self._collection(tenant, collection)
        with kept.lock:
            self._follow(kept, tenant, collection)
            if kept.vectors is None or not kept.vectors.ntotal:
                return []
            if len(vector) != kept.vectors.d:
                raise InvalidRequestError(
                    f"collection {collection!r} holds vectors of {kept.vectors.d} numbers, the question has "
                    f"{len(vector)}: it was ingested with another embedding model",
                    {"collection": collection},
                )
            scores, numbers = kept.vectors.search(_row(as_bytes(vector)), min(limit, kept.vectors.ntotal))
            return [
                Found(kept.passages[kept.ids[int(number)]], float(score))
                for number, score in zip(numbers[0], scores[0], strict=True)
            ]

    def matching(self, tenant: str, collection: str, query: str, limit: int) -> list[Found]:
        """The passages that share most words with `query`, by BM25."""
        words = list(dict.fromkeys(_WORD.findall(query.lower())))
        if not words:
            return []
        kept = self._collection(tenant, collection)
        with kept.lock:
            self._follow(kept, tenant, collection)
            if kept.words is None:
                return []
            # Quoted, so that no word of the question is an operator of the query language.
            expression = " OR ".join(f'"{word}"' for word in words)
            rows = kept.words.execute(
                "SELECT id, bm25(passages) FROM passages WHERE passages MATCH ? ORDER BY 2 LIMIT ?", (expression, limit)
            ).fetchall()
            return [Found(kept.passages[passage_id], -score) for passage_id, score in rows]

    def _collection(self, tenant: str, collection: str) -> _Collection:
        with self._lock:
            return self._collections.setdefault((tenant, collection), _Collection())

    def _follow(self, kept: _Collection, tenant: str, collection: str) -> None:
        changes = self._passages.changes(tenant, collection, kept.version)
        for passage_id in (*changes.removed, *(passage.id for passage in changes.added)):
            self._drop(kept, passage_id)
        for passage in changes.added:
            self._add(kept, passage)
        kept.version = changes.version

    def _drop(self, kept: _Collection, passage_id: str) -> None:
        if kept.passages.pop(passage_id, None) is None:
            return
        number = kept.numbers.pop(passage_id, None)
        if number is not None:
            del kept.ids[number]
            kept.vectors.remove_ids(_ids([number]))
        assert kept.words is not None  # every passage was added to it
        kept.words.execute("DELETE FROM passages WHERE id = ?", (passage_id,))

    def _add(self, kept: _Collection, passage: Passage) -> None:
        kept.passages[passage.id] = passage
        if kept.words is None:
            kept.words = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
            kept.words.execute("CREATE VIRTUAL TABLE passages USING fts5(id UNINDEXED, title, text, tokenize='porter')")
        kept.words.execute("INSERT INTO passages VALUES (?, ?, ?)", (passage.id, passage.title, passage.text))
        if passage.vector:
            self._add_vector(kept, passage)

    def _add_vector(self, kept: _Collection, passage: Passage) -> None:
        size = len(passage.vector) // BYTES_PER_NUMBER
        if kept.vectors is None:
            kept.vectors = _new_index(size)
        if size != kept.vectors.d:
            return  # of an older model; it is still found by its words
        kept.numbers[passage.id] = number = kept.next_number
        kept.ids[number] = passage.id
        kept.next_number += 1
        kept.vectors.add_with_ids(_row(passage.vector), _ids([number]))


def _row(vector: bytes) -> Any:
    """One row of length one, so that inner products are cosines; shape (1, size), fp32."""
    import numpy as np  # comes with faiss, which not every process needs

    row = np.frombuffer(vector, dtype="<f4").reshape(1, -1)
    return row / max(float(np.linalg.norm(row)), 1e-12)


def _ids(numbers: Sequence[int]) -> Any:
    import numpy as np

    return np.asarray(numbers, dtype=np.int64)


def _new_index(size: int) -> Any:
    try:
        import faiss
    except ImportError as error:
        raise InvalidRequestError("answers from documents need faiss (pip install 'muai[workflows]')") from error
    # Exact: some milliseconds for 100,000 passages, and passages can be taken out.
    return faiss.IndexIDMap2(faiss.IndexFlatIP(size))
