"""What an engine answers, asked in its own environment: a question on the standard input of this module.

The question and the answer are JSON, so that the answers of engines can be compared whose libraries do not fit into one
process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 240.0
MARK = "answers: "


def ask(
    python: Path, engine: str, folder: Path, prompts: Sequence[str], *, max_tokens: int = 24, **optimization: Any
) -> list[dict[str, Any]]:
    """The text and the number of tokens that `engine`, in fp32, gives greedily for each prompt.

    Args:
        python: of the environment where the engine's library is.
        optimization: sections of the configuration.
    """
    question = {
        "engine": engine,
        "folder": str(folder),
        "prompts": list(prompts),
        "max_tokens": max_tokens,
        "optimization": optimization,
    }
    # What one test run sets for its own libraries is not for others.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "VLLM_"))}
    done = subprocess.run(
        [str(python), "-m", "tests.engines.answers"],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=LIMIT_S,
        check=False,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert found, f"{engine} gave no answer:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    answers: list[dict[str, Any]] = json.loads(found[0].removeprefix(MARK))
    return answers


def main() -> None:
    sys.path[:0] = [str(ROOT / part) for part in ("config", "producers", "batching", "workers")]
    from tests import models

    from muai_workers.engines.base import Completion
    from muai_workers.engines.registry import create_engine

    question = json.load(sys.stdin)
    spec = models.folder_spec("model", "text-generation", Path(question["folder"]), dtype="fp32")
    optimization = {"cache": {"max_memory_mb": 64}, **question["optimization"]}
    engine = create_engine(question["engine"], models.settings([spec], **optimization))
    requests = [
        models.request(str(index), spec, prompt, max_tokens=question["max_tokens"])
        for index, prompt in enumerate(question["prompts"])
    ]
    try:
        done = {
            event.request_id: event
            for event in engine.run(spec, "text-generation", requests)
            if isinstance(event, Completion)
        }
    finally:
        engine.close()
    answers: list[dict[str, Any]] = []
    for request in requests:
        output = done[request.id].output
        assert output is not None, done[request.id].error
        answers.append({"text": output.outputs["text"], "tokens": output.output_tokens})
    sys.stdout.write(f"\n{MARK}{json.dumps(answers)}\n")


if __name__ == "__main__":
    main()
