"""Ranges received over HTTP, from a server on loopback that answers well or badly."""

from __future__ import annotations

import os
import random
import socket
import ssl
import threading
import time
from collections import Counter
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from seedvc_ckpt.storage.buckets import receiving
from seedvc_ckpt.storage.buckets.receiving import Receiver, Target
from seedvc_ckpt.storage.ranges import RemoteBlob

CONTENT = random.Random(0).randbytes(3 << 20)


class Server(ThreadingHTTPServer):
    """Serves `CONTENT`; `behaviour` says how.

    Attributes:
        connections: How many were opened.
        requests: Ranges that were asked for.
    """

    daemon_threads = True

    def __init__(self, behaviour="well", context=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour, self.connections, self.requests = behaviour, 0, []
        self.scheme = "http" if context is None else "https"
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,)).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def process_request(self, request, client_address):
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request, client_address):
        """Clients that break off are no error."""

    @property
    def url(self):
        return f"{self.scheme}://127.0.0.1:{self.server_port}/file?signature=1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked = False

    def log_message(self, *_):
        """Say nothing."""

    def do_GET(self):
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        self.server.requests.append((first, last + 1))
        behaviour = self.server.behaviour
        if behaviour == "forgets" and self.asked:
            self.close_connection = True
            return
        self.asked = True
        body = CONTENT[first : last + 1]
        status = {"refuses": 403, "another": 412, "whole": 200, "fails": 500}.get(behaviour, 206)
        self.send_response(status)
        if behaviour == "elsewhere":
            first += 1
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(body) + (behaviour == "longer")))
        if behaviour in ("says goodbye", "trickles"):
            self.send_header("Connection", "close")
        self.end_headers()
        if behaviour == "cut":
            body = body[: len(body) // 2]
        if behaviour == "trickles":
            for start in range(0, len(body), 10):
                self.wfile.write(body[start : start + 10])
                time.sleep(0.05)
        if behaviour == "stops":
            self.wfile.write(body[:1000])
            time.sleep(2)
            return
        self.wfile.write(body)
        if behaviour in ("cut", "closes"):  # without having said so
            self.close_connection = True


def receiver(server, *, timeout=5.0, authorities=None, outcomes=None):
    target = Target(server.url, timeout, timeout, authorities)
    return Receiver(lambda: target, '"tag"', 300.0, (outcomes if outcomes is not None else []).append)


def taken(arriving, start, size):
    buffer = bytearray(size)
    return bytes(buffer) if arriving.read_into(start, memoryview(buffer)) else None


def test_bytes_arrive_in_order_and_what_is_not_wanted_is_passed_over():
    with Server() as server, closing(receiver(server)) as source:
        arriving = source.begin(100, 1 << 20)
        with closing(arriving):
            assert taken(arriving, 100, 10) == CONTENT[100:110]
            assert taken(arriving, 110, 70_000) == CONTENT[110:70_110]
            assert taken(arriving, 200_000, 500_000) == CONTENT[200_000:700_000]
            assert taken(arriving, 199_999, 10) is None  # gone
            assert taken(arriving, 700_000, 1 << 20) is None  # more than was asked for
            assert taken(arriving, 700_000, 100 + (1 << 20) - 700_000) == CONTENT[700_000 : 100 + (1 << 20)]
        assert server.requests == [(100, 100 + (1 << 20))]


def test_a_connection_is_used_again_once_all_is_read():
    """Also when some bytes at the end were not wanted; one with much left is closed."""
    with Server() as server, closing(receiver(server)) as source:
        for wanted, connections in ((100_000, 1), (90_000, 1), (10, 1), (100_000, 2)):
            with closing(source.begin(0, 100_000)) as arriving:
                assert taken(arriving, 0, wanted) == CONTENT[:wanted]
            assert server.connections == connections


@pytest.mark.parametrize("behaviour", ["closes", "says goodbye", "forgets"])
def test_a_connection_that_the_server_ended_is_no_failure(behaviour):
    outcomes = []
    with Server(behaviour) as server, closing(receiver(server, outcomes=outcomes)) as source:
        for _ in range(3):
            with closing(source.begin(0, 1000)) as arriving:
                assert taken(arriving, 0, 1000) == CONTENT[:1000]
            assert len(source._idle) == (behaviour != "says goodbye")
        assert server.connections == 3
    assert not any(outcomes)


@pytest.mark.parametrize("behaviour", ["refuses", "another", "whole", "fails", "elsewhere", "longer"])
def test_an_answer_that_is_not_the_range_is_not_taken(behaviour):
    outcomes = []
    with Server(behaviour) as server, closing(receiver(server, outcomes=outcomes)) as source:
        assert source.begin(0, 1000) is None
    (outcome,) = outcomes
    assert "signature" not in str(outcome)


@pytest.mark.parametrize("behaviour", ["cut", "stops", "trickles"])
def test_an_answer_that_breaks_off_or_hangs_is_given_up(behaviour, monkeypatch):
    monkeypatch.setattr(receiving, "DEADLINE", 0.5)
    outcomes = []
    with Server(behaviour) as server, closing(receiver(server, timeout=0.4, outcomes=outcomes)) as source:
        began = time.monotonic()
        with closing(source.begin(0, 3000)) as arriving:
            assert taken(arriving, 0, 3000) is None
        assert time.monotonic() - began < 5
    assert len(outcomes) == 1
    assert isinstance(outcomes[0], OSError)


def test_no_server_is_a_failure():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    outcomes = []
    target = Target(f"http://127.0.0.1:{port}/f", 1.0, 1.0, None)
    assert Receiver(lambda: target, "", 300.0, outcomes.append).begin(0, 10) is None
    assert isinstance(outcomes[0], ConnectionRefusedError)


def test_what_can_not_be_received_is_no_failure():
    outcomes = []
    assert Receiver(lambda: None, "", 300.0, outcomes.append).begin(0, 10) is None
    assert outcomes == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_opens_its_own_connections():
    """Two processes on one connection would receive each other's answers."""
    with Server() as server, closing(receiver(server)) as source:
        with closing(source.begin(0, 1000)) as arriving:
            assert taken(arriving, 0, 1000)
        child = os.fork()
        if not child:
            with closing(source.begin(5, 1000)) as arriving:
                os._exit(0 if taken(arriving, 5, 1000) == CONTENT[5:1005] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert server.connections == 2
        with closing(source.begin(7, 1000)) as arriving:
            assert taken(arriving, 7, 1000) == CONTENT[7:1007]
        assert server.connections == 2


def test_a_server_is_known_by_its_certificate(certificate):
    key, found = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(found, key)
    outcomes = []
    with Server(context=context) as server:
        known = ssl.create_default_context(cafile=found)
        with closing(receiver(server, authorities=known, outcomes=outcomes)) as source:
            with closing(source.begin(0, 1 << 20)) as arriving:
                assert taken(arriving, 0, 1 << 20) == CONTENT[: 1 << 20]
            assert outcomes == [None]
        with closing(receiver(server, authorities=ssl.create_default_context(), outcomes=outcomes)) as source:
            assert source.begin(0, 1000) is None
            assert isinstance(outcomes[-1], ssl.SSLCertVerificationError)


@pytest.mark.parametrize("behaviour", ["well", "cut", "refuses", "closes"])
def test_a_file_is_whole_whatever_its_server_does(behaviour):
    """What did not arrive is fetched in blocks; each byte once, from where it broke off."""
    fetched = []

    def fetch(offset, size):
        fetched.append(size)
        return CONTENT[offset : offset + size]

    step, pieces = 400_000, {}
    stretches = [(start, min(start + step, len(CONTENT))) for start in range(0, len(CONTENT), step)]

    def read(stretch, number):
        start, end = stretches[number]
        buffer = bytearray(end - start)
        for at in range(0, len(buffer), 30_000):
            stretch.read_into(start + at, memoryview(buffer)[at : at + 30_000])
        pieces[number] = bytes(buffer)

    with Server(behaviour) as server, closing(receiver(server)) as source:
        arguments = ("f", len(CONTENT), fetch, lambda found: found, str)
        with RemoteBlob(*arguments, source.close, source.begin) as blob:
            blob.read_in_parallel(stretches, read)
        assert Counter(server.requests) == Counter(stretches)
    assert b"".join(pieces[number] for number in range(len(stretches))) == CONTENT
    missing = {"well": 0, "closes": 0, "refuses": 1}.get(behaviour)
    if missing is None:
        assert 0.4 * len(CONTENT) < sum(fetched) < 0.6 * len(CONTENT)
    else:
        assert sum(fetched) == missing * len(CONTENT)
