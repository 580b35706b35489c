"""An engine worker: one engine in one process, fed by its queue."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
import uuid
from typing import TYPE_CHECKING, Any

import msgspec
import redis
from celery import Celery, signals
from celery.exceptions import Ignore, Reject
from kombu.exceptions import OperationalError

from muai_batching.own_queues import own_queue_entity, own_queues_of
from muai_batching.serving import QuietConsumer
from muai_batching.transport import pin
from muai_config.engines import FAKE
from muai_config.queues import engine_queue, own_queue
from muai_config.slots import slots_of
from muai_producers.connections import state_client
from muai_producers.errors import EngineUnavailableError, MuaiError
from muai_producers.fleet import Fleet, WorkerRecord
from muai_producers.messages import RUN_BATCH_TASK
from muai_producers.monitoring import instruments
from muai_producers.monitoring.pushing import start_pushing
from muai_producers.monitoring.recorder import recorder
from muai_producers.performance.recorder import recorder_for
from muai_producers.performance.sampling import end_sampling, offer_sampling
from muai_producers.runtime_config.following import ConfigFollower
from muai_producers.runtime_config.live import LiveSettings
from muai_producers.store import Store
from muai_producers.tracing import create_tracer
from muai_producers.wire import Batch
from muai_workers.announcing import Announcer
from muai_workers.engines.base import Engine
from muai_workers.engines.fake import FakeEngine, FakeOptions
from muai_workers.engines.registry import create_engine
from muai_workers.execution import BatchRunner, WorkerIdentity
from muai_workers.gpus.nvml import nvml_library
from muai_workers.monitoring.machine import MachineWatch
from muai_workers.monitoring.models import ModelWatch

if TYPE_CHECKING:
    from muai_config import Settings
    from muai_config.engines import EngineName

log = logging.getLogger(__name__)
EVENTS_EVERY_S = 0.1
FAKE_OPTIONS_VARIABLE = "MUAI_TEST_FAKE_ENGINE"
"""How a fake engine behaves: a `FakeOptions` as JSON."""


class NotBegunError(Reject):
    """The batch goes back to the broker as it came."""


class EngineConsumer(QuietConsumer):
    """A Celery consumer that sends its task events together, ten times a second and from its loop alone: at hundreds
    of small batches a second they would cost more than the batches.
    """

    def on_send_event_buffered(self) -> Any:
        """Called for each event, from any thread; the timer below sends them."""

    def register_with_event_loop(self, hub: Any) -> None:
        """Called by Celery at each start of the event loop."""
        super().register_with_event_loop(hub)
        if self.event_dispatcher is not None:
            # Else a full buffer is sent by whichever thread fills it, over the loop's own connection.
            self.event_dispatcher.buffer_limit = sys.maxsize
        hub.call_repeatedly(EVENTS_EVERY_S, self._flush_events)


class EngineWorker:
    """What an engine worker process holds while it runs.

    Raises:
        EngineUnavailableError: the engine cannot run here.
    """

    def __init__(self, settings: Settings, engine: EngineName, name: str) -> None:
        # With the host, as in Flower: process ids repeat from container to container.
        self._name = f"{name}@{socket.gethostname()}"
        self._started_at = time.time()
        self.live = LiveSettings(settings, f"{self._name} (worker)")
        self._follower = ConfigFollower(self.live)
        self._follower.start()
        self._settings = settings = self.live.current
        self.engine = _make_engine(engine, settings)
        availability = self.engine.availability()
        if not availability.available:
            raise EngineUnavailableError(availability.reason, {"engine": engine})
        self._device = availability.reason
        store = Store(
            state_client(settings.queue.state_url),
            prefix=settings.queue.key_prefix,
            result_ttl_s=settings.queue.result_ttl_s,
        )
        keeps = settings.optimization.affinity.enabled and self.engine.capabilities.kv_reuse
        self.queue = own_queue(engine, uuid.uuid4().hex) if keeps else ""
        """Its own, for the conversations that it keeps; '' where it keeps none."""
        identity = WorkerIdentity(self._name, os.environ.get("CUDA_VISIBLE_DEVICES", ""), self.queue)
        self._tracer = create_tracer(settings, "worker")
        self.live.subscribe(self._tracer.reconfigure, settings)
        self.statistics = recorder_for(settings)
        self.runner = BatchRunner(
            settings, self.engine, store, identity, tracer=self._tracer, statistics=self.statistics
        )
        self.live.subscribe(self.engine.reconfigure, settings)
        self.live.subscribe(self.runner.reconfigure, settings)
        self._watches = (ModelWatch(self.engine, recorder), MachineWatch(recorder))
        self._pusher = start_pushing(settings, "engine", name)
        own_queues = own_queues_of(settings) if self.queue else None
        self._announcer = Announcer(Fleet(store), self._record, own_queues)
        self.is_leaving = False
        """Whether batches that have not begun are to go to other workers."""

    def _record(self) -> WorkerRecord:
        slots = slots_of(self._settings, self.engine.name)  # type: ignore[arg-type]
        return WorkerRecord(
            name=self._name,
            engine=self.engine.name,
            slots=slots.running,
            ahead=slots.ahead,
            pid=os.getpid(),
            host=socket.gethostname(),
            gpu=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
            models_loaded=self.engine.loaded(),
            device=self._device,
            started_at=self._started_at,
            in_flight=self.runner.activity.in_flight,
            progress=self.runner.activity.progress,
            models_loading=self.runner.models.loading_models(),
            model_bytes=self.runner.models.memory_bytes(),
            queue=self.queue,
        )

    def preload(self) -> None:
        """Load the models of `preload_models` that this engine may serve."""
        for model in self._settings.monitoring.server.preload_models:
            spec = self._settings.model(model)
            if self.engine.name not in self._settings.chain(spec):
                continue
            try:
                self.runner.models.load_model(model)
            except MuaiError as error:
                log.warning("%s could not preload %s: %s", self.engine.name, model, error)

    def open(self) -> None:
        """Say that work can come."""
        log.info("%s: %s", self.engine.name, self._device)
        self._follower.take_sighup()
        self._announcer.start()

    def withdraw(self) -> None:
        """Say that no more work should come. Waits for nothing and takes no lock, as a signal handler must."""
        self.is_leaving = True
        self._announcer.withdraw()

    def close(self) -> None:
        """Free what the process holds, once no batch runs any more."""
        self._announcer.stop()
        self._follower.close()
        self.runner.close()
        self.engine.close()
        self._tracer.close()
        for watch in self._watches:
            watch.close()
        if self._pusher is not None:
            self._pusher.close()


def _make_engine(engine: EngineName, settings: Settings) -> Engine:
    behaviour = os.environ.get(FAKE_OPTIONS_VARIABLE)
    if engine == FAKE and behaviour:
        return FakeEngine(FakeOptions.from_env_value(behaviour))
    return create_engine(engine, settings)


def register(app: Celery, settings: Settings, engine: EngineName, name: str) -> None:
    """Give `app` the batch task, and make the engine when the app's worker starts."""
    held: list[EngineWorker] = []
    app.conf.worker_consumer = EngineConsumer

    @app.task(bind=True, name=RUN_BATCH_TASK, max_retries=None, ignore_result=True, acks_late=True)
    def run_batch(task: Any, batch: str) -> None:
        """Run a batch; what this engine could not serve is retried on the next engine's queue."""
        _run(task, batch, held[0], is_redis=settings.queue.broker_is_redis)

    def start(**_: Any) -> None:
        worker = EngineWorker(settings, engine, name)
        worker.preload()
        held.append(worker)
        if worker.queue:
            # Celery has chosen its queues by now, and consumes none of them yet.
            app.amqp.queues.select_add(own_queue_entity(worker.queue, is_redis=settings.queue.broker_is_redis))
        offer_sampling(app, settings, worker.statistics, nvml_library)

    def ready(**_: Any) -> None:
        held[0].open()

    def stopping(**_: Any) -> None:
        # Celery calls this from its signal handler, which may have interrupted any of the main thread's code.
        for worker in held:
            worker.withdraw()

    def stopped(**_: Any) -> None:
        end_sampling(app)
        while held:
            held.pop().close()

    signals.worker_init.connect(start, weak=False)
    signals.worker_ready.connect(ready, weak=False)
    signals.worker_shutting_down.connect(stopping, weak=False)
    signals.worker_shutdown.connect(stopped, weak=False)


