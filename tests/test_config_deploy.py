"""What an operator copies from config/deploy: each file is loaded by the program that it is for."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import paho.mqtt.client as mqtt
import pytest
import trustme
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.reasoncodes import ReasonCode
from ruamel.yaml import YAML

from config.cloud import Cloud
from config.load import load
from sync.identity import TOPIC_ROOT, GatewayName, read_secret
from tests.servers import catalogue
from tests.servers.locate import ServerMissing, find
from tests.servers.process import HOST, ServerProcess, free_port, port_open
from tests.servers.run import Starter, mosquitto_password

DEPLOY = Path(__file__).resolve().parents[1] / "config" / "deploy"
UNITS = ("headgate.service", "headgate-cloud.service")
DEADLINE_S = 30.0
CLOUD = "headgate-cloud"
ONE, OTHER, STRANGER = "acme/plant-1", "acme/plant-2", "evil/plant-1"
UPWARD, DOWNWARD = ("up", "state", "result"), ("ack", "cmd")
WORDS = {name: f"a long password of {name}" for name in (CLOUD, ONE, OTHER, STRANGER)}

# ------------------------------------------------------------------------------------------- compose


class Secret(msgspec.Struct):
    file: str


class Service(msgspec.Struct):
    image: str | None = None
    secrets: list[str] = []
    volumes: list[str] = []
    environment: dict[str, str] = {}
    network_mode: str | None = None
    ports: list[str] = []
    privileged: bool = False


class Compose(msgspec.Struct):
    services: dict[str, Service]
    secrets: dict[str, Secret]


@pytest.fixture(scope="module")
def compose() -> Compose:
    return msgspec.convert(YAML(typ="safe").load(DEPLOY / "compose.yaml"), Compose)


def test_compose_file_is_valid_by_the_compose_schema() -> None:
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "check-jsonschema"),
            "--builtin-schema",
            "vendor.compose-spec",
            str(DEPLOY / "compose.yaml"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S * 2,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_brings_the_four_real_stores_and_the_cloud(compose: Compose) -> None:
    assert set(compose.services) == {"network", "mosquitto", "influxdb", "mariadb", "minio", "cloud"}


def test_compose_names_each_secret_once_and_uses_each_that_it_names(compose: Compose) -> None:
    used = {secret for service in compose.services.values() for secret in service.secrets}
    assert used == set(compose.secrets)


def test_compose_holds_no_secret_in_an_environment_variable(compose: Compose) -> None:
    for name, service in compose.services.items():
        for variable, value in service.environment.items():
            if re.search("PASSWORD|TOKEN|SECRET|ACCESS_KEY", variable):
                assert value.startswith("/run/secrets/"), f"{name}: {variable}"


def test_compose_opens_only_the_two_doors_with_tls(compose: Compose) -> None:
    assert compose.services["network"].ports == ["8883:8883", "8443:8443"]
    others = [service for name, service in compose.services.items() if name != "network"]
    assert all(service.network_mode == "service:network" and not service.ports for service in others)


def test_every_file_that_compose_mounts_is_there_or_is_made(compose: Compose, tmp_path: Path) -> None:
    made = secrets_made(tmp_path)
    given_by_the_operator = {"secrets/tls_cert", "secrets/tls_key"}
    wanted = {secret.file.removeprefix("./") for secret in compose.secrets.values()} - given_by_the_operator
    for service in compose.services.values():
        wanted |= {mount.split(":")[0][2:] for mount in service.volumes if mount.startswith("./")}
    assert {name for name in wanted if not ((DEPLOY / name).exists() or (made / name).exists())} == set()


def test_the_cloud_of_compose_reads_its_secrets_where_compose_puts_them(compose: Compose) -> None:
    cloud = load(DEPLOY / "cloud.toml", Cloud)
    assert cloud.mysql is not None
    assert cloud.influxdb is not None
    text = (DEPLOY / "cloud.toml").read_text()
    live = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    named = set(re.findall(r'"/run/secrets/(\w+)"', live))
    assert named == set(compose.services["cloud"].secrets)


# ------------------------------------------------------------------------------------------- secrets


def make_secrets(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DEPLOY / "make_secrets.py"), "--folder", str(folder), *more],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
        umask=0,
    )


def secrets_made(folder: Path, *more: str) -> Path:
    done = make_secrets(folder, *more)
    assert done.returncode == 0, done.stderr
    return folder


def test_secrets_are_private_and_good_enough_for_the_cloud(tmp_path: Path) -> None:
    folder = secrets_made(tmp_path, "--gateway", ONE) / "secrets"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 10
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        if path.name != "mosquitto_passwords":
            read_secret(path.name, file=str(path), env=None)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in [folder, *folder.glob("*/")])


def test_no_secret_is_printed_and_a_second_run_changes_none(tmp_path: Path) -> None:
    said = make_secrets(tmp_path, "--gateway", ONE).stdout
    before = {path: path.read_text() for path in (tmp_path / "secrets").rglob("*") if path.is_file()}
    assert not [path for path, text in before.items() if text.strip() in said]
    secrets_made(tmp_path)
    passwords = tmp_path / "secrets" / "mosquitto_passwords"
    assert {path: path.read_text() for path in before if path != passwords} == {
        path: text for path, text in before.items() if path != passwords
    }
    users = [line.split(":")[0] for line in passwords.read_text().splitlines()]
    assert sorted(users) == [ONE, CLOUD]


@pytest.mark.parametrize("name", ["plant-1", "acme/", "acme/plant 1", "acme/+", "a/b/c", "../../etc"])
def test_a_name_that_is_no_gateways_is_refused(tmp_path: Path, name: str) -> None:
    done = make_secrets(tmp_path, "--gateway", name)
    assert done.returncode == 2
    assert "TENANT/GATEWAY" in done.stderr


def test_mosquitto_admits_a_gateway_by_the_credential_that_was_made(
    tmp_path: Path, authority: Path, start: Starter
) -> None:
    folder = secrets_made(tmp_path, "--gateway", ONE) / "secrets"
    plain, _ = start(shipped_mosquitto(tmp_path, authority, folder / "mosquitto_passwords"))
    password = (folder / "gateways" / "acme" / "plant-1").read_text().strip()
    with connected(plain, ONE, password) as gateway:
        assert granted(gateway, topic(ONE, "ack"))


# ------------------------------------------------------------------------------------------- brokers


@contextmanager
def connected(
    port: int,
    user: str,
    password: str,
    *,
    version: MQTTProtocolVersion = mqtt.MQTTv5,
    ca: Path | None = None,
) -> Iterator[mqtt.Client]:
    """A client whose CONNACK was good, with its loop running."""
    client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=version, client_id=user.replace("/", "-"))
    client.username_pw_set(user, password)
    if ca is not None:
        client.tls_set(ca_certs=str(ca))
    ready = threading.Event()
    client.on_connect = lambda _c, _d, _f, reason, _p: None if reason.is_failure else ready.set()
    client.connect(HOST, port)
    client.loop_start()
    try:
        assert ready.wait(DEADLINE_S), f"{user} was not admitted"
        yield client
    finally:
        client.disconnect()
        client.loop_stop()


def granted(client: mqtt.Client, topic: str) -> bool:
    """Whether the broker grants this subscription."""
    answered = threading.Event()
    codes: list[ReasonCode] = []

    def on_subscribe(
        _client: mqtt.Client, _data: object, _mid: int, reasons: list[ReasonCode], _properties: object
    ) -> None:
        codes.extend(reasons)
        answered.set()

    client.on_subscribe = on_subscribe
    client.subscribe(topic, qos=0)
    assert answered.wait(DEADLINE_S), topic
    return not codes[0].is_failure


class Heard:
    """What arrives at a subscriber; `settled` waits for a last message, so that silence is not a guess."""

    def __init__(self, client: mqtt.Client) -> None:
        self.topics: set[str] = set()
        client.on_message = lambda _c, _d, message: self.topics.add(message.topic)

    def wait_for(self, topic: str) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while topic not in self.topics:
            assert time.monotonic() < deadline_s, f"{topic} never came; came: {self.topics}"
            time.sleep(0.01)


def topic(name: str, leaf: str) -> str:
    tenant, gateway = name.split("/")
    return GatewayName(tenant, gateway).topic(leaf)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca.pem, tls_cert and tls_key for localhost."""
    folder = tmp_path_factory.mktemp("authority")
    ca = trustme.CA()
    certificate = ca.issue_cert("localhost", HOST)
    ca.cert_pem.write_to_path(folder / "ca.pem")
    certificate.private_key_pem.write_to_path(folder / "tls_key")
    for pem in certificate.cert_chain_pems:
        pem.write_to_path(folder / "tls_cert", append=True)
    return folder


