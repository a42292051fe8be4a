"""Names, topics and secrets."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync.identity import (
    GatewayName,
    IdentityError,
    Secret,
    is_loopback,
    parse_name,
    parse_topic,
    read_secret,
    require_private,
)


def test_a_name_and_its_topics_come_back() -> None:
    name = parse_name("acme/plant-1")
    assert name == GatewayName("acme", "plant-1")
    assert parse_topic(name.topic("up")) == (name, "up")


@pytest.mark.parametrize(
    "text", ["acme", "a/b/c", "/b", "a/", "a b/c", "a/+", "a/#", "ü/b", "a/" + "x" * 65, "a/b\n"]
)
def test_a_name_that_could_reach_another_topic_is_refused(text: str) -> None:
    with pytest.raises(IdentityError):
        parse_name(text)


@given(st.text(max_size=40))
def test_no_text_gives_a_name_with_a_wildcard_or_a_separator(text: str) -> None:
    try:
        name = parse_name(text)
    except IdentityError:
        return
    assert not set("+#/ .\0\n") & set(name.tenant + name.gateway)


@pytest.mark.parametrize(
    "topic", ["x", "headgate/v1/a/b", "headgate/v1/a/b/c/d", "headgate/v2/a/b/up", "headgate/v1/a/b/x"]
)
def test_a_topic_that_is_not_ours_is_refused(topic: str) -> None:
    with pytest.raises(IdentityError):
        parse_topic(topic)


def test_a_secret_prints_nothing_of_itself() -> None:
    secret = Secret("correct horse battery")
    assert "horse" not in f"{secret} {secret!r} {[secret]}"
    assert secret.reveal() == "correct horse battery"


def test_a_secret_comes_from_a_private_file_or_the_environment_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text("0123456789abcdef\n")
    file.chmod(0o600)
    assert read_secret("t", file=str(file), env=None).reveal() == "0123456789abcdef"
    monkeypatch.setenv("HEADGATE_T", "fedcba9876543210")
    assert read_secret("t", file=None, env="HEADGATE_T").reveal() == "fedcba9876543210"
    with pytest.raises(IdentityError, match="no default"):
        read_secret("t", file=None, env=None)
    with pytest.raises(IdentityError, match="not set"):
        read_secret("t", file=None, env="HEADGATE_NOT_THERE")
    file.chmod(0o604)
    with pytest.raises(IdentityError, match="chmod 600"):
        read_secret("t", file=str(file), env=None)
    file.chmod(0o600)
    file.write_text("short")
    with pytest.raises(IdentityError, match="too short"):
        read_secret("t", file=str(file), env=None)


def test_a_token_file_that_holds_no_text_is_told_as_such(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_bytes(b"\xff" * 30)
    file.chmod(0o600)
    with pytest.raises(IdentityError, match="holds no text"):
        read_secret("t", file=str(file), env=None)


def test_plaintext_is_for_loopback_only() -> None:
    for host in ("localhost", "127.0.0.1", "::1", "[::1]", "127.8.8.8"):
        assert is_loopback(host)
        require_private("uplink", host, tls="off")
    for host in ("example.org", "10.0.0.1", "localhost.example.org", "0.0.0.0"):
        assert not is_loopback(host)
        with pytest.raises(IdentityError, match="tls = true"):
            require_private("uplink", host, tls="off")
        require_private("uplink", host, tls="on")
