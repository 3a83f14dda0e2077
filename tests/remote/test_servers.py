"""Whether the servers that other tests rely on do what is said of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from servers import Azurite, FakeGcs, LocalBucket, Moto, S3rver, Server, Sshd, Weed, filesystem, free_ports

_READ = """
import sys
from servers import filesystem
fs, path = filesystem(sys.argv[1])
sys.stdout.buffer.write(fs.cat_file(path))
"""
_KINDS = [Weed, Moto, Azurite, FakeGcs, Sshd, S3rver, LocalBucket]


@pytest.fixture(params=_KINDS, ids=[kind.name for kind in _KINDS])
def any_server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param.name)
    return found


def _write(url: str, options: dict, content: bytes) -> None:
    fs, path = filesystem(url, options)
    if url.startswith("sftp:"):
        fs.makedirs(os.path.dirname(path), exist_ok=True)
    fs.pipe_file(path, content)


def _read(url: str, options: dict) -> bytes:
    fs, path = filesystem(url, options)
    return fs.cat_file(path)


def test_what_was_written_is_read_by_the_options_and_by_the_environment(any_server: Server):
    url, content = any_server.url("some run/model_000001.pt"), os.urandom(100_000)
    _write(url, any_server.options, content)
    assert _read(url, any_server.options) == content
    taken = ("AWS_", "AZURE_", "FSSPEC_", "GCSFS_", "GOOGLE_", "SSH_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(taken)}
    by_environment = subprocess.run(
        [sys.executable, "-c", _READ, url],
        env={**clean, "PYTHONPATH": os.path.dirname(__file__), **any_server.environment},
        check=False,
        capture_output=True,
        timeout=60,
    )
    assert by_environment.returncode == 0, by_environment.stderr.decode()
    assert by_environment.stdout == content


def test_data_outlives_a_crash_where_it_is_said_to(any_server: Server):
    url, content = any_server.url("crash/model_000001.pt"), os.urandom(100_000)
    _write(url, any_server.options, content)
    time.sleep(any_server.durable_after if any_server.persistent else 0.0)
    any_server.kill()
    any_server.restart()
    if any_server.persistent:
        assert _read(url, any_server.options) == content
    else:
        with pytest.raises(FileNotFoundError):
            _read(url, any_server.options)


def test_data_outlives_an_orderly_end(any_server: Server):
    if not any_server.persistent:
        pytest.skip("it keeps its data in memory")
    url, content = any_server.url("end/model_000001.pt"), os.urandom(100_000)
    _write(url, any_server.options, content)
    any_server.restart()
    assert _read(url, any_server.options) == content


def test_a_killed_server_takes_its_connections_with_it(sshd: Server):
    fs, path = filesystem(sshd.url(""), sshd.options)
    assert fs.isdir(path)
    sshd.kill()
    try:
        with pytest.raises(Exception, match=r"(?i)connection"):
            fs.pipe_file(f"{path}connected", b"still")
    finally:
        sshd.restart()


def test_two_servers_of_a_kind_run_side_by_side(weed: Server, tmp_path: os.PathLike[str]):
    with Weed(tmp_path) as other:
        for server in (weed, other):
            _write(server.url("which"), server.options, str(server.port).encode())
        for server in (weed, other):
            assert _read(server.url("which"), server.options) == str(server.port).encode()


class _Broken(Moto):
    def _command(self) -> list[str]:
        return [sys.executable, "-c", "raise SystemExit('out of cheese')"]


def test_a_server_that_does_not_come_up_says_why(tmp_path: os.PathLike[str]):
    broken = _Broken(tmp_path)
    with pytest.raises(RuntimeError, match=r"(?s)moto ended with 1: .*out of cheese"):
        broken.start()
    broken.stop()


def test_nobody_else_is_taken_for_the_server(sshd: Server, tmp_path: os.PathLike[str]):
    late = Sshd(tmp_path)
    late.port = sshd.port
    with pytest.raises(RuntimeError, match="is taken"):
        late.start()


def test_ports_are_not_given_twice():
    ports = free_ports(50)
    assert len(set(ports)) == 50
    assert not set(ports) & set(free_ports(50))


def test_each_test_gets_a_place_of_its_own(remote: tuple[str, dict], server: Server):
    url, options = remote
    _write(f"{url}/new", options, b"here")
    assert _read(f"{url}/new", options) == b"here"
    assert url.startswith(server.url("run_"))
