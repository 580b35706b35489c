"""The `monitoring` section: metrics, traces, alerts and the HTTP server."""

from collections.abc import Iterator
from typing import Literal

from muai_config.fields import (
    Conflict,
    DistinctList,
    FilePath,
    FolderPath,
    Host,
    HttpUrl,
    Name,
    Section,
    UrlPath,
    section,
    setting,
)

AlertType = Literal[
    "latency",
    "error_rate",
    "memory",
    "throughput",
    "latency_anomaly",
    "throughput_anomaly",
    "queue_age",
    "missing_workers",
    "gpu_failure",
    "disk_full",
    "performance_data",
]


class PrometheusSettings(Section):
    enabled: bool = setting(True, describe="Whether metrics are exported for Prometheus.")
    port: int = setting(9090, ge=1, le=65535, example=9100, describe="Port of the metrics page; it must be free.")
    host: Host = setting(
        "0.0.0.0",
        example="127.0.0.1",
        describe="Address that the metrics page listens on; 127.0.0.1 keeps it to this machine.",
    )
    path: UrlPath = setting("/metrics", example="/internal/metrics", describe="Path of the metrics page.")


class TracingSettings(Section):
    enabled: bool = setting(True, describe="Whether requests are traced with OpenTelemetry.")
    endpoint: HttpUrl = setting(
        "http://localhost:4317",
        example="http://otel-collector:4317",
        describe="The OTLP collector that takes the traces.",
    )
    protocol: Literal["auto", "grpc", "http"] = setting(
        "auto",
        example="http",
        describe="How to speak with the collector; auto: HTTP on port 4318 or where the address has a path, else gRPC.",
    )
    sample_rate: float = setting(
        1.0,
        ge=0.0,
        le=1.0,
        unit="fraction of requests",
        example=0.1,
        reloadable=True,
        describe="Share of requests that are traced; 0.1 suits heavy traffic.",
    )
    max_traces_per_s: float = setting(
        20.0,
        ge=0.0,
        unit="requests/s",
        example=0.0,
        describe="Most requests that a process begins to trace in a second, whatever sample_rate says; 0: no limit. "
        "What comes with a trace of its caller's is not counted.",
    )
    service_name: str = setting(
        "muai-orchestration", min_length=1, example="muai-staging", describe="The name that traces carry."
    )
    export_timeout_ms: int = setting(
        30000, ge=1, le=3_600_000, unit="ms", example=10000, describe="Longest that one export may take."
    )


class LogSettings(Section):
    format: Literal["console", "json"] = setting(
        "console", example="json", describe="Lines for people, or one JSON object a line for machines."
    )
    contents: bool = setting(
        False,
        describe="Whether logs and traces may repeat what clients sent and were answered. Passwords and keys never "
        "appear.",
    )
    folder: FolderPath | None = setting(
        None,
        example="/var/log/muai",
        describe="Folder in which each process also keeps a log file of its own; null: none is kept.",
    )
    max_file_mb: int = setting(
        50, ge=1, le=100_000, unit="MB", example=200, describe="Size at which a log file is put aside for a new one."
    )
    keep_files: int = setting(
        5, ge=1, le=1000, unit="files", example=10, describe="Log files put aside that are kept, for each process."
    )
    min_free_mb: int = setting(
        200,
        ge=0,
        le=10_000_000,
        unit="MB",
        example=1000,
        describe="With less than this free, a disk counts as full: old logs, leftovers and converted models that "
        "nobody has used lately are deleted, and only warnings are logged. 0: only when nothing more fits.",
    )


