"""Real Celery workers on the transport: what a signal, a crash or a pause does to the messages they hold."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import celery
import pytest
from tests.transport_support import OURS, OwnRedis, Process, own_redis, wait_until

from muai_batching.transport import lease_table

pytestmark = [pytest.mark.redis, pytest.mark.chaos]

QUEUE = "work"

#: Tasks note their runs in Redis, each once however often the note is sent, and wait there to be let go on.
WORKER = f"""
import sys
import uuid
import celery, redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from muai_batching.transport import pin, delivery_count

url, prefetch, lease_ttl_s = sys.argv[1:4]
client = redis.Redis.from_url(url, socket_timeout=None, retry=Retry(ConstantBackoff(0.05), 200))
app = celery.Celery("w", broker=url)
app.conf.update(
    broker_transport={OURS!r}, broker_transport_options={{"lease_ttl_s": float(lease_ttl_s)}},
    task_acks_late=True, task_default_queue={QUEUE!r}, worker_prefetch_multiplier=int(prefetch),
    worker_cancel_long_running_tasks_on_connection_loss=False, broker_connection_retry_on_startup=True,
)

@app.task(name="note", bind=True)
def note(self, n, gate=None):
    if not pin(self.request.properties["delivery_tag"]):
        raise celery.exceptions.Ignore()
    run = f"{{n}}:{{uuid.uuid4()}}"
    client.sadd("deaths", f"{{run}}:{{delivery_count(self.request)}}")
    client.sadd("begun", run)
    if gate is not None:
        client.blmove(gate, gate, 0, "RIGHT", "RIGHT")
    client.sadd("ended", run)

