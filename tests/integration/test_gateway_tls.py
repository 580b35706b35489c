"""A gateway that speaks TLS itself, with and without certificates of callers."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import httpx
import pytest
from tests.gateway_support import gateway_stack
from tests.transport_support import wait_until

pytestmark = pytest.mark.redis


def a_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def test_given_a_certificate_and_an_authority_then_https_alone_and_only_for_callers_with_theirs(tmp_path: Path) -> None:
    certificate, key = a_certificate(tmp_path, "gateway")
    own, own_key = a_certificate(tmp_path, "caller")
    tls = {"certificate": str(certificate), "private_key": str(key), "client_ca": str(own)}
    with gateway_stack(tmp_path, sections={"gateway": {"tls": tls}}) as stack:
        gateway = stack.start("gateway")
        known = ssl.create_default_context(cafile=str(certificate))
        known.load_cert_chain(own, own_key)
        url = f"https://127.0.0.1:{stack.port}/v1/models"

        def answers() -> bool:
            assert gateway.popen.poll() is None, gateway.log.read_text()
            try:
                return httpx.get(url, verify=known).status_code == 200
            except httpx.ConnectError:
                return False

        wait_until(answers, what="the gateway over TLS")
        with pytest.raises(httpx.TransportError):
            httpx.get(url, verify=ssl.create_default_context(cafile=str(certificate)))  # a caller without its own
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https", "http"))
