"""What `muai top` shows: read from the state store and the broker, and laid out for 80 columns and more."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from muai_config.engines import ALL_ENGINES
from muai_producers.alerts.records import Alert
from muai_producers.alerts.store import AlertStore
from muai_producers.cli.alerts import SEVERITY_STYLES
from muai_producers.connections import state_client
from muai_producers.errors import BrokerError
from muai_producers.fleet import Fleet, FleetView
from muai_producers.performance.monitor import PerformanceMonitor
from muai_producers.performance.report import LatencyFigures, PerformanceReport, ResourceTrend, SeriesFigures
from muai_producers.queue_depths import SHOWN_QUEUES, QueueDepth, queue_reader, read_depths
from muai_producers.scheduled import TaskRuns, overdue
from muai_producers.store import Store

if TYPE_CHECKING:
    from muai_config import Settings

MAX_SERIES, MAX_HOSTS, MAX_ALERTS = 16, 12, 6
BARS = "▁▂▃▄▅▆▇█"
SPARK_POINTS = 24


@dataclass(frozen=True)
class TopLook:
    """The fleet at one moment."""

    taken_s: float
    report: PerformanceReport
    fleet: FleetView
    in_flight: int
    queues: Mapping[str, QueueDepth]
    alerts: Sequence[Alert]
    overdue: Sequence[str]


class TopView:
    """Looks at the fleet.

    Raises:
        redis.exceptions.RedisError: from `look`, when the state store does not answer.
    """

    def __init__(self, settings: Settings, window_s: float) -> None:
        self._client = state_client(settings.queue.state_url, timeout_s=2.0)
        self._store = Store(self._client, prefix=settings.queue.key_prefix)
        self.monitor = PerformanceMonitor(self._store, settings.monitoring.performance.retention_s)
        self._queues = queue_reader(settings, SHOWN_QUEUES)
        self._window_s = window_s

    def look(self) -> TopLook:
        """Look now."""
        try:
            queues: Mapping[str, QueueDepth] = read_depths(self._queues)
        except BrokerError:
            queues = {}
        return TopLook(
            taken_s=time.time(),
            report=self.monitor.report(self._window_s),
            fleet=Fleet(self._store).view(ALL_ENGINES),
            in_flight=self._store.in_flight(),
            queues=queues,
            alerts=AlertStore(self._store).open(),
            overdue=overdue(TaskRuns(self._store).all(), time.time()),
        )

    def close(self) -> None:
        """Close the connections."""
        self._queues.close()
        self._client.close()


def render(look: TopLook, width: int) -> RenderableType:
    """The look, laid out. Pure."""
    parts: list[RenderableType] = [_headline(look), Text()]
    parts += [_series_table(look.report.series, width), Text()]
    parts += [_fleet_line(look), _queue_line(look)]
    if look.report.resources.trends:
        parts += [Text(), _resource_table(look.report.resources.trends)]
    parts += [Text(), *_alert_lines(look)]
    return Group(*parts)


def _headline(look: TopLook) -> Text:
    total, window_s = look.report.total, look.report.to_s - look.report.from_s
    clock = time.strftime("%H:%M:%S", time.localtime(look.taken_s))
    errors = "-" if total.error_rate is None else f"{total.error_rate:.1%}"
    line = Text.assemble(
        ("MuAI ", "bold"),
        (clock, "dim"),
        "  ",
        (f"{total.throughput_rps:,.1f}", "bold green"),
        " req/s  ",
        (f"{total.arrival_rps:,.1f}", "bold"),
        " arriving  ",
        (f"{look.in_flight:,}", "bold"),
        " in flight  ",
        (errors, "bold red" if total.faults else "bold"),
        " errors  ",
        (f"last {_duration(window_s)}", "dim"),
    )
    line.no_wrap = True
    return line


def _series_table(series: Sequence[SeriesFigures], width: int) -> Table:
    table = Table(box=None, pad_edge=False, expand=False, header_style="dim", collapse_padding=True)
    table.add_column("model", overflow="ellipsis", no_wrap=True, max_width=max(14, width - 62))
    table.add_column("engine", no_wrap=True, max_width=9)
    for name in ("req/s", "queue", "infer", "p50", "p95", "p99", "batch", "err"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = worth_showing(series)
    for one in shown[:MAX_SERIES]:
        total = one.latency.get("total")
        table.add_row(
            one.model or "(refused)",
            one.engine or "-",
            f"{one.throughput_rps:,.1f}" if one.requests else f"+{one.arrival_rps:,.1f}",
            _p95(one.latency.get("queue")),
            _p95(one.latency.get("inference")),
            *(("-", "-", "-") if total is None else (_ms(total.p50_ms), _ms(total.p95_ms), _ms(total.p99_ms))),
            "-" if one.batching is None else f"{one.batching.mean_size:.1f}",
            _error_cell(one),
        )
    if not shown:
        table.add_row("[dim]no requests[/dim]", *[""] * 9)
    if len(shown) > MAX_SERIES:
        table.add_row(f"[dim]and {len(shown) - MAX_SERIES} more[/dim]", *[""] * 9)
    return table


def worth_showing(series: Sequence[SeriesFigures]) -> list[SeriesFigures]:
    """Without what has only arrived, where more is known of its model. Pure."""
    ended = {one.model for one in series if one.requests}
    return [one for one in series if one.requests or one.model not in ended]


def _error_cell(one: SeriesFigures) -> str:
    if one.error_rate is None:
        return f"{sum(one.errors.values())}" if one.errors else "-"
    text = f"{one.error_rate:.1%}"
    return f"[red]{text}[/red]" if one.faults else text


def _fleet_line(look: TopLook) -> Text:
    fleet = look.fleet
    line = Text("workers  ", style="dim")
    line.append(f"{len(fleet.collectors)} collector{'' if len(fleet.collectors) == 1 else 's'}", style="default")
    for engine in ALL_ENGINES:
        workers = sum(worker.engine == engine for worker in fleet.workers)
        outstanding = fleet.outstanding.get(engine, 0)
        if workers or outstanding:
            style = "bold red" if not workers else "default"
            line.append(f"  {engine} {workers}: {outstanding}/{fleet.capacity(engine)} batches", style=style)
    for cooling, model in sorted(fleet.cooling):
        line.append(f"  {cooling} passed over for {model}", style="yellow")
    return line


def _queue_line(look: TopLook) -> Text:
    line = Text("queues   ", style="dim")
    waiting = {name: depth for name, depth in look.queues.items() if depth.messages}
    if not waiting:
        line.append("nothing waits", style="default")
    for name, depth in waiting.items():
        age = "" if depth.oldest_at is None else f" ({_duration(max(0.0, look.taken_s - depth.oldest_at))})"
        line.append(f"{name} {depth.messages:,}{age}  ", style="default")
    return line


def _resource_table(trends: Sequence[ResourceTrend]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", collapse_padding=True)
    table.add_column("host", no_wrap=True, overflow="ellipsis", max_width=24)
    table.add_column("resource", no_wrap=True)
    for name in ("now", "mean", "max"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("over the window", no_wrap=True)
    for trend in trends[:MAX_HOSTS]:
        style = "red" if trend.latest_percent >= 90 and trend.resource != "cpu" else "default"
        table.add_row(
            trend.host,
            trend.resource,
            f"[{style}]{trend.latest_percent:.0f} %[/{style}]",
            f"{trend.mean_percent:.0f} %",
            f"{trend.max_percent} %",
            spark([point.mean_percent for point in trend.points]),
        )
    if len(trends) > MAX_HOSTS:
        table.add_row(f"[dim]and {len(trends) - MAX_HOSTS} more[/dim]", *[""] * 5)
    return table


def _alert_lines(look: TopLook) -> list[Text]:
    lines = [Text(told, style="yellow") for told in look.overdue]
    for alert in look.alerts[:MAX_ALERTS]:
        since = _duration(max(0.0, look.taken_s - alert.timestamp))
        lines.append(
            Text.assemble((f"{alert.severity} ", SEVERITY_STYLES[alert.severity]), alert.message, (f"  {since}", "dim"))
        )
    if len(look.alerts) > MAX_ALERTS:
        lines.append(Text(f"and {len(look.alerts) - MAX_ALERTS} alerts more", style="dim"))
    return lines or [Text("no alerts", style="green")]


def spark(percents: Sequence[float]) -> str:
    """A line of bars, one per point, of the last `SPARK_POINTS`. Pure."""
    last = percents[-SPARK_POINTS:]
    return "".join(BARS[min(len(BARS) - 1, int(max(0.0, value) / 100 * len(BARS)))] for value in last)


def _p95(figures: LatencyFigures | None) -> str:
    return "-" if figures is None else _ms(figures.p95_ms)


def _ms(value: float) -> str:
    """Milliseconds in at most five characters and the unit."""
    if value < 9.95:
        return f"{value:.1f}ms"
    return f"{value:.0f}ms" if value < 9_999.5 else _duration(value / 1000)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f}s"
    return f"{seconds / 60:.0f}m" if seconds < 7200 else f"{seconds / 3600:.0f}h"
