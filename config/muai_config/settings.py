"""The whole configuration as one immutable value."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, model_validator

from muai_config.catalog import BUILTIN_CATALOG, ModelCacheSettings, ModelSpec
from muai_config.engines import FAKE, EngineName, suits
from muai_config.errors import UnknownModelError, did_you_mean
from muai_config.fields import Conflict, Section, section
from muai_config.gateway import GatewaySettings
from muai_config.monitoring import MonitoringSettings
from muai_config.optimization import OptimizationSettings
from muai_config.queueing import QueueSettings
from muai_config.workflows import WorkflowSettings


class Settings(Section):
    """Everything that is configured, checked. `Settings()` is the defaults."""

    optimization: OptimizationSettings = section(OptimizationSettings, "Engines, batching, cache and tuning.")
    monitoring: MonitoringSettings = section(MonitoringSettings, "Metrics, traces, alerts and the HTTP server.")
    queue: QueueSettings = section(QueueSettings, "Brokers, delivery and limits.")
    gateway: GatewaySettings = section(
        GatewaySettings, "The HTTP gateway: keys, TLS, webhooks, files and batches. Its address: monitoring.server."
    )
    workflows: WorkflowSettings = section(WorkflowSettings, "Chat, answers from documents and from search.")
    models: Mapping[str, ModelSpec] = Field(
        default_factory=lambda: dict(BUILTIN_CATALOG), description="The models that can be asked for, by name."
    )
    model_cache: ModelCacheSettings = section(ModelCacheSettings, "What is kept of models, on disk and in memory.")

    @model_validator(mode="before")
    @classmethod
    def _name_the_models(cls, value: object) -> object:
        """Give each entry of `models` its key as its name, and an empty catalog the built-in one."""
        if not isinstance(value, dict) or "models" not in value:
            return value
        models: Any = value["models"]
        if not models and (models is None or isinstance(models, dict)):
            return value | {"models": dict(BUILTIN_CATALOG)}
        if not isinstance(models, dict):
            return value
        named = {
            name: {"name": name, **(entry or {})} if entry is None or isinstance(entry, dict) else entry
            for name, entry in models.items()
        }
        return value | {"models": named}

    def conflicts(self) -> Iterator[Conflict]:
        for field in ("chat_model", "embedding_model"):
            name = getattr(self.workflows, field)
            if name is not None and name not in self.models:
                yield Conflict(
                    f"workflows.{field}", name, f"names from the models section: {', '.join(sorted(self.models)[:10])}"
                )
        for key, spec in self.models.items():
            if spec.name != key:
                yield Conflict(f"models.{key}.name", spec.name, f"{key}, the entry's own key, or nothing")
        for name in self.monitoring.server.preload_models:
            if name not in self.models:
                nearest = did_you_mean(name, self.models)
                hint = f"; did you mean {nearest}?" if nearest else ""
                yield Conflict(
                    "monitoring.server.preload_models",
                    name,
                    f"names from the models section: {', '.join(sorted(self.models)[:10])}{hint}",
                )

    def model(self, name: str) -> ModelSpec:
        """The catalog's entry for `name`.

        Raises:
            UnknownModelError: there is none; the message names the nearest.
        """
        try:
            return self.models[name]
        except KeyError:
            raise UnknownModelError(name, self.models) from None

    def engine_enabled(self, engine: EngineName) -> bool:
        """Whether the configuration lets `engine` serve. With optimization off, PyTorch alone does."""
        if not self.optimization.enabled:
            return engine == "pytorch"
        if engine == FAKE:
            return True  # nobody meets it who has not named it in a model's engines
        enabled: bool = getattr(self.optimization, engine).enabled
        return enabled

    def chain(self, spec: ModelSpec) -> tuple[EngineName, ...]:
        """The engines that may serve `spec`, preferred first: those it names itself, or the preferred that suit its
        task, without those that are switched off. Empty when none is left.
        """
        if not self.optimization.enabled:
            return ("pytorch",)
        if spec.engines is not None:
            candidates = spec.engines
        else:
            preference = self.optimization.engine_preference
            candidates = tuple(engine for engine in preference if suits(engine, spec.task))
        return tuple(engine for engine in candidates if self.engine_enabled(engine))