class AnomalySettings(Section):
    enabled: bool = setting(True, reloadable=True, describe="Whether unusual behaviour is looked for and reported.")
    latency_threshold_ms: float = setting(
        1000.0,
        gt=0.0,
        unit="ms",
        example=500.0,
        reloadable=True,
        env="MUAI_MON_ANOMALY_LATENCY_THRESHOLD",
        describe="Latency above which an alert is raised.",
    )
    error_rate_threshold: float = setting(
        0.05,
        ge=0.0,
        le=1.0,
        unit="fraction of requests",
        example=0.01,
        reloadable=True,
        describe="Share of failed requests above which an alert is raised.",
    )
    memory_threshold_percent: float = setting(
        90.0,
        ge=0.0,
        le=100.0,
        unit="%",
        example=85.0,
        reloadable=True,
        describe="Memory use above which an alert is raised.",
    )
    throughput_threshold_rps: float = setting(
        1.0,
        ge=0.0,
        unit="requests/s",
        example=10.0,
        reloadable=True,
        describe="Throughput below which an alert is raised.",
    )
    alert_rate_limit_seconds: int = setting(
        300,
        ge=0,
        le=604_800,
        unit="s",
        example=600,
        reloadable=True,
        describe="Least time between two alerts of one kind, so that one fault is not a storm of messages.",
    )
    window_s: int = setting(
        60,
        ge=10,
        le=3600,
        unit="s",
        example=120,
        reloadable=True,
        describe="Time over which latency, errors and throughput are judged.",
    )
    min_requests: int = setting(
        5,
        ge=1,
        le=1_000_000,
        unit="requests",
        example=20,
        reloadable=True,
        describe="Fewer answers than this within window_s say nothing of latency and errors.",
    )
    check_every_s: float = setting(
        10.0, ge=1.0, le=3600.0, unit="s", example=30.0, describe="How often unusual behaviour is looked for."
    )
    resolve_after_s: float = setting(
        30.0,
        ge=0.0,
        le=86_400.0,
        unit="s",
        example=60.0,
        reloadable=True,
        describe="How long all must be well again before an alert counts as resolved.",
    )
    queue_age_threshold_s: float = setting(
        60.0,
        gt=0.0,
        unit="s",
        example=30.0,
        reloadable=True,
        describe="Age of the oldest waiting request above which an alert is raised.",
    )
    baseline_s: int = setting(
        3600,
        ge=600,
        le=21_600,
        unit="s",
        example=7200,
        reloadable=True,
        describe="How far back a model's own behaviour is what its present is compared with.",
    )
    baseline_deviations: float = setting(
        6.0,
        ge=0.0,
        le=1000.0,
        unit="robust standard deviations",
        example=4.0,
        reloadable=True,
        describe="Distance from the model's own recent median at which an alert is raised; 0 switches it off.",
    )
    alert_destinations: DistinctList[Literal["log", "webhook", "alertmanager"]] = setting(
        ("log",), example=["log", "webhook"], reloadable=True, describe="Where alerts go."
    )
    webhook_url: HttpUrl | None = setting(
        None,
        example="https://hooks.example.com/muai",
        reloadable=True,
        describe="Address that alerts are posted to; needed when webhook is among alert_destinations.",
    )
    alertmanager_url: HttpUrl | None = setting(
        None,
        example="http://alertmanager:9093",
        reloadable=True,
        describe="The Prometheus Alertmanager; needed when alertmanager is among alert_destinations.",
    )

    def conflicts(self) -> Iterator[Conflict]:
        for destination, url in (("webhook", self.webhook_url), ("alertmanager", self.alertmanager_url)):
            if destination in self.alert_destinations and url is None:
                yield Conflict(
                    f"{destination}_url",
                    None,
                    f"an http:// or https:// address, because alert_destinations has {destination}",
                )


class PerformanceSettings(Section):
    enabled: bool = setting(
        True, describe="Whether latencies, errors, tokens and resources are recorded, fleet-wide, in the state store."
    )
    retention_s: int = setting(
        604_800,
        ge=3600,
        le=31_536_000,
        unit="s",
        example=2_592_000,
        describe="How long performance data are kept: by 10 s for two hours, by the minute for a day, by 10 minutes "
        "for a week, and by the hour after that.",
    )


