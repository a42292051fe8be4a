"""Fixtures that many tests share: real servers.

Two kinds. `influxdb_server`, `mariadb_server`, `mosquitto_server`, `nats_server`, `s3_server` live as long
as the test session and are shared: use names of your own in them (a bucket, a database, a tenant), never kill
them. `start` is a function that starts one for this test alone, to be configured, killed and restarted at
will: `broker = start(run.mosquitto(persistence=True))`. A server that is not on the machine fails the test
with the line that installs it; no test is skipped for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from tests.servers import process, run
from tests.servers.locate import ServerMissing


@contextlib.contextmanager
def _or_fail() -> Iterator[None]:
    """A missing server is a failed test with the remedy alone, not forty lines of traceback."""
    try:
        yield
    except ServerMissing as missing:
        raise pytest.fail.Exception(str(missing), pytrace=False) from None


@pytest.fixture(scope="session")
def influxdb_server() -> Iterator[run.InfluxDb]:
    with _or_fail(), contextlib.ExitStack() as stack:
        yield run.influxdb_elsewhere() or stack.enter_context(run.influxdb())


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[run.MariaDb]:
    with _or_fail(), contextlib.ExitStack() as stack:
        yield run.mariadb_elsewhere() or stack.enter_context(run.mariadb())


@pytest.fixture(scope="session")
def mosquitto_server() -> Iterator[run.Mosquitto]:
    with _or_fail(), contextlib.ExitStack() as stack:
        yield run.mosquitto_elsewhere() or stack.enter_context(run.mosquitto())


@pytest.fixture(scope="session")
def nats_server() -> Iterator[run.Nats]:
    with _or_fail(), contextlib.ExitStack() as stack:
        yield run.nats_elsewhere() or stack.enter_context(run.nats())


@pytest.fixture(scope="session")
def s3_server() -> Iterator[run.S3]:
    """MinIO, or versitygw where that cannot be had: see its `product`."""
    with _or_fail(), contextlib.ExitStack() as stack:
        yield run.s3_elsewhere() or stack.enter_context(run.s3())


@pytest.fixture
def start() -> Iterator[run.Starter]:
    """`start(run.mosquitto(…))` gives a server of this test's own; all are gone at its end, last first."""
    with contextlib.ExitStack() as stack:
        yield run.Starter(stack)


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A function: each call gives a loopback port that nobody listens on."""
    return process.free_port
