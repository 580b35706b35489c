"""What Celery is configured with, for each kind of process."""

import ssl
from typing import Any, Literal
from urllib.parse import parse_qs, urlencode, urlsplit, urlunsplit

from kombu import Exchange, Queue

from muai_config import queues
from muai_config.engines import EngineName
from muai_config.settings import Settings
from muai_config.slots import slots_of

Role = Literal["producer", "collector", "engine", "control"]

# Redeliver rather than lose: a task is acknowledged after its work, and goes back when its worker dies.
_DELIVERY = {
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "worker_cancel_long_running_tasks_on_connection_loss": False,
}
# JSON or msgpack, never pickle: whoever can write to the broker must not be able to run code.
_WIRE = {
    "task_serializer": "json",
    "result_serializer": "json",
    "event_serializer": "json",
    "accept_content": ["json", "msgpack"],
    "result_accept_content": ["json", "msgpack"],
}
_CONNECTION = {
    "broker_connection_timeout": 5.0,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,  # a broker that is away for an hour must not end the workers
}

REPLY_TIMEOUT_S = 3.0
CONTROL_THREADS = 4
"""Of a control worker, beside those for the steps of workflows, which mostly wait."""
_MAX_AMQP_PREFETCH = 65535  # the protocol has 16 bits for it


def celery_settings(settings: Settings, role: Role, engine: EngineName | None = None) -> dict[str, Any]:
    """The Celery configuration of one process.

    Args:
        engine: the engine that an engine worker runs; it decides the worker's own queue.
    Raises:
        ValueError: `role` is engine and `engine` names none, or the other way round.
    """
    if (role == "engine") != (engine is not None):
        raise ValueError("an engine worker, and only that, is configured for an engine")
    conf: dict[str, Any] = {**_DELIVERY, **_WIRE, **_CONNECTION, **_broker(settings), **_results(settings)}
    conf |= _queues(settings) | _worker(settings, role, engine)
    if engine is not None and settings.queue.broker_is_redis:
        # Of several workers the one with the least to do takes the next batch.
        conf["broker_transport_options"]["at_work"] = slots_of(settings, engine).running
    conf |= {"task_default_queue": _own_queue(role, engine), "enable_utc": True, "timezone": "UTC"}
    return conf


def _own_queue(role: Role, engine: EngineName | None) -> str:
    if engine is not None:
        return queues.engine_queue(engine)
    return queues.CONTROL if role == "control" else queues.INFERENCE


def _broker(settings: Settings) -> dict[str, Any]:
    queue = settings.queue
    url, master_name = _without_master_name(queue.broker_url)
    if not queue.broker_is_redis:
        return {
            "broker_url": url,
            "broker_transport": "muai_batching.amqp:Transport",
            "broker_transport_options": {
                "confirm_publish": True,
                # Celery waits for confirmations, of its own events too, on the thread that does all the rest.
                "read_timeout": REPLY_TIMEOUT_S,
                "write_timeout": REPLY_TIMEOUT_S,
            },
            "broker_heartbeat": _heartbeat_s(queue.lease_ttl_s),
            **_tls(url),
        }
    options: dict[str, Any] = {
        "lease_ttl_s": queue.lease_ttl_s,
        "state_prefix": queue.key_prefix,
        # kombu waits for ever for the reply of a Redis that has vanished without closing the connection.
        "socket_timeout": REPLY_TIMEOUT_S,
        "socket_connect_timeout": REPLY_TIMEOUT_S,
        "socket_keepalive": True,
    }
    if master_name is not None:
        options["master_name"] = master_name
    transport = "SentinelTransport" if url.startswith("sentinel://") else "Transport"
    return {
        "broker_url": url,
        "broker_transport": f"muai_batching.transport:{transport}",
        "broker_transport_options": options,
        **_tls(url),
    }


def _heartbeat_s(lease_ttl_s: float) -> int:
    """AMQP's heartbeat, in whole seconds: either side gives the other up after two that were missed."""
    return max(1, round(lease_ttl_s / 2))


