"""The support archive: all that is known here, and no secret."""

from __future__ import annotations

import io
import json
import stat
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.cli import main
from agent.report import REMOVED, archive, end_of, scrubbed

TOKEN = "ZmllbGQtdGVjaG5pY2lhbg-0815"


@pytest.mark.parametrize(
    "text",
    [
        'password = "hunter2-and-more"',
        "password = 'hunter2-and-more'",
        '# password = "hunter2-and-more"',
        'options = { user = "u", password = "hunter2-and-more" }',
        'api_key="hunter2-and-more"',
        '"Authorization": "Bearer hunter2-and-more"',
        "Authorization: Bearer hunter2-and-more",
        "authorization: Basic hunter2-and-more==",
        'key = "hunter2-and-more"',
        '# bindkey = "hunter2-and-more"',
        "headgate.token: hunter2-and-more",
        "mqtt://plant:hunter2-and-more@broker.example:8883",
        "https://hunter2-and-more@cloud.example/x",
        'token = """\nhunter2-and-more\n"""',
        "-----BEGIN EC PRIVATE KEY-----\nhunter2-and-more\n-----END EC PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\nhunter2-and-more",
        "seen: hunter2-and-more.",
    ],
)
def test_a_secret_is_taken_out_wherever_it_stands(text: str) -> None:
    cleaned = scrubbed(text, ["hunter2-and-more"] if text.startswith("seen") else [])
    assert "hunter2" not in cleaned
    assert REMOVED in cleaned


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
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert scrubbed(text) == text


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
    (state / "status.json").write_text(json.dumps({"gateway": "acme/plant-1", "why": f"login with {TOKEN}"}))
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
