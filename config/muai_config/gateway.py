"""The `gateway` section: who may call, TLS and proxies, webhooks, files and batches."""

from collections.abc import Iterator

from muai_config.fields import (
    Conflict,
    DistinctList,
    FilePath,
    FolderPath,
    Host,
    HostPattern,
    Section,
    section,
    setting,
)

MIB = 1_000_000


class TlsSettings(Section):
    certificate: FilePath | None = setting(
        None,
        example="/etc/muai/tls.crt",
        describe="Certificate chain (PEM) that the gateway shows; null serves plain HTTP, for use behind a proxy.",
    )
    private_key: FilePath | None = setting(
        None, example="/etc/muai/tls.key", describe="Private key (PEM) of the certificate."
    )
    client_ca: FilePath | None = setting(
        None,
        example="/etc/muai/clients.crt",
        describe="Authorities (PEM) one of which must have signed a caller's own certificate; null asks callers for "
        "none.",
    )

    def conflicts(self) -> Iterator[Conflict]:
        if (self.certificate is None) != (self.private_key is None):
            name = "private_key" if self.private_key is None else "certificate"
            yield Conflict(name, None, "a file, because certificate and private_key go together")
        if self.client_ca is not None and self.certificate is None:
            yield Conflict("certificate", None, "a file, because client_ca needs TLS")


class ProxySettings(Section):
    trust_headers: bool = setting(
        False,
        describe="Whether X-Forwarded-For and X-Forwarded-Proto are believed when they come from one of "
        "trusted_addresses. Only for a gateway that nobody reaches but through its proxy.",
    )
    trusted_addresses: DistinctList[Host] = setting(
        ("127.0.0.1",),
        min_length=1,
        example=["10.0.0.0/8"],
        describe="Addresses and networks of the proxies whose headers are believed.",
    )


class WebhookSettings(Section):
    allowed_hosts: DistinctList[HostPattern] = setting(
        (),
        example=["hooks.example.com", "*.shop.example"],
        describe="Hosts that results may be posted to; *.example.com stands for every name under example.com, * for "
        "every host. Empty switches webhooks off.",
    )
    secret_file: FilePath | None = setting(
        None,
        example="/run/secrets/muai-webhooks",
        describe="File with the secret (32 characters at least) from which each tenant's signing secret is made; "
        "needed when allowed_hosts has entries.",
    )
    allow_private_networks: bool = setting(
        False,
        describe="Whether receivers may have private, loopback or other addresses that are not on the internet.",
    )
    allow_http: bool = setting(False, describe="Whether receivers may be http:// addresses, unencrypted.")
    timeout_s: float = setting(
        10.0, gt=0.0, le=120.0, unit="s", example=5.0, describe="Longest that one delivery may take, all of it."
    )
    give_up_after_s: int = setting(
        86_400,
        ge=1,
        le=2_592_000,
        unit="s",
        example=3600,
        describe="How long a delivery that fails is tried again, with growing pauses.",
    )

    def conflicts(self) -> Iterator[Conflict]:
        if self.allowed_hosts and self.secret_file is None:
            yield Conflict("secret_file", None, "a file, because allowed_hosts has entries")


class FilesSettings(Section):
    folder: FolderPath | None = setting(
        None,
        example="/var/lib/muai/files",
        describe="Where uploaded files and batches' outputs are kept. All gateways and control workers must see the "
        "same folder. null stands for files inside MUAI_HOME, or inside ~/.muai.",
    )
    max_file_mb: int = setting(200, ge=1, le=100_000, unit="MB", example=50, describe="Largest file that is accepted.")
    max_tenant_mb: int = setting(
        10_000,
        ge=1,
        le=100_000_000,
        unit="MB",
        example=2000,
        describe="Most that one tenant's files may take together.",
    )
    keep_s: int = setting(
        2_592_000,
        ge=60,
        le=315_360_000,
        unit="s",
        example=604_800,
        describe="How long a file is kept; then it is deleted.",
    )

    @property
    def max_file_bytes(self) -> int:
        """Largest file that is accepted."""
        return self.max_file_mb * MIB


