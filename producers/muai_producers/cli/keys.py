"""`muai keys`: make, list and revoke API keys, and print a tenant's signing secret."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from muai_producers.cli.invocation import Invocation, pass_invocation

if TYPE_CHECKING:
    from muai_producers.client import InferenceClient
    from muai_producers.keys import KeyRecord, Keys


@click.group()
def keys() -> None:
    """Make, list and revoke the API keys that the gateway asks for."""


def _keys(client: InferenceClient) -> Keys:
    from muai_producers.keys import Keys

    return Keys(client.store, client.settings.gateway.keys_file)


@keys.command()
@click.option("--tenant", required=True, help="Whose key it is: tenants see only their own requests.")
@click.option("--name", default="", help="What the key is for.")
@click.option("--max-requests", type=click.IntRange(min=1), help="Most requests in flight.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Most tokens in flight.")
@click.option("--requests-per-minute", type=click.IntRange(1, 10_000_000), help="Most requests in a minute.")
@click.option(
    "--operator",
    is_flag=True,
    help="For whoever runs the installation: the console shows all of it, and replays and purges dead letters.",
)
@click.option(
    "--print-record", is_flag=True, help="Store nothing: print the record, a line for gateway.keys_file, instead."
)
@pass_invocation
def create(
    invocation: Invocation,
    tenant: str,
    name: str,
    max_requests: int | None,
    max_tokens: int | None,
    requests_per_minute: int | None,
    operator: bool,
    print_record: bool,
) -> None:
    """Make a key and print it, this once: only its hash is kept."""
    import msgspec

    from muai_producers.keys import TenantLimits, new_key

    limits = TenantLimits(max_requests=max_requests, max_tokens=max_tokens, requests_per_minute=requests_per_minute)
    key, record = new_key(tenant, limits, name, operator=operator)
    if not print_record:
        with invocation.client() as client:
            _keys(client).add(record)
    click.echo(key)
    if print_record:
        click.echo(msgspec.json.encode(record).decode())
    else:
        click.echo(f"key {record.id} of tenant {tenant}; it is not shown again", err=True)


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
@pass_invocation
def list_(invocation: Invocation, as_json: bool) -> None:
    """List the keys there are, without the keys themselves."""
    from muai_producers.cli.present import echo_json

    with invocation.client() as client:
        records = _keys(client).all()
    if as_json:
        for record in records:
            echo_json(_plain(record))
    elif records:
        _print_table(records)
    else:
        click.echo("no keys; `muai keys create --tenant NAME` makes one")


def _plain(record: KeyRecord) -> dict[str, Any]:
    import msgspec

    plain: dict[str, Any] = msgspec.to_builtins(record)
    plain.pop("digest")
    return plain


def _print_table(records: list[KeyRecord]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("key", "tenant", "name", "made", "limits")
    for record in records:
        made = datetime.fromtimestamp(record.created_at, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        limits = _plain(record).get("limits", {})
        marks = [f"{name} {value}" for name, value in limits.items()] + (["operator"] if record.operator else [])
        shown = ", ".join(marks) or "-"
        table.add_row(record.id, record.tenant, record.name, made, shown)
    Console().print(table)


@keys.command()
@click.argument("key_ids", nargs=-1, required=True)
@pass_invocation
def revoke(invocation: Invocation, key_ids: tuple[str, ...]) -> None:
    """Revoke keys by their ids; gateways refuse them within gateway.key_cache_s."""
    with invocation.client() as client:
        revoked = {key_id: _keys(client).revoke(key_id) for key_id in key_ids}
    for key_id, is_revoked in revoked.items():
        told = "revoked" if is_revoked else "not found; `muai keys list` lists them, and a keys_file is yours to edit"
        click.echo(f"{key_id}  {told}")
    if not all(revoked.values()):
        click.get_current_context().exit(1)


@keys.command("webhook-secret")
@click.argument("tenant", default="default")
@pass_invocation
def webhook_secret(invocation: Invocation, tenant: str) -> None:
    """Print the secret that a tenant's webhooks are signed with."""
    from muai_producers.webhooks.signing import Signer

    click.echo(Signer.from_settings(invocation.settings.gateway.webhooks).secret_of(tenant))
