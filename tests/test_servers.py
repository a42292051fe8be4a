"""The real servers that other tests rely on: they start, refuse strangers, survive a kill, and die with us."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import asyncmy
import nats as nats_client
import paho.mqtt.client as mqtt
import psutil
import pytest
from minio import Minio as MinioClient
from nats.aio.client import Client as NatsClient
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.reasoncodes import ReasonCode

from tests.servers import __main__ as servers_command
from tests.servers import catalogue, install, locate, run
from tests.servers.__main__ import main as servers_main
from tests.servers.process import ElsewhereError, ServerFailed, free_port, port_open, wait_until

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 30.0


def mqtt_answer(port: int, user: str, password: str, *, version: MQTTProtocolVersion) -> ReasonCode:
    """What the broker answers to one connection with these credentials."""
    answers: list[ReasonCode] = []
    client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=version)
    client.username_pw_set(user, password)
    client.on_connect = lambda _client, _data, _flags, reason, _properties: answers.append(reason)
    client.connect("127.0.0.1", port)
    deadline_s = time.monotonic() + DEADLINE_S
    while not answers and time.monotonic() < deadline_s:
        client.loop(timeout=0.1)
    client.disconnect()
    assert answers, "the broker did not answer at all"
    return answers[0]


@pytest.mark.parametrize("version", [mqtt.MQTTv5, mqtt.MQTTv311])
def test_mosquitto_admits_its_user_and_refuses_a_wrong_password(
    mosquitto_server: run.Mosquitto, version: MQTTProtocolVersion
) -> None:
    port = mosquitto_server.port
    good = mqtt_answer(port, mosquitto_server.user, mosquitto_server.password, version=version)
    bad = mqtt_answer(port, mosquitto_server.user, "wrong", version=version)
    assert (good.is_failure, bad.is_failure) == (False, True)


async def test_nats_keeps_a_message_across_a_kill_on_the_same_port(start: run.Starter) -> None:
    server = start(run.nats())

    async def connected() -> NatsClient:
        return await nats_client.connect(server.url, user=server.user, password=server.password)

    client = await connected()
    stream = client.jetstream()
    await stream.add_stream(name="readings", subjects=["readings"])
    await stream.publish("readings", b"one")
    await client.close()
    before = server.process.pid
    server.process.kill()
    assert not port_open(server.port)
    server.process.start()
    assert server.process.pid != before
    client = await connected()
    info = await client.jetstream().stream_info("readings")
    await client.close()
    assert info.state.messages == 1


def test_nats_speaks_mqtt_3_1_1_and_refuses_a_wrong_password(nats_server: run.Nats) -> None:
    port = nats_server.mqtt_port
    good = mqtt_answer(port, nats_server.user, nats_server.password, version=mqtt.MQTTv311)
    bad = mqtt_answer(port, nats_server.user, "wrong", version=mqtt.MQTTv311)
    assert (good.is_failure, bad.is_failure) == (False, True)


async def test_mariadb_keeps_a_committed_row_across_a_kill(start: run.Starter) -> None:
    server = start(run.mariadb())

    async def ask(*statements: str) -> tuple[tuple[int, ...], ...]:
        connection = await asyncmy.connect(
            host=server.host,
            port=server.port,
            user=server.user,
            password=server.password,
            db=server.database,
            autocommit=True,
        )
        async with connection.cursor() as cursor:
            for statement in statements:
                await cursor.execute(statement)
            rows = await cursor.fetchall()
        connection.close()
        return tuple(rows)

    await ask("CREATE TABLE kept (n INT PRIMARY KEY)", "INSERT INTO kept VALUES (7)")
    server.process.kill()
    server.process.start()
    assert await ask("SELECT n FROM kept") == ((7,),)


def s3_client(server: run.S3) -> MinioClient:
    return MinioClient(
        server.endpoint,
        access_key=server.access_key,
        secret_key=server.secret_key,
        secure=server.secure,
        region="us-east-1",
    )


def test_the_s3_store_stores_and_gives_back_an_object(s3_server: run.S3, tmp_path: Path) -> None:
    client = s3_client(s3_server)
    bucket = f"test-servers-{os.getpid()}"
    client.make_bucket(bucket)
    source, back = tmp_path / "source", tmp_path / "back"
    source.write_bytes(b"a reading" * 1000)
    client.fput_object(bucket, "object", str(source))
    client.fget_object(bucket, "object", str(back))
    assert back.read_bytes() == source.read_bytes()


def test_the_s3_store_says_which_product_it_is(s3_server: run.S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as what was started, once by what it answers at the address of a server of one's own."""
    user = f"{s3_server.access_key}:{s3_server.secret_key}"
    monkeypatch.setenv("HEADGATE_TEST_MINIO", s3_server.url.replace("://", f"://{user}@"))
    elsewhere = run.s3_elsewhere()
    assert elsewhere is not None
    assert elsewhere.product == s3_server.product


