"""A reliable bulk Redis transport for kombu and Celery: `broker_transport="muai_batching.transport:Transport"`."""

from muai_batching.transport.channel import Channel, SentinelChannel
from muai_batching.transport.errors import LeaseLostError, SettleCommandError, TransportError
from muai_batching.transport.keeper import close_ledgers, ledgers, pin, unpin
from muai_batching.transport.lease import LeaseObserver
from muai_batching.transport.message import delivery_count
from muai_batching.transport.monitor import Lease, Reclaimed, lease_table, reclaim_dead
from muai_batching.transport.transport import SentinelTransport, Transport

__all__ = [
    "Channel",
    "Lease",
    "LeaseLostError",
    "LeaseObserver",
    "Reclaimed",
    "SentinelChannel",
    "SentinelTransport",
    "SettleCommandError",
    "Transport",
    "TransportError",
    "close_ledgers",
    "delivery_count",
    "lease_table",
    "ledgers",
    "pin",
    "reclaim_dead",
    "unpin",
]
