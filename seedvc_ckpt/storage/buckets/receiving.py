"""Ranges of a URL, received straight into the memory that they are for, by the standard library's HTTP client.

Client libraries hand over what they received in memory of their own; copying it from there costs a resume more than
receiving it.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import NamedTuple
from urllib.parse import urlsplit

from seedvc_ckpt.storage.remote import DEADLINE

__all__ = ["Receiver", "Target"]

_PARTIAL_CONTENT = 206
_CRUMBS = 64 << 10  # bytes that are read and thrown away, so that a connection can be used again


class Target(NamedTuple):
    """Where a file is.

    Attributes:
        url: Signed, or open to all.
        connect_timeout: Seconds.
        read_timeout: Seconds without a byte.
        authorities: What vouches for the server, where the URL is https.
    """

    url: str
    connect_timeout: float
    read_timeout: float
    authorities: ssl.SSLContext | None


class Receiver:
    """Receives ranges of one file, from any thread; whatever fails, the caller has to read in another way.

    Args:
        target: Tells where it is; None if it can't be received.
        tag: The file's, which the server compares: else another one may have taken its place.
        renew: Seconds after which `target` is asked again.
        outcome: Told of each failure, and None for what went well.
        least: Bytes of a range that is worth a connection.
    """

    def __init__(
        self,
        target: Callable[[], Target | None],
        tag: str,
        renew: float,
        outcome: Callable[[Exception | None], object],
        least: int = 0,
    ) -> None:
        self._find = target
        self._tag = tag
        self._renew = renew
        self.outcome = outcome
        self._least = least
        self._target: Target | None = None
        self._found = float("-inf")
        self._finding = threading.Lock()
        self._idle: list[HTTPConnection] = []
        self._process = os.getpid()

    def begin(self, start: int, size: int) -> _Arriving | None:
        """Ask for a range; None if that failed, or is not worth it."""
        if size < self._least:
            return None
        try:
            target = self._current()
            return _Arriving(self, *self._ask(target, start, size), start, size) if target is not None else None
        except Exception as error:  # noqa: BLE001 - whatever it is, the other way meets it too or does without
            self.outcome(error)
            return None

    def keep(self, connection: HTTPConnection) -> None:
        """A connection over which nothing is on its way."""
        self._idle.append(connection)

    def close(self) -> None:
        """Close the connections that are not in use."""
        while (connection := self._kept()) is not None:
            connection.close()

    def _current(self) -> Target | None:
        with self._finding:
            if time.monotonic() - self._found > self._renew:
                self._target, self._found = self._find(), time.monotonic()
            return self._target

    def _ask(self, target: Target, start: int, size: int) -> tuple[HTTPConnection, socket.socket, HTTPResponse]:
        parts = urlsplit(target.url)
        path = f"{parts.path}?{parts.query}" if parts.query else parts.path
        headers = {"Range": f"bytes={start}-{start + size - 1}", "If-Match": self._tag}
        while True:
            kept = self._kept()
            connection = kept or _connected(target, parts.scheme, parts.hostname or "", parts.port)
            try:
                connection.request("GET", path, headers=headers)
                connected = connection.sock  # which is forgotten at an answer after which the server will close it
                response = connection.getresponse()
            except BaseException as error:
                connection.close()
                if kept is None or not isinstance(error, ConnectionError):  # a server may end what it kept for long
                    raise
                continue
            if response.status == _PARTIAL_CONTENT and response.length == size and _begins(response, start):
                return connection, connected, response
            connection.close()
            raise OSError(f"the server answered {response.status} {response.reason} to the request for a range")

    def _kept(self) -> HTTPConnection | None:
        if self._process != os.getpid():  # after a fork, the parent goes on to use them
            self._process, self._idle = os.getpid(), []
        with suppress(IndexError):
            return self._idle.pop()
        return None


class _Arriving:
    """A range on its way."""

    def __init__(
        self,
        receiver: Receiver,
        connection: HTTPConnection,
        connected: socket.socket,
        response: HTTPResponse,
        start: int,
        size: int,
    ) -> None:
        self._receiver = receiver
        self._connection = connection
        self._response = response
        self._at = start
        self._end = start + size
        self._late = threading.Timer(DEADLINE, _break, [connected])
        self._late.daemon = True
        with suppress(RuntimeError):  # no more threads may be started
            self._late.start()

    def read_into(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` from `offset`, before which nothing will be asked for any more; False if that fails."""
        if not self._at <= offset <= offset + len(buffer) <= self._end:
            return False
        try:
            while self._at < offset:
                self._take(memoryview(bytearray(min(offset - self._at, _CRUMBS))))
            self._take(buffer)
        except (OSError, HTTPException, ValueError) as error:
            self._receiver.outcome(error)
            return False
        return True

    def close(self) -> None:
        """Keep the connection for others, if nearly all was read."""
        self._late.cancel()
        try:
            left = self._end - self._at
            whole = left <= _CRUMBS and len(self._response.read(left)) == left
        except (OSError, HTTPException, ValueError):
            whole = False
        if whole and not self._response.will_close:
            self._receiver.keep(self._connection)
            self._receiver.outcome(None)
        else:
            self._connection.close()
        self._response.close()

    def _take(self, buffer: memoryview) -> None:
        while buffer:
            count = self._response.readinto(buffer)
            if not count:
                raise ConnectionError("the answer broke off")
            self._at, buffer = self._at + count, buffer[count:]


def _connected(target: Target, scheme: str, host: str, port: int | None) -> HTTPConnection:
    if scheme == "https":
        connection: HTTPConnection = HTTPSConnection(
            host, port, timeout=target.connect_timeout, context=target.authorities
        )
    else:
        connection = HTTPConnection(host, port, timeout=target.connect_timeout)
    connection.connect()
    connection.sock.settimeout(target.read_timeout)
    return connection


def _begins(response: HTTPResponse, start: int) -> bool:
    return (response.getheader("Content-Range") or "").startswith(f"bytes {start}-")


def _break(connected: socket.socket) -> None:
    """Wake whoever waits for it."""
    with suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)
