"""The support archive: all that is known here, and no secret."""

from __future__ import annotations

import io
import json
import stat
import tarfile
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.cli import main
from agent.report import REMOVED, archive, end_of, scrubbed, secrets_in

TOKEN = "ZmllbGQtdGVjaG5pY2lhbg-0815"


S = "hunter2-and-more"


@pytest.mark.parametrize(
    "text",
    [
        # TOML
        f'password = "{S}"',
        f"password = '{S}'",
        f'# password = "{S}"',
        f'options = {{ user = "u", password = "{S}" }}',
        f'api_key="{S}"',
        f'key = "{S}"',
        f'options = {{ address = "AA:BB", key = "{S}" }}',
        f'keys = {{ "AA:BB" = "{S}" }}',
        f'# bindkey = "{S}"',
        f'token = """\nx\n{S}\n"""',
        f"token = '''\n{S}\n'''",
        f'passwords = [\n  "a]b",\n  "{S}",\n]',
        f'secrets = [["a"], ["{S}"]]',
        f'password = {{ value = "{S}" }}',
        f'auth.password.value = "{S}"',
        f'"pass word" = "{S}"',
        f'[device.options.password]\nvalue = "{S}"\nother = 1',
        f'auth = ["user", "{S}"]',
        f'community = "{S}"',
        f'pwd = "{S}"',
        f'password = "unfinished {S}\nnext = 1',
        f'password = """unfinished\n{S}\nnext = 1',
        # headers
        f'"Authorization": "Bearer {S}"',
        f"Authorization: Bearer {S}",
        f'Authorization: Digest username="u", response="{S}"',
        f"Authorization: Token {S}",
        f"authorization: Basic {S}==",
        f"X-API-Key: {S}",
        f'headers = {{ "X-Api-Key" = "{S}" }}',
        f'headers = [["Authorization", "{S}"]]',
        f'headers = ["Authorization: Bearer {S}"]',
        f"(b'Authorization', b'Basic {S}')",
        f"Cookie: a=b; session={S}",
        # addresses
        f"mqtt://plant:{S}@broker.example:8883",
        f"https://{S}@cloud.example/x",
        f"mqtt://u:p@{S}@host/",
        f"mqtt://u:p/{S}@host/",
        f'url = "http://10.0.0.1/data?token={S}&x=1"',
        f'url = "http://10.0.0.1/data?x=1&api-key={S}"',
        f'url = "http://10.0.0.1/data?key={S}&q=1"',
        f"GET /cgi?user=admin&pwd={S} HTTP/1.1",
        # environments, command lines, words
        f"headgate.token: {S}",
        f"Environment=MQTT_PASSWORD={S}",
        f'Environment="MQTT_PASSWORD=two {S}"',
        f'Environment="A=b" "HEADGATE_TOKEN={S}"',
        f"PASSWORD=ab#cd,ef;gh}}{S}",
        f"password: correct horse {S}",
        f"Server=x;Uid=a;Pwd={S};",
        f"mosquitto_pub --password {S} -t x",
        f"mosquitto_pub --password={S} -t x",
        f"mosquitto_pub --password 'x {S}' -t x",
        f"curl --api-key {S} -u admin:{S} http://x",
        f"login with password '{S}' refused",
        # JSON, and JSON in JSON
        f'{{"key": "{S}"}}',
        f'{{"password": "a\\"{S}"}}',
        f'{{"credentials": {{"user": "x", "pw": "{S}"}}}}',
        f'{{"text": "{{\\"token\\": \\"{S}\\"}}"}}',
        f'{{"a": "{{\\\\\\"password\\\\\\": \\\\\\"{S}\\\\\\"}}"}}',
        f"{{'password': '{S}'}}",
        # keys and tokens by their looks
        f"-----BEGIN EC PRIVATE KEY-----\n{S}\n-----END EC PRIVATE KEY-----",
        f"-----BEGIN PRIVATE KEY-----\n{S}",
        f"seen eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.{S}",
    ],
)
def test_a_secret_is_taken_out_wherever_it_stands(text: str) -> None:
    cleaned = scrubbed(text)
    assert S not in cleaned
    assert REMOVED in cleaned


@pytest.mark.parametrize(
    "seen",
    [
        "seen: a\"b/c d'é-secret.",
        r'{"why": "a\"b/c d\'é-secret"}'.replace(r"\'", "'"),
        r'{"why": "a\"b/c d\u0027\u00e9-secret"}'.replace(r"\u0027", "'"),
        "GET /x?y=a%22b%2Fc%20d%27%C3%A9-secret HTTP/1.1",
        "GET /x?y=a%22b%2Fc+d%27%C3%A9-secret HTTP/1.1",
    ],
)
def test_a_known_secret_is_taken_out_however_it_is_written(seen: str) -> None:
    cleaned = scrubbed(seen, ["a\"b/c d'é-secret"])
    assert "secret" not in cleaned
    assert REMOVED in cleaned


def test_what_a_configuration_holds_is_known_and_found_elsewhere() -> None:
    found = secrets_in(
        {
            "token_file": "/etc/token",
            "name": "boiler",
            "device": [
                {
                    "options": {
                        "url": "http://u:pa55-1@h/?sig=pa55-2&x=1",
                        "headers": {"X-Api-Key": "pa55-3", "Accept": "text/plain"},
                        "lines": ["Authorization: Bearer pa55-4", "Host: h"],
                        "pairs": [["Cookie", "pa55-5"], ["Accept", "*/*"]],
                        "passwords": {"first": ["pa55-6", 55555]},
                        "auth": "basic",
                        "pin": "1",
                    }
                }
            ],
        }
    )
    assert found == ["pa55-1", "pa55-2", "pa55-3", "Bearer pa55-4", "pa55-5", "pa55-6", "55555"]


