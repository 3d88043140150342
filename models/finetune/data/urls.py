"""Images from the web: only http(s), never from inside the network, and never too large."""

import ipaddress
import socket
import time
from urllib.parse import urljoin, urlsplit

import urllib3

from m3kernels.models.finetune.data.records import BadRecord

MAX_BYTES = 32 * 2**20
TIMEOUT_S = 20.0
MAX_REDIRECTS = 5
_CHUNK = 2**16
_REDIRECTS = (301, 302, 303, 307, 308)


def is_url(text: str) -> bool:
    return "://" in text or text.startswith("data:")


def public_address(host: str, port: int) -> str:
    """The first address of a host, once all of them have been found to be public.

    Raises:
        BadRecord: an unknown host, or one with an address that is private, loopback, link-local or reserved.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise BadRecord("", f"the host {host} cannot be resolved ({error})") from error
    addresses = [entry[4][0].partition("%")[0] for entry in found]
    for address in addresses:
        parsed = ipaddress.ip_address(address)
        inner = getattr(parsed, "ipv4_mapped", None) or getattr(parsed, "sixtofour", None) or parsed
        if not (parsed.is_global and inner.is_global) or parsed.is_multicast or inner.is_multicast:
            given = f"{host} is" if host == address else f"{host} is at {address}, which is"
            raise BadRecord("", f"{given} no public address; put the image into a file")
    return addresses[0]


def fetch(url: str, *, max_bytes: int = MAX_BYTES, timeout_s: float = TIMEOUT_S) -> bytes:
    """What an http(s) URL holds. Each redirect's host is checked again.

    Raises:
        BadRecord: another scheme, an address that is not public, an error or timeout, or more than ``max_bytes``.
    """
    for _ in range(MAX_REDIRECTS + 1):
        status, target, body = _request(url, max_bytes, timeout_s)
        if status in _REDIRECTS and target:
            url = urljoin(url, target)
        elif status == 200:
            return body
        else:
            raise BadRecord("", f"{url} answered with status {status}")
    raise BadRecord("", f"{url} redirects more than {MAX_REDIRECTS} times")


def _request(url: str, max_bytes: int, timeout_s: float) -> tuple[int, str | None, bytes]:
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise BadRecord("", f"{url[:80]!r} is no URL ({error})") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadRecord("", f"{url[:80]!r} is not allowed; image URLs are http:// or https://")
    address = public_address(parts.hostname, port)
    pool = _pool(parts.scheme, address, port, parts.hostname, timeout_s)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {"Host": parts.netloc.rpartition("@")[2], "User-Agent": "m3kernels"}
    try:
        response = pool.request("GET", target, headers=headers, redirect=False, retries=False, preload_content=False)
        if response.status != 200:
            return response.status, response.headers.get("Location"), b""
        return 200, None, _read(response, url, max_bytes, timeout_s)
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise BadRecord("", f"{url} cannot be read ({error})") from error
    finally:
        pool.close()


def _pool(scheme: str, address: str, port: int, hostname: str, timeout_s: float):
    """Connects to the address that was checked: a second look-up of the name could give another."""
    timeout = urllib3.Timeout(total=timeout_s)
    if scheme == "http":
        return urllib3.HTTPConnectionPool(address, port, timeout=timeout)
    return urllib3.HTTPSConnectionPool(
        address, port, timeout=timeout, server_hostname=hostname, assert_hostname=hostname, cert_reqs="CERT_REQUIRED"
    )


def _read(response, url: str, max_bytes: int, timeout_s: float) -> bytes:
    body, deadline = bytearray(), time.monotonic() + timeout_s
    for chunk in response.stream(_CHUNK, decode_content=True):
        body += chunk
        if len(body) > max_bytes:
            raise BadRecord("", f"{url} holds more than {max_bytes} bytes")
        # the socket's own timeout starts again with each byte
        if time.monotonic() > deadline:
            raise BadRecord("", f"{url} takes longer than {timeout_s} s")
    return bytes(body)
