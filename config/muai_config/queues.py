"""Names of the queues: what producers send to and what each worker consumes. Imports nothing heavy."""

from typing import Final

from muai_config.engines import ALL_ENGINES

INFERENCE: Final = "inference"
INFERENCE_HIGH: Final = "inference.high"
INFERENCE_LOW: Final = "inference.low"
REQUEST_QUEUES: Final[tuple[str, ...]] = (INFERENCE_HIGH, INFERENCE, INFERENCE_LOW)
"""Most urgent first. Separate queues rather than a broker's own priorities: Redis and RabbitMQ order those the
opposite way round, quorum queues have none, and monitors read the depth of one list only."""
CONTROL: Final = "control"
WORKFLOW: Final = "workflow"


def engine_queue(engine: str) -> str:
    """The queue that the workers of `engine` consume.

    Raises:
        ValueError: there is no engine of that name.
    """
    if engine not in ALL_ENGINES:
        raise ValueError(f"unknown engine {engine!r} (engines: {', '.join(ALL_ENGINES)})")
    return f"engine.{engine}"


def shard_queue(shard: int) -> str:
    """The queue of the requests that another collector passed on to the one that holds `shard`."""
    return f"{INFERENCE}.shard.{shard}"


def own_queue(engine: str, life: str) -> str:
    """The queue of one engine worker, for the conversations whose keys and values it keeps.

    Args:
        life: tells this life of the worker from all others; what an earlier one kept is gone.
    """
    return f"{engine_queue(engine)}.own.{life}"


OWN_EXCHANGE: Final = "muai.own"
"""What the workers' own queues are bound to on AMQP: one that is unbound is sent nothing more."""
ENGINE_QUEUES: Final[tuple[str, ...]] = tuple(engine_queue(engine) for engine in ALL_ENGINES)
ALL_QUEUES: Final[tuple[str, ...]] = (*REQUEST_QUEUES, *ENGINE_QUEUES, CONTROL, WORKFLOW)
