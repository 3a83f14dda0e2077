"""What is told of a server's failure: the cause in words, what to do, and no secret."""

from __future__ import annotations

import asyncio

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from seedvc_ckpt import StorageError
from seedvc_ckpt.storage import plain_location
from seedvc_ckpt.storage.remote import Redactor, failure_of, in_words, secrets_in

KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq"
PLAIN = Redactor()


def boto(code, status, message=""):
    error = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(error, "PutObject")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (boto("ExpiredToken", 400), "have expired: renew"),
        (boto("InvalidAccessKeyId", 403), "credentials were refused"),
        (boto("AccessDenied", 403), "access was denied"),
        (boto("NoSuchBucket", 404), "no such bucket: create it"),
        (boto("SlowDown", 503), "asked to slow down"),
        (boto("InternalError", 500, "oh"), "the server failed, again and again: try later (500 InternalError: oh)"),
        (NoCredentialsError(), "no usable credentials"),
        (EndpointConnectionError(endpoint_url="http://x"), "no connection to the server"),
        (ConnectionResetError("reset"), "no connection to the server"),
        (asyncio.TimeoutError(), "did not answer in time"),
        (PermissionError("no"), "access was denied"),
        (ValueError("odd"), "ValueError: odd"),
        (ValueError(), "no reason given"),
    ],
)
def test_the_cause_is_told_in_words(error, words):
    """Each kind of failure by what it means for the user, whatever class the client library gave it."""
    assert words in in_words(error, PLAIN)
    wrapped = OSError(22, "An error occurred")
    wrapped.__cause__ = error
    if isinstance(error, ClientError):
        assert words in in_words(wrapped, PLAIN)


def test_failed_conditions_are_told_from_other_refusals():
    """412 and 409 by status or by name; a missing object is not a missing bucket."""
    assert failure_of(boto("PreconditionFailed", 412)).condition_failed
    assert failure_of(boto("ConditionalRequestConflict", 409)).condition_failed
    assert failure_of(boto("409", 0)).condition_failed
    assert failure_of(FileExistsError("x")).condition_failed
    assert not failure_of(boto("AccessDenied", 403)).condition_failed
    assert (failure_of(boto("NoSuchKey", 404)).missing, failure_of(boto("NoSuchKey", 404)).no_bucket) == (True, False)
    assert (failure_of(boto("NoSuchBucket", 404)).missing, failure_of(boto("NoSuchBucket", 404)).no_bucket) == (
        False,
        True,
    )
    assert failure_of(boto("NotImplemented", 501)).unsupported


def test_secrets_are_taken_out_of_every_text(monkeypatch):
    """Those in the options at any depth, in connection strings and the environment, and what looks like one."""
    options = {
        "secret": "hidden-1",
        "client_kwargs": {"aws_session_token": "hidden-2", "region_name": "eu-west-1"},
        "connection_string": f"AccountName=me;AccountKey={KEY};BlobEndpoint=http://x",
        "client_keys": ["hidden-3"],
        "endpoint_url": "http://host:9000",
    }
    monkeypatch.setenv("SOME_API_TOKEN", "hidden-4-env")
    redact = Redactor(secrets_in(options))
    text = f"hidden-1 hidden-2 hidden-3 hidden-4-env {KEY} at http://host:9000 in eu-west-1"
    found = redact(text)
    assert "hidden" not in found
    assert KEY not in found
    assert "http://host:9000 in eu-west-1" in found
    for shown in (
        "sftp://user:hidden@host/path",
        "https://x.blob/c/b?sv=1&sig=hidden",
        "AccountKey=hidden;Next",
        "token: hidden",
        "X-Amz-Signature=hidden",
        "https://s3/b/k?X-Amz-Credential=hidden%2F2024",
    ):
        assert "hidden" not in PLAIN(shown), shown


def test_errors_of_ours_are_passed_on():
    """What was put in words once is not put in words again."""
    assert in_words(StorageError("as it is"), PLAIN) == "as it is"


@pytest.mark.parametrize(
    ("url", "plain"),
    [
        ("s3://bucket/run", "s3://bucket/run"),
        ("sftp://user:secret@host:22/run", "sftp://host:22/run"),
        ("sftp://user@host/run", "sftp://host/run"),
        ("abfs://container@account.dfs.core.windows.net/run", "abfs://container@account.dfs.core.windows.net/run"),
        ("az://c/run?sig=secret", "az://c/run"),
        ("memory://a?b/run", "memory://a?b/run"),
        ("runs/my@run?", "runs/my@run?"),
    ],
)
def test_locations_are_shown_without_userinfo_and_query(url, plain):
    """But a container before the @, and names on this machine, stay."""
    assert plain_location(url) == plain