def _run(task: Any, batch: str, worker: EngineWorker, *, is_redis: bool) -> None:
    """Run the batch of a message, and publish what of it goes on elsewhere.

    Raises:
        Reject, NotBegunError, Ignore: what Celery is to do with the message.
    """
    if (task.request.delivery_info or {}).get("redelivered"):
        recorder.count(instruments.REDELIVERIES, "batch")
    # Known to this thread alone; our Redis transport sends it along, AMQP does not.
    tag: int = task.request.properties["delivery_tag"] if is_redis else 0

    def claim() -> None:
        if worker.is_leaving:
            raise NotBegunError("this worker is ending", requeue=True)
        # The work begins: should the connection break from now on, the message is not to go to another worker.
        if is_redis and not pin(tag):
            raise Ignore  # it has gone to another already, while this worker was silent

    try:
        decoded = msgspec.json.decode(batch, type=Batch)
    except msgspec.MsgspecError as error:
        worker.runner.refuse(task.request.id, batch, error)
        return
    try:
        again = worker.runner.run(decoded, claim)
        for part in again[1:]:
            task.apply_async(kwargs=_kwargs(part), task_id=part.id, queue=engine_queue(part.engine), retry=True)
        if again:
            moved = again[0]
            cause = MuaiError(f"goes on at {moved.engine}: {len(moved.requests)} of the batch's requests")
            raise task.retry(exc=cause, kwargs=_kwargs(moved), queue=engine_queue(moved.engine), countdown=0)
    except NotBegunError:
        raise
    except (redis.RedisError, OperationalError, Reject) as error:
        # Celery acknowledges what fails, and drops what it cannot retry: here that would lose the requests. What of
        # them is done already, or goes on elsewhere, has its second result refused.
        log.warning("batch given back, the broker or the state store does not answer: %s", error)
        raise Reject(str(error), requeue=True) from error


def _kwargs(batch: Batch) -> dict[str, str]:
    return {"batch": msgspec.json.encode(batch).decode()}
