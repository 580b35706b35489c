"""From a folder to a torch module in memory: number format, attention, device, and weights that are all there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from muai_config import ModelSpec
from muai_config.optimization import PyTorchSettings
from muai_producers.errors import ModelLoadError
from muai_workers.models.weights import weight_files

_DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TorchPlan:
    """How a model is to be loaded here."""

    spec: ModelSpec
    folder: Path
    config: Any
    """The model's transformers configuration."""
    device: torch.device
    dtype: torch.dtype
    attention: str
    """`auto`, or what transformers calls the attention implementation."""
    compile: bool

    @property
    def dtype_name(self) -> str:
        return next(name for name, dtype in _DTYPES.items() if dtype == self.dtype)


def plan_loading(spec: ModelSpec, folder: Path, settings: PyTorchSettings) -> TorchPlan:
    """Decide number format and device for `spec`.

    Raises:
        ModelLoadError: as `read_config`.
    """
    config = read_config(spec, folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = spec.dtype if spec.dtype != "auto" else settings.dtype
    return TorchPlan(
        spec, folder, config, device, choose_dtype(wanted, config, device), settings.attention, settings.compile
    )


def read_config(spec: ModelSpec, folder: Path) -> Any:
    """The model's transformers configuration.

    Raises:
        ModelLoadError: the folder has no safetensors weights: other formats can hold code and are not read.
    """
    if not weight_files(folder):
        raise ModelLoadError(f"{spec.name}: {folder} holds no .safetensors weights", {"model": spec.name})
    return AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code, local_files_only=True)


def choose_dtype(wanted: str, config: Any, device: torch.device) -> torch.dtype:
    """The number format to compute in; `auto` is the weights' own on a GPU, and fp32 on a CPU."""
    if wanted != "auto":
        return _DTYPES[wanted]
    own = getattr(config, "dtype", None)
    if device.type == "cuda" and isinstance(own, torch.dtype) and own in _DTYPES.values():
        return own
    return torch.float32


def load_module(auto_class: Any, plan: TorchPlan, *, dispensable: tuple[str, ...] = ()) -> torch.nn.Module:
    """Load the weights into the architecture that `auto_class` finds for them.

    Args:
        dispensable: beginnings of names of weights that may be absent from the files, because nothing reads them.
    Raises:
        ModelLoadError: weights are absent: the model was trained for another task.
    """
    # Progress bars belong on terminals, not in the logs of workers.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    attention = {} if plan.attention == "auto" else {"attn_implementation": plan.attention}
    module, report = auto_class.from_pretrained(
        plan.folder,
        config=plan.config,
        dtype=plan.dtype,
        use_safetensors=True,
        trust_remote_code=plan.spec.trust_remote_code,
        local_files_only=True,
        output_loading_info=True,
        **attention,
    )
    absent = sorted(name for name in report["missing_keys"] if not name.startswith(dispensable))
    if absent:
        raise ModelLoadError(
            f"{plan.spec.name} was not trained for {plan.spec.task}: its files lack {len(absent)} weights, "
            f"{absent[0]} among them",
            {"model": plan.spec.name, "missing": absent[:20]},
        )
    loaded: torch.nn.Module = module.eval().requires_grad_(False).to(plan.device)
    return loaded
