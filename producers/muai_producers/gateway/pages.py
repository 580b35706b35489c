"""Pages of lists, in OpenAI's shape: `limit`, `after`, `order`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from muai_producers.errors import InvalidRequestError

MAX_LIMIT = 10_000


class HasId(Protocol):
    """What a list holds."""

    @property
    def id(self) -> str:
        """Its id."""
        ...


Item = TypeVar("Item", bound=HasId)


def page_of(items: Sequence[Item], query: Mapping[str, str], default_limit: int) -> tuple[list[Item], bool]:
    """The page that a query asks for, and whether there are more after it.

    Args:
        items: newest first.
    Raises:
        InvalidRequestError: a parameter is wrong; `field` names it.
    """
    limit, after, order = query.get("limit"), query.get("after"), query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequestError(f"order must be asc or desc, got {order[:40]!r}", {"field": "order"})
    if limit is not None and not (limit.isascii() and limit.isdecimal() and 1 <= int(limit[:6]) <= MAX_LIMIT):
        raise InvalidRequestError(
            f"limit must be a whole number from 1 to {MAX_LIMIT}, got {limit[:40]!r}", {"field": "limit"}
        )
    ordered = list(items) if order == "desc" else list(reversed(items))
    first = 0
    if after is not None:
        places = [place for place, item in enumerate(ordered) if item.id == after]
        if not places:
            raise InvalidRequestError(f"after: there is no {after[:100]!r} in the list", {"field": "after"})
        first = places[0] + 1
    last = first + (default_limit if limit is None else int(limit))
    return ordered[first:last], last < len(ordered)
