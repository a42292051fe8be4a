"""`headgate-cloud` on the command line."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cloud import cli
from cloud.cli import main

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "config/samples/cloud.toml"


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_help_answers_at_once_and_loads_nothing_heavy() -> None:
    heavy = (
        "fastapi",
        "uvicorn",
        "sqlalchemy",
        "deltalake",
        "pyarrow",
        "paho",
        "numpy",
        "apscheduler",
        "zstandard",
    )
    code = (
        "import sys; sys.argv = ['headgate-cloud', '--help']\n"
        "from cloud.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    took_s = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.stdout.endswith("[]\n")
    assert "serve" in done.stdout
    # 0.3 s is the promise. CPU time, which is all of it on an idle machine: others use this one too.
    assert min(took_s) < 0.3, f"{min(took_s):.2f} s"


def every_command(
    group: click.Group, ctx: click.Context, path: tuple[str, ...] = ()
) -> list[tuple[str, ...]]:
    out = []
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        out.append((*path, name))
        if isinstance(command, click.Group):
            out += every_command(command, click.Context(command), (*path, name))
    return out


@pytest.mark.parametrize("path", every_command(main, click.Context(main)), ids=" ".join)
def test_every_command_has_help_that_says_something(path: tuple[str, ...]) -> None:
    code, output = run(*path, "--help")
    assert code == 0
    assert len(output.split("\n\n")[1].strip()) > 20


def test_a_command_of_another_module_is_loaded_only_when_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "borrowed_commands.py").write_text(
        "import click\n\n@click.group()\ndef side_door() -> None:\n    'Through the side.'\n\n"
        "@side_door.command()\n@click.argument('word')\ndef say(word: str) -> None:\n    'Say it.'\n"
        "    click.echo('said ' + word)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(cli.ELSEWHERE, "side-door", ("borrowed_commands", "Somewhere else."))
    assert "Somewhere else." in run("--help")[1]
    assert "borrowed_commands" not in sys.modules
    assert run("side-door", "say", "hello") == (0, "said hello\n")
    assert "Through the side." in run("side-door", "--help")[1]


def test_a_command_that_is_not_there_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.ELSEWHERE, "nowhere", ("cloud.no_such_module", "Nothing."))
    assert "nowhere" not in run("--help")[1]
    code, output = run("nowhere")
    assert code == 2
    assert "No such command" in output


def test_config_check_accepts_the_sample_and_notes_what_this_machine_lacks() -> None:
    code, output = run("config", "check", str(SAMPLE))
    assert code == 0
    assert f"{SAMPLE}: ok" in output
    assert "note: on this machine gateway[0] (acme/plant-1)" in output


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[server]\nport = 99999", "cloud.toml:2: server.port"),
        ("[server\n", "cloud.toml:1: not valid TOML"),
        ("[servre]\n", "did you mean 'server'?"),
        ('[server]\nhost = "0.0.0.0"\n', "cloud.toml:2: server.host"),
        ("[journal]\nkeep_hour = 1\n", "did you mean 'keep_hours'?"),
    ],
)
def test_config_check_says_where_and_what(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "cloud.toml"
    file.write_text(text)
    code, output = run("config", "check", str(file))
    assert code == 2
    assert said in output
    assert run("serve", "--config", str(file)) == (code, output)


def test_serve_without_a_configuration_says_how_to_give_one() -> None:
    code, output = run("serve")
    assert code == 2
    assert "headgate-cloud serve --config FILE" in output


def test_a_token_is_random_private_and_never_overwritten(tmp_path: Path) -> None:
    files = [tmp_path / "one", tmp_path / "two"]
    old = os.umask(0)
    try:
        for file in files:
            code, output = run("token", str(file))
            assert code == 0
            assert file.read_text().strip() not in output
    finally:
        os.umask(old)
    words = {file.read_text().strip() for file in files}
    assert len(words) == 2
    assert all(len(word) == 43 for word in words)  # 32 bytes, url-safe
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    before = files[0].read_text()
    code, output = run("token", str(files[0]))
    assert code == 1
    assert "never overwritten" in output
    assert files[0].read_text() == before
    code, output = run("token", str(tmp_path / "no/such/folder"))
    assert code == 1
    assert "Traceback" not in output