@contextmanager
def shipped_mosquitto(folder: Path, authority: Path, passwords: Path) -> Iterator[tuple[int, int]]:
    """The shipped mosquitto.conf and ACL, with paths and ports moved: (plain port, TLS port)."""
    program = find(catalogue.MOSQUITTO)
    plain, tls = free_port(), free_port()
    text = (DEPLOY / "mosquitto.conf").read_text()
    for shipped, here in (
        ("/run/secrets/mosquitto_passwords", str(passwords)),
        ("/run/secrets/tls_cert", str(authority / "tls_cert")),
        ("/run/secrets/tls_key", str(authority / "tls_key")),
        ("/mosquitto/config/mosquitto.acl", str(folder / "mosquitto.acl")),
        ("listener 8883", f"listener {tls} {HOST}"),
        ("listener 1883", f"listener {plain}"),
    ):
        assert text.count(shipped) == 1, shipped
        text = text.replace(shipped, here)
    shutil.copy(DEPLOY / "mosquitto.acl", folder)
    (folder / "mosquitto.conf").write_text(text + ("user root\n" if os.geteuid() == 0 else ""))
    broker = ServerProcess(
        program=program,
        binary="mosquitto",
        arguments=("-c", str(folder / "mosquitto.conf")),
        folder=folder,
        ready=lambda: port_open(plain) and port_open(tls),
    )
    try:
        broker.start()
        yield plain, tls
    finally:
        broker.kill()


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory, authority: Path) -> Iterator[tuple[int, int]]:
    folder = tmp_path_factory.mktemp("mosquitto")
    passwords = folder / "passwords"
    passwords.touch(mode=0o600)
    passwords.write_text("".join(f"{user}:{mosquitto_password(word)}\n" for user, word in WORDS.items()))
    try:
        with shipped_mosquitto(folder, authority, passwords) as ports:
            yield ports
    except ServerMissing as missing:
        pytest.fail(str(missing), pytrace=False)


