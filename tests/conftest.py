"""Fixtures that most tests with a state store share."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings

from muai_config import Settings, build_settings
from muai_producers.store import Store
from tests.chaos.brokers import RabbitNode
from tests.engines_here import REAL
from tests.transport_support import OwnRedis, own_redis


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell has started this in its background; what is ignored stays so in every process that a test interrupts.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "vllm" in REAL:
        # What vLLM imports warns of itself and of each other; none of it is ours to mend.
        config.addinivalue_line("filterwarnings", "default")
        # And at the very end, when what is left is collected, for which pytest has set its filters by now.
        warnings.simplefilter("default")


# How long an example takes says how busy the machine is; speed is what benchmarks are for.
hypothesis_settings.register_profile("muai", deadline=None)
hypothesis_settings.load_profile("muai")


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnRedis]:
    """A redis-server of this test run's own."""
    folder: Path = tmp_path_factory.mktemp("redis")
    with own_redis(folder) as server:
        yield server


@pytest.fixture(scope="session")
def rabbit_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitNode]:
    """A RabbitMQ node of this test run's own, which takes seconds to start: ask for it where it is needed."""
    node = RabbitNode(tmp_path_factory.mktemp("rabbitmq"))
    yield node
    node.stop()


@pytest.fixture(scope="module")
def rabbit_node(rabbit_server: RabbitNode) -> Iterator[RabbitNode]:
    """The same, without queues."""
    rabbit_server.delete_queues()
    yield rabbit_server
    rabbit_server.delete_queues()


@pytest.fixture
def clean_redis(redis_server: OwnRedis) -> OwnRedis:
    redis_server.client.flushall()
    return redis_server


@pytest.fixture
def store(clean_redis: OwnRedis) -> Store:
    return Store(clean_redis.client)


@pytest.fixture
def muai_settings(clean_redis: OwnRedis) -> Settings:
    """Broker and state store are this run's Redis; the models run on the fake engine."""
    return build_settings(
        {
            "queue": {"broker_url": clean_redis.url},
            "models": {
                "noop": {"task": "text-classification", "source": "hub:none", "engines": ["fake"]},
                "two": {"task": "embedding", "source": "hub:none", "engines": ["fake", "pytorch"]},
            },
        },
        {},
    )
