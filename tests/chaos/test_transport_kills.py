"""Consumers killed at random instants while they move work on: each message must be moved on once."""

from __future__ import annotations

import random
import signal
from collections import Counter
from pathlib import Path

import pytest
from tests.transport_support import OURS, Process, connect, own_redis, publish, wait_until

from muai_batching.transport import lease_table

pytestmark = [pytest.mark.redis, pytest.mark.chaos]

NUM_MESSAGES = 3000

MOVER = f"""
import sys
from tests.transport_support import Inbox, connect
connection = connect(sys.argv[1], {OURS!r}, lease_ttl_s=0.4, claim_batch=20)
box = Inbox(connection, "q", prefetch=60)
while True:
    box.wait_for(1, timeout_s=3600)
    mine, box.messages[:] = list(box.messages), []
    for start in range(0, len(mine), 7):
        group = mine[start:start + 7]
        box.channel.settle([m.delivery_tag for m in group], [("RPUSH", "moved", *[str(m.payload) for m in group])])
    box.channel.ledger.store.client.blpop("pace", 1)
"""


def test_given_movers_killed_at_random_when_all_is_moved_then_each_message_was_moved_once(tmp_path: Path) -> None:
    chance = random.Random(7)
    with own_redis(tmp_path) as server, connect(server.url, None) as stock:
        publish(stock, "q", *range(NUM_MESSAGES))
        movers = [Process(MOVER, server.url) for _ in range(3)]
        try:
            num_kills = 0
            while (moved := server.client.llen("moved")) < NUM_MESSAGES:
                server.client.rpush("pace", *["go"] * 10)
                goal = min(NUM_MESSAGES, moved + chance.randrange(50, 400))
                wait_until(lambda goal=goal: server.client.llen("moved") >= goal)
                victim = movers.pop(0)
                victim.signal(signal.SIGKILL)
                victim.wait()
                num_kills += 1
                movers.append(Process(MOVER, server.url))
            assert num_kills >= 7
            wait_until(lambda: sum(lease.num_claims for lease in lease_table(server.client)) == 0)
            assert Counter(map(int, server.client.lrange("moved", 0, -1))) == Counter(range(NUM_MESSAGES))
            assert server.client.llen("q") == 0
        finally:
            for mover in movers:
                mover.end()
