"""The watch over the GPUs of the workers that a supervisor runs: it reads, judges, tells the fleet, and says which
workers must not run. What it decides is in `verdict`.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import redis

from muai_producers.connections import state_client
from muai_producers.fleet import Fleet, GpuRecord, WorkerRecord
from muai_producers.store import Store
from muai_workers.gpus.nvml import GpuReader, NoDriverError, Vitals
from muai_workers.gpus.verdict import Effort, GpuCase, Rules, WorkerLook, next_case, next_effort, unseen
from muai_workers.up.decisions import Hold
from muai_workers.up.supervisor import Standing

if TYPE_CHECKING:
    from muai_config import Settings

log = logging.getLogger(__name__)
HUNG_PATIENCE_S = 3.0
"""A worker whose GPU hangs will not finish what it runs: it only gets the time to give back what it has not begun."""

FIGURES = (
    *("uuid", "name", "memory_used_bytes", "memory_total_bytes", "utilization_percent"),
    *("temperature_c", "power_w", "power_limit_w", "ecc_uncorrected"),
)
"""What a GPU's record repeats of its vitals."""


@dataclass
class _Watched:
    """One GPU and what is known of it."""

    gpu: str
    worker: str
    """The supervised process that has it."""
    case: GpuCase = field(default_factory=GpuCase)
    vitals: Vitals | None = None
    """The last that there were."""
    read_at: float = 0.0
    effort: Effort | None = None
    hung: bool = False
    written: GpuRecord | None = None


