"""Who a gateway is: its name, its topics, and the credential that proves it.

Both programs meet here, so that a name is formed and checked in one place. For now a credential is one static token
per gateway (MQTT password, or HTTP bearer token); what else proves an identity later stays behind this module.

Rules: there is no default credential; a secret comes from a file or an environment variable, never from the command
line; plaintext is refused except to loopback.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from pathlib import Path

import msgspec

ID_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,64}")  #: safe in topics, NATS subjects, paths and SQL keys
TOPIC_ROOT = "headgate/v1"  #: the version is the topics', not the envelope's
TOPIC_LEAVES = ("up", "ack", "state", "cmd", "result")


class IdentityError(ValueError):
    """A name or credential that cannot be used; the text says what to change."""


class GatewayName(msgspec.Struct, frozen=True, order=True, gc=False):
    """A gateway's full name, `<tenant>/<gateway>`; it is also its MQTT user name."""

    tenant: str
    gateway: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.gateway}"

    def topic(self, leaf: str) -> str:
        """`headgate/v1/<tenant>/<gateway>/<leaf>`."""
        return f"{TOPIC_ROOT}/{self.tenant}/{self.gateway}/{leaf}"


def parse_name(text: str) -> GatewayName:
    """`tenant/gateway`. Raises `IdentityError` naming the part that is wrong and what is allowed."""
    tenant, slash, gateway = text.partition("/")
    if not slash:
        raise IdentityError(f"gateway name {text!r}: expected <tenant>/<gateway>, as in acme/plant-1")
    for what, part in (("tenant", tenant), ("gateway", gateway)):
        if not ID_PATTERN.fullmatch(part):
            raise IdentityError(
                f"gateway name {text!r}: the {what} {part!r} must be 1 to 64 of A-Z a-z 0-9 _ -"
            )
    return GatewayName(tenant, gateway)


def parse_topic(topic: str) -> tuple[GatewayName, str]:
    """The name and leaf of one of our topics. Raises `IdentityError` for any other topic."""
    if not topic.startswith(TOPIC_ROOT + "/"):
        raise IdentityError(f"topic {topic!r} does not start with {TOPIC_ROOT}/")
    parts = topic[len(TOPIC_ROOT) + 1 :].split("/")
    if len(parts) != 3 or parts[2] not in TOPIC_LEAVES:
        raise IdentityError(
            f"topic {topic!r}: expected {TOPIC_ROOT}/<tenant>/<gateway>/<{'|'.join(TOPIC_LEAVES)}>"
        )
    return parse_name(f"{parts[0]}/{parts[1]}"), parts[2]


class Secret:
    """A secret value that does not print itself. `reveal()` where it is used, and nowhere else."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(****)"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


MIN_SECRET_CHARS = 16  #: below this a token is guessable at the rates a door allows


def read_secret(what: str, *, file: str | None, env: str | None) -> Secret:
    """One secret from a file or an environment variable. Raises `IdentityError` saying where it was looked for.

    A file readable by others is refused: the remedy is in the text.
    """
    if file:
        path = Path(file)
        try:
            mode = path.stat().st_mode
            text = path.read_text().strip()
        except OSError as err:
            raise IdentityError(f"{what}: cannot read {path}: {err.strerror}") from err
        except UnicodeDecodeError as err:
            raise IdentityError(f"{what}: {path} holds no text; put the token itself in it") from err
        if stat.S_IMODE(mode) & 0o007:
            raise IdentityError(f"{what}: {path} is readable by everybody; run: chmod 600 {path}")
    elif env:
        text = os.environ.get(env, "").strip()
        if not text:
            raise IdentityError(f"{what}: the environment variable {env} is not set")
    else:
        raise IdentityError(f"{what}: give a file or an environment variable; there is no default")
    if len(text) < MIN_SECRET_CHARS:
        raise IdentityError(f"{what}: {len(text)} characters is too short; use at least {MIN_SECRET_CHARS}")
    return Secret(text)


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine by its loopback name or address (no resolver is asked)."""
    if host in ("localhost", "localhost."):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def require_private(what: str, host: str, *, tls: str) -> None:
    """Refuse plaintext to anywhere but loopback. `tls` is "on" or "off". Raises `IdentityError` with the remedy."""
    if tls == "off" and not is_loopback(host):
        raise IdentityError(f"{what}: {host} is not loopback, and plaintext is refused there; set tls = true")
