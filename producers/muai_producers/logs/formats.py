"""Lines for people and for machines, with the same fields."""

from __future__ import annotations

import logging
import time
import traceback
from datetime import UTC, datetime
from typing import Any

import msgspec

from muai_producers.errors import MuaiError
from muai_producers.logs.context import current
from muai_producers.logs.redaction import Redactor

MAX_MESSAGE_CHARS = 4_000
MAX_STACK_CHARS = 6_000
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName", "data"}
Plain = str | int | float | bool | None
_encode = msgspec.json.Encoder(enc_hook=str).encode


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What the line is about: its surroundings, and what it says by itself with `extra`."""
    own = {
        name: value if isinstance(value, Plain) else str(value)
        for name, value in vars(record).items()
        if name not in _STANDARD and not name.startswith("_")
    }
    return {**current().fields, **own}


def error_of(record: logging.LogRecord) -> BaseException | None:
    """The error that a line tells: that of `exc_info`, else the one among its arguments."""
    if record.exc_info and record.exc_info[1] is not None:
        return record.exc_info[1]
    arguments = record.args if isinstance(record.args, tuple) else ()
    return next((one for one in arguments if isinstance(one, BaseException)), None)


def stack_of(error: BaseException) -> str:
    """The error with its stack and its causes."""
    return "".join(traceback.format_exception(error)).rstrip()[-MAX_STACK_CHARS:]


def error_fields(error: BaseException) -> dict[str, Any]:
    """An error's fields, under the names that traces have too."""
    told = {
        "error_type": type(error).__name__,
        "error_message": str(error)[:MAX_MESSAGE_CHARS],
        "stack_trace": stack_of(error),
    }
    return {**told, "error_code": error.code} if isinstance(error, MuaiError) else told


def message_of(record: logging.LogRecord) -> str:
    """The message; a line whose arguments do not fit is told as it stands rather than lost."""
    try:
        message = record.getMessage()
    except (TypeError, ValueError, KeyError):
        message = f"{record.msg} {record.args!r}"
    return message if len(message) <= MAX_MESSAGE_CHARS else message[:MAX_MESSAGE_CHARS] + " …"


class JsonFormatter(logging.Formatter):
    """One JSON object a line.

    Args:
        process: the process's name in the installation.
    """

    def __init__(self, redactor: Redactor, process: str) -> None:
        super().__init__()
        self._redactor = redactor
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        error = error_of(record)
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": message_of(record),
            "process": self._process,
            "pid": record.process,
            **fields_of(record),
            **({} if error is None else error_fields(error)),
        }
        inputs = current().inputs
        cleaned = {
            name: self._redactor.clean(value, inputs) if isinstance(value, str) else value
            for name, value in line.items()
        }
        return _encode(cleaned).decode()


class ConsoleFormatter(logging.Formatter):
    """`time LEVEL logger: message [field=value …]`; the stack below it for what is logged as an error."""

    def __init__(self, redactor: Redactor) -> None:
        super().__init__()
        self._redactor = redactor

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        line = f"{moment},{int(record.msecs):03} {record.levelname} {record.name}: {message_of(record)}"
        fields = fields_of(record)
        error = error_of(record)
        if error is not None:
            fields["error_type"] = type(error).__name__
        if fields:
            line += f" [{' '.join(f'{name}={value}' for name, value in fields.items())}]"
        if error is not None and (record.levelno >= logging.ERROR or record.exc_info):
            line += "\n" + stack_of(error)
        if record.stack_info:
            line += "\n" + record.stack_info
        return self._redactor.clean(line, current().inputs)
