"""Running batches of requests from files, step by step.

All that a batch has come to is in its record, which is written at the end of each step over the version that the step
began with. A process that dies in a step leaves nothing that counts: its requests are the same ones when the step is
done again (their ids follow from batch and line), and what it wrote of answers lies after the bytes that the record
knows. Two processes at one batch write to files of their own, and the record of one of them is refused.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import msgspec

from muai_producers.batches.lines import (
    InputCheck,
    answered_line,
    failed_line,
    line_requests,
    read_line,
    unserved_line,
)
from muai_producers.batches.records import BatchProblem, BatchRecord, OpenLine, Segment, Status
from muai_producers.batches.store import BatchStore, Versioned
from muai_producers.client import limits_of
from muai_producers.errors import BrokerError, MuaiError, QueueFullError, RequestCancelledError
from muai_producers.files.folder import FileFolder, refusing_bad_disks
from muai_producers.files.records import FileRecord, FileUnavailableError, UnknownFileError
from muai_producers.files.shelf import FileShelf
from muai_producers.gateway.submission import RequestBuilder
from muai_producers.store import REVOKED, TERMINAL, Limits, Store, failure_answer, outcome_of
from muai_producers.wire import InferenceRequest, InferenceResult
from muai_workers.control.slack import Slack

if TYPE_CHECKING:
    from muai_config import Settings

log = logging.getLogger(__name__)
MAX_TRIES = 3
UNSERVED_PER_STEP = 5000
COPY_BYTES = 1_000_000
Submit = Callable[[Sequence[InferenceRequest], Limits], list[str]]
Kind = Literal["output", "error"]


@dataclass
class _Step:
    """What one step adds to a batch."""

    record: BatchRecord
    input: BinaryIO
    lines: dict[Kind, list[bytes]] = field(default_factory=lambda: {"output": [], "error": []})
    open_lines: list[OpenLine] = field(default_factory=list)

    def answer(self, line: bytes, is_success: bool) -> None:
        self.lines["output" if is_success else "error"].append(line)

    def read_again(self, line: OpenLine) -> bytes:
        self.input.seek(line.offset)
        return self.input.read(line.num_bytes)


class BatchRunner:
    """Takes steps at batches. `step` may be called for one batch by one thread of a process at a time; other processes
    may do what they want.

    Raises:
        redis.exceptions.RedisError, BrokerError: from `step`, when state store or broker do not answer.
        DiskFullError: there is no room for answers; the batch waits.
    """

    def __init__(self, settings: Settings, store: Store, submit: Submit, folder: FileFolder) -> None:
        self._settings = settings.gateway.batches
        self._set_limits(settings)
        self._max_line_bytes = settings.queue.max_payload_mb * 1_000_000
        self._builder = RequestBuilder(settings, None)
        self._store = store
        self._submit = submit
        self._shelf = FileShelf(store, folder, settings.gateway.files)
        self._folder = folder
        self.batches = BatchStore(store, settings.gateway.files.keep_s)
        self._slack = Slack(self._settings.busy_share, self._settings.max_in_flight)
        self._owner = f"{os.getpid()}-{secrets.token_hex(4)}"

    def _set_limits(self, settings: Settings) -> None:
        self._capacity = int(settings.monitoring.server.queue_capacity * self._settings.capacity_share) or 1
        self._base_limits = dataclasses.replace(limits_of(settings), queue_capacity=self._capacity)

    def on_settings(self, settings: Settings) -> None:
        """Work by these settings from now on, as far as they are reloadable."""
        self._set_limits(settings)
        self._builder.on_settings(settings)

    def step(self, batch_id: str, now_s: float | None = None) -> bool:
        """Take one step at a batch; returns whether anything was done."""
        found = self.batches.get(batch_id)
        if found.record.ended:
            return False
        now_s = time.time() if now_s is None else now_s
        self._slack.owes(batch_id, found.record.num_left, found.record.expires_at - now_s)
        after = self._after(found, now_s)
        if after == found.record:
            return False
        if not self.batches.save(after, found):
            log.info("batch %s: another process is at it", batch_id)
            return False
        if after.status != found.record.status:
            log.info("batch %s is %s", batch_id, after.status)
        if after.ended:
            self._forget_segments(after)
        return True

    def _after(self, found: Versioned, now_s: float) -> BatchRecord:
        record = found.record
        if record.status == "finalizing":
            return self._finalized(record, int(now_s))
        try:
            file = self._shelf.get(record.body.input_file_id, record.tenant)
            path = self._shelf.path(file)
        except UnknownFileError as error:
            return self._failed(record, [BatchProblem(code=error.code, message=error.message)], now_s)
        except FileUnavailableError as error:
            log.error("batch %s waits: %s", record.id, error.message)
            return record
        with path.open("rb") as content:
            step = _Step(record, content)
            if found.cancelling_at is not None:
                return self._ended_early(step, "cancelled", now_s)
            if now_s >= record.expires_at:
                return self._ended_early(step, "expired", now_s)
            if record.status == "validating":
                return self._validated(step, now_s)
            return self._advanced(step, now_s)

    # -- the statuses --------------------------------------------------------------------------------------------

    def _validated(self, step: _Step, now_s: float) -> BatchRecord:
        record = step.record
        check = self._checked(step)
        problems = check.end()
        if problems:
            return self._failed(record, problems, now_s)
        return _moved(record, "in_progress", now_s, total=check.num_lines)

    def _checked(self, step: _Step) -> InputCheck:
        check = InputCheck(step.record.body.endpoint, self._settings.max_lines, self._max_line_bytes)
        for number, raw, _ in self._raw_lines(step.input, 0, 1):
            if not check.see(raw, number):
                break
        return check

    def _advanced(self, step: _Step, now_s: float) -> BatchRecord:
        self._collect(step, now_s)
        offset, number = self._fill(step, now_s)
        record = self._written(step, next_offset=offset, next_line=number)
        is_done = not record.open_lines and _is_at_end(step.input, offset)
        return _moved(record, "finalizing", now_s) if is_done else record

    def _ended_early(self, step: _Step, why: Literal["cancelled", "expired"], now_s: float) -> BatchRecord:
        """Cancel what is in the queue, take what is done, and answer the rest with why it was not done."""
        record = step.record
        total = record.total or self._checked(step).num_lines
        for line in record.open_lines:
            self._revoke(record, line)
        self._collect(step, now_s, why)
        offset, number = record.next_offset, record.next_line
        for number_here, raw, end in self._raw_lines(step.input, offset, number):
            if number_here - record.next_line >= UNSERVED_PER_STEP:
                break
            offset, number = end, number_here + 1
            if raw.strip():
                custom_id = _custom_id(raw, record.body.endpoint, number_here)
                step.answer(unserved_line(record, number_here, custom_id, why), is_success=False)
        after = self._written(step, next_offset=offset, next_line=number, total=total, ending=why)
        is_done = not after.open_lines and _is_at_end(step.input, offset)
        return _moved(after, "finalizing", now_s) if is_done else after

    def _finalized(self, record: BatchRecord, now_s: int) -> BatchRecord:
        output, errors = (self._make_file(record, kind) for kind in ("output", "error"))
        return _moved(record, record.ending, now_s, output_file_id=output, error_file_id=errors)

    def _failed(self, record: BatchRecord, problems: Sequence[BatchProblem], now_s: float) -> BatchRecord:
        return _moved(record, "failed", now_s, problems=tuple(problems))

    # -- lines in and out ----------------------------------------------------------------------------------------

    def _collect(self, step: _Step, now_s: float, why: Literal["cancelled", "expired"] | None = None) -> None:
        """Answer the lines whose requests have all ended; submit again what was lost."""
        ids = [request_id for line in step.record.open_lines for request_id in line.request_ids]
        outcomes = self._outcomes(ids)
        results: list[InferenceResult] = []
        for line in step.record.open_lines:
            own = [outcomes[request_id] for request_id in line.request_ids]
            if any(outcome == "lost" for outcome in own):
                self._repeat(step, line, now_s)
            elif any(outcome is None for outcome in own):
                step.open_lines.append(line)
            elif why is not None and any(isinstance(outcome, RequestCancelledError) for outcome in own):
                step.answer(unserved_line(step.record, line.number, line.custom_id, why), is_success=False)
            else:
                body = read_line(step.read_again(line), step.record.body.endpoint).body
                ended = [one for one in own if isinstance(one, InferenceResult | MuaiError)]
                results += [one for one in ended if isinstance(one, InferenceResult)]
                step.answer(*answered_line(step.record, line, body, ended, now_s))
        self._slack.ended(results, time.monotonic())

    def _outcomes(self, ids: Sequence[str]) -> dict[str, InferenceResult | MuaiError | Literal["lost"] | None]:
        """How each request ended; None while it goes on, "lost" where nobody knows it any more.

        In flight is asked first: what is answered between the two questions shows as answered, never as lost.
        """
        if not ids:
            return {}
        client: Any = self._store.client
        in_flight = client.hmget(self._store.keys.inflight, list(ids))
        outcomes: dict[str, InferenceResult | MuaiError | Literal["lost"] | None] = {}
        for request_id, entry, state in zip(ids, in_flight, self._store.states(ids), strict=True):
            if state is not None and state.status in TERMINAL:
                outcomes[request_id] = outcome_of(state)
            else:
                outcomes[request_id] = "lost" if state is None and entry is None else None
        return outcomes

    def _repeat(self, step: _Step, line: OpenLine, now_s: float) -> None:
        """A line whose requests or results are gone (they had expired before anybody looked) is made again."""
        if line.num_tries >= MAX_TRIES:
            lost = MuaiError(f"the request's result was lost {line.num_tries} times")
            step.answer(failed_line(step.record, line.number, line.custom_id, lost), is_success=False)
            return
        read = read_line(step.read_again(line), step.record.body.endpoint)
        requests = line_requests(self._builder, step.record, read, line.number, line.num_tries + 1)
        if self._submit_line(step.record, requests):
            ids = tuple(request.id for request in requests)
            line = msgspec.structs.replace(line, request_ids=ids, num_tries=line.num_tries + 1)
        step.open_lines.append(line)

    def _fill(self, step: _Step, now_s: float) -> tuple[int, int]:
        """Submit lines while there is room; returns where the first stands that was not, and its number."""
        record = step.record
        offset, number = record.next_offset, record.next_line
        own = sum(len(line.request_ids) for line in step.open_lines)
        room = self._room(own, sum(len(line.request_ids) for line in record.open_lines))
        for number_here, raw, end in self._raw_lines(step.input, offset, number):
            if raw.strip():
                if room <= 0:
                    break
                line = read_line(raw, record.body.endpoint)
                try:
                    requests = line_requests(self._builder, record, line, number_here, 1)
                    if not self._submit_line(record, requests):
                        break
                except BrokerError:
                    raise
                except MuaiError as error:
                    step.answer(failed_line(record, number_here, line.custom_id, error), is_success=False)
                else:
                    room -= len(requests)
                    step.open_lines.append(
                        OpenLine(
                            number=number_here,
                            custom_id=line.custom_id,
                            offset=offset,
                            num_bytes=len(raw),
                            request_ids=tuple(request.id for request in requests),
                        )
                    )
            offset, number = end, number_here + 1
        return offset, number

    def _room(self, own: int, own_before: int) -> int:
        """Requests that a batch may add, of which `own` are in the queue, and were `own_before` when its step began."""
        traffic, now_s = self.batches.traffic(), time.monotonic()
        self._slack.forget_but(traffic.open_ids)
        self._slack.saw(traffic.others_admitted, now_s)
        return min(self._settings.max_in_flight - own, self._slack.room(traffic.own_in_queue - own_before + own, now_s))

    def _submit_line(self, record: BatchRecord, requests: Sequence[InferenceRequest]) -> bool:
        """Submit a line's requests; False when there is no room for all of them: those that were accepted are the same
        when the line is submitted again."""
        own = record.limits
        limits = Limits(
            queue_capacity=self._capacity,
            tenant_max_requests=own.max_requests or self._base_limits.tenant_max_requests,
            tenant_max_tokens=own.max_tokens or self._base_limits.tenant_max_tokens,
            model_max_requests=self._base_limits.model_max_requests,
        )
        try:
            self._submit(requests, limits)
        except QueueFullError:
            return False
        return True

    def _revoke(self, record: BatchRecord, line: OpenLine) -> None:
        error = RequestCancelledError(f"batch {record.id} has ended", {"batch_id": record.id})
        self._store.answer(
            [failure_answer(one, error, state=REVOKED, tenant=record.tenant) for one in line.request_ids]
        )

    def _raw_lines(self, content: BinaryIO, offset: int, number: int) -> Iterator[tuple[int, bytes, int]]:
        """Lines from `offset` on: number, bytes, and where the next one begins."""
        content.seek(offset)
        while raw := content.readline(self._max_line_bytes + 1):
            offset += len(raw)
            yield number, raw, offset
            number += 1
            content.seek(offset)  # whoever reads other lines in between moves the place

    # -- answers on disk -----------------------------------------------------------------------------------------

    def _written(self, step: _Step, **changes: Any) -> BatchRecord:
        """The record after the step's answers are on the disk."""
        record = step.record
        segment = next((one for one in record.segments if one.owner == self._owner), Segment(owner=self._owner))
        others = tuple(one for one in record.segments if one.owner != self._owner)
        output_bytes = self._append(record, "output", segment.output_bytes, step.lines["output"])
        error_bytes = self._append(record, "error", segment.error_bytes, step.lines["error"])
        grown = Segment(owner=self._owner, output_bytes=output_bytes, error_bytes=error_bytes)
        return msgspec.structs.replace(
            record,
            completed=record.completed + len(step.lines["output"]),
            failed=record.failed + len(step.lines["error"]),
            open_lines=tuple(step.open_lines),
            segments=(*others, grown) if output_bytes or error_bytes else record.segments,
            **changes,
        )

    def _append(self, record: BatchRecord, kind: Kind, offset: int, lines: Sequence[bytes]) -> int:
        """Write lines after the bytes that count; returns how many count then."""
        if not lines:
            return offset
        data = b"".join(lines)
        with refusing_bad_disks():
            descriptor = os.open(self._folder.segment(record.id, kind, self._owner), os.O_CREAT | os.O_WRONLY, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.truncate(offset)
                file.seek(offset)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        return offset + len(data)

    def _make_file(self, record: BatchRecord, kind: Kind) -> str | None:
        """One file of all segments; None where there is nothing in it. Done again, it is the same file."""
        sizes = {one.owner: one.output_bytes if kind == "output" else one.error_bytes for one in record.segments}
        if not sum(sizes.values()):
            return None
        file_id = f"file-{record.id.removeprefix('batch_')}-{kind}"
        with self._folder.writing() as (target, partial):
            for owner, num_bytes in sizes.items():
                if num_bytes:
                    self._copy(record, kind, owner, num_bytes, target)
            self._folder.keep(target, partial, file_id)
        self._shelf.put(self._output_record(record, kind, file_id, sum(sizes.values())), limited=False)
        return file_id

    def _copy(self, record: BatchRecord, kind: Kind, owner: str, num_bytes: int, target: BinaryIO) -> None:
        with self._folder.segment(record.id, kind, owner).open("rb") as source, refusing_bad_disks():
            while num_bytes:
                piece = source.read(min(COPY_BYTES, num_bytes))
                if not piece:
                    raise FileUnavailableError(f"answers of batch {record.id} are missing from {source.name}")
                target.write(piece)
                num_bytes -= len(piece)

    def _output_record(self, record: BatchRecord, kind: Kind, file_id: str, num_bytes: int) -> FileRecord:
        name = f"{record.id}_{kind}.jsonl"
        return self._shelf.new_file(record.tenant, name, "batch_output", num_bytes, file_id=file_id)

    def _forget_segments(self, record: BatchRecord) -> None:
        for segment in record.segments:
            for kind in ("output", "error"):
                self._folder.segment(record.id, kind, segment.owner).unlink(missing_ok=True)


def _moved(record: BatchRecord, status: Status, now_s: float, **changes: Any) -> BatchRecord:
    return msgspec.structs.replace(record, status=status, times={**record.times, status: int(now_s)}, **changes)


def _is_at_end(content: BinaryIO, offset: int) -> bool:
    content.seek(0, os.SEEK_END)
    return content.tell() <= offset


def _custom_id(raw: bytes, endpoint: str, number: int) -> str:
    try:
        return read_line(raw, endpoint).custom_id
    except MuaiError:  # a batch that was cancelled before it was checked may hold anything
        return f"line {number}"