def put_if_absent(client: MinioClient, bucket: str, name: str) -> int:
    address = client.get_presigned_url("PUT", bucket, name)
    request = urllib.request.Request(address, data=b"x" * 4096, headers={"If-None-Match": "*"}, method="PUT")
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        return refused.code
    except OSError:
        return 0


def test_the_s3_store_keeps_through_kills_what_it_answered_and_holds_no_name_for_what_it_did_not(
    start: run.Starter,
) -> None:
    """The sink's exactly-once stands on both: Delta's log is one conditional PUT after the other."""
    server = start(run.s3())
    client = s3_client(server)
    client.make_bucket("kills")
    answers: dict[str, int] = {}
    for round_ in range(6):
        writing = threading.Event()

        def write(round_: int = round_, writing: threading.Event = writing) -> None:
            for n in range(1000):
                name = f"{round_}/{n}"
                answers[name] = put_if_absent(client, "kills", name)
                writing.set()
                if answers[name] == 0:
                    return

        writer = threading.Thread(target=write)
        writer.start()
        assert writing.wait(DEADLINE_S)
        server.process.kill()
        writer.join(DEADLINE_S)
        server.process.start()
    there = {str(found.object_name) for found in client.list_objects("kills", recursive=True)}
    assert {name for name, answer in answers.items() if answer == 200} <= there
    assert set(answers.values()) == {200, 0}
    for name, answer in answers.items():
        if answer == 0:  # it is either there whole, or free to be written
            assert put_if_absent(client, "kills", name) == (412 if name in there else 200)
            assert client.stat_object("kills", name).size == 4096


