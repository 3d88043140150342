"""Images from the web: which addresses are refused, and what is really connected to."""

import http.server
import ipaddress
import socket
import threading
import time

import pytest
import urllib3

from m3kernels.models.finetune.data import urls
from m3kernels.models.finetune.data.images import localise
from m3kernels.models.finetune.data.records import BadRecord
from m3kernels.models.finetune.data.urls import fetch, public_address

PUBLIC = "93.184.215.14"


@pytest.fixture
def names(monkeypatch):
    """A table of host names instead of DNS; what is asked is kept."""
    table, asked = {}, []

    def getaddrinfo(host, port, *args, **kwargs):
        asked.append(host)
        found = table.get(host, [host] if _is_address(host) else None)
        if found is None:
            raise socket.gaierror("unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(urls.socket, "getaddrinfo", getaddrinfo)
    return table, asked


def _is_address(host):
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


@pytest.mark.parametrize(
    "address",
    "127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 0.0.0.0 100.64.0.1 224.0.0.1 255.255.255.255 "
    "::1 fe80::1 fc00::1 ::ffff:10.0.0.1 2002:7f00:1:: ff0e::1 ::".split(),
)
def test_addresses_inside_the_network_are_refused(address, names):
    names[0]["inside.test"] = [address]
    with pytest.raises(BadRecord, match="no public address"):
        public_address("inside.test", 80)
    with pytest.raises(BadRecord, match="no public address"):
        fetch("http://inside.test/a.png")


def test_one_private_address_among_public_ones_is_enough(names):
    names[0]["mixed.test"] = [PUBLIC, "10.0.0.1"]
    with pytest.raises(BadRecord, match="10.0.0.1"):
        public_address("mixed.test", 80)
    names[0]["open.test"] = [PUBLIC]
    assert public_address("open.test", 80) == PUBLIC


@pytest.mark.parametrize(
    "url",
    ["ftp://h/a", "file:///etc/passwd", "gopher://h", "http:///a", "http://h:x/", "http://[::", "data:image/png,x"],
)
def test_other_schemes_and_broken_urls_are_refused(url, names):
    with pytest.raises(BadRecord, match="not allowed|no URL"):
        localise(url)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/a", "http://[::1]/a", "http://2130706433/", "http://unknown.test/"]
)
def test_literal_addresses_and_unknown_hosts(url, names):
    names[0]["2130706433"] = ["127.0.0.1"]
    with pytest.raises(BadRecord, match="no public address|cannot be resolved"):
        fetch(url)


@pytest.mark.parametrize(
    "host, said",
    [
        ("127.0.0.1", "127.0.0.1 is no public address; put the image into a file"),
        ("[::1]", "::1 is no public address; put the image into a file"),
        ("inside.test", "inside.test is at 10.0.0.1, which is no public address; put the image into a file"),
    ],
)
def test_an_address_is_named_once(host, said, names):
    names[0]["inside.test"] = ["10.0.0.1"]
    with pytest.raises(BadRecord) as caught:
        fetch(f"http://{host}/a")
    assert str(caught.value) == said


class Handler(http.server.BaseHTTPRequestHandler):
    seen = []
    body = b"image"

    def do_GET(self):
        self.seen.append((self.headers["Host"], self.path))
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
        elif self.path == "/none":
            self.send_response(404)
        elif self.path == "/large":
            self.send_response(200)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        if self.path == "/large":
            self.wfile.write(b"x" * 5000)
        elif not self.path.startswith("/to/"):
            self.wfile.write(self.body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(names, monkeypatch):
    """A server here that stands for the public address: connections to it are led here, all others fail."""
    Handler.seen = []
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    connected = []
    direct = socket.create_connection

    def connect(address, *args, **kwargs):
        connected.append(address[0])
        assert address[0] == PUBLIC, f"connected to {address}"
        return direct(("127.0.0.1", made.server_port), timeout=5)

    monkeypatch.setattr(urllib3.util.connection, "create_connection", connect)
    names[0]["web.test"] = [PUBLIC]
    names[0]["inside.test"] = ["10.0.0.1"]
    yield connected
    made.shutdown()
    made.server_close()


def test_it_connects_to_the_checked_address_under_the_name(server, names):
    assert fetch("http://web.test/a.png?x=1") == b"image"
    assert server == [PUBLIC] and Handler.seen == [("web.test", "/a.png?x=1")]
    # one look-up: a second could give another address
    assert names[1].count("web.test") == 1
    assert localise({"bytes": None, "path": "http://web.test/a"}) == {"bytes": b"image", "path": "http://web.test/a"}


def test_redirects_are_followed_and_checked(server):
    assert fetch("http://web.test/to//b.png") == b"image"
    for target in ("http://inside.test/a", "http://127.0.0.1/a", "file:///etc/passwd"):
        with pytest.raises(BadRecord, match="no public address|not allowed"):
            fetch(f"http://web.test/to/{target}")
    with pytest.raises(BadRecord, match="redirects more than 5 times"):
        fetch("http://web.test" + "/to/" * 8 + "b")


def test_status_and_size_limits(server):
    with pytest.raises(BadRecord, match="status 404"):
        fetch("http://web.test/none")
    with pytest.raises(BadRecord, match="more than 4999 bytes"):
        fetch("http://web.test/large", max_bytes=4999)
    assert len(fetch("http://web.test/large", max_bytes=5000)) == 5000


def test_an_answer_that_does_not_come_times_out(names, monkeypatch):
    listener = socket.create_server(("127.0.0.1", 0))
    direct = socket.create_connection
    monkeypatch.setattr(
        urllib3.util.connection,
        "create_connection",
        lambda address, *args, **kwargs: _slow(direct(listener.getsockname())),
    )
    names[0]["web.test"] = [PUBLIC]
    with pytest.raises(BadRecord, match="cannot be read.*timed out"):
        fetch("http://web.test/a", timeout_s=0.2)
    listener.close()


def test_an_answer_that_drips_is_ended():
    class Drip:
        def stream(self, *args, **kwargs):
            while True:
                time.sleep(0.02)
                yield b"x"

    with pytest.raises(BadRecord, match="takes longer than 0.1 s"):
        urls._read(Drip(), "http://web.test/", 100, 0.1)


def _slow(connection):
    connection.settimeout(0.2)
    return connection


def test_https_checks_the_certificate_against_the_name_and_not_the_address():
    pool = urls._pool("https", PUBLIC, 443, "web.test", 1.0)
    assert (pool.host, pool.assert_hostname, pool.cert_reqs) == (PUBLIC, "web.test", "CERT_REQUIRED")
    assert pool.conn_kw["server_hostname"] == "web.test"