def test_mosquitto_conf_lets_a_gateway_and_the_cloud_talk(broker: tuple[int, int]) -> None:
    with connected(broker[0], CLOUD, WORDS[CLOUD]) as cloud, connected(broker[0], ONE, WORDS[ONE]) as gateway:
        at_cloud, at_gateway = Heard(cloud), Heard(gateway)
        for leaf in UPWARD:
            assert granted(cloud, f"{TOPIC_ROOT}/+/+/{leaf}")
        for leaf in DOWNWARD:
            assert granted(gateway, topic(ONE, leaf))
        for leaf in UPWARD:
            gateway.publish(topic(ONE, leaf), b"x", qos=1)
            at_cloud.wait_for(topic(ONE, leaf))
        for leaf in DOWNWARD:
            cloud.publish(topic(ONE, leaf), b"x", qos=1)
            at_gateway.wait_for(topic(ONE, leaf))


@pytest.mark.parametrize("victim", [OTHER, STRANGER])
def test_mosquitto_conf_keeps_a_gateway_from_speaking_as_another(
    broker: tuple[int, int], victim: str
) -> None:
    with connected(broker[0], CLOUD, WORDS[CLOUD]) as cloud, connected(broker[0], ONE, WORDS[ONE]) as gateway:
        heard = Heard(cloud)
        assert granted(cloud, f"{TOPIC_ROOT}/+/+/up")
        gateway.publish(topic(victim, "up"), b"forged", qos=1)
        gateway.publish(topic(ONE, "up"), b"honest", qos=1)
        heard.wait_for(topic(ONE, "up"))
        assert heard.topics == {topic(ONE, "up")}


def test_mosquitto_conf_keeps_a_gateway_from_hearing_another_or_the_wildcards(
    broker: tuple[int, int],
) -> None:
    with connected(broker[0], CLOUD, WORDS[CLOUD]) as cloud, connected(broker[0], ONE, WORDS[ONE]) as spy:
        heard = Heard(spy)
        for wanted in (topic(OTHER, "cmd"), topic(STRANGER, "cmd"), f"{TOPIC_ROOT}/+/+/cmd", "#"):
            granted(spy, wanted)  # Mosquitto may grant it and hold the messages back
        assert granted(spy, topic(ONE, "cmd"))
        for name in (OTHER, STRANGER, ONE):
            cloud.publish(topic(name, "cmd"), b"x", qos=1)
        heard.wait_for(topic(ONE, "cmd"))
        assert heard.topics == {topic(ONE, "cmd")}


def test_mosquitto_conf_refuses_the_anonymous_and_a_wrong_password(broker: tuple[int, int]) -> None:
    for user, password in ((ONE, "wrong"), ("", "")):
        client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        if user:
            client.username_pw_set(user, password)
        answers: list[ReasonCode] = []
        client.on_connect = lambda _c, _d, _f, reason, _p, answers=answers: answers.append(reason)
        client.connect(HOST, broker[0])
        deadline_s = time.monotonic() + DEADLINE_S
        while not answers and time.monotonic() < deadline_s:
            client.loop(timeout=0.1)
        assert answers
        assert answers[0].is_failure


