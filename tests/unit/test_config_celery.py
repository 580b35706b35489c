"""Celery's configuration by role and broker, taken up by a real Celery application."""

import ssl
from typing import Any

import pytest
from celery import Celery

from muai_config import Settings, build_settings, celery_settings
from muai_config.celery_conf import Role
from muai_config.engines import ENGINES
from muai_config.queues import ALL_QUEUES, engine_queue

AMQP = {"MUAI_BROKER_URL": "amqp://guest:guest@rabbit//"}


def conf(role: Role = "producer", engine: str | None = None, **env: str) -> dict[str, Any]:
    return celery_settings(build_settings({}, env), role, engine)


@pytest.mark.parametrize(
    ("role", "engine"), [("producer", None), ("collector", None), ("engine", "onnx"), ("control", None)]
)
@pytest.mark.parametrize("env", [{}, AMQP])
def test_Given_any_role_Then_Celery_takes_every_key_and_knows_every_queue(
    role: Role, engine: str | None, env: dict[str, str]
) -> None:
    app = Celery("test", set_as_current=False)
    known = set(app.conf)
    settings = conf(role, engine, **env)
    assert set(settings) - known == set()
    app.conf.update(settings)
    assert set(app.amqp.queues) == set(ALL_QUEUES)


def test_Given_Redis_Then_our_transport_carries_with_its_lease() -> None:
    settings = conf(MUAI_QUEUE_LEASE_TTL_S="3", MUAI_QUEUE_KEY_PREFIX="x")
    assert settings["broker_transport"] == "muai_batching.transport:Transport"
    options = settings["broker_transport_options"]
    assert (options["lease_ttl_s"], options["state_prefix"]) == (3.0, "x")
    assert 0 < options["socket_timeout"] <= 5.0, "a reply that never comes must not hang a worker"
    assert all(queue.queue_arguments == {} for queue in settings["task_queues"])


def test_Given_RabbitMQ_Then_queues_are_quorum_and_publishing_is_confirmed() -> None:
    settings = conf(**AMQP)
    assert settings["broker_transport"] == "muai_batching.amqp:Transport"
    assert settings["broker_transport_options"]["confirm_publish"] is True
    assert 0 < settings["broker_transport_options"]["read_timeout"] <= 5.0, "nor a confirmation that never comes"
    assert settings["broker_heartbeat"] == 4, "a consumer that is cut off is found out within the lease of 8 s"
    assert all(queue.queue_arguments == {"x-queue-type": "quorum"} for queue in settings["task_queues"])
    assert settings["result_backend"] == "redis://127.0.0.1:6379/0"


def test_Given_Sentinels_Then_the_masters_name_goes_where_each_side_looks_for_it() -> None:
    settings = conf(MUAI_BROKER_URL="sentinel://a:1/0?master_name=main;sentinel://b:2/0")
    assert settings["broker_transport"] == "muai_batching.transport:SentinelTransport"
    assert settings["broker_url"] == settings["result_backend"] == "sentinel://a:1/0;sentinel://b:2/0"
    assert settings["broker_transport_options"]["master_name"] == "main"
    assert settings["result_backend_transport_options"] == {"master_name": "main"}


@pytest.mark.parametrize(
    ("url", "backend"),
    [
        ("rediss://r", "rediss://r/0?ssl_cert_reqs=CERT_REQUIRED"),
        ("rediss://r:1/4?socket_timeout=5", "rediss://r:1/4?socket_timeout=5&ssl_cert_reqs=CERT_REQUIRED"),
        ("rediss://r/0?ssl_cert_reqs=CERT_NONE", "rediss://r/0?ssl_cert_reqs=CERT_NONE"),
    ],
)
def test_Given_Redis_over_TLS_Then_certificates_are_checked_unless_told_otherwise(url: str, backend: str) -> None:
    app = Celery("test", set_as_current=False)
    app.conf.update(conf(MUAI_REDIS_URL=url))
    assert app.conf.result_backend == backend
    assert app.backend.connparams["ssl_cert_reqs"] is not None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("url", "option", "required"),
    [
        ("redis://:pw@r:6380/2", None, None),
        ("rediss://:pw@r:6380/2", "ssl_cert_reqs", ssl.CERT_REQUIRED),
        ("rediss://:pw@r:6380/2?ssl_cert_reqs=CERT_NONE", "ssl_cert_reqs", ssl.CERT_NONE),
        ("amqps://app:pw@r:6380/2", "cert_reqs", ssl.CERT_REQUIRED),
    ],
)
def test_Given_a_broker_address_Then_the_connection_goes_where_and_how_it_says(
    url: str, option: str | None, required: ssl.VerifyMode | None
) -> None:
    app = Celery("test", set_as_current=False)
    settings = conf(MUAI_BROKER_URL=url)
    if url.startswith("redis"):  # any transport named by its module, as ours is
        settings["broker_transport"] = "kombu.transport.redis:Transport"
    app.conf.update(settings)
    connection = app.connection_for_write()
    assert (connection.hostname, connection.port, connection.virtual_host, connection.password) == (
        "r",
        6380,
        "2",
        "pw",
    )
    assert (connection.ssl[option] == required) if option else not connection.ssl


def test_Given_an_engine_worker_Then_it_holds_its_slots_and_what_is_next() -> None:
    settings = conf("engine", "onnx", MUAI_QUEUE_WORKER_CONCURRENCY="2", MUAI_QUEUE_WORKER_PREFETCH="3")
    assert settings["worker_concurrency"] * settings["worker_prefetch_multiplier"] == 2 * (1 + 3)
    assert settings["task_default_queue"] == "engine.onnx"


def test_Given_a_collector_Then_it_holds_its_buffer_as_far_as_the_protocol_goes() -> None:
    assert conf("collector")["worker_prefetch_multiplier"] == 16384
    wide = {"MUAI_OPT_BATCHER_BUFFER_REQUESTS": "100000"}
    assert conf("collector", **wide)["worker_prefetch_multiplier"] == 100000
    assert conf("collector", **wide, **AMQP)["worker_prefetch_multiplier"] == 65535


def test_Given_any_role_Then_nothing_is_pickled_and_work_is_acknowledged_late() -> None:
    settings = conf("control")
    assert set(settings["accept_content"]) == {"json", "msgpack"}
    assert settings["task_acks_late"]
    assert settings["task_reject_on_worker_lost"]
    assert settings["worker_soft_shutdown_timeout"] == 30.0


@pytest.mark.parametrize(("role", "engine"), [("engine", None), ("collector", "onnx"), ("engine", "tpu")])
def test_Given_a_role_and_an_engine_that_do_not_fit_Then_it_is_refused(role: Role, engine: str | None) -> None:
    with pytest.raises(ValueError, match="engine"):
        celery_settings(Settings(), role, engine)


def test_Given_the_engines_Then_each_has_its_queue() -> None:
    assert [engine_queue(engine) for engine in ENGINES] == [
        "engine.vllm",
        "engine.deepspeed",
        "engine.onnx",
        "engine.pytorch",
    ]
