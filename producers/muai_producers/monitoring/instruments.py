"""Every metric: its name, kind, labels and meaning. docs/monitoring.md has this table, and a test keeps it so.

The specification's metrics have its names; all others begin with `muai_`. What is free text from outside (tenants) is
an `open` label: past `max_series` its value becomes `other`, here and in the state store, so that no sender decides how
many series there are. Models and engines come from the catalog.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Merge = Literal["sum", "max", "latest"]
OTHER = "other"
UNKNOWN = "unknown"
"""The model of a request that named none of the catalog's."""
NO_ENGINE = "none"
"""The engine of a request that ended before it had one."""

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
LONG_SECONDS = (0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
COARSE_SECONDS = (0.1, 1.0, 10.0, 60.0)


@dataclass(frozen=True, slots=True)
class Instrument:
    """One metric."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, without the infinite one."""
    open: tuple[str, ...] = ()
    """Labels whose values come from outside."""
    max_series: int = 1000
    """Of one process, and of the installation."""
    merge: Merge = "sum"
    """What becomes of a gauge that several processes set under the same labels."""


def _counter(name: str, help_text: str, *labels: str, open_labels: tuple[str, ...] = ()) -> Instrument:
    return Instrument(name, "counter", help_text, labels, open=open_labels, max_series=200 if open_labels else 1000)


def _gauge(name: str, help_text: str, *labels: str, merge: Merge = "sum") -> Instrument:
    return Instrument(name, "gauge", help_text, labels, merge=merge)


def _histogram(
    name: str,
    help_text: str,
    *labels: str,
    buckets: tuple[float, ...] = SECONDS,
    open_labels: tuple[str, ...] = (),
) -> Instrument:
    limit = 200 if open_labels else 1000
    return Instrument(name, "histogram", help_text, labels, buckets, open_labels, limit)


# -- the specification's ---------------------------------------------------------------------------------------------

LATENCY = _histogram("inference_latency_seconds", "Time from a request's submission to its answer.", "model", "engine")
REQUESTS = _counter(
    "inference_requests_total",
    "Requests that ended, by how: success, failure, refused, expired or cancelled.",
    "model",
    "engine",
    "status",
)
THROUGHPUT = _gauge("throughput_requests_per_second", "Requests served in the last 30 s, per second.", "model")
GPU_MEMORY_USED = _gauge("gpu_memory_used_bytes", "Memory in use on a GPU.", "gpu_id", "host", merge="latest")
CPU_USAGE = _gauge("cpu_usage_percent", "CPU in use on a host, of all its cores.", "host", merge="latest")
KV_CACHE_HIT_RATE = _gauge(
    "kv_cache_hit_rate",
    "Share of requests that found some of their prompt in the cache, in the last 5 minutes; if none looked, ever.",
    "model",
)
BATCH_SIZE = _histogram("batch_size", "Requests in the batches that engines ran.", "model", buckets=SIZES)

# -- queues and waiting ----------------------------------------------------------------------------------------------

QUEUE_DEPTH = _gauge("muai_queue_depth", "Messages that wait at the broker.", "queue", "priority")
OLDEST_AGE = _gauge(
    "muai_oldest_request_age_seconds",
    "Age of the oldest request that waits, at the broker (where it can be looked at) or in a collector.",
    "queue",
    merge="max",
)
IN_FLIGHT = _gauge("muai_requests_in_flight", "Requests accepted and not yet answered.")
CAPACITY = _gauge("muai_queue_capacity", "Most requests that may be in flight.")
COLLECTED = _gauge("muai_requests_collected", "Requests that wait in a collector for their batch.", "model")
STAGE = _histogram(
    "muai_stage_seconds",
    "Time that requests spend in each stage: queue, batching, dispatch, inference.",
    "model",
    "stage",
)
LEASES = _gauge("muai_leases", "Consumers that hold a lease at the Redis broker.")
LEASED = _gauge("muai_leased_messages", "Messages that are claimed under a lease and not yet acknowledged.")
REDELIVERIES = _counter("muai_redeliveries_total", "Messages that came again: of requests, and of batches.", "stage")
DUPLICATES = _counter("muai_duplicates_refused_total", "Second results that were refused.")
ANSWERED = _counter("muai_requests_answered_total", "Requests that got their one terminal result.")
DEAD_LETTERS = _gauge("muai_dead_letters_kept", "Dead letters that are kept.")
DIED = _counter("muai_dead_letters_total", "Dead letters written, by the error's code.", "code")

# -- batches and tokens ----------------------------------------------------------------------------------------------

BATCH_FILL = _histogram(
    "muai_batch_fill_ratio", "Requests in a batch, of the most that it could have.", "model", buckets=RATIOS
)
BATCH_TOKENS = _counter(
    "muai_batch_tokens_total",
    "Estimated tokens of batches as they are sent: real ones, and what padding adds.",
    "model",
    "kind",
)
TOKENS = _counter("muai_tokens_total", "Tokens of served requests: input and output.", "model", "engine", "direction")
FIRST_TOKEN = _histogram(
    "muai_time_to_first_token_seconds",
    "Time from a streamed request's submission to its first piece of text.",
    "model",
    "engine",
)

# -- engines ---------------------------------------------------------------------------------------------------------

ATTEMPTS = _counter(
    "muai_attempts_total", "Requests that an engine was tried for: served or failed.", "model", "engine", "outcome"
)
FALLBACKS = _counter(
    "muai_fallbacks_total",
    "Requests that went from one engine to the next; to none where the chain was spent.",
    "model",
    "from_engine",
    "to_engine",
)
CIRCUIT_OPEN = _gauge("muai_engine_circuit_open", "1 while an engine is passed over for a model.", "engine", "model")
WORKERS = _gauge("muai_workers", "Live engine workers.", "engine")
SLOTS = _gauge("muai_worker_slots", "Batches that the live workers of an engine can run at once.", "engine")
OUTSTANDING = _gauge("muai_outstanding_batches", "Batches sent to an engine and not finished.", "engine")
COLLECTORS = _gauge("muai_collectors", "Live collectors.")
PROCESSES = _gauge("muai_processes", "Processes that report metrics.", "role")
MODELS_LOADED = _gauge("muai_models_loaded", "Workers that hold a model in memory.", "model", "engine")
MODEL_MEMORY = _gauge("muai_model_memory_bytes", "Memory that a model takes at all workers.", "model", "engine")
MODEL_EVENTS = _counter(
    "muai_model_events_total", "Models loaded, unloaded, and not loaded: load, unload, load_failed.",
    "model", "engine", "event",
)  # fmt: skip
MODEL_LOAD = _histogram(
    "muai_model_load_seconds", "Time that loading a model took.", "model", "engine", buckets=LONG_SECONDS
)

# -- the cache of conversations --------------------------------------------------------------------------------------

KV_BYTES = _gauge("muai_kv_cache_bytes", "Memory that kept conversations take.", "model")
KV_MAX_BYTES = _gauge("muai_kv_cache_max_bytes", "Most memory that they may take.", "model")
KV_HITS = _counter("muai_kv_cache_hits_total", "Requests that found some of their prompt.", "model")
KV_MISSES = _counter("muai_kv_cache_misses_total", "Requests that found none of their prompt.", "model")
KV_EVICTIONS = _counter("muai_kv_cache_evictions_total", "Conversations let go for want of room.", "model")
KV_HIT_TOKENS = _counter("muai_kv_cache_hit_tokens_total", "Prompt tokens that were not computed again.", "model")
KV_PROMPT_TOKENS = _counter("muai_kv_cache_prompt_tokens_total", "Prompt tokens of requests that looked.", "model")

CONVERSATION_TURNS = _counter(
    "muai_conversation_turns_total",
    "Turns of conversations by where they went: pinned (to the worker that keeps the conversation), spilled (that one "
    "had too much to do), repinned (it is gone), new (no worker kept it).",
    "model",
    "way",
)

# -- machines --------------------------------------------------------------------------------------------------------

GPU_MEMORY_TOTAL = _gauge("muai_gpu_memory_total_bytes", "Memory of a GPU.", "gpu_id", "host", merge="latest")
GPU_UTILIZATION = _gauge(
    "muai_gpu_utilization_ratio", "Share of time in which a GPU was at work.", "gpu_id", "host", merge="latest"
)
GPU_TEMPERATURE = _gauge("muai_gpu_temperature_celsius", "Temperature of a GPU.", "gpu_id", "host", merge="latest")
GPU_POWER = _gauge("muai_gpu_power_watts", "Power that a GPU draws.", "gpu_id", "host", merge="latest")
GPU_STATE = _gauge(
    "muai_gpu_state",
    "1 for the state that a watched GPU is in: ok, degraded, failed or unseen.",
    "gpu_id",
    "host",
    "state",
    merge="latest",
)
MEMORY_USED = _gauge("muai_memory_used_bytes", "Memory in use on a host.", "host", merge="latest")
MEMORY_TOTAL = _gauge("muai_memory_total_bytes", "Memory of a host.", "host", merge="latest")

# -- tenants and HTTP ------------------------------------------------------------------------------------------------

TENANT_REQUESTS = _counter(
    "muai_tenant_requests_total", "Requests that ended, by tenant.", "tenant", "status", open_labels=("tenant",)
)
TENANT_TOKENS = _counter(
    "muai_tenant_tokens_total", "Tokens of served requests, by tenant.", "tenant", "direction", open_labels=("tenant",)
)
TENANT_LATENCY = _histogram(
    "muai_tenant_latency_seconds",
    "Time from submission to answer, by tenant.",
    "tenant",
    buckets=COARSE_SECONDS,
    open_labels=("tenant",),
)
TENANT_IN_FLIGHT = _gauge("muai_tenant_requests_in_flight", "Requests in flight, by tenant.", "tenant")
REFUSED = _counter("muai_requests_refused_total", "Requests refused before they were queued, by reason.", "reason")
HTTP_REQUESTS = _counter("muai_http_requests_total", "HTTP requests answered.", "route", "method", "code")
HTTP_SECONDS = _histogram("muai_http_request_seconds", "Time to the start of the HTTP answer.", "route")

# -- monitoring itself -----------------------------------------------------------------------------------------------

ALERTS = _counter("muai_alerts_total", "Alerts raised.", "type", "severity")
TUNING = _counter("muai_tuning_decisions_total", "Decisions of the tuner.", "parameter", "outcome")
SPANS = _counter("muai_trace_spans_total", "Spans of traces, by what became of them.", "outcome")
FAILURES = _counter("muai_monitoring_failures_total", "Failures of monitoring that requests did not feel.", "part")
DEGRADED = _gauge("muai_monitoring_degraded", "1 while a part of monitoring does not work.", "part", merge="max")
STORE_UP = _gauge("muai_state_store_up", "Whether the state store answers the metrics page.")
BROKER_UP = _gauge("muai_broker_up", "Whether the broker answers the metrics page.")

INSTRUMENTS: tuple[Instrument, ...] = tuple(
    value for value in dict(globals()).values() if isinstance(value, Instrument)
)
BY_NAME = {instrument.name: instrument for instrument in INSTRUMENTS}
