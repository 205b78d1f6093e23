"""What is told of errors and addresses has no secret in it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.wording import LENGTH, has_secret, one_line, without_secrets


@given(st.text("abc@", min_size=1, max_size=5), st.text("xyz:/@?#&'", min_size=1, max_size=8))
def test_passwords_disappear_whatever_they_are_made_of(user, password):
    shown = without_secrets(f"sftp://{user}:{password}@host/place")
    assert shown == f"sftp://{user}:***@host/place"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://h/db?user=me&password=S3CRET", "postgresql://h/db?user=me&password=***"),
        ("mysql://h/db?passwd=S3CRET&x=1", "mysql://h/db?passwd=***&x=1"),
        ("https://S3CRET@host/path", "https://***@host/path"),
        ("https://S3CRET:@host", "https://***:@host"),
        ("http://me:p@S3CRET@host:5000", "http://me:***@host:5000"),
        ("http://me@corp.example:S3CRET@host", "http://***@corp.example:***@host"),
        ("az://box/lab?sv=1&sig=S3CRET&se=2", "az://box/lab?sv=1&sig=***&se=2"),
        ("s3://b/x?X-Amz-Signature=S3CRET", "s3://b/x?X-Amz-Signature=***"),
        ("simplecache::sftp://me:S3CRET@h/x", "simplecache::sftp://me:***@h/x"),
    ],
)
def test_secrets_in_addresses(address, shown):
    assert without_secrets(address) == shown
    assert has_secret(address)
    assert not has_secret(shown), "what was hidden is not hidden twice"


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////a/b@c/mlflow.db",
        "http://127.0.0.1:5000",
        "a: b@c",
        "abfs://box@account.dfs.core.windows.net/lab",
        "postgresql://me@host/db?sslkey=/a/key.pem&passfile=/b",
        "s3://bucket/lab",
    ],
)
def test_what_has_no_secret_stays(text):
    assert without_secrets(text) == text
    assert not has_secret(text)


def test_an_error_that_tells_part_of_an_address():
    address = "postgresql://me:first@second%21@host/db"
    error = ValueError('could not translate "second%21@host", nor second!')
    assert one_line(error, address) == 'could not translate "***@host", nor ***'


def test_a_line_that_ends_within_a_secret():
    error = ValueError("x" * (LENGTH - 15) + " http://me:S3CRET@host")
    assert "S3C" not in one_line(error)
    assert len(one_line(error)) <= LENGTH
    assert one_line(KeyError()) == "KeyError"
    assert one_line("") == ""
