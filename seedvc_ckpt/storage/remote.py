"""Talking to a server: one client a process, every call with a deadline, failures in words without secrets."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, NamedTuple, TypeVar

from seedvc_ckpt.errors import StorageError

__all__ = ["DEADLINE", "Client", "Failure", "InDoubtError", "Redactor", "failure_of", "in_words", "secrets_in"]

_T = TypeVar("_T")

DEADLINE = 300.0
"""Seconds that one request may take, its library's retries included."""

_clients: dict[tuple[int, str], Any] = {}
_making: dict[tuple[int, str], threading.Lock] = {}
_guard = threading.Lock()


def _forget_in_child() -> None:
    global _guard  # noqa: PLW0603
    _guard = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


class Client:
    """A filesystem of fsspec's whose coroutines are run to their end, from any thread.

    Args:
        make: Makes the filesystem. It is called once in each process for equal `key`: connections don't survive a
            fork, and the stores of a process share theirs.
        key: Equal for equal options; "" to make none but take what `make` returns.
        redact: Takes secrets out of what is told about failures.
    """

    def __init__(self, make: Callable[[], Any], key: str, redact: Redactor) -> None:
        self._make = make
        self._key = key
        self.redact = redact

    @property
    def fs(self) -> Any:
        """The filesystem of this process.

        Raises:
            StorageError: if it can't be made, such as without credentials.
        """
        if not self._key:
            return self._make()
        place = os.getpid(), self._key
        with _guard:
            lock = _making.setdefault(place, threading.Lock())
        # one for each: some connect here, which the loop does, where coroutines of others must not wait for it
        with lock:
            if place not in _clients:
                try:
                    _clients[place] = self._make()
                except ImportError:
                    raise
                except Exception as error:  # noqa: BLE001 - whatever a client library raises
                    raise StorageError(f"can't connect: {in_words(error, self.redact)}") from None
            return _clients[place]

    def renew(self, broken: Any) -> bool:
        """Forget a filesystem whose connection is gone, so that `fs` makes a new one; False if it is the user's own."""
        if not self._key:
            return False
        place = os.getpid(), self._key
        with _guard:
            if _clients.get(place) is broken:
                del _clients[place]
        return True

    def start(self, coroutine: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Begin a coroutine on fsspec's own loop, which runs in a thread: callers may be inside another loop."""
        from fsspec.asyn import get_loop

        begun: list[Future[_T]] = []

        async def call() -> _T:
            try:
                return await coroutine
            except Exception:
                if any(future.cancelled() for future in begun):  # nobody asks any more, and asyncio would print it
                    raise asyncio.CancelledError from None
                raise

        begun.append(asyncio.run_coroutine_threadsafe(call(), get_loop()))
        return begun[0]

    def wait(self, future: Future[_T], seconds: float = DEADLINE) -> _T:
        """Its result; given up, and cancelled, after so long or at an interruption.

        Raises:
            StorageError: if it took too long.
        """
        try:
            return future.result(seconds)
        except FutureTimeoutError:
            if future.done():
                raise
            future.cancel()
            raise StorageError(f"the server did not answer within {seconds:.0f} s: try again") from None
        except BaseException:
            future.cancel()
            raise

    def run(self, coroutine: Coroutine[Any, Any, _T], seconds: float = DEADLINE) -> _T:
        """`start` and `wait`."""
        return self.wait(self.start(coroutine), seconds)


class InDoubtError(StorageError):
    """A write that may have happened."""

    @classmethod
    def of(cls, name: str, location: str, why: str) -> InDoubtError:
        """The answer to the last request of a write was lost, and what came of it can't be seen."""
        return cls(
            f"whether {name} was saved in {location} is not known: the answer to its last request was lost ({why}). "
            "Older checkpoints are as they were"
        )


class Failure(NamedTuple):
    """What a server or client library said.

    Attributes:
        status: The HTTP status; 0 where there was no answer.
        code: The service's own name for it.
        message: Its words.
    """

    status: int
    code: str
    message: str

    @property
    def condition_failed(self) -> bool:
        """Whether a condition of the request did not hold: the name is taken, or its object another by now."""
        return self.status in (409, 412) or self.code in _CONDITION_CODES

    @property
    def missing(self) -> bool:
        """Whether the object is not there."""
        return (self.status == 404 or self.code in ("NoSuchKey", "BlobNotFound")) and not self.no_bucket

    @property
    def no_bucket(self) -> bool:
        """Whether there is not even the bucket."""
        return self.code in ("NoSuchBucket", "ContainerNotFound") or "bucket does not exist" in self.message

    @property
    def unsupported(self) -> bool:
        """Whether the server does not know what it was asked for."""
        return self.status == 501 or self.code == "NotImplemented"


_CONDITION_CODES = {
    "PreconditionFailed",
    "ConditionalRequestConflict",
    "ConditionNotMet",
    "BlobAlreadyExists",
    "OperationAborted",
}


def failure_of(error: BaseException) -> Failure:
    """What is behind an exception of s3fs, gcsfs, adlfs, obstore or their libraries: each tells it otherwise."""
    status, code, message = 0, "", str(error)
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, Mapping) and "Error" in response:  # botocore
            status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            code, message = str(response["Error"].get("Code", "")), str(response["Error"].get("Message", ""))
            return Failure(status or (int(code) if code.isdecimal() else 0), code, message)
        if hasattr(link, "error_code") and hasattr(link, "status_code"):  # azure
            words = getattr(link, "reason", "") or type(link).__name__  # its text may hold the account's key
            return Failure(int(link.status_code or 0), str(getattr(link.error_code, "value", link.error_code)), words)
        number = getattr(link, "code", None)
        if type(link).__name__ == "HttpError" and number is not None and str(number).isdecimal():  # gcsfs
            return Failure(int(number), "", str(getattr(link, "message", link)))
        if type(link).__name__ in ("AlreadyExistsError", "PreconditionError"):  # obstore
            return Failure(412, "PreconditionFailed", str(link))
    if isinstance(error, FileExistsError):
        status = 412
    elif isinstance(error, FileNotFoundError):
        status = 404
    elif isinstance(error, PermissionError) or str(error).startswith("Forbidden"):
        status = 403
    return Failure(status, code, message)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


