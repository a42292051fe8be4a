"""Starts each real server on a free loopback port in a folder of its own, and hands back how to reach it.

Rules: every function is a context manager; on leaving, the server is killed and its folder deleted. What it
yields is frozen; its `process` can be killed and started again on the same port and data. Credentials are
made up for the run and stand in files or the environment, never on a command line. A program that is not here
raises `ServerMissing`. `*_elsewhere()` gives the server that the user's environment variable names, or None.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from tests.servers.catalogue import INFLUXDB, MARIADB, MINIO, MOSQUITTO, NATS, VERSITYGW, Server
from tests.servers.locate import Program, address, find
from tests.servers.process import (
    HOST,
    ElsewhereProcess,
    ServerFailed,
    ServerProcess,
    free_port,
    greets,
    port_open,
    program_command,
)

T = TypeVar("T")

ANSWER_TIMEOUT_S = 5.0
INITIALISE_TIMEOUT_S = 120.0
# mosquitto 2.0's own choice (src/password_mosq.h, PW_DEFAULT_ITERATIONS).
MOSQUITTO_ITERATIONS = 101


@dataclass(frozen=True, slots=True)
class Mosquitto:
    """An MQTT 3.1.1 and 5 broker."""

    host: str
    port: int
    user: str
    password: str
    process: ServerProcess


@dataclass(frozen=True, slots=True)
class Nats:
    """A NATS server: JetStream on `port`, MQTT 3.1.1 on `mqtt_port`."""

    host: str
    port: int
    mqtt_port: int
    user: str
    password: str
    process: ServerProcess

    @property
    def url(self) -> str:
        return f"nats://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class MariaDb:
    """A MariaDB server; the user may create databases."""

    host: str
    port: int
    user: str
    password: str
    database: str
    process: ServerProcess

    def url(self, database: str | None = None, *, driver: str = "mysql+asyncmy") -> str:
        """An SQLAlchemy address of `database`, or of the one that is there from the start."""
        return f"{driver}://{self.user}:{self.password}@{self.host}:{self.port}/{database or self.database}"


@dataclass(frozen=True, slots=True)
class S3:
    """An S3 store: MinIO, or versitygw in its stead, which knows no lifecycle and no bucket encryption."""

    product: Literal["minio", "versitygw"]
    host: str
    port: int
    access_key: str
    secret_key: str
    secure: bool
    process: ServerProcess

    @property
    def endpoint(self) -> str:
        """As the `minio` client takes it: without a scheme."""
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self.secure else 'http'}://{self.endpoint}"


@dataclass(frozen=True, slots=True)
class InfluxDb:
    """An InfluxDB 2 server, set up with one organisation, one bucket and an all-access token."""

    host: str
    port: int
    token: str
    org: str
    bucket: str
    secure: bool
    process: ServerProcess

    @property
    def url(self) -> str:
        return f"{'https' if self.secure else 'http'}://{self.host}:{self.port}"


# ----------------------------------------------------------------------------------- common ground


class Starter:
    """Starts servers for one test: `start(run.mosquitto(persistence=True))`. All are gone at the test's end."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack

    def __call__(self, server: AbstractContextManager[T]) -> T:
        return self._stack.enter_context(server)


@contextlib.contextmanager
def _folder(server: Server) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=f"headgate-{server.name}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _started(process: ServerProcess) -> Iterator[None]:
    try:
        process.start()
        yield
    finally:
        process.kill()


def _private(path: Path, text: str) -> Path:
    """Write a file that only we can read: it holds a password."""
    path.touch(mode=0o600)
    path.write_text(text)
    return path


def _ok(url: str) -> Callable[[], bool]:
    """Whether `url` answers 200."""

    def ready() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=ANSWER_TIMEOUT_S) as answer:
                return bool(answer.status == 200)
        except (OSError, ValueError):
            return False

    return ready


def _open(port: int, host: str = HOST) -> Callable[[], bool]:
    return lambda: port_open(port, host=host)


# ---------------------------------------------------------------------------------------- Mosquitto


def mosquitto_password(password: str) -> str:
    """What stands after the name in mosquitto's password file: PBKDF2 with SHA-512."""
    salt = secrets.token_bytes(12)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, MOSQUITTO_ITERATIONS, 64)
    return f"$7${MOSQUITTO_ITERATIONS}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


