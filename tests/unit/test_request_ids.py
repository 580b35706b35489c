"""Ids are UUIDs as the RFC has them, and name their listener."""

from __future__ import annotations

import uuid

from muai_producers.request_ids import new_owner, new_request_id, owner_of


def test_given_many_ids_then_each_is_a_uuid_of_version_4_that_names_its_owner() -> None:
    owner = new_owner()
    ids = [new_request_id(owner) for _ in range(2000)]
    assert len(set(ids)) == 2000
    for request_id in ids:
        parsed = uuid.UUID(request_id)
        assert (parsed.version, parsed.variant, str(parsed)) == (4, uuid.RFC_4122, request_id)
        assert owner_of(request_id) == owner