_REMEDIES = (
    ({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"},
     "the credentials have expired: renew them and start again"),
    ({"InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthenticationFailed", "InvalidAuthenticationInfo",
      "AuthorizationHeaderMalformed", "NoAuthenticationInformation"},
     "the credentials were refused: check the key and its secret"),
    ({"AccessDenied", "AuthorizationFailure", "AuthorizationPermissionMismatch", "AllAccessDisabled"},
     "access was denied: check the permissions of the credentials"),
    ({"NoSuchBucket", "ContainerNotFound"}, "there is no such bucket: create it, or correct the URL"),
    ({"SlowDown", "ServerBusy", "TooManyRequests"}, "the server asked to slow down, again and again: try later"),
)  # fmt: skip


def in_words(error: BaseException, redact: Redactor) -> str:
    """Why a call failed and what to do, without secrets."""
    if isinstance(error, StorageError):
        return str(error)
    found = failure_of(error)
    details = " ".join(part for part in (str(found.status or ""), found.code) if part and part != "None")
    said = redact(found.message).strip().replace("\n", " ")[:300]
    for codes, words in _REMEDIES:
        if found.code in codes:
            return f"{words} ({details}: {said})" if said else f"{words} ({details})"
    if found.no_bucket:
        return f"there is no such bucket: create it, or correct the URL ({said})"
    if found.status in (401, 403):
        return f"access was denied: check the credentials and their permissions ({details}: {said})"
    if found.status == 429 or found.status >= 500:
        return f"the server failed, again and again: try later ({details}: {said})"
    kind = type(error).__name__
    if "Credential" in kind:
        return f"no usable credentials were found: set them up as for the vendor's own tools ({kind}: {said})"
    if isinstance(error, (asyncio.TimeoutError, TimeoutError)) or "Timeout" in kind:
        return f"the server did not answer in time: try again ({kind})"
    if isinstance(error, ConnectionError) or any(word in kind for word in ("Connect", "Endpoint", "Disconnect")):
        return f"no connection to the server: check the address and the network ({kind}: {said})"
    return f"{kind}: {said or 'no reason given'}" + (f" ({details})" if details else "")


_PUBLIC = {
    "endpoint_url", "region_name", "region", "host", "port", "account_name", "account_host", "anon", "project",
    "use_ssl", "addressing_style", "default_block_size", "signature_version", "location_mode", "access",
    "default_location", "cache_regions", "known_hosts", "protocol", "profile", "username", "user",
}  # fmt: skip
_SECRET_NAMES = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CONNECTION_STRING|CREDENTIAL|SAS|SIGNATURE", re.IGNORECASE)
_SECRET_FORMS = (
    (re.compile(r"(\w+://)[^/@\s]*@"), r"\1"),
    (re.compile(r"(\w+://[^\s?'\"]*)\?[^\s'\"]*"), r"\1"),
    (re.compile(r"(?i)((?:account_?key|sharedaccesssignature|signature|sig|token|secret|password)\s*[=:]\s*)[^\s;&,'\"]+"),
     r"\1…"),
)  # fmt: skip


class Redactor:
    """Takes known secrets, and what looks like one, out of a text."""

    def __init__(self, secrets: tuple[str, ...] = ()) -> None:
        self._secrets = secrets

    def __call__(self, text: str) -> str:
        """The text with "…" in place of each secret."""
        environment = [value for name, value in os.environ.items() if _SECRET_NAMES.search(name) and len(value) >= 8]
        secrets = {*self._secrets, *(part for value in environment for part in _parts(value))}
        for secret in sorted(secrets, key=len, reverse=True):
            text = text.replace(secret, "…")
        for form, replacement in _SECRET_FORMS:
            text = form.sub(replacement, text)
        return text


def secrets_in(options: Any, name: str = "") -> tuple[str, ...]:
    """Every text in a filesystem's options that may be a secret."""
    if isinstance(options, Mapping):
        return tuple(secret for key, value in options.items() for secret in secrets_in(value, str(key)))
    if isinstance(options, (list, tuple)):
        return tuple(secret for value in options for secret in secrets_in(value, name))
    if isinstance(options, bytes):
        options = options.decode(errors="replace")
    if not isinstance(options, str) or name in _PUBLIC or len(options) < 4:
        return ()
    return tuple(_parts(options))


def _parts(value: str) -> Iterator[str]:
    """A value, and the secrets inside a connection string."""
    yield value
    for piece in value.split(";"):
        key, _, inner = piece.partition("=")
        if key.lower() in ("accountkey", "sharedaccesssignature") and len(inner) >= 4:
            yield inner
