"""Setting up the logs of a process: its own lines, Celery's, uvicorn's and the libraries', all the same way."""

from __future__ import annotations

import logging
import os
import re
import sys
from typing import TYPE_CHECKING, TextIO

from muai_producers.logs.disk import DiskKeeper, places_of
from muai_producers.logs.files import ReducedWhenFull, RotatingLog, StreamLog
from muai_producers.logs.formats import ConsoleFormatter, JsonFormatter
from muai_producers.logs.redaction import Redactor, passwords_of

if TYPE_CHECKING:
    from muai_config import Settings

OWN_HANDLERS = ("uvicorn", "uvicorn.error", "uvicorn.access", "celery", "celery.task", "celery.redirected", "kombu")
"""Libraries that like to have handlers of their own; a line would come twice."""


def redactor_of(settings: Settings) -> Redactor:
    """What this installation keeps out of its logs."""
    queue = settings.queue
    secrets = [
        *passwords_of((queue.broker_url, queue.redis_url, settings.monitoring.tracing.endpoint)),
        os.environ.get("MUAI_WEBHOOK_SECRET", ""),
    ]
    return Redactor(secrets, contents=settings.monitoring.logs.contents)


def set_up_logging(settings: Settings, process: str, level: str = "INFO", stream: TextIO | None = None) -> DiskKeeper:
    """Have everything that this process logs written as the configuration says. May be called again.

    Args:
        process: its name in the installation.
    Returns:
        the keeper of its disk, which runs already.
    """
    config = settings.monitoring.logs
    redactor = redactor_of(settings)
    formatter = JsonFormatter(redactor, process) if config.format == "json" else ConsoleFormatter(redactor)
    keeper = DiskKeeper(places_of(settings), min_free_bytes=config.min_free_mb * 1_000_000)
    handlers: list[logging.Handler] = [StreamLog(stream or sys.stderr, keeper)]
    if config.folder is not None:
        file = config.folder / f"{re.sub(r'[^A-Za-z0-9._-]', '-', process)}.log"
        handlers.append(RotatingLog(file, config.max_file_mb * 1_000_000, config.keep_files, keeper))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.setFormatter(formatter)
        handler.addFilter(ReducedWhenFull(keeper))
        root.addHandler(handler)
    root.setLevel(level.upper())
    for name in OWN_HANDLERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
    logging.captureWarnings(True)
    keeper.start()
    return keeper
