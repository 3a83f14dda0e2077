"""A proxy between a client and a server, which fails once on purpose."""

from __future__ import annotations

import random
import socket
import ssl
import threading
import time
from contextlib import suppress

__all__ = ["FAULTS", "HTTP_FAULTS", "Proxy", "Tls"]

FAULTS = ("cut request", "cut answer", "delay", "half-open")
"""What can happen to any connection: bytes of one direction end at the k-th, wait, or stop without an end."""
HTTP_FAULTS = (*FAULTS, "500", "503", "409", "412", "truncated")
"""What can happen to a request of HTTP besides: an answer of the proxy's own in place of the server's, before the
server has seen it or after; a body that ends early under the length that was promised. "lost PUT" and "lost POST" are
the answer to the next such request, which the server has had."""

_METHODS = (b"PUT ", b"GET ", b"POST", b"HEAD", b"DELE")


class Proxy:
    """Listens on a free port of loopback and passes bytes on to `port`.

    Once armed, the next fault happens at a moment that is drawn, and then no more.
    """

    def __init__(self, port: int, chance: random.Random) -> None:
        self._target = port
        self._chance = chance
        self._guard = threading.Lock()
        self._fault = ""
        self._after = 0
        self.happened = ""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def arm(self, fault: str, after: int) -> None:
        """Let `fault` happen: after so many bytes of its direction, or requests where it is one of a request."""
        with self._guard:
            self._fault, self._after, self.happened = fault, after, ""

    def disarm(self) -> str:
        """Let nothing happen any more; returns what did."""
        with self._guard:
            self._fault = ""
            return self.happened

    def close(self) -> None:
        """End all connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._guard:
            for connection in self._sockets:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, target, *arguments):
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    client.close()
                    continue
                with self._guard:
                    self._sockets |= {client, server}
                answered = threading.Event()
                self._start(self._pass_on, client, server, "request", answered)
                self._start(self._pass_on, server, client, "answer", answered)

    def _pass_on(self, source, sink, direction, answered):
        with suppress(OSError):
            while chunk := source.recv(1 << 16):
                what, passed = self._what_happens(direction, chunk)
                if what.startswith("lost"):
                    answered.set()
                    what = ""
                if what in ("500", "503", "409", "412"):
                    self._answer(source, sink, chunk, what, answered)
                    break
                if what == "delay":
                    time.sleep(self._chance.uniform(0.2, 2.0))
                elif what == "half-open":
                    time.sleep(4)
                    break
                elif what:
                    sink.sendall(chunk[:passed])
                    break
                if direction == "answer" and answered.is_set():
                    break
                sink.sendall(chunk)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        with self._guard:
            self._sockets -= {source, sink}
        source.close()

    def _answer(self, client, server, chunk, status, answered):
        """Answer a request in the server's place, half of the time after the server has had it."""
        answered.set()
        if self._chance.random() < 0.5:
            server.sendall(chunk)
        else:
            server = None
        client.settimeout(0.3)
        with suppress(OSError):  # a time-out: the client has sent all
            while rest := client.recv(1 << 16):
                if server is not None:
                    server.sendall(rest)
        words = {
            "500": "InternalError",
            "503": "SlowDown",
            "409": "ConditionalRequestConflict",
            "412": "PreconditionFailed",
        }
        body = f"<?xml version='1.0'?><Error><Code>{words[status]}</Code><Message>by the proxy</Message></Error>"
        head = f"HTTP/1.1 {status} By the proxy\r\nContent-Type: application/xml\r\nConnection: close\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())

    def _what_happens(self, direction, chunk):
        """(fault, bytes that still pass) for this chunk; "" for none."""
        with self._guard:
            fault = self._fault
            if not fault:
                return "", 0
            if fault in ("500", "503", "409", "412"):
                if direction != "request" or chunk[:4] not in _METHODS:
                    return "", 0
                self._after -= 1
                if self._after > 0:
                    return "", 0
            elif fault == "truncated":
                if direction != "answer" or len(chunk) < 2000:
                    return "", 0
            elif fault.startswith("lost"):
                if direction != "request" or not chunk.startswith(fault.removeprefix("lost ").encode()):
                    return "", 0
            else:
                if fault != "delay" and fault != "half-open" and not fault.endswith(direction):
                    return "", 0
                if len(chunk) <= self._after:
                    self._after -= len(chunk)
                    return "", 0
            self._fault, self.happened = "", fault
            return fault, len(chunk) // 2 if fault == "truncated" else self._after


class Tls:
    """Listens on a free port of loopback for TLS, and passes on what it carries to `port`."""

    def __init__(self, port: int, key, certificate) -> None:
        self._target = port
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self._listener = socket.create_server(("127.0.0.1", 0))

    def __enter__(self) -> int:
        threading.Thread(target=self._accept, daemon=True).start()
        return self._listener.getsockname()[1]

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with (
            suppress(OSError),
            self._context.wrap_socket(client, server_side=True) as inside,
            socket.create_connection(("127.0.0.1", self._target)) as server,
        ):
            back = threading.Thread(target=_pass_on, args=(server, inside), daemon=True)
            back.start()
            _pass_on(inside, server)
            back.join()


def _pass_on(source, target):
    with suppress(OSError):
        while data := source.recv(1 << 20):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
