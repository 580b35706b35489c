"""The `queue` section: brokers, delivery and limits."""

from muai_config.fields import REDIS_SCHEMES, BrokerUrl, Name, RedisUrl, Section, setting

LOCAL_REDIS = "redis://127.0.0.1:6379/0"


class QueueSettings(Section):
    broker_url: BrokerUrl = setting(
        LOCAL_REDIS,
        example="amqp://muai:secret@rabbitmq:5672//",
        also_env="MUAI_BROKER_URL",
        describe="The broker that carries the messages: Redis or RabbitMQ.",
    )
    redis_url: RedisUrl | None = setting(
        None,
        example="redis://redis:6379/0",
        also_env="MUAI_REDIS_URL",
        describe="The Redis that keeps results, leases and statistics. null stands for broker_url when that is Redis, "
        f"else {LOCAL_REDIS}.",
    )
    key_prefix: Name = setting(
        "muai", example="muai-staging", describe="What the names of our keys in Redis begin with."
    )
    result_ttl_s: int = setting(
        86400, ge=1, le=31_536_000, unit="s", example=3600, describe="How long a result can be fetched."
    )
    stream_ttl_s: int = setting(
        3600,
        ge=1,
        le=31_536_000,
        unit="s",
        example=600,
        describe="How long the pieces of a streamed answer are kept after the last of them; the result has its whole "
        "text.",
    )
    lease_ttl_s: float = setting(
        8.0,
        ge=0.5,
        le=3600.0,
        unit="s",
        example=15.0,
        describe="How long a consumer may give no sign of life before its messages go to others. It does not limit "
        "how long work takes.",
    )
    max_deliveries: int = setting(
        3,
        ge=1,
        le=100,
        unit="deliveries",
        example=5,
        describe="How often a request may be handed out before it counts as one that kills its workers.",
    )
    max_payload_mb: int = setting(16, ge=1, le=512, unit="MB", example=4, describe="Largest request that is accepted.")
    worker_concurrency: int = setting(
        1, ge=1, le=1024, unit="batches", example=2, describe="Batches that one engine worker runs at once: its slots."
    )
    continuous_slots: int = setting(
        16,
        ge=1,
        le=1024,
        unit="batches",
        example=32,
        describe="The same for engines that take requests into those that run: vLLM, and the others "
        "where all of their models generate text.",
    )
    worker_prefetch: int = setting(
        1, ge=0, le=1024, unit="batches", example=2, describe="Further batches that a worker holds ready for each slot."
    )
    engine_cooldown_s: float = setting(
        30.0,
        ge=0.0,
        le=86_400.0,
        unit="s",
        example=60.0,
        reloadable=True,
        describe="How long an engine is passed over after it failed.",
    )
    default_deadline_s: float | None = setting(
        None,
        gt=0.0,
        le=31_536_000.0,
        unit="s",
        example=120.0,
        reloadable=True,
        describe="Time that a request has from being accepted to being answered when it names no deadline itself; "
        "null sets none.",
    )
    collector_shards: int = setting(
        1,
        ge=1,
        le=1024,
        unit="shards",
        example=2,
        describe="Parts that the batch keys are divided into, so that several collectors still fill their batches.",
    )
    tenant_max_requests: int | None = setting(
        None,
        ge=1,
        le=1_000_000_000,
        unit="requests",
        example=1000,
        reloadable=True,
        describe="Most requests of one tenant accepted and not yet answered; null sets no limit.",
    )
    tenant_max_tokens: int | None = setting(
        None,
        ge=1,
        le=10**15,
        unit="tokens",
        example=1_000_000,
        reloadable=True,
        describe="Most tokens of one tenant accepted and not yet answered; null sets no limit.",
    )
    model_max_requests: int | None = setting(
        None,
        ge=1,
        le=1_000_000_000,
        unit="requests",
        example=5000,
        reloadable=True,
        describe="Most requests for one model accepted and not yet answered; null sets no limit.",
    )

    @property
    def broker_is_redis(self) -> bool:
        return self.broker_url.split("://", 1)[0] in REDIS_SCHEMES

    @property
    def state_url(self) -> str:
        """The Redis that keeps results and state: `redis_url`, or what stands for its null."""
        if self.redis_url is not None:
            return self.redis_url
        return self.broker_url if self.broker_is_redis else LOCAL_REDIS