class GpuWatch:
    """Watches in a thread of its own, from `start` on. It is its supervisor's warden.

    Args:
        groups: the GPUs of each worker, by the name of its process.
        grace_s: how long a worker that is stopped may take for what it runs.
        reader: reads them; None: from NVML.
        suffix: what the workers' names in the fleet have beside those of their processes.
    """

    def __init__(
        self,
        settings: Settings,
        groups: Mapping[str, Sequence[str]],
        grace_s: float,
        reader: GpuReader | None = None,
        suffix: str = "",
    ) -> None:
        options = settings.monitoring.gpus
        self._rules = Rules(
            options.hang_s or 0.0, options.load_hang_s or 0.0, options.quarantine_s, options.max_temperature_c
        )
        self._every_s = options.check_every_s
        self._grace_s = grace_s
        self._host = socket.gethostname()
        self._suffix = suffix
        self._watched = [_Watched(gpu, worker) for worker, group in groups.items() for gpu in group]
        # Each once, though several workers may have it: an error that the driver reports is told one time.
        self._reader = reader or GpuReader(list(dict.fromkeys(one.gpu for one in self._watched)))
        self._client = state_client(settings.queue.state_url, timeout_s=2.0, retries=0)
        self._fleet = Fleet(Store(self._client, prefix=settings.queue.key_prefix))
        self._last_looks: dict[str, WorkerLook] = {}
        self._holds: dict[str, Hold] = {}
        self._remarks: deque[str] = deque(maxlen=1000)
        self._fleet_answers: bool | None = None
        """None: it has not answered yet; it may have to be started first."""
        self._standings: Callable[[], Mapping[str, Standing]] = dict
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="muai-gpu-watch", daemon=True)

    def start(self, standings: Callable[[], Mapping[str, Standing]]) -> None:
        """Begin to watch.

        Args:
            standings: how the supervised processes stand.
        """
        self._standings = standings
        self._look_safely()  # before any worker starts: one whose GPU has failed already is not begun with
        self._thread.start()

    def stop(self) -> None:
        """Watch no more, and take the GPUs out of the fleet's picture."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10.0)
        self._reader.close()
        try:
            self._fleet.withdraw_gpus([one.written for one in self._watched if one.written is not None])
        except redis.RedisError as error:
            log.debug("the fleet could not be told that the watch over GPUs ends: %s", error)
        self._client.close()

    def holds(self) -> Mapping[str, Hold]:
        """See `Warden.holds`."""
        return self._holds

    def remarks(self) -> Sequence[str]:
        """See `Warden.remarks`."""
        return [self._remarks.popleft() for _ in range(len(self._remarks))]

    # -- in the watch's thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            self._look_safely()

    def _look_safely(self) -> None:
        try:
            self.look(self._standings(), time.monotonic(), time.time())
        except Exception:
            # A watch that dies unheard would leave workers on GPUs that have failed.
            log.exception("looking at the GPUs failed; it is tried again")
            self._remarks.append("looking at the GPUs failed; it is tried again")

    def look(self, standings: Mapping[str, Standing], now_s: float, wall_s: float) -> None:
        """Look once, judge, and tell.

        Args:
            standings: how the supervised processes stand.
            now_s: monotonic seconds.
            wall_s: wall-clock seconds since the epoch.
        """
        looks = self._looks(standings)
        try:
            by_gpu = {vitals.gpu: vitals for vitals in self._reader.read()}
            blind = ""
        except NoDriverError as error:
            by_gpu, blind = {}, str(error)
        for one in self._watched:
            told = by_gpu.get(one.gpu)
            self._judge(one, told, looks.get(one.worker), blind, now_s)
            if told is not None:
                one.vitals, one.read_at = told, wall_s
        self._holds = self._find_holds()
        self._tell(standings, wall_s)

    def _looks(self, standings: Mapping[str, Standing]) -> dict[str, WorkerLook]:
        """What each worker that runs does; none while the state store does not answer: nobody knows then."""
        try:
            records = {record.name: record for record in self._fleet.view(()).workers}
        except redis.RedisError as error:
            self._note_fleet(False, error)
            return {}
        self._note_fleet(True)
        looks = {}
        for name, standing in standings.items():
            look = self._look_of(name, standing.pid, records.get(self._fleet_name(name)))
            if look is not None:
                looks[name] = look
        return looks

    def _look_of(self, name: str, pid: int | None, record: WorkerRecord | None) -> WorkerLook | None:
        if pid is None:
            self._last_looks.pop(name, None)
            return None
        if record is not None and record.pid == pid:
            self._last_looks[name] = WorkerLook(pid, record.in_flight, record.progress, record.models_loading)
        # One that has fallen silent with work in its engine is what a hung one looks like, when it hangs hard enough.
        last = self._last_looks.get(name)
        return last if last is not None and last.run == pid else None

    def _judge(self, one: _Watched, told: Vitals | None, look: WorkerLook | None, blind: str, now_s: float) -> None:
        before = one.case
        if told is None:
            one.effort, one.case = None, unseen(before, blind)
        else:
            one.effort = next_effort(one.effort, look, told, now_s)
            hang = None if one.effort is None else one.effort.hang(self._rules, now_s)
            one.case = next_case(before, told, hang, self._rules, now_s)
            if one.case.state == "failed" and one.case.failed_s == now_s:
                one.hung = hang is not None
        if before.state != one.case.state:
            why = f": {one.case.reason}" if one.case.reason else ""
            self._remarks.append(f"GPU {one.gpu} is {one.case.state}{why}")

    def _find_holds(self) -> dict[str, Hold]:
        holds: dict[str, Hold] = {}
        for one in self._watched:
            if one.case.state == "failed" and one.worker not in holds:
                reason = f"GPU {one.gpu} is failed: {one.case.reason}"
                patience_s = HUNG_PATIENCE_S if one.hung else self._grace_s
                holds[one.worker] = Hold(reason, patience_s)
        return holds

    def _tell(self, standings: Mapping[str, Standing], wall_s: float) -> None:
        outdated, records = [], []
        for one in self._watched:
            record = self._record(one, standings.get(one.worker), wall_s)
            if one.written is not None and one.written.uuid != record.uuid:
                outdated.append(one.written)
            one.written = record
            records.append(record)
        try:
            self._fleet.withdraw_gpus(outdated)
            self._fleet.announce_gpus(records)
        except redis.RedisError as error:
            self._note_fleet(False, error)

    def _record(self, one: _Watched, standing: Standing | None, wall_s: float) -> GpuRecord:
        figures = one.vitals or Vitals(gpu=one.gpu, uuid=one.gpu)
        state, reason = one.case.state, one.case.reason
        if state == "ok" and standing is not None and standing.given_up is not None:
            state, reason = "degraded", f"nothing runs on it, its worker was given up: {standing.given_up}"
        return GpuRecord(
            host=self._host,
            index=one.gpu,
            worker=self._fleet_name(one.worker),
            last_xid=one.case.last_xid,
            state=state,
            reason=reason,
            read_at=one.read_at,
            written_at=wall_s,
            **{name: getattr(figures, name) for name in FIGURES},
        )

    def _fleet_name(self, worker: str) -> str:
        return f"{worker}{self._suffix}@{self._host}"

    def _note_fleet(self, answers: bool, error: Exception | None = None) -> None:
        if self._fleet_answers is None:
            self._fleet_answers = answers or None
        elif answers != self._fleet_answers:
            what = "answers again" if answers else f"does not answer the watch over the GPUs: {error}"
            self._remarks.append(f"the state store {what}")
            self._fleet_answers = answers
