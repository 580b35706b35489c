"""What a DeepSpeed engine and its ranks tell each other.

They go through a socket that the engine made and that nobody else has, as pickles: both ends are the same program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muai_config import ModelSpec
from muai_config.optimization import DeepSpeedSettings
from muai_producers import errors
from muai_producers.errors import MuaiError
from muai_workers.engines.deepspeed_plan import DeepSpeedPlan
from muai_workers.engines.failures import as_engine_error
from muai_workers.engines.padding import PaddedRows


@dataclass(frozen=True)
class Start:
    """The first message: the model that a rank is to load."""

    spec: ModelSpec
    folder: Path
    settings: DeepSpeedSettings
    attention: str
    num_threads: int | None


@dataclass(frozen=True)
class Ready:
    """The rank's first answer: the model is loaded, and answers as it did before DeepSpeed had it."""

    plan: DeepSpeedPlan
    device: str
    weights_bytes: int
    """Of this rank."""
    joins: bool
    """Whether rows of a causal model can come and go; see `rows_can_join`."""


@dataclass(frozen=True)
class Failed:
    """An answer in place of any other: what was raised, as an error of our tree."""

    kind: str
    message: str
    details: dict[str, Any]

    @classmethod
    def of(cls, error: Exception) -> Failed:
        told = as_engine_error(error)
        return cls(type(told).__name__, told.message, told.details)

    def error(self) -> MuaiError:
        """To be raised on this side."""
        kind = getattr(errors, self.kind)
        assert issubclass(kind, MuaiError)
        error: MuaiError = kind(self.message, self.details)
        return error


@dataclass(frozen=True)
class Forward:
    """A forward pass of an encoder; rank 0 answers with its values, the others with None."""

    rows: PaddedRows


@dataclass(frozen=True)
class KeptPart:
    """The first tokens of kept keys and values."""

    kept: int
    num_tokens: int


@dataclass(frozen=True)
class Resume:
    """A group of rows begins; rank 0 answers with logits."""

    group: int
    rows: PaddedRows
    kept: Sequence[KeptPart | None]


@dataclass(frozen=True)
class Step:
    """One token more for each row of a group; rank 0 answers with logits."""

    group: int
    tokens: Sequence[int]


@dataclass(frozen=True)
class Keep:
    """A group goes on with these rows alone."""

    group: int
    rows: Sequence[int]


@dataclass(frozen=True)
class Join:
    """A group takes in another's rows."""

    group: int
    other: int


@dataclass(frozen=True)
class TakeOut:
    """A row's keys and values are kept under the number `kept`; each rank answers with its bytes and tokens."""

    group: int
    row: int
    kept: int


@dataclass(frozen=True)
class Drop:
    """A group, or kept keys and values, that nobody has any more."""

    group: int | None = None
    kept: int | None = None


Command = Forward | Resume | Step | Keep | Join | TakeOut | Drop