@pytest.mark.parametrize(
    "text",
    [
        'token_file = "/etc/headgate/gateway-token"',
        'token_env = "HEADGATE_TOKEN"',
        'key_file = "/etc/headgate/cold-room.key"',
        'name = "boiler"\nregister = 4',
        "the token of acme/plant-1 was refused",
        "2026-11-23 boiler: no answer within 5 s",
        "mqtts://broker.example:8883",
        "http://station.example/data.json?period=1&format=csv",
        "cannot read /etc/headgate/gateway-token: Permission denied",
        "uplink.token_file: /etc/headgate/gateway-token: it is not there",
        '{"check": "credential", "level": "ok", "text": "/etc/headgate/gateway-token"}',
        'auth = "basic"',
        "as in ?appid=…).",
        "cookiecutter==2.6.0\nPyJWT==2.9.0\nkeyring==25.5",
        "unknown key 'registerr'; did you mean 'register'?",
        "ttyUSB0: no answer; key: value",
        "author: somebody, pinned: yes",
        "the password is not set\nnext line",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert scrubbed(text) == text


def test_what_was_json_is_json_afterwards() -> None:
    told = {
        "token": 12345,
        "psk": None,
        "devices": [{"why": 'login "x" failed, token: abc', "password": ["a", "b"]}],
        "text": json.dumps({"secret": 'a"b', "n": {"cookie": "c"}}),
        "last": 1,
    }
    found = json.loads(scrubbed(json.dumps(told)))
    assert found["last"] == 1
    assert found["devices"][0]["password"] == found["token"] == REMOVED
    assert json.loads(found["text"])["n"] == {"cookie": REMOVED}


def test_our_own_samples_lose_nothing() -> None:
    for file in [
        *Path("drivers").glob("*.toml"),
        *Path("drivers/models").glob("*.toml"),
        *Path("config").rglob("*.toml"),
    ]:
        assert scrubbed(file.read_text()) == file.read_text(), file


@pytest.mark.parametrize(
    "unit", ["a.", "-a", "token", "token ", "token: ", "token=x\n", "[", '"', 'password = "', 'pwd = [ "',
             '\\"psk\\": \\"', "\\", "http://", "http://a:", "://a:b@", "[token\n", 'token="""', "eyJ", "--token "],
)  # fmt: skip
def test_no_text_takes_long(unit: str) -> None:
    """A log is megabytes, and holds what devices sent. Where it grows with the square, this takes minutes."""
    began_s = time.process_time()
    scrubbed(unit * (200_000 // len(unit)))
    assert time.process_time() - began_s < 20


def test_of_a_long_log_the_end_is_kept_from_a_whole_line_on() -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    kept, was_cut = end_of(text, 100)
    assert was_cut
    assert text.endswith(kept)
    assert kept.startswith("line ")
    assert len(kept) <= 100
    assert end_of("short\n", 100) == ("short\n", False)


def test_the_same_content_makes_the_same_archive() -> None:
    files = {"b.txt": "2", "a.txt": "1"}
    assert archive("x", files, made_s=7) == archive("x", dict(reversed(files.items())), made_s=7)


def unpacked(path: Path) -> dict[str, str]:
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as tar:
        found = {}
        for entry in tar:
            held = tar.extractfile(entry)
            assert held is not None
            found[entry.name.split("/", 1)[1]] = held.read().decode()
        return found


def test_the_archive_tells_all_and_holds_no_secret(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    token.chmod(0o600)
    state = tmp_path / "state"
    state.mkdir()
    (state / "status.json").write_text(
        json.dumps({"gateway": "acme/plant-1", "why": f"login with {TOKEN}, then pa55-w0rd"})
    )
    file = tmp_path / "agent.toml"
    file.write_text(
        f'[gateway]\ntenant = "acme"\nname = "plant-1"\nstate_dir = "{state}"\n'
        f'[uplink]\nkind = "none"\n# once it was {TOKEN}\ntoken_file = "{token}"\n'
        f'[[device]]\nname = "x"\ndriver = "simulator"\n[device.options]\npassword = "pa55-w0rd"\n'
    )
    done = CliRunner().invoke(
        main, ["report", str(tmp_path / "r.tar.gz"), "--config", str(file), "--offline", "--json"]
    )
    assert done.exit_code == 0, done.output
    found = unpacked(tmp_path / "r.tar.gz")
    assert sorted(found) == json.loads(done.output)["contents"]
    assert {"config.toml", "doctor.json", "status.json", "packages.txt", "contents.txt"} <= set(found)
    assert "[[device]]" in found["config.toml"]
    everything = "".join(found.values())
    assert TOKEN not in everything
    assert "pa55" not in everything
    assert stat.S_IMODE((tmp_path / "r.tar.gz").stat().st_mode) == 0o600


def test_a_broken_configuration_can_be_reported_too(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text('[gateway\npassword = "pa55-w0rd"\n')
    words = ["report", str(tmp_path), "--config", str(file), "--state-dir", str(tmp_path), "--offline"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    (made,) = tmp_path.glob("headgate-report-*.tar.gz")
    found = unpacked(made)
    assert "[gateway" in found["config.toml"]
    assert "pa55" not in "".join(found.values())


def test_a_place_that_cannot_be_written_is_said_with_the_remedy(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        main,
        ["report", str(tmp_path / "no" / "r.tar.gz"), "--config", str(tmp_path / "none.toml"), "--offline"],
    )
    assert done.exit_code == 2
    assert "headgate report /tmp" in done.output