class BatchSettings(Section):
    max_lines: int = setting(
        50_000, ge=1, le=10_000_000, unit="lines", example=10_000, describe="Most requests in one batch."
    )
    max_in_flight: int = setting(
        64,
        ge=1,
        le=100_000,
        unit="requests",
        example=256,
        describe="Requests of one batch that are in the queue at once. More fill larger batches at the engines, and "
        "make other requests wait longer behind what is running.",
    )
    busy_share: float = setting(
        0.2,
        gt=0.0,
        le=1.0,
        unit="fraction of the time",
        example=0.5,
        describe="Of the time, the most that batches' requests may keep an engine while other requests come in. They "
        "take what their windows want, and 0.01 where that is less. While nobody else asks they may have it all.",
    )
    max_open_per_tenant: int = setting(
        100, ge=1, le=100_000, unit="batches", example=10, describe="Batches of one tenant that are not finished."
    )
    capacity_share: float = setting(
        0.5,
        gt=0.0,
        le=1.0,
        unit="fraction of queue_capacity",
        example=0.25,
        describe="Batches add requests only while fewer than this share of monitoring.server.queue_capacity is in "
        "flight: the rest is kept for who waits for an answer.",
    )


class ConsoleSettings(Section):
    enabled: bool = setting(True, describe="Whether the gateway serves its console, a page for people, at /.")
    refresh_s: float = setting(
        2.0, ge=0.5, le=3600.0, unit="s", example=5.0, describe="How often an open console asks for what has changed."
    )
    session_s: int = setting(
        28_800,
        ge=60,
        le=2_592_000,
        unit="s",
        example=3600,
        describe="How long a key that was given to the console serves before it is asked for again.",
    )


class AdviceSettings(Section):
    allowed_hosts: DistinctList[HostPattern] = setting(
        ("localhost", "127.0.0.1"),
        example=["localhost", "gpu-7.internal", "*.vllm.internal"],
        describe="Hosts whose vLLM servers may be asked for their metrics when an operator wants advice on them; "
        "*.example.com stands for every name under example.com, * for every host. Empty asks none.",
    )
    timeout_s: float = setting(
        2.0, gt=0.0, le=30.0, unit="s", example=5.0, describe="Longest that asking a server for its metrics may take."
    )
    window_s: float = setting(
        300.0,
        gt=0.0,
        le=604_800.0,
        unit="s",
        example=900.0,
        describe="How far back advice on this installation's own models looks.",
    )
    port: int = setting(
        8002, ge=0, le=65535, example=9002, describe="Port of `muai advisor`, which serves advice alone; 0: any free."
    )


class GatewaySettings(Section):
    require_keys: bool = setting(
        False,
        describe="Whether callers need an API key. They always do where the gateway listens on an address that other "
        "machines reach, unless it is started with --insecure-no-auth.",
    )
    keys_file: FilePath | None = setting(
        None,
        example="/etc/muai/keys.json",
        describe="File with hashed API keys, as `muai keys create --print-record` prints them, one a line, beside "
        "those in Redis.",
    )
    key_cache_s: float = setting(
        5.0,
        ge=0.0,
        le=300.0,
        unit="s",
        example=1.0,
        describe="How long what is known of a key is used without asking again: a revoked key works no longer than "
        "this.",
    )
    max_requests_per_call: int = setting(
        1000, ge=1, le=100_000, unit="requests", example=200, describe="Most requests in one POST of many."
    )
    proxy: ProxySettings = section(ProxySettings, "A proxy in front of the gateway.")
    tls: TlsSettings = section(TlsSettings, "TLS by the gateway itself.")
    webhooks: WebhookSettings = section(WebhookSettings, "Results posted to an address that the request names.")
    files: FilesSettings = section(FilesSettings, "Files that callers upload, and batches' outputs.")
    batches: BatchSettings = section(BatchSettings, "Batches of requests from files.")
    advice: AdviceSettings = section(AdviceSettings, "What would help an instance: analysis and plans.")
    console: ConsoleSettings = section(ConsoleSettings, "The console, a page for people.")