@contextlib.contextmanager
def mosquitto(
    *,
    users: Mapping[str, str] | None = None,
    acl: str | None = None,
    persistence: bool = False,
    extra: Sequence[str] = (),
    port: int | None = None,
) -> Iterator[Mosquitto]:
    """A broker that refuses the anonymous. `users` maps names to passwords (default: one, `tester`);
    `acl` is an ACL file's text; `extra` are further lines of its configuration, after the listener's."""
    program = find(MOSQUITTO)
    accounts = dict(users) if users else {"tester": secrets.token_hex(8)}
    port = port or free_port()
    with _folder(MOSQUITTO) as folder:
        passwords = "".join(f"{user}:{mosquitto_password(word)}\n" for user, word in accounts.items())
        lines = [
            f"listener {port} {HOST}",
            "allow_anonymous false",
            f"password_file {_private(folder / 'passwords', passwords)}",
            "log_dest stderr",
            "log_type all",
            f"persistence {'true' if persistence else 'false'}",
        ]
        if persistence:
            (folder / "data").mkdir()
            lines.append(f"persistence_location {folder / 'data'}/")
        if acl is not None:
            lines.append(f"acl_file {_private(folder / 'acl', acl)}")
        if os.geteuid() == 0:
            lines.append("user root")  # or it becomes `mosquitto`, who may not read this folder
        config = folder / "mosquitto.conf"
        config.write_text("\n".join([*lines, *extra]) + "\n")
        process = ServerProcess(
            program=program,
            binary=program.server.binary,
            arguments=("-c", str(config)),
            folder=folder,
            ready=_open(port),
        )
        with _started(process):
            user, password = next(iter(accounts.items()))
            yield Mosquitto(host=HOST, port=port, user=user, password=password, process=process)


# --------------------------------------------------------------------------------------------- NATS


@contextlib.contextmanager
def nats(
    *,
    users: Mapping[str, str] | None = None,
    sync_always: bool = True,
    extra: Sequence[str] = (),
    port: int | None = None,
    mqtt_port: int | None = None,
) -> Iterator[Nats]:
    """A NATS server with JetStream and MQTT. `extra` are further top-level lines of its configuration."""
    program = find(NATS)
    accounts = dict(users) if users else {"tester": secrets.token_hex(8)}
    port, mqtt_port, monitor_port = port or free_port(), mqtt_port or free_port(), free_port()
    synced = ", sync_interval: always" if sync_always else ""
    with _folder(NATS) as folder:
        people = "\n".join(f'    {{ user: "{user}", password: "{word}" }}' for user, word in accounts.items())
        config = _private(
            folder / "nats.conf",
            "\n".join(
                [
                    'server_name: "headgate-test"',  # MQTT needs one
                    f'listen: "{HOST}:{port}"',
                    f'http: "{HOST}:{monitor_port}"',
                    f'jetstream {{ store_dir: "{folder}/data"{synced} }}',
                    f'mqtt {{ listen: "{HOST}:{mqtt_port}" }}',
                    f"authorization {{\n  users = [\n{people}\n  ]\n}}",
                    *extra,
                ]
            )
            + "\n",
        )
        process = ServerProcess(
            program=program,
            binary=program.server.binary,
            arguments=("-c", str(config)),
            folder=folder,
            ready=_ok(f"http://{HOST}:{monitor_port}/healthz"),
        )
        with _started(process):
            user, password = next(iter(accounts.items()))
            yield Nats(
                host=HOST, port=port, mqtt_port=mqtt_port, user=user, password=password, process=process
            )


# ------------------------------------------------------------------------------------------ MariaDB


def _initialise_mariadb(program: Program, folder: Path, data: Path) -> None:
    command = [
        *program_command(program, "mariadb-install-db", folder),
        "--no-defaults",
        f"--datadir={data}",
        "--auth-root-authentication-method=normal",
        "--skip-test-db",
        *(["--user=root"] if os.geteuid() == 0 else []),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=INITIALISE_TIMEOUT_S,
        check=False,
        stdin=subprocess.DEVNULL,
        cwd=folder,
    )
    if done.returncode != 0:
        raise ServerFailed(f"mariadb-install-db ended with {done.returncode}:\n{done.stdout}{done.stderr}")


@contextlib.contextmanager
def mariadb(*, extra: Sequence[str] = (), port: int | None = None) -> Iterator[MariaDb]:
    """A MariaDB with one user who may do everything. `extra` are further options, as `--general-log=1`."""
    program = find(MARIADB)
    port = port or free_port()
    user, password, database = "headgate", secrets.token_hex(8), "headgate"
    with _folder(MARIADB) as folder:
        data = folder / "data"
        data.mkdir()
        _initialise_mariadb(program, folder, data)
        # Run at every start before the first connection is taken, so it must bear being repeated.
        first = _private(
            folder / "init.sql",
            f"CREATE DATABASE IF NOT EXISTS {database} CHARACTER SET utf8mb4;\n"
            + "".join(
                f"CREATE USER IF NOT EXISTS '{user}'@'{host}' IDENTIFIED BY '{password}';\n"
                f"GRANT ALL PRIVILEGES ON *.* TO '{user}'@'{host}' WITH GRANT OPTION;\n"
                for host in ("127.0.0.1", "localhost")
            ),
        )
        process = ServerProcess(
            program=program,
            binary=program.server.binary,
            arguments=(
                "--no-defaults",
                f"--datadir={data}",
                f"--socket={folder}/sql.sock",
                f"--pid-file={folder}/sql.pid",
                f"--port={port}",
                f"--bind-address={HOST}",
                f"--init-file={first}",
                "--skip-name-resolve",
                "--character-set-server=utf8mb4",
                "--innodb-buffer-pool-size=64M",
                "--performance-schema=OFF",
                *(["--user=root"] if os.geteuid() == 0 else []),
                *extra,
            ),
            folder=folder,
            ready=lambda: greets(port),
        )
        with _started(process):
            yield MariaDb(
                host=HOST, port=port, user=user, password=password, database=database, process=process
            )