class GpuSettings(Section):
    enabled: bool = setting(
        True,
        describe="Whether `muai worker --gpus` watches the GPUs of its workers, and stops those whose GPU fails. "
        "monitoring.enabled does not switch it off.",
    )
    check_every_s: float = setting(
        2.0, ge=0.1, le=5.0, unit="s", example=1.0, describe="How often the GPUs are looked at."
    )
    hang_s: float | None = setting(
        300.0,
        ge=5.0,
        le=86_400.0,
        unit="s",
        example=600.0,
        describe="How long a worker may have work in its engine without answering any of it and without its GPUs' "
        "utilization changing, before the GPUs count as hung. null: never.",
    )
    load_hang_s: float | None = setting(
        1800.0,
        ge=60.0,
        le=86_400.0,
        unit="s",
        example=3600.0,
        describe="The same for a worker that loads a model: how long neither utilization nor used memory may change; "
        "longer than the slowest download of weights. null: loading may take for ever.",
    )
    quarantine_s: float = setting(
        60.0,
        ge=0.0,
        le=86_400.0,
        unit="s",
        example=300.0,
        describe="How long a GPU that failed must be well before its worker starts again; doubled for each failure "
        "that soon follows another, up to an hour.",
    )
    max_temperature_c: float | None = setting(
        None,
        ge=30.0,
        le=200.0,
        unit="°C",
        example=92.0,
        describe="Temperature from which a GPU counts as failed, so that it cools down; null takes the one at which "
        "the GPU would switch itself off.",
    )


class FlowerSettings(Section):
    host: Host = setting("127.0.0.1", example="0.0.0.0", describe="Address that `muai flower` listens on.")
    port: int = setting(5555, ge=1, le=65535, example=5556, describe="Port that `muai flower` listens on.")
    login_file: FilePath | None = setting(
        None,
        example="/run/secrets/flower",
        describe="File with one line, user:password, that Flower asks for; null asks nobody, unless Flower's own "
        "variable FLOWER_BASIC_AUTH says so.",
    )


class ServerSettings(Section):
    enabled: bool = setting(False, describe="Whether the HTTP server runs; production deployments want it.")
    host: Host = setting("0.0.0.0", example="127.0.0.1", describe="Address that the server listens on.")
    port: int = setting(8000, ge=1, le=65535, example=8080, describe="Port that the server listens on.")
    queue_capacity: int = setting(
        100,
        ge=1,
        le=1_000_000_000,
        unit="requests",
        example=10000,
        reloadable=True,
        describe="Most requests accepted and not yet answered; one more is refused.",
    )
    preload_models: DistinctList[Name] = setting(
        (),
        example=["all-minilm-l6-v2"],
        describe="Models to load at the start, so that the first request need not wait for it.",
    )
    graceful_shutdown_timeout: int = setting(
        30,
        ge=0,
        le=86_400,
        unit="s",
        example=120,
        describe="Time that requests in progress have to finish when a process is told to stop.",
    )
    health_check_path: UrlPath = setting("/health", example="/healthz", describe="Path of the health check.")
    readiness_check_path: UrlPath = setting("/ready", example="/readyz", describe="Path of the readiness check.")

    def conflicts(self) -> Iterator[Conflict]:
        if self.health_check_path == self.readiness_check_path:
            yield Conflict("readiness_check_path", self.readiness_check_path, "a path other than health_check_path")


class MonitoringSettings(Section):
    enabled: bool = setting(
        True, describe="The main switch of metrics, traces and alerts. The HTTP server has its own."
    )
    prometheus: PrometheusSettings = section(PrometheusSettings, "Metrics for Prometheus.")
    tracing: TracingSettings = section(TracingSettings, "Traces for OpenTelemetry.")
    logs: LogSettings = section(LogSettings, "What processes log, and how.")
    anomaly: AnomalySettings = section(AnomalySettings, "Alerts.")
    performance: PerformanceSettings = section(PerformanceSettings, "Performance data.")
    gpus: GpuSettings = section(GpuSettings, "The watch over GPUs.")
    flower: FlowerSettings = section(FlowerSettings, "Flower, which shows workers and batches.")
    server: ServerSettings = section(ServerSettings, "The HTTP server and how processes stop.")

    def conflicts(self) -> Iterator[Conflict]:
        both_listen = self.enabled and self.prometheus.enabled and self.server.enabled
        if both_listen and self.prometheus.port == self.server.port:
            yield Conflict(
                "prometheus.port", self.prometheus.port, "a port other than monitoring.server.port, as both listen"
            )