def test_mosquitto_conf_serves_tls_to_the_outside(broker: tuple[int, int], authority: Path) -> None:
    with connected(broker[1], ONE, WORDS[ONE], ca=authority / "ca.pem") as gateway:
        assert granted(gateway, topic(ONE, "ack"))


@contextmanager
def shipped_nats(folder: Path, authority: Path) -> Iterator[int]:
    """The shipped nats.conf and its users, with paths and ports moved: the MQTT port."""
    program = find(catalogue.NATS)
    mqtt_port, port, monitor = free_port(), free_port(), free_port()
    text = (DEPLOY / "nats.conf").read_text()
    for shipped, here in (
        ("127.0.0.1:4222", f"{HOST}:{port}"),
        ("127.0.0.1:8222", f"{HOST}:{monitor}"),
        ("0.0.0.0:8883", f"{HOST}:{mqtt_port}"),
        ("/var/lib/nats", str(folder / "data")),
        ("/etc/nats/tls.crt", str(authority / "tls_cert")),
        ("/etc/nats/tls.key", str(authority / "tls_key")),
    ):
        assert text.count(shipped) == 1, shipped
        text = text.replace(shipped, here)
    (folder / "nats.conf").write_text(text)
    shutil.copy(DEPLOY / "nats-users.conf", folder)
    server = ServerProcess(
        program=program,
        binary="nats-server",
        arguments=("-c", str(folder / "nats.conf")),
        folder=folder,
        ready=lambda: port_open(mqtt_port),
        environment={
            "HEADGATE_CLOUD_PASSWORD": f'"{WORDS[CLOUD]}"',
            "HEADGATE_ACME_PLANT_1_PASSWORD": f'"{WORDS[ONE]}"',
        },
    )
    try:
        server.start()
        yield mqtt_port
    finally:
        server.kill()


def test_nats_conf_lets_a_gateway_talk_over_tls_and_only_as_itself(tmp_path: Path, authority: Path) -> None:
    ca = authority / "ca.pem"
    with (
        shipped_nats(tmp_path, authority) as port,
        connected(port, CLOUD, WORDS[CLOUD], version=mqtt.MQTTv311, ca=ca) as cloud,
        connected(port, ONE, WORDS[ONE], version=mqtt.MQTTv311, ca=ca) as gateway,
    ):
        at_cloud, at_gateway = Heard(cloud), Heard(gateway)
        assert granted(cloud, f"{TOPIC_ROOT}/+/+/up")
        assert granted(gateway, topic(ONE, "ack"))
        assert not granted(gateway, topic(OTHER, "ack"))
        gateway.publish(topic(OTHER, "up"), b"forged", qos=1)
        gateway.publish(topic(ONE, "up"), b"honest", qos=1)
        at_cloud.wait_for(topic(ONE, "up"))
        assert at_cloud.topics == {topic(ONE, "up")}
        cloud.publish(topic(ONE, "ack"), b"x", qos=0)
        at_gateway.wait_for(topic(ONE, "ack"))


# --------------------------------------------------------------------------------------------- units


@pytest.fixture(scope="module")
def systemd_analyze() -> str:
    try:
        return str(find(catalogue.SYSTEMD).path)
    except ServerMissing as missing:
        pytest.fail(str(missing), pytrace=False)


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_finds_nothing_wrong_with_a_unit(systemd_analyze: str, unit: str, tmp_path: Path) -> None:
    """Its program is not installed in /opt here, so the copy that is verified names the one that is."""
    text = (DEPLOY / unit).read_text()
    program = re.search(r"^ExecStart=(\S+)", text, re.MULTILINE)
    assert program is not None
    here = Path(sys.executable).parent / Path(program[1]).name
    assert here.exists(), f"{unit} starts a program that this project does not install"
    (tmp_path / unit).write_text(text.replace(program[1], str(here)))
    done = subprocess.run(
        [systemd_analyze, "verify", "--man=no", str(tmp_path / unit)],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S * 2,
        env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"},
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if unit in line]
    assert (done.returncode, said) == (0, []), done.stdout + done.stderr


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_is_hardened_well_beyond_what_systemd_calls_safe(systemd_analyze: str, unit: str) -> None:
    done = subprocess.run(
        [systemd_analyze, "security", "--offline=yes", "--threshold=25", str(DEPLOY / unit)],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S * 2,
    )
    assert done.returncode == 0, done.stdout + done.stderr
