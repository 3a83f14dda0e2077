"""Saves to a server that speaks S3, on this machine, against plain transfers of the same bytes: seconds, memory, bytes.

`python -m benchmarks.remote WHAT …` measures one thing in a process of its own; `compare` does them all in turn.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.measure import memory_peak
from seedvc_ckpt import SEED_VC, CheckpointStore

__all__ = ["DOWNLOADS", "NAMES", "OURS", "UPLOADS", "CountingProxy", "compare", "missing"]

OURS = "seedvc-ckpt"
NAMES = 10_000
_MIB = 1 << 20
_STEP = 2  # of the state; step 1 is a small one, saved first so that no connection, import or lease is counted
_SMALL = "small"
_TO_FILE = " to /dev/shm"

Run = Callable[..., Mapping[str, float] | None]
Transfer = Callable[[], object]


class _Place:
    """A bucket, for every client library.

    Args:
        url: Of a folder in it.
        options: What s3fs needs to reach it.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.url = url
        self.options = dict(options)
        self.path = url.partition("://")[2]
        self.bucket, _, self.prefix = self.path.partition("/")
        self.region = self.options["client_kwargs"]["region_name"]

    def s3fs(self) -> Any:
        from s3fs import S3FileSystem

        return S3FileSystem(**self.options, use_listings_cache=False)

    def boto3(self) -> Any:
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.options["endpoint_url"],
            region_name=self.region,
            aws_access_key_id=self.options["key"],
            aws_secret_access_key=self.options["secret"],
        )

    def obstore(self) -> Any:
        from obstore.store import S3Store

        return S3Store(
            self.bucket,
            endpoint=self.options["endpoint_url"],
            region=self.region,
            access_key_id=self.options["key"],
            secret_access_key=self.options["secret"],
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )

    def key(self, name: str) -> str:
        return f"{self.prefix}/{name}"


def _s3fs_put(place: _Place, file: str, **options: int) -> Callable[[str, str], object]:
    fs = place.s3fs()
    return lambda name, source=file: fs.put_file(source, f"{place.path}/{name}", **options)


def _boto3_upload(place: _Place, file: str) -> Callable[[str, str], object]:
    client = place.boto3()
    return lambda name, source=file: client.upload_file(source, place.bucket, place.key(name))


def _obstore_put(place: _Place, file: str) -> Callable[[str, str], object]:
    import obstore

    store = place.obstore()
    return lambda name, source=file: obstore.put(store, place.key(name), Path(source))


UPLOADS: Mapping[str, tuple[str, Callable[..., Callable[..., object]]]] = {
    "s3fs put_file": ("s3fs", _s3fs_put),
    "s3fs put_file, 4 × 16 MiB": ("s3fs", lambda *where: _s3fs_put(*where, max_concurrency=4, chunksize=16 * _MIB)),
    "boto3 upload_file": ("boto3", _boto3_upload),
    "obstore put": ("obstore", _obstore_put),
}
"""Plain uploads by their names: the package, and what makes ``upload(name, file)``."""


def _s3fs_cat(place: _Place, folder: str) -> Callable[[str], object]:  # noqa: ARG001
    fs = place.s3fs()
    return lambda name: fs.cat_file(f"{place.path}/{name}")


def _s3fs_get(place: _Place, folder: str) -> Callable[[str], object]:
    fs = place.s3fs()
    return lambda name: fs.get_file(f"{place.path}/{name}", os.path.join(folder, "s3fs"))


def _boto3_fileobj(place: _Place, folder: str) -> Callable[[str], object]:  # noqa: ARG001
    from io import BytesIO

    client = place.boto3()

    def download(name: str) -> object:
        buffer = BytesIO()
        client.download_fileobj(place.bucket, place.key(name), buffer)
        return buffer

    return download


def _boto3_file(place: _Place, folder: str) -> Callable[[str], object]:
    client = place.boto3()
    return lambda name: client.download_file(place.bucket, place.key(name), os.path.join(folder, "boto3"))


def _obstore_get(place: _Place, folder: str) -> Callable[[str], object]:  # noqa: ARG001
    import obstore

    store = place.obstore()
    return lambda name: obstore.get(store, place.key(name)).bytes()


def _obstore_ranges(place: _Place, folder: str, *, checked: bool = False) -> Callable[[str], object]:  # noqa: ARG001
    """Ranges side by side; `checked` is what no resume can do without: a copy in memory of one's own, its checksum."""
    import obstore

    store = place.obstore()

    def download(name: str) -> object:
        size = obstore.head(store, place.key(name))["size"]
        content = memoryview(bytearray(size if checked else 0))

        def part(start: int) -> object:
            end = min(size, start + 16 * _MIB)
            received = obstore.get_range(store, place.key(name), start=start, end=end)
            if not checked:
                return received
            content[start:end] = received
            return zlib.crc32(content[start:end])

        with ThreadPoolExecutor(8) as pool:
            return content, list(pool.map(part, range(0, size, 16 * _MIB)))

    return download