# ----------------------------------------------------------------------------------------------- S3


def _minio(program: Program, folder: Path, port: int, access_key: str, secret_key: str) -> ServerProcess:
    return ServerProcess(
        program=program,
        binary=program.server.binary,
        arguments=(
            "server",
            "--address",
            f"{HOST}:{port}",
            "--certs-dir",
            f"{folder}/certs",
            f"{folder}/data",
        ),
        folder=folder,
        ready=_ok(f"http://{HOST}:{port}/minio/health/live"),
        environment={
            "MINIO_ROOT_USER": access_key,
            "MINIO_ROOT_PASSWORD": secret_key,
            "MINIO_BROWSER": "off",
            "MINIO_UPDATE": "off",
        },
    )


def _keeps_attributes(folder: Path) -> bool:
    """Whether the file system keeps extended attributes of a user (ext4 and xfs do, tmpfs since Linux 6.6)."""
    probe = folder / "probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.headgate", b"1")
    except OSError:
        return False
    finally:
        probe.unlink()
    return True


def _versitygw(program: Program, folder: Path, port: int, access_key: str, secret_key: str) -> ServerProcess:
    if not _keeps_attributes(folder):
        # Its other way, files beside the objects, is none for us: it writes them before the object, so a kill between
        # the two leaves an ETag without its object, and `If-None-Match: *` is refused for ever (1.8.0,
        # backend/posix/posix.go, checkPutPreconditions). An attribute comes and goes with its object.
        raise ServerFailed(
            f"versitygw needs extended attributes, which {folder.parent} has not: set TMPDIR to a folder on ext4 or xfs"
        )
    (folder / "versions").mkdir()
    return ServerProcess(
        program=program,
        binary=program.server.binary,
        arguments=(
            "--port",
            f"{HOST}:{port}",
            "--health",
            "/healthz",
            "--quiet",
            "posix",
            "--versioning-dir",
            f"{folder}/versions",
            f"{folder}/data",
        ),
        folder=folder,
        ready=_ok(f"http://{HOST}:{port}/healthz"),
        environment={"ROOT_ACCESS_KEY": access_key, "ROOT_SECRET_KEY": secret_key},
    )


@contextlib.contextmanager
def s3(*, port: int | None = None) -> Iterator[S3]:
    """An S3 store on one folder: MinIO where it is to be had, else versitygw; `product` says which."""
    program = find(MINIO)
    port = port or free_port()
    access_key, secret_key = "headgate", secrets.token_hex(16)
    stands_in = program.server is VERSITYGW
    with _folder(program.server) as folder:
        (folder / "data").mkdir()
        process = (_versitygw if stands_in else _minio)(program, folder, port, access_key, secret_key)
        with _started(process):
            yield S3(
                product="versitygw" if stands_in else "minio",
                host=HOST,
                port=port,
                access_key=access_key,
                secret_key=secret_key,
                secure=False,
                process=process,
            )


# ----------------------------------------------------------------------------------------- InfluxDB


def _set_up_influxdb(server: InfluxDb, password: str) -> None:
    body = json.dumps(
        {
            "username": "headgate",
            "password": password,
            "org": server.org,
            "bucket": server.bucket,
            "token": server.token,
        }
    ).encode()
    request = urllib.request.Request(
        f"{server.url}/api/v2/setup", data=body, headers={"Content-Type": "application/json"}
    )
    try:
        urllib.request.urlopen(request, timeout=30).close()
    except urllib.error.HTTPError as refused:
        raise ServerFailed(f"influxd refused its set-up: {refused.code} {refused.read()!r}") from refused


