"""The cloud's configuration: the sample, the bounds, and what cannot stand together."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloud.preflight import load_config, missing_secrets, read_secrets
from config.cloud import Cloud, conflicts
from config.load import ConfigFileError, convert, parse_toml
from sync.identity import GatewayName, IdentityError

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "config/samples/cloud.toml"
SECTIONS = ("server", "mqtt", "gateway", "journal", "embedded", "archive", "influxdb", "mysql", "limits")


def loaded(text: str) -> Cloud:
    config = convert(parse_toml(text), Cloud, text=text)
    found = conflicts(config)
    if found:
        raise ConfigFileError(found[0].text, path=found[0].path)
    return config


# --- the sample ---


def uncommented() -> dict[str, Any]:
    """The sample with every `# key = value` and `# [table]` in force; prose (`##`) stays out."""
    lines = [
        re.sub(r"^# ", "", line) for line in SAMPLE.read_text().splitlines() if not line.startswith("##")
    ]
    return tomllib.loads("\n".join(lines))


def test_the_sample_loads_as_it_is() -> None:
    config = load_config(SAMPLE)
    assert config.gateway[0].token_file == "/etc/headgate/gateways/acme-plant-1.token"
    assert config == msgspec.structs.replace(Cloud(), gateway=config.gateway)


def test_the_sample_names_every_key_once_and_shows_each_default() -> None:
    shown = uncommented()
    assert set(shown) == set(SECTIONS) == set(Cloud.__struct_fields__)
    for field in msgspec.structs.fields(Cloud):
        table = shown[field.name][0] if field.name == "gateway" else shown[field.name]
        kind = field.type
        struct = next(
            t
            for t in (kind, *getattr(kind, "__args__", ()))
            if isinstance(t, type) and issubclass(t, msgspec.Struct)
        )
        assert set(table) == set(struct.__struct_fields__), field.name
        for key in msgspec.structs.fields(struct):
            if key.default is not None and not key.required:
                assert table[key.name] == key.default, f"{field.name}.{key.name}"


def test_every_key_of_the_sample_has_a_word_above_it() -> None:
    above = ""
    for line in SAMPLE.read_text().splitlines():
        key = re.match(r"(?:# )?(\w+?)(?:_file|_env)? = ", line)
        if key:
            # The file and the variable of one secret share their word.
            assert above.startswith("##") or above == key.group(1), line
            above = key.group(1)
        else:
            above = line


def test_the_whole_sample_is_valid_when_everything_is_switched_on() -> None:
    config = msgspec.convert(uncommented(), Cloud, strict=True)
    assert conflicts(config) == []


# --- bounds ---

BAD = [
    ('[server]\nport = 70000', "server.port"),
    ('[server]\nport = -1', "server.port"),
    ('[server]\nport = "8080"', "server.port"),
    ('[server]\ndata_dir = ""', "server.data_dir"),
    ('[server]\nlog_level = "loud"', "server.log_level"),
    ("[server]\ndrain_s = -1", "server.drain_s"),
    ("[server]\nprot = 1", "server.prot"),
    ("[journal]\nmax_mb = 1", "journal.max_mb"),
    ("[journal]\nkeep_hours = -1.0", "journal.keep_hours"),
    ("[journal]\ncommit_interval_ms = 5000", "journal.commit_interval_ms"),
    ('[journal]\nkind = "postgres"', "journal.kind"),
    ("[limits]\nmax_inflight = 0", "limits.max_inflight"),
    ("[limits]\nmemory_mb = 1", "limits.memory_mb"),
    ('[[gateway]]\ntenant = "a b"\nname = "x"', "gateway[0].tenant"),
    ('[[gateway]]\ntenant = "a"\nname = "x/y"', "gateway[0].name"),
    ('[[gateway]]\ntenant = "a"', "gateway[0].name"),
    ('[influxdb]\nurl = "localhost:8086"\norg = "a"', "influxdb.url"),
    ('[influxdb]\norg = "a"', "influxdb.url"),
    ("[influxdb]\nurl = \"http://x\"\norg = \"a\"\nbatch_lines = 0", "influxdb.batch_lines"),
    ('[mysql]\nhost = "h"\ndatabase = "a-b"', "mysql.database"),
    ('[mysql]\nhost = "h"\npool_size = 0', "mysql.pool_size"),
    ("[mqtt]\nkeepalive_s = 1", "mqtt.keepalive_s"),
    ('[archive]\nbucket = "UPPER"', "archive.bucket"),
    ("[archive]\ncommit_mb = 0", "archive.commit_mb"),
    ("[nonsense]\na = 1", "nonsense"),
    ("server = 3", "server"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "path"), BAD)
def test_a_value_out_of_bounds_is_refused_with_its_key_path(text: str, path: str) -> None:
    with pytest.raises(ConfigFileError) as refused:
        loaded(text)
    assert refused.value.path == path
    assert refused.value.text


def test_a_misspelt_key_is_refused_with_the_nearest_word() -> None:
    with pytest.raises(ConfigFileError, match="did you mean 'keep_hours'"):
        loaded("[journal]\nkeep_hour = 3")


# --- what cannot stand together ---

TOGETHER = [
    ('[server]\nhost = "0.0.0.0"', "server.host", "plaintext is refused"),
    ('[server]\nhost = "::"', "server.host", "plaintext is refused"),
    ('[server]\nhost = "cloud.example"', "server.host", "tls_cert_file"),
    ('[server]\ntls_cert_file = "x"', "server.tls_key_file", "come together"),
    ('[server]\ntls_key_file = "x"', "server.tls_cert_file", "come together"),
    ('[mqtt]\nhost = "broker.example"\ntls = false\npassword_env = "X"', "mqtt.tls", "plaintext is refused"),
    ("[mqtt]\ntls = false", "mqtt.password_file", "no default"),
    ('[[gateway]]\ntenant = "a"\nname = "b"', "gateway[0].token_file", "no default"),
    (
        '[[gateway]]\ntenant = "a"\nname = "b"\ntoken_env = "X"\n' * 2,
        "gateway[1].name", "already gateway[0]",
    ),
    ('[influxdb]\nurl = "http://x"\norg = "o"', "influxdb.token_file", "no default"),
    ('[mysql]\nhost = "localhost"', "mysql.password_file", "no default"),
    ('[mysql]\nhost = "db.example"\npassword_env = "X"', "mysql.ca_file", "plaintext is refused"),
    (
        '[influxdb]\nurl = "http://db.example:8086"\norg = "o"\ntoken_env = "X"',
        "influxdb.url",
        "plaintext is refused",
    ),
    (
        '[archive]\nendpoint = "http://s3.example"\naccess_key_env = "X"\nsecret_key_env = "Y"',
        "archive.endpoint",
        "plaintext is refused",
    ),
    ('[archive]\nendpoint = "https://s3"', "archive.access_key_file", "no default"),
    ("[embedded]\nenabled = false\n[archive]\nenabled = false", "embedded.enabled", "no sink is left"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "path", "why"), TOGETHER)
def test_what_cannot_stand_together_is_refused_with_the_remedy(text: str, path: str, why: str) -> None:
    with pytest.raises(ConfigFileError) as refused:
        loaded(text)
    assert refused.value.path == path
    assert why in refused.value.text


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
def test_loopback_needs_no_certificate(host: str) -> None:
    assert loaded(f'[server]\nhost = "{host}"').server.host == host


def test_the_file_and_the_line_are_told(tmp_path: Path) -> None:
    file = tmp_path / "cloud.toml"
    file.write_text('[server]\nport = 1\n\n[[gateway]]\ntenant = "a"\nname = "b"\n')
    with pytest.raises(
        ConfigFileError, match=rf"{re.escape(str(file))}:4: gateway\[0\].token_file: is missing"
    ):
        load_config(file)


# --- secrets ---


def with_secret(tmp_path: Path, word: str, mode: int = 0o600) -> Cloud:
    file = tmp_path / "token"
    file.write_text(word)
    file.chmod(mode)
    return loaded(f'[[gateway]]\ntenant = "a"\nname = "b"\ntoken_file = "{file}"')


def test_secrets_come_from_their_files(tmp_path: Path) -> None:
    secrets = read_secrets(with_secret(tmp_path, "a-token-that-is-long-enough\n"))
    assert secrets.gateways[GatewayName("a", "b")].reveal() == "a-token-that-is-long-enough"
    assert "long-enough" not in repr(secrets)


@pytest.mark.parametrize(
    ("word", "mode", "why"), [("short", 0o600, "too short"), ("x" * 40, 0o644, "chmod 600")]
)
def test_a_secret_that_is_weak_or_open_is_refused(tmp_path: Path, word: str, mode: int, why: str) -> None:
    config = with_secret(tmp_path, word, mode)
    with pytest.raises(IdentityError, match=why):
        read_secrets(config)
    assert why in str(missing_secrets(config))


def test_a_secret_that_is_not_there_names_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADGATE_NO_SUCH", raising=False)
    config = loaded('[[gateway]]\ntenant = "a"\nname = "b"\ntoken_env = "HEADGATE_NO_SUCH"')
    assert "a/b" in str(missing_secrets(config))
