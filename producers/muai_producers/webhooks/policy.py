"""Where webhooks may go: which hosts, and which of the addresses that their names lead to. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from muai_producers.errors import InvalidRequestError

if TYPE_CHECKING:
    from muai_config.gateway import WebhookSettings

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Target:
    """A receiver's address, taken apart."""

    scheme: str
    host: str
    port: int
    path: str
    """With the query."""

    @property
    def host_header(self) -> str:
        """What the header Host says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


class HookPolicy:
    """Decides which receivers are allowed."""

    def __init__(self, settings: WebhookSettings) -> None:
        self._settings = settings

    def check(self, url: str) -> str:
        """The address itself, when results may be posted to it.

        Raises:
            InvalidRequestError: they may not; the message says why.
        """
        self.target(url)
        return url

    def target(self, url: str) -> Target:
        """The address taken apart; raises as `check`."""
        if not self._settings.allowed_hosts:
            raise _refused("webhooks are switched off here (gateway.webhooks.allowed_hosts is empty)")
        parts, port = _split(url)
        host = (parts.hostname or "").rstrip(".").lower()
        if parts.scheme not in _PORTS or not host or not url.isascii():
            raise _refused("webhook must be an https:// address with a host, in ASCII: punycode and percent-encoding")
        if parts.scheme == "http" and not self._settings.allow_http:
            raise _refused("webhook must be an https:// address (gateway.webhooks.allow_http)")
        if parts.username is not None or parts.password is not None or parts.fragment:
            raise _refused("webhook must hold no user, password or fragment")
        if not any(host_matches(pattern, host) for pattern in self._settings.allowed_hosts):
            raise _refused(f"webhook: the host {host[:100]} is not among gateway.webhooks.allowed_hosts")
        literal = _literal(host)
        if literal is not None and not self.allows(literal):
            raise _refused(f"webhook: {host} is no address on the internet (gateway.webhooks.allow_private_networks)")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return Target(parts.scheme, host, port or _PORTS[parts.scheme], path)

    def allows(self, address: Address) -> bool:
        """Whether a connection may be made to an address that the host's name leads to."""
        return self._settings.allow_private_networks or is_public(address)

    def choose(self, addresses: Sequence[str]) -> str | None:
        """The first of the resolved addresses that may be connected to; None when none may."""
        allowed = [address for address in addresses if self.allows(ipaddress.ip_address(address))]
        return allowed[0] if allowed else None


def host_matches(pattern: str, host: str) -> bool:
    """Whether a host is meant by a pattern: itself, `*.example.com`, or `*`."""
    if pattern == "*":
        return True
    return host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern


def is_public(address: Address) -> bool:
    """Whether an address is one on the internet, also when it is wrapped in another."""
    if isinstance(address, ipaddress.IPv6Address):
        inner: list[Any] = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if not all(is_public(one) for one in inner if one is not None):
            return False
        if address.ipv4_mapped is not None:
            return True
    return address.is_global and not address.is_multicast and not address.is_reserved


def _split(url: str) -> tuple[SplitResult, int | None]:
    try:
        parts = urlsplit(url)
        return parts, parts.port
    except ValueError as error:
        raise _refused(f"webhook is no address: {error}") from None


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _refused(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, {"field": "webhook"})