DOWNLOADS: Mapping[str, tuple[str, Callable[..., Callable[[str], object]]]] = {
    "s3fs cat_file": ("s3fs", _s3fs_cat),
    f"s3fs get_file{_TO_FILE}": ("s3fs", _s3fs_get),
    "boto3 download_fileobj": ("boto3", _boto3_fileobj),
    f"boto3 download_file{_TO_FILE}": ("boto3", _boto3_file),
    "obstore get": ("obstore", _obstore_get),
    "obstore get_range, 8 × 16 MiB": ("obstore", _obstore_ranges),
    "the same, copied and CRC-32": ("obstore", partial(_obstore_ranges, checked=True)),
}
"""Plain downloads into fresh memory, or a file in memory, by their names."""


def missing() -> str:
    """Why nothing can be compared here, "" if it can."""
    if find_spec("s3fs") is None:
        return "s3fs is not installed"
    reason: str = _server_kind().missing()
    return reason


def compare(place: str, runs: int, run: Run) -> dict[str, Any]:
    """All of it, a server with an empty folder for each repetition, in which every way has its turn.

    Args:
        place: A folder.
        runs: How many repetitions.
        run: Runs a module with arguments in a process of its own and returns the JSON it prints.

    Returns:
        ``saving`` and ``resuming``, each ``{way: {seconds, processor, memory}}`` of medians; ``looking`` and ``names``:
        bytes and requests of commands; ``file``: its bytes.
    """
    server_kind = _server_kind()
    file = os.path.join(place, "file")
    made = run("benchmarks.remote", "making", file)
    saving, resuming = _installed(UPLOADS), _installed(DOWNLOADS)
    found: dict[str, dict[str, list[Mapping[str, float]]]] = {"saving": {}, "resuming": {}}
    answer: dict[str, Any] = {"file": made}
    for turn in range(runs):
        folder = os.path.join(place, f"server-{turn}")
        with server_kind(folder) as server:
            for what, ways in (("saving", saving), ("resuming", resuming)):
                for way in _turned(ways, turn):
                    os.sync()
                    url = server.url("run" if way == OURS or what == "resuming" else f"plain-{ways.index(way)}")
                    measured = run("benchmarks.remote", what, way, url, json.dumps(server.options), file)
                    if measured is not None:
                        found[what].setdefault(way, []).append(measured)
            if turn == runs - 1:
                for what, names in (("looking", 0), ("names", NAMES)):
                    url = server.url("many" if names else "run")
                    answer[what] = run("benchmarks.remote", what, url, json.dumps(_reaching(server)), str(names))
        shutil.rmtree(folder)
    medians = {what: {way: _median(seen[way]) for way in _in_order(seen)} for what, seen in found.items()}
    return {**answer, **medians}


def _server_kind() -> Any:
    """The class of the tests' server."""
    helpers = str(Path(__file__).parent.parent / "tests" / "remote")
    if helpers not in sys.path:
        sys.path.append(helpers)
    from servers import Weed

    return Weed


def _reaching(server: Any) -> dict[str, Any]:
    """What a process needs to reach a server by a proxy in front of it: its port, and variables that name it."""
    return {"port": server.port, "environment": server.environment}


def _installed(ways: Mapping[str, tuple[str, Any]]) -> list[str]:
    return [OURS, *(way for way, (package, _) in ways.items() if find_spec(package))]


def _turned(ways: Sequence[str], turn: int) -> Sequence[str]:
    """Each time in another order: a server is slower or faster after what it did before."""
    first = (2 * turn + 1) % len(ways)
    return [*ways[first:], *ways[:first]]


def _in_order(seen: Mapping[str, Any]) -> Iterator[str]:
    return (way for way in (*UPLOADS, *DOWNLOADS, OURS) if way in seen)


def _median(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.median(one[key] for one in measured) for key in measured[0]}


def making(file: str) -> dict[str, float]:
    """Write the file that a save of the state makes, for the plain uploads."""
    state, nbytes = _state()
    folder, name = os.path.split(file)
    with CheckpointStore(folder, pattern=f"{name}-{{step:d}}") as store:
        os.rename(os.path.join(folder, store.save(state, _STEP).name), file)
    return {"bytes": float(os.path.getsize(file)), "state": float(nbytes)}


def saving(way: str, url: str, options: str, file: str) -> dict[str, float]:
    """Seconds, of the processor too, and bytes of memory beyond those before, of one save or upload."""
    place = _Place(url, json.loads(options))
    if way == OURS:
        import torch

        state, _ = _state()
        with CheckpointStore(url, storage_options=place.options) as store:
            store.save({"small": torch.zeros(1)}, _STEP - 1)
            return _measured(lambda: store.save(state, _STEP))
    small = f"{file}.{os.getpid()}"
    Path(small).write_bytes(b"small")
    upload = UPLOADS[way][1](place, file)
    upload(_SMALL, small)
    os.unlink(small)
    return _measured(lambda: upload("file"))