app.worker_main(["worker", "-P", "threads", "-c", "4", "-l", "WARNING", "--without-gossip", "--without-mingle"])
"""

Start = Callable[..., Process]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OwnRedis]:
    with own_redis(tmp_path, "--appendonly", "yes", "--appendfsync", "always") as running:
        yield running


@pytest.fixture
def start(server: OwnRedis) -> Iterator[Start]:
    processes: list[Process] = []

    def start_one(prefetch: int = 4, lease_ttl_s: float = 1.0) -> Process:
        processes.append(Process(WORKER, server.url, str(prefetch), str(lease_ttl_s)))
        return processes[-1]

    yield start_one
    for process in processes:
        process.end()


@pytest.fixture
def send(server: OwnRedis) -> Iterator[Callable[..., None]]:
    """A stock producer: it knows nothing of our transport."""
    with celery.Celery("p", broker=server.url, set_as_current=False) as app:

        def send_all(*numbers: int, gate: str | None = None) -> None:
            for n in numbers:
                app.send_task("note", args=[n], kwargs={"gate": gate}, queue=QUEUE)

        yield send_all
        app.pool.force_close_all()


def noted(server: OwnRedis, what: str) -> list[int]:
    return [int(run.split(b":")[0]) for run in server.client.smembers(what)]


def num_noted(server: OwnRedis, what: str) -> int:
    return int(server.client.scard(what))


def test_given_a_backlog_when_workers_serve_it_then_every_task_runs_once(
    server: OwnRedis, start: Start, send: Callable[..., None]
) -> None:
    send(*range(300))
    start(), start()
    wait_until(lambda: num_noted(server, "ended") >= 300)
    assert Counter(noted(server, "begun")) == Counter(range(300))
    wait_until(lambda: sum(lease.num_claims for lease in lease_table(server.client)) == 0)


def test_given_remote_control_when_workers_are_pinged_then_they_answer(server: OwnRedis, start: Start) -> None:
    start(), start()
    with celery.Celery("c", broker=server.url, set_as_current=False) as app:
        app.conf.result_backend = None
        wait_until(lambda: len(lease_table(server.client)) == 2)
        assert len(wait_until(lambda: app.control.ping(timeout=0.3))) >= 1
        app.pool.force_close_all()


def test_given_a_worker_killed_amid_its_work_when_its_lease_ends_then_another_serves_all_of_it(
    server: OwnRedis, start: Start, send: Callable[..., None]
) -> None:
    victim = start()
    send(*range(30), gate="gate")
    wait_until(lambda: num_noted(server, "begun") == 4)
    wait_until(lambda: server.client.llen(QUEUE) == 30 - 16, what="a full prefetch")
    victim.signal(signal.SIGKILL)
    server.client.lpush("gate", "open")
    start()
    wait_until(lambda: num_noted(server, "ended") == 30)
    assert sorted(noted(server, "ended")) == list(range(30))
    deaths = Counter(entry.rsplit(b":")[-1] for entry in server.client.smembers("deaths"))
    assert deaths == {b"1": 16, b"0": 4 + 14}
    wait_until(lambda: not server.client.exists("muai:transport:deliveries"), what="an acknowledged death count")


def test_given_work_of_many_leases_when_it_ends_then_it_ran_once(
    server: OwnRedis, start: Start, send: Callable[..., None]
) -> None:
    start(lease_ttl_s=0.4), start(lease_ttl_s=0.4)
    send(1, gate="gate")
    wait_until(lambda: num_noted(server, "begun") == 1)
    before = max(lease.beats for lease in lease_table(server.client))
    wait_until(lambda: max(lease.beats for lease in lease_table(server.client)) > before + 16, what="four leases")
    server.client.lpush("gate", "open")
    wait_until(lambda: num_noted(server, "ended") == 1)
    assert noted(server, "begun") == [1]


def test_given_a_worker_stopped_past_its_lease_when_it_goes_on_then_its_claims_are_void(
    server: OwnRedis, start: Start, send: Callable[..., None]
) -> None:
    sleeper = start()
    send(*range(10), gate="gate")
    wait_until(lambda: num_noted(server, "begun") == 4)
    name = lease_table(server.client)[0].consumer
    begun_before = noted(server, "begun")
    sleeper.signal(signal.SIGSTOP)
    start()
    wait_until(lambda: name not in [lease.consumer for lease in lease_table(server.client)], what="the reclaim")
    server.client.lpush("gate", "open")
    wait_until(lambda: num_noted(server, "ended") == 10)
    sleeper.signal(signal.SIGCONT)
    wait_until(lambda: len(lease_table(server.client)) == 2, what="a new life of the stopped worker")
    # What it had begun ends a second time, harmlessly; what it had only fetched never begins in it.
    wait_until(lambda: num_noted(server, "ended") == 14)
    send(10, 11)
    wait_until(lambda: num_noted(server, "ended") == 16)
    assert Counter(noted(server, "begun")) == Counter([*range(12), *begun_before])


def test_given_a_worker_told_to_end_when_it_is_gone_then_nothing_waits_for_its_lease(
    server: OwnRedis, start: Start, send: Callable[..., None]
) -> None:
    leaver = start(lease_ttl_s=60.0)
    send(*range(30), gate="gate")
    wait_until(lambda: num_noted(server, "begun") == 4)
    leaver.signal(signal.SIGTERM)
    server.client.lpush("gate", "open")
    leaver.wait()
    assert sorted(noted(server, "ended")) == sorted(noted(server, "begun"))
    assert lease_table(server.client) == []
    start(lease_ttl_s=60.0)
    wait_until(lambda: num_noted(server, "ended") == 30)
    assert Counter(noted(server, "begun")) == Counter(range(30))


def test_given_a_broker_that_restarts_when_it_is_back_then_nothing_is_lost_and_nothing_runs_twice(
    server: OwnRedis, start: Start, send: Callable[..., None]
) -> None:
    start(lease_ttl_s=4.0)
    send(*range(20), gate="gate")
    wait_until(lambda: num_noted(server, "begun") == 4)
    server.client.lpush("gate", "open")
    server.kill()
    server.start()
    wait_until(lambda: num_noted(server, "ended") >= 20)
    send(20)
    wait_until(lambda: 20 in noted(server, "ended"))
    wait_until(lambda: sum(lease.num_claims for lease in lease_table(server.client)) == 0)
    assert Counter(noted(server, "begun")) == Counter(range(21))
    assert server.client.llen(QUEUE) == 0