@contextlib.contextmanager
def influxdb(*, extra: Sequence[str] = (), port: int | None = None) -> Iterator[InfluxDb]:
    """An InfluxDB 2, set up. `extra` are further options of influxd."""
    program = find(INFLUXDB)
    port = port or free_port()
    with _folder(INFLUXDB) as folder:
        process = ServerProcess(
            program=program,
            binary=program.server.binary,
            arguments=(
                "--bolt-path",
                f"{folder}/influxd.bolt",
                "--sqlite-path",
                f"{folder}/influxd.sqlite",
                "--engine-path",
                f"{folder}/engine",
                "--http-bind-address",
                f"{HOST}:{port}",
                "--reporting-disabled",
                "--log-level",
                "warn",
                *extra,
            ),
            folder=folder,
            ready=_ok(f"http://{HOST}:{port}/health"),
        )
        with _started(process):
            server = InfluxDb(
                host=HOST,
                port=port,
                token=secrets.token_hex(24),
                org="headgate",
                bucket="headgate",
                secure=False,
                process=process,
            )
            _set_up_influxdb(server, secrets.token_hex(12))
            yield server


# ---------------------------------------------------------------------------------------- elsewhere


class AddressError(ValueError):
    """An address in the environment that cannot be used; the text shows the form that can."""


def _elsewhere(server: Server, form: str) -> urllib.parse.SplitResult | None:
    given = address(server)
    if given is None:
        return None
    url = urllib.parse.urlsplit(given)
    try:
        usable = bool(url.hostname) and url.port is not None
    except ValueError:
        usable = False
    if not usable:
        # The value holds a password, so it is not repeated.
        raise AddressError(f"{server.address_variable} is not of the form {form}")
    return url


def _not_ours(server: Server, url: urllib.parse.SplitResult) -> ElsewhereProcess:
    host, port = url.hostname or HOST, url.port or 0
    return ElsewhereProcess(
        program=Program(server=server, path=None, image=None, origin="elsewhere"),
        binary=server.binary,
        arguments=(),
        folder=Path(tempfile.gettempdir()),
        ready=_open(port, host),
    )


def _query(url: urllib.parse.SplitResult, key: str, default: str) -> str:
    return urllib.parse.parse_qs(url.query).get(key, [default])[0]


def _user_and_password(url: urllib.parse.SplitResult) -> tuple[str, str]:
    return urllib.parse.unquote(url.username or ""), urllib.parse.unquote(url.password or "")


def mosquitto_elsewhere() -> Mosquitto | None:
    url = _elsewhere(MOSQUITTO, "mqtt://user:password@host:port")
    if url is None:
        return None
    user, password = _user_and_password(url)
    return Mosquitto(
        host=url.hostname or HOST,
        port=url.port or 0,
        user=user,
        password=password,
        process=_not_ours(MOSQUITTO, url),
    )


def nats_elsewhere() -> Nats | None:
    url = _elsewhere(NATS, "nats://user:password@host:port?mqtt_port=1883")
    if url is None:
        return None
    user, password = _user_and_password(url)
    return Nats(
        host=url.hostname or HOST,
        port=url.port or 0,
        mqtt_port=int(_query(url, "mqtt_port", "1883")),
        user=user,
        password=password,
        process=_not_ours(NATS, url),
    )


def mariadb_elsewhere() -> MariaDb | None:
    url = _elsewhere(MARIADB, "mysql://user:password@host:port/database")
    if url is None:
        return None
    user, password = _user_and_password(url)
    return MariaDb(
        host=url.hostname or HOST,
        port=url.port or 0,
        user=user,
        password=password,
        database=url.path.strip("/") or "headgate",
        process=_not_ours(MARIADB, url),
    )


def _product_elsewhere(url: urllib.parse.SplitResult) -> Literal["minio", "versitygw"]:
    """By how it names itself; a store that names itself otherwise, or does not answer, is held to MinIO's measure."""
    request = urllib.request.Request(f"{url.scheme}://{url.hostname}:{url.port}/")
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as answer:
            named = answer.headers.get("Server", "")
    except urllib.error.HTTPError as refused:  # as it should, for want of a signature
        named = refused.headers.get("Server", "")
    except OSError:
        named = ""
    return "versitygw" if named.lower() == "versitygw" else "minio"


def s3_elsewhere() -> S3 | None:
    url = _elsewhere(MINIO, "http://access_key:secret_key@host:port")
    if url is None:
        return None
    access_key, secret_key = _user_and_password(url)
    return S3(
        product=_product_elsewhere(url),
        host=url.hostname or HOST,
        port=url.port or 0,
        access_key=access_key,
        secret_key=secret_key,
        secure=url.scheme == "https",
        process=_not_ours(MINIO, url),
    )


def influxdb_elsewhere() -> InfluxDb | None:
    url = _elsewhere(INFLUXDB, "http://:token@host:port?org=ORG&bucket=BUCKET")
    if url is None:
        return None
    _, token = _user_and_password(url)
    return InfluxDb(
        host=url.hostname or HOST,
        port=url.port or 0,
        token=token,
        org=_query(url, "org", "headgate"),
        bucket=_query(url, "bucket", "headgate"),
        secure=url.scheme == "https",
        process=_not_ours(INFLUXDB, url),
    )
