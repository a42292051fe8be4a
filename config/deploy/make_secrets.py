#!/usr/bin/env python3
"""Makes the secrets that compose.yaml mounts, and a credential for each gateway.

Rules: standard library only, for it runs where Headgate is not installed; a secret that is there stays as it is;
every file is readable by its owner alone; no secret is printed.
"""

import argparse
import base64
import hashlib
import os
import re
import secrets
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = (
    "influxdb_password",
    "influxdb_token",
    "minio_access_key",
    "minio_secret_key",
    "mqtt_password",
    "mysql_password",
    "mysql_root_password",
    "operator_token",
)
CLOUD_USER = "headgate-cloud"
# Both parts of a gateway's name, as sync/identity.py has them.
GATEWAY_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}/[A-Za-z0-9_-]{1,64}")
# mosquitto 2.0's default is 101, for people's passwords on small machines; these are random and 192 bits long.
ITERATIONS = 101


def write_private(path: Path, text: str) -> None:
    """Write `path` whole or not at all, readable by its owner alone."""
    half = path.with_name(path.name + ".part")
    half.unlink(missing_ok=True)
    with os.fdopen(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)


def secret(folder: Path, name: str) -> str:
    """The secret of that name, made now if it is not there."""
    path = folder / name
    if path.exists():
        return path.read_text().strip()
    value = secrets.token_urlsafe(24)
    write_private(path, value + "\n")
    print(f"made {path}")
    return value


def hashed(password: str) -> str:
    """What stands after the name in mosquitto's password file: PBKDF2 with SHA-512."""
    salt = secrets.token_bytes(12)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, ITERATIONS, 64)
    return f"$7${ITERATIONS}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


def admit(folder: Path, user: str, password: str) -> None:
    """Put one user into mosquitto's password file, in the place of an older line of the same name."""
    path = folder / "mosquitto_passwords"
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if line.split(":", 1)[0] != user]
    write_private(path, "\n".join([*kept, f"{user}:{hashed(password)}"]) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gateway", metavar="TENANT/GATEWAY", help="also make this gateway's credential")
    parser.add_argument("--folder", type=Path, default=HERE, help="where compose.yaml is (default: here)")
    asked = parser.parse_args()
    os.umask(0o077)
    folder: Path = asked.folder / "secrets"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o700)
    for name in NAMES:
        secret(folder, name)
    admit(folder, CLOUD_USER, secret(folder, "mqtt_password"))
    # The cloud's data belongs to whoever owns the secrets, for both run as that user.
    (asked.folder / "data").mkdir(exist_ok=True)
    write_private(asked.folder / ".env", f"HEADGATE_UID={os.getuid()}\nHEADGATE_GID={os.getgid()}\n")
    if asked.gateway is not None:
        if not GATEWAY_NAME.fullmatch(asked.gateway):
            print(
                f"{asked.gateway!r} is not TENANT/GATEWAY, each 1 to 64 of A-Z a-z 0-9 _ -", file=sys.stderr
            )
            return 2
        tenant, gateway = asked.gateway.split("/")
        theirs = folder / "gateways" / tenant
        theirs.mkdir(parents=True, exist_ok=True)
        admit(folder, asked.gateway, secret(theirs, gateway))
        print(f"carry {theirs / gateway} to the gateway, as /etc/headgate/gateway-token")
    for name in ("tls_cert", "tls_key"):
        if not (folder / name).exists():
            print(
                f"still missing: {folder / name} (your certificate's {'chain' if name == 'tls_cert' else 'key'})"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