def post_influxdb(server: run.InfluxDb, line: bytes, *, token: str | None = None) -> int:
    request = urllib.request.Request(
        f"{server.url}/api/v2/write?org={server.org}&bucket={server.bucket}&precision=ns",
        data=line,
        headers={"Authorization": f"Token {token or server.token}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        return refused.code


def count_influxdb(server: run.InfluxDb, measurement: str) -> int:
    flux = (
        f'from(bucket: "{server.bucket}") |> range(start: 0)'
        f' |> filter(fn: (r) => r._measurement == "{measurement}") |> count()'
    )
    request = urllib.request.Request(
        f"{server.url}/api/v2/query?org={server.org}",
        data=flux.encode(),
        headers={"Authorization": f"Token {server.token}", "Content-Type": "application/vnd.flux"},
    )
    with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
        lines = answer.read().decode().splitlines()
    header, first = lines[0].split(","), lines[1].split(",")
    return int(first[header.index("_value")])


def test_influxdb_keeps_a_point_across_a_kill_and_refuses_a_wrong_token(start: run.Starter) -> None:
    server = start(run.influxdb())
    assert post_influxdb(server, b"level v=1 1700000000000000000") == 204
    assert post_influxdb(server, b"level v=2 1700000001000000000", token="wrong") == 401
    assert post_influxdb(server, b"level nonsense") == 400
    server.process.kill()
    server.process.start()
    assert count_influxdb(server, "level") == 1


def test_a_frozen_server_answers_again_when_resumed(start: run.Starter) -> None:
    broker = start(run.mosquitto())
    broker.process.pause()
    status = psutil.Process(broker.process.pid)
    wait_until(lambda: status.status() == psutil.STATUS_STOPPED, timeout_s=DEADLINE_S, what="freezing")
    with socket.create_connection(("127.0.0.1", broker.port), timeout=DEADLINE_S) as connection:
        connection.settimeout(0.3)
        connection.sendall(b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x3c\x00\x00")  # CONNECT, anonymous
        with pytest.raises(TimeoutError):
            connection.recv(1)
        broker.process.resume()
        connection.settimeout(DEADLINE_S)
        assert connection.recv(4)[:1] == b"\x20"  # CONNACK


def test_a_polite_stop_leaves_nothing_listening(start: run.Starter) -> None:
    broker = start(run.mosquitto())
    broker.process.stop()
    assert not broker.process.running
    assert not port_open(broker.port)


def test_a_server_dies_with_the_session_that_started_it_even_when_that_is_killed() -> None:
    script = (
        "import sys, time\n"
        "from tests.servers import run\n"
        "with run.mosquitto() as broker:\n"
        "    print(broker.process.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    session = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert session.stdout is not None
        server = psutil.Process(int(session.stdout.readline()))
        assert "mosquitto" in server.name()
    finally:
        os.killpg(session.pid, signal.SIGKILL)
        session.wait(DEADLINE_S)
        if session.stdout is not None:
            session.stdout.close()
    wait_until(
        lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE,
        timeout_s=DEADLINE_S,
        what="the broker's end",
    )


def test_a_server_that_does_not_start_says_why_from_its_own_log(start: run.Starter) -> None:
    with pytest.raises(ServerFailed, match="no_such_option"):
        start(run.mosquitto(extra=["no_such_option true"]))


def test_no_credential_stands_on_a_command_line(
    mosquitto_server: run.Mosquitto, nats_server: run.Nats, mariadb_server: run.MariaDb
) -> None:
    for server in (mosquitto_server, nats_server, mariadb_server):
        command = " ".join(psutil.Process(server.process.pid).cmdline())
        assert server.password not in command


def test_ports_are_free_and_outside_the_range_of_outgoing_connections(free_port: Callable[[], int]) -> None:
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = {free_port() for _ in range(20)}
    assert len(ports) > 10
    assert all(port < low and not port_open(port) for port in ports)


# ------------------------------------------------------------------------------------------- finding


@pytest.mark.parametrize("server", catalogue.KNOWN.values(), ids=lambda server: server.name)
def test_a_missing_server_names_the_line_that_installs_it(
    server: catalogue.Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path))
    monkeypatch.setattr(locate, "SYSTEM_FOLDERS", ())
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    locate.docker_answers.cache_clear()
    try:
        with pytest.raises(locate.ServerMissing) as missing:
            locate.find(server)
    finally:
        locate.docker_answers.cache_clear()
    assert "make servers" in str(missing.value)
    assert server.remedy in str(missing.value)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_program_of_a_wrong_version_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrong = executable(tmp_path / "influxd", "echo 'InfluxDB v1.8.10 (git: 1.8 688e697)'")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(locate.ServerMissing, match=f"{wrong} is not a version"):
        locate.find(catalogue.INFLUXDB)


def test_a_server_without_the_programs_it_calls_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    executable(tmp_path / "mariadbd", "echo 'mariadbd Ver 10.11.19-MariaDB'")
    executable(tmp_path / "mariadb-install-db", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(locate, "SYSTEM_FOLDERS", ())
    with pytest.raises(locate.ServerMissing, match=r"my_print_defaults is not.*\n.*mariadb-client-core"):
        locate.find(catalogue.MARIADB)


def test_the_cache_comes_before_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    says = "echo 'InfluxDB v2.7.12 (git: none)'"
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    executable(tmp_path / "bin" / "influxd", says)
    assert locate.find(catalogue.INFLUXDB).origin == "PATH"
    cached = executable(locate.cached_path(catalogue.INFLUXDB), says)
    assert locate.find(catalogue.INFLUXDB).path == cached


def test_versitygw_is_not_started_where_a_kill_could_leave_half_an_object(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    executable(locate.cached_path(catalogue.VERSITYGW), SAYS_VERSITYGW)
    monkeypatch.setattr(os, "setxattr", refuse)
    with pytest.raises(ServerFailed, match="set TMPDIR to a folder on ext4 or xfs"), run.s3():
        pytest.fail("started all the same")


SAYS_MINIO = "echo 'minio version RELEASE.2025-10-15T17-29-55Z'"
SAYS_VERSITYGW = "echo 'Version  : v1.8.0'"


def test_a_stand_in_is_found_only_where_the_server_itself_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    executable(locate.cached_path(catalogue.VERSITYGW), SAYS_VERSITYGW)
    assert locate.find(catalogue.MINIO).server is catalogue.VERSITYGW
    with pytest.raises(locate.ServerMissing, match="minio"):
        locate.find_itself(catalogue.MINIO)
    executable(tmp_path / "bin" / "minio", SAYS_MINIO)
    assert locate.find(catalogue.MINIO).server is catalogue.MINIO


def test_where_docker_answers_its_image_is_run_with_the_same_arguments_and_no_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stand-in for Docker's client writes down what it was asked; a daemon is not to be had everywhere."""
    asked = tmp_path / "asked"
    executable(tmp_path / "bin" / "docker", f'echo "$@" >> {asked}; [ "$1" != run ]')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(locate, "SYSTEM_FOLDERS", ())
    locate.docker_answers.cache_clear()
    try:
        with pytest.raises(ServerFailed, match="ended with status 1"), run.s3() as server:
            pytest.fail(f"the stand-in runs nothing, yet {server} is ready")
    finally:
        locate.docker_answers.cache_clear()
    order = next(line for line in asked.read_text().splitlines() if line.startswith("run "))
    assert str(catalogue.MINIO.image) in order
    assert "--env MINIO_ROOT_PASSWORD " in order
    assert order.index("--entrypoint minio") < order.index(str(catalogue.MINIO.image)) < order.index("server")


def test_an_address_of_the_users_own_is_used_and_never_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADGATE_TEST_MARIADB", f"mysql://me:p%40ss@127.0.0.1:{free_port()}/mine")
    server = run.mariadb_elsewhere()
    assert server is not None
    assert (server.user, server.password, server.database) == ("me", "p@ss", "mine")
    assert not server.process.running
    with pytest.raises(ElsewhereError, match="unset HEADGATE_TEST_MARIADB"):
        server.process.kill()


@pytest.mark.parametrize("given", ["nonsense", "http://host", "http://:secret@host:port"])
def test_an_unusable_address_shows_the_form_and_not_the_secret(
    monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("HEADGATE_TEST_INFLUXDB", given)
    with pytest.raises(run.AddressError, match="HEADGATE_TEST_INFLUXDB is not of the form") as refused:
        run.influxdb_elsewhere()
    assert "secret" not in str(refused.value)


# ---------------------------------------------------------------------------------------- installing


def test_make_servers_installs_nothing_where_an_address_is_given(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HEADGATE_TEST_MINIO", "http://a:b@127.0.0.1:9000")
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path))
    assert install.ensure(catalogue.MINIO) is None
    assert "HEADGATE_TEST_MINIO" in capfd.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_without_root_or_sudo_a_person_gets_the_line_to_type(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    executable(tmp_path / "apt-get", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(
        install.InstallError, match="sudo apt-get install -y --no-install-recommends mosquitto"
    ):
        install._apt_install(("mosquitto",))


def fake_go(folder: Path, *, builds: str, asked: Path) -> None:
    """A Go that builds `builds` alone, and is refused the rest as by a module proxy; it writes down what was asked."""
    executable(
        folder / "go",
        'case "$1" in version) echo go version go1.99.1 linux/amd64; exit;; esac\n'
        f'for module; do :; done\necho "$module" >> {asked}\n'
        f'case "$module" in *{builds}*) mkdir -p "$GOBIN"; printf \'#!/bin/sh\\n%s\\n\' '
        f'"{SAYS_VERSITYGW}" > "$GOBIN/{builds}";;\n'
        "*) echo 'server response: This module version is not available.'; exit 1;; esac",
    )


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with no S3 store, no Docker, and a folder first on its PATH, which is returned."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HEADGATE_TEST_MINIO", raising=False)
    monkeypatch.setattr(locate, "SYSTEM_FOLDERS", ())
    monkeypatch.setattr(locate, "docker_answers", lambda: False)
    monkeypatch.setattr(install, "docker_answers", lambda: False)
    monkeypatch.setattr(install, "BUILD_DISK_BYTES", 0)
    return tmp_path / "bin"


def test_a_refused_build_is_said_the_stand_in_is_built_and_the_refusal_not_asked_for_again(
    bare: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = tmp_path / "asked"
    fake_go(bare, builds="versitygw", asked=asked)
    assert servers_main(["versitygw", "mosquito"]) == 2
    for _ in range(2):
        program = install.ensure(catalogue.MINIO)
        assert program is not None
        assert program.server is catalogue.VERSITYGW
    said = capfd.readouterr().out
    assert "minio      cannot be had: minio: go install failed with status 1" in said
    assert "server response: This module version is not available." in said
    assert "versitygw stands in" in said
    assert "-m tests.servers minio" in said
    assert [line.rpartition("@")[0] for line in asked.read_text().splitlines()] == [
        "github.com/minio/minio",
        "github.com/versity/versitygw/cmd/versitygw",
    ]
    assert servers_main(["minio"]) == 1  # named, so it is tried again, and nothing taken in its stead
    assert asked.read_text().count("minio@") == 2


def test_where_neither_can_be_built_both_refusals_and_the_remedy_are_said(
    bare: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_go(bare, builds="nothing-at-all", asked=tmp_path / "asked")
    monkeypatch.setattr(servers_command, "ALL", (catalogue.MINIO,))
    assert servers_main([]) == 1
    said = capfd.readouterr().out
    assert "minio: go install failed" in said
    assert "versitygw in its stead: versitygw: go install failed" in said
    assert "point HEADGATE_TEST_MINIO at one of your own" in said


def test_a_failed_step_shows_the_end_of_its_output_and_leaves_no_build_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    executable(
        tmp_path / "bin" / "go",
        'case "$1" in version) echo go version go1.99.1 linux/amd64;; *) echo the module is gone; exit 3;; esac',
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(install, "BUILD_DISK_BYTES", 0)
    monkeypatch.setattr(install, "docker_answers", lambda: False)
    with pytest.raises(install.InstallError, match=r"(?s)status 3.*the module is gone"):
        install._build(catalogue.MINIO, catalogue.Build.MINIO)
    assert list((tmp_path / "cache" / "build").iterdir()) == []
    assert not locate.cached_path(catalogue.MINIO).exists()


def test_a_failed_go_build_shows_the_package_that_failed_and_not_those_built_after_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    after = "\n".join(f"echo example.org/later/{n}" for n in range(60))
    go = executable(
        tmp_path / "go", f"echo '# example.org/broken'\necho pkg-config is missing\n{after}\nexit 1"
    )
    with pytest.raises(install.InstallError, match=r"(?s)# example.org/broken.*pkg-config is missing"):
        install._run("go build", [str(go)], log=log, timeout_s=DEADLINE_S)


def test_a_build_is_refused_before_it_fills_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path))
    monkeypatch.setattr(install, "BUILD_DISK_BYTES", 10**18)
    with pytest.raises(install.InstallError, match="HEADGATE_CACHE to a folder on another disk"):
        install._build(catalogue.MINIO, catalogue.Build.MINIO)


def test_two_runs_at_once_build_one_time(tmp_path: Path) -> None:
    """Both ask for the same server; the go that they find writes down each time it is called to build."""
    calls = tmp_path / "calls"
    executable(
        tmp_path / "bin" / "go",
        'case "$1" in version) echo go version go1.99.1 linux/amd64;; '
        f"*) echo x >> {calls}; sleep 1; mkdir -p \"$GOBIN\"; printf '#!/bin/sh\\necho minio version 1\\n' "
        '> "$GOBIN/minio";; esac',
    )
    script = (
        "from tests.servers import catalogue, install, locate\n"
        "install.BUILD_DISK_BYTES = 0\n"
        "locate.SYSTEM_FOLDERS = ()\n"
        "install.docker_answers = lambda: False\n"
        "locate.docker_answers.cache_clear(); locate.docker_answers = lambda: False\n"
        "print(install.ensure(catalogue.MINIO))\n"
    )
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "HEADGATE_CACHE": str(tmp_path / "cache"),
    }
    environment.pop("HEADGATE_TEST_MINIO", None)
    with contextlib.ExitStack() as stack:
        runs = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", script],
                    cwd=ROOT,
                    env=environment,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(2)
        ]
        said = [run_.communicate(timeout=DEADLINE_S)[0] for run_ in runs]
    assert [run_.returncode for run_ in runs] == [0, 0], said
    assert calls.read_text() == "x\n"