def resuming(way: str, url: str, options: str, file: str) -> dict[str, float]:
    """Seconds, of the processor too, and bytes of memory beyond the contents, of one resume or download."""
    place, size = _Place(url, json.loads(options)), os.path.getsize(file)
    if way == OURS:
        with CheckpointStore(url, storage_options=place.options, read_only=True) as store:
            store.load(_STEP - 1)
            return _measured(store.resume, size)
    folder = f"/dev/shm/seedvc_ckpt-benchmark-{os.getpid()}"  # noqa: S108 - memory is meant
    os.makedirs(folder)
    try:
        download = DOWNLOADS[way][1](place, folder)
        download(SEED_VC.format(_STEP - 1))
        return _measured(lambda: download(SEED_VC.format(_STEP)), 0 if way.endswith(_TO_FILE) else size)
    finally:
        shutil.rmtree(folder)


def _measured(act: Transfer, kept: int = 0) -> dict[str, float]:
    with memory_peak() as peak:
        began, work = time.perf_counter(), time.process_time()
        result = act()  # kept until memory was looked at
        seconds, processor = time.perf_counter() - began, time.process_time() - work
    del result
    return {"seconds": seconds, "processor": processor, "memory": float(max(0, peak.nbytes - kept))}


def _state() -> tuple[Any, int]:
    from benchmarks.states import checkpoint_of, preset
    from seedvc_ckpt.format.records import collect_tensors

    state = checkpoint_of(preset("whisper_small_wavenet"))
    return state, sum(tensor.nbytes for tensor in collect_tensors(state)[0])


def looking(url: str, reach: str, _: str) -> dict[str, float]:
    """Bytes that commands receive, and the requests they make, by kind."""
    target = f"/dev/shm/seedvc_ckpt-benchmark-{os.getpid()}.pth"  # noqa: S108 - memory is meant
    commands = {
        "export": ["export", url, "--out", target],
        "show": ["show", url],
        "ls": ["ls", url],
        "latest": ["latest", url],
    }
    try:
        return _moved(commands, json.loads(reach))
    finally:
        with suppress(FileNotFoundError):
            os.unlink(target)


def names(url: str, reach: str, number: str) -> dict[str, float]:
    """The same of the commands that list, in a run of so many (empty) checkpoints."""
    import s3fs

    environment = json.loads(reach)["environment"]
    os.environ.update(environment)
    path = url.partition("://")[2]
    fs = s3fs.S3FileSystem(endpoint_url=environment["AWS_ENDPOINT_URL"])
    objects = {f"{path}/{SEED_VC.format(step)}": b"" for step in range(int(number))}
    fs.pipe(objects, batch_size=32)
    return _moved({"ls": ["ls", url], "latest": ["latest", url]}, json.loads(reach))


def _moved(commands: Mapping[str, Sequence[str]], reach: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    program = os.path.join(os.path.dirname(sys.executable), "seedvc-ckpt")
    for name, arguments in commands.items():
        with CountingProxy(reach["port"]) as proxy:
            environment = {**os.environ, **reach["environment"], "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
            subprocess.run([program, *arguments], check=True, env=environment, stdout=subprocess.DEVNULL)
        found |= {f"{name} bytes": float(proxy.received)}
        found |= {f"{name} {kind}": float(count) for kind, count in sorted(proxy.requests.items())}
    return found


class CountingProxy:
    """Passes bytes on between clients on a free port of loopback and a server, and counts.

    Attributes:
        port: Where it listens.
        received: Bytes of answers, their headers included.
        requests: How many by kind: "lists", or the method in lower case.
    """

    def __init__(self, port: int) -> None:
        self.received = 0
        self.requests: Counter[str] = Counter()
        self._target = port
        self._guard = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    def __enter__(self) -> CountingProxy:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # close alone does not end an accept
        self._listener.close()

    def _start(self, act: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=act, args=arguments, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._start(self._pass_on, client, server, self._count_request)
                self._start(self._pass_on, server, client, self._count_answer)

    def _pass_on(self, source: socket.socket, sink: socket.socket, count: Callable[[bytes], None]) -> None:
        with suppress(OSError):
            while chunk := source.recv(1 << 18):
                count(chunk)
                sink.sendall(chunk)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _count_request(self, chunk: bytes) -> None:
        """A client that waits for each answer begins a chunk with each request."""
        method, _, rest = chunk.partition(b" ")
        if method in (b"GET", b"HEAD", b"PUT", b"POST", b"DELETE"):
            kind = "lists" if b"list-type=2" in rest.partition(b" ")[0] else method.decode().lower()
            with self._guard:
                self.requests[kind] += 1

    def _count_answer(self, chunk: bytes) -> None:
        with self._guard:
            self.received += len(chunk)


def main(what: str, *arguments: str) -> None:
    """Measure one thing and print one JSON document."""
    act: Callable[..., Mapping[str, float]] = {
        "making": making, "saving": saving, "resuming": resuming, "looking": looking, "names": names,
    }[what]  # fmt: skip
    print(json.dumps(act(*arguments)))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
