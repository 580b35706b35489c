"""One installation for each broker, which the scenarios share; a scenario that fails leaves it to be built anew."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.chaos.brokers import RabbitNode, RedisServer
from tests.chaos.stack import Stack, lease_ttl_s

MODELS = {"noop": {"task": "text-classification", "source": "hub:none", "engines": ["fake"]}}
WORKERS = {"worker-1": "engine", "worker-2": "engine"}


class Installation:
    """The stack on one broker, built when it is first asked for."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self._folder = folder
        self._node = RabbitNode(folder / "rabbitmq") if kind == "rabbitmq" else None
        self._state = RedisServer(folder / "redis")
        self._built = 0
        self._stack: Stack | None = None

    def stack(self) -> Stack:
        if self._stack is None:
            self._built += 1
            folder = self._folder / f"stack-{self._built}"
            broker = self._node or self._state
            self._stack = Stack(broker, self._state, folder, workers=WORKERS, models=MODELS, lease_ttl_s=lease_ttl_s())
            self._stack.start()
        return self._stack

    def discard(self) -> None:
        """Stop the stack and leave nothing of it to the next."""
        if self._stack is not None:
            stack, self._stack = self._stack, None
            stack.stop()
            sys.stdout.write(stack.logs())
            self._state.client.flushall()
            if self._node is not None:
                self._node.delete_queues()

    def close(self) -> None:
        self.discard()
        self._state.stop()
        if self._node is not None:
            self._node.stop()


@pytest.fixture(
    scope="session",
    params=[pytest.param("redis", marks=pytest.mark.redis), pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)],
)
def installation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    installation = Installation(request.param, tmp_path_factory.mktemp(request.param))
    try:
        yield installation
    finally:
        installation.close()


@pytest.fixture
def stack(installation: Installation) -> Iterator[Stack]:
    try:
        stack = installation.stack()
        yield stack
        if not stack.verified:
            installation.discard()
    except BaseException:
        installation.discard()
        raise
