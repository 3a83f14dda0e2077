"""Which storage a URL or a filesystem of fsspec's means."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

from seedvc_ckpt.errors import StorageError
from seedvc_ckpt.storage import Storage, plain_location
from seedvc_ckpt.storage.buckets.azure import AzureBucket
from seedvc_ckpt.storage.buckets.gcs import GcsBucket
from seedvc_ckpt.storage.buckets.generic import GenericBucket, MemoryBucket
from seedvc_ckpt.storage.buckets.s3 import S3Bucket
from seedvc_ckpt.storage.object_store import MemoryStorage, ObjectStorage
from seedvc_ckpt.storage.remote import Client, Redactor, secrets_in

__all__ = ["open_filesystem", "open_url"]


class _Kind(NamedTuple):
    """A service: the package that speaks to it, and the extra that brings it."""

    package: str
    extra: str


_KINDS = {
    **dict.fromkeys(("s3", "s3a"), _Kind("s3fs", "s3")),
    **dict.fromkeys(("gs", "gcs"), _Kind("gcsfs", "gcs")),
    **dict.fromkeys(("az", "abfs", "abfss"), _Kind("adlfs", "azure")),
    **dict.fromkeys(("sftp", "ssh"), _Kind("sshfs", "sftp")),
}
_BUCKETS: Mapping[str, type[S3Bucket | GcsBucket | AzureBucket]] = {
    "s3fs": S3Bucket,
    "gcsfs": GcsBucket,
    "adlfs": AzureBucket,
}


def open_url(scheme: str, rest: str, options: Mapping[str, Any], lease_seconds: float) -> Storage:
    """The storage at ``scheme://rest``."""
    kind = _KINDS.get(scheme)
    url = f"{scheme}://{rest}"
    redact = Redactor(secrets_in({**options, "url": _userinfo(rest)}))
    if kind is not None and find_spec(kind.package) is None:
        raise StorageError(
            f"{scheme}:// needs {kind.package}, which is not installed: pip install 'seedvc-ckpt[{kind.extra}]'"
        )
    if "?" in rest and scheme != "memory":
        raise StorageError(
            f"{plain_location(url)}?… has a query, which names no place: leave it out, and give keys and tokens as "
            "storage_options or in the environment"
        )
    if kind is None and scheme != "memory":
        found = _class_of(scheme)
        options = {**found._get_kwargs_from_urls(url), **options}  # noqa: SLF001 - have no public names
        rest = found._strip_protocol(url)  # noqa: SLF001
    elif scheme in ("sftp", "ssh"):
        options = {**_options_in(scheme, url), **options}
    key = hashlib.sha256(repr((scheme, _ordered(options))).encode()).hexdigest()
    client = Client(lambda: _make(scheme, options), key, redact)
    return _storage(kind.package if kind else scheme, client, rest, plain_location(url), lease_seconds)


def open_filesystem(fs: Any, path: str, lease_seconds: float) -> Storage:
    """The storage at a path on a filesystem of the user's, which is used as it is."""
    if getattr(fs, "asynchronous", False):
        raise StorageError(
            f"this {type(fs).__name__} was made with asynchronous=True, for one event loop: make it without"
        )
    scheme = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    module = type(fs).__module__
    if module.startswith("fsspec.implementations.sftp"):
        raise StorageError(
            "fsspec's own sftp filesystem (paramiko) can't create a file exclusively and breaks after a fork: use "
            "sshfs instead, by pip install 'seedvc-ckpt[sftp]' and an sftp:// URL or fs=sshfs.SSHFileSystem(…)"
        )
    packages = {"s3fs", "gcsfs", "adlfs", "sshfs"} & {base.__module__.partition(".")[0] for base in type(fs).__mro__}
    kind = next(iter(packages), scheme)
    place = path.partition("://")[2] if "://" in path else path
    if kind in (*_BUCKETS, "memory"):
        place = place.lstrip("/")
    elif kind != "sshfs":
        place = fs._strip_protocol(path)  # noqa: SLF001 - has no public name
    elif "://" not in path:
        place = f"host/{path}"
    client = Client(lambda: fs, "", Redactor(secrets_in(getattr(fs, "storage_options", {}))))
    return _storage(kind, client, place, plain_location(path if "://" in path else f"{scheme}://{path}"), lease_seconds)


def _storage(kind: str, client: Client, rest: str, location: str, lease_seconds: float) -> Storage:
    if kind == "sshfs":
        from seedvc_ckpt.storage.sftp import SftpStorage  # needs asyncssh, which comes with sshfs

        return SftpStorage(client, _sftp_path(rest), location, lease_seconds)
    if kind == "memory":
        return MemoryStorage(client, MemoryBucket(client, ""), _prefix(rest), location, lease_seconds)
    if kind not in _BUCKETS:
        return ObjectStorage(client, GenericBucket(client, rest.rstrip("/")), "", location, lease_seconds)
    name, _, prefix = _container_first(kind, rest).partition("/")
    if not name:
        raise StorageError(f"{location!r} names no bucket: write it after the scheme, as {location}BUCKET/runs/my_run")
    return ObjectStorage(client, _BUCKETS[kind](client, name), _prefix(prefix), location, lease_seconds)


def _make(scheme: str, options: Mapping[str, Any]) -> Any:
    """A filesystem of our own: no other code sees it, and it keeps no listing."""
    import fsspec

    if scheme in ("gs", "gcs"):
        # the class that gcsfs registers asks every bucket for its type by gRPC first, which no emulator answers
        from gcsfs.core import GCSFileSystem

        return GCSFileSystem(**{"skip_instance_cache": True, "use_listings_cache": False, **options})
    if scheme in ("sftp", "ssh"):
        from sshfs import SSHFileSystem

        alive = {"keepalive_interval": 15, "connect_timeout": 30}  # else a line that goes dead is noticed after minutes
        return SSHFileSystem(**{"skip_instance_cache": True, **alive, **options})
    cached = {"use_listings_cache": False} if scheme in _KINDS else {}
    return fsspec.filesystem(scheme, **{"skip_instance_cache": True, **cached, **options})


def _options_in(scheme: str, url: str) -> dict[str, Any]:
    from fsspec.utils import infer_storage_options

    found = infer_storage_options(url)
    if not found.get("host"):
        raise StorageError(f"{plain_location(url)} names no host: write {scheme}://HOST/PATH")
    return {name: found[name] for name in ("host", "port", "username", "password") if found.get(name)}


def _class_of(scheme: str) -> Any:
    """The filesystem that fsspec knows for a scheme."""
    import fsspec

    try:
        return fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        raise StorageError(f"{scheme}:// can't be used: {error}") from None


def _userinfo(rest: str) -> str:
    """The password in front of a URL's host, "" where there is none."""
    return rest.partition("/")[0].rpartition("@")[0].partition(":")[2]


def _sftp_path(rest: str) -> str:
    """The absolute path after the host."""
    return "/" + rest.partition("/")[2].strip("/")


def _container_first(kind: str, rest: str) -> str:
    """Of ``container@account.dfs.core.windows.net/path``, the container and path."""
    authority, slash, path = rest.partition("/")
    return f"{authority.partition('@')[0]}{slash}{path}" if kind == "adlfs" else rest


def _prefix(path: str) -> str:
    path = path.strip("/")
    return f"{path}/" if path else ""


def _ordered(value: Any) -> Any:
    return sorted((str(key), _ordered(item)) for key, item in value.items()) if isinstance(value, Mapping) else value
