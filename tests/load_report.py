"""Figures of the tests under load: printed, and kept where `MUAI_TEST_FIGURES` names a file, a line of JSON each."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def keep_figure(what: str, **values: Any) -> None:
    line = json.dumps({"what": what, **values})
    print(line)  # noqa: T201
    if file := os.environ.get("MUAI_TEST_FIGURES"):
        with Path(file).open("a") as figures:
            figures.write(line + "\n")