def _tls(url: str) -> dict[str, Any]:
    """TLS with certificates checked. kombu knows the schemes of its own transports only, and checks nothing by itself.

    Redis addresses may say otherwise, with ssl_… after the question mark: kombu prefers those.
    """
    parts = urlsplit(url)
    if parts.scheme == "rediss":
        return {"broker_use_ssl": {"ssl_cert_reqs": ssl.CERT_REQUIRED}}
    if parts.scheme == "amqps":
        return {"broker_use_ssl": {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": parts.hostname}}
    return {}


def _results(settings: Settings) -> dict[str, Any]:
    url, master_name = _without_master_name(settings.queue.state_url)
    if url.startswith("rediss://") and "ssl_cert_reqs" not in parse_qs(urlsplit(url).query):
        # Celery refuses rediss:// without a word on certificates; ours is the safe one.
        parts = urlsplit(url)
        query = "&".join(filter(None, (parts.query, "ssl_cert_reqs=CERT_REQUIRED")))
        url = urlunsplit(parts._replace(path=parts.path or "/0", query=query))
    conf: dict[str, Any] = {
        "result_backend": url,
        "result_expires": settings.queue.result_ttl_s,
        "result_extended": False,
    }
    if master_name is not None:
        conf["result_backend_transport_options"] = {"master_name": master_name}
    return conf


def _without_master_name(url: str) -> tuple[str, str | None]:
    """A Sentinel address without its ?master_name=…, which the transports want apart from it."""
    if not url.startswith("sentinel://"):
        return url, None
    addresses, names = [], []
    for address in url.split(";"):
        parts = urlsplit(address)
        query = parse_qs(parts.query)
        names += query.pop("master_name", [])
        addresses.append(urlunsplit(parts._replace(query=urlencode(query, doseq=True))))
    return ";".join(addresses), names[0] if names else None


def _queues(settings: Settings) -> dict[str, Any]:
    # Nothing but the type: RabbitMQ refuses a plain producer that declares the queue with fewer arguments than ours.
    arguments = {} if settings.queue.broker_is_redis else {"x-queue-type": "quorum"}
    return {
        "task_queues": [
            Queue(name, Exchange(name, type="direct"), routing_key=name, durable=True, queue_arguments=dict(arguments))
            for name in (*queues.ALL_QUEUES, *_shard_queues(settings))
        ],
        "task_default_queue_type": "classic" if settings.queue.broker_is_redis else "quorum",
        # A misspelt queue is an error at once, not a queue that nobody consumes.
        "task_create_missing_queues": False,
        "task_routes": {
            "muai.infer": {"queue": queues.INFERENCE},
            "muai.control.*": {"queue": queues.CONTROL},
            "muai.workflow.*": {"queue": queues.WORKFLOW},
        },
    }


def _shard_queues(settings: Settings) -> list[str]:
    num_shards = settings.queue.collector_shards
    return [queues.shard_queue(shard) for shard in range(num_shards)] if num_shards > 1 else []


def _worker(settings: Settings, role: Role, engine: EngineName | None) -> dict[str, Any]:
    if role == "producer":
        return {"task_track_started": False}
    conf: dict[str, Any] = {
        "task_track_started": False,
        "worker_pool": "threads",
        "worker_hijack_root_logger": False,
        "worker_enable_remote_control": True,
        "worker_soft_shutdown_timeout": float(settings.monitoring.server.graceful_shutdown_timeout),
        # Whoever looks at events asks for them, as Flower does; a tenth of a worker's time would go into them.
        "worker_send_task_events": False,
    }
    return conf | _reservation(settings, role, engine)


def _reservation(settings: Settings, role: Role, engine: EngineName | None) -> dict[str, Any]:
    """How many messages a process holds unacknowledged: concurrency times multiplier, those at work included."""
    if role == "collector":
        held = settings.optimization.batcher.buffer_requests
        if not settings.queue.broker_is_redis:
            held = min(held, _MAX_AMQP_PREFETCH)
        return {"worker_concurrency": 1, "worker_prefetch_multiplier": held}
    if engine is not None:
        slots = slots_of(settings, engine)
        # A thread for each batch that is held: one that is ready waits for its turn in the runner, which begins it
        # while the answers of the one before are still being written.
        return {"worker_concurrency": slots.running * (1 + slots.ahead), "worker_prefetch_multiplier": 1}
    concurrency = CONTROL_THREADS + settings.workflows.concurrency
    return {"worker_concurrency": concurrency, "worker_prefetch_multiplier": 1}
