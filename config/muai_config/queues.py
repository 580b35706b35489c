"""Names of the queues: what producers send to and what each worker consumes. Imports nothing heavy."""

from typing import Final

from muai_config.engines import ENGINES

INFERENCE: Final = "inference"
CONTROL: Final = "control"
WORKFLOW: Final = "workflow"
DEAD: Final = "dead"


def engine_queue(engine: str) -> str:
    """The queue that the workers of `engine` consume.

    Raises:
        ValueError: there is no engine of that name.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r} (engines: {', '.join(ENGINES)})")
    return f"engine.{engine}"


ENGINE_QUEUES: Final[tuple[str, ...]] = tuple(engine_queue(engine) for engine in ENGINES)
ALL_QUEUES: Final[tuple[str, ...]] = (INFERENCE, *ENGINE_QUEUES, CONTROL, WORKFLOW, DEAD)
