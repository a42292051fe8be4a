"""An engineer's way: `headgate driver new`, and the worked example of the docs, installed as a stranger's package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from agent.commands_driver import files_of
from drivers.registry import driver_types

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "docs" / "examples" / "headgate-pms5003"
BIN = Path(sys.executable).parent
DEADLINE_S = 110.0


def run(
    *command: str | Path, cwd: Path, path: Path | None = None, deadline_s: float = DEADLINE_S
) -> subprocess.CompletedProcess[str]:
    """A command somewhere else, with `path` as one more place where packages are installed."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "COV"))}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**kept, "PYTHONDONTWRITEBYTECODE": "1", **({"PYTHONPATH": str(path)} if path else {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=deadline_s,
        stdin=subprocess.DEVNULL,
    )


def installed(package: Path, into: Path) -> Path:
    """Built and installed as pip does for anybody, without an index."""
    done = run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation",
        "--disable-pip-version-check", "--target", into, package, cwd=into.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return into


def copied(source: Path, to: Path) -> Path:
    """What git would hand to a stranger."""
    for file in source.rglob("*"):
        if file.is_file() and not re.search(r"__pycache__|_cache/|\.pyc$|/build/|/dist/", str(file)):
            target = to / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return to


def conforms(package: Path, site: Path) -> None:
    """Its tests pass against the installed package, and nothing was skipped."""
    tested = run(
        sys.executable, "-m", "pytest", "-q", "-o", "pythonpath=tests", "-p", "no:cacheprovider",
        cwd=package, path=site,
    )  # fmt: skip
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "skipped" not in tested.stdout
    assert int(re.findall(r"(\d+) passed", tested.stdout)[0]) >= 17


def is_typed(package: Path) -> None:
    typed = run(BIN / "mypy", "--strict", cwd=package)
    assert typed.returncode == 0, typed.stdout + typed.stderr


@pytest.mark.parametrize("push", [False, True], ids=["pull", "push"])
def test_what_driver_new_writes_passes_as_an_installed_package(tmp_path: Path, *, push: bool) -> None:
    made = run(BIN / "headgate", "driver", "new", "acme_probe", *(["--push"] if push else []), cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    package = tmp_path / "headgate-acme-probe"
    site = installed(package, tmp_path / "site")
    conforms(package, site)
    is_typed(package)
    checked = run(BIN / "headgate", "config", "check", "try.toml", cwd=package, path=site)
    assert checked.returncode == 0, checked.stderr
    assert "1 devices, 2 points" in checked.stdout
    listed = run(BIN / "headgate", "drivers", cwd=package, path=site)
    assert re.search(r"acme_probe +headgate_acme_probe\.driver:AcmeProbeDriver", listed.stdout)


@pytest.mark.parametrize("push", [False, True], ids=["pull", "push"])
def test_what_driver_new_writes_is_as_tidy_as_our_own(tmp_path: Path, *, push: bool) -> None:
    for name, text in files_of("ab", push=push).items():
        assert "@" not in re.sub(r"^ *@|\w@", "", text, flags=re.MULTILINE), name  # decorators only
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    rules = ("--config", ROOT / "pyproject.toml")
    tidy = run(BIN / "ruff", "check", *rules, "--ignore", "S101,I001", ".", cwd=tmp_path)
    assert tidy.returncode == 0, tidy.stdout
    tidy = run(BIN / "ruff", "format", *rules, "--check", ".", cwd=tmp_path)
    assert tidy.returncode == 0, tidy.stdout


def test_driver_new_tells_what_it_wrote_as_json(tmp_path: Path) -> None:
    made = run(BIN / "headgate", "driver", "new", "x1", "--folder", "there/mine", "--json", cwd=tmp_path)
    told = json.loads(made.stdout)
    assert told["folder"] == "there/mine"
    assert told["driver"] == "x1"
    written = {
        str(f.relative_to(tmp_path / "there/mine")) for f in (tmp_path / "there").rglob("*") if f.is_file()
    }
    assert set(told["files"]) == written == set(files_of("x1", push=False))
    assert (
        tomllib.loads((tmp_path / "there/mine/pyproject.toml").read_text())["project"]["name"]
        == "headgate-x1"
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("modbus", "installed already"),
        ("Acme", "cannot be a driver's name"),
        ("a-b", "small letters"),
        ("../x", "cannot be a driver's name"),
        ("x__y", "single underscores"),
        ("x" * 41, "at most 40"),
        ("class", "is a word of Python"),
    ],
)
def test_driver_new_refuses_a_name_that_cannot_be(tmp_path: Path, name: str, says: str) -> None:
    refused = run(BIN / "headgate", "driver", "new", name, cwd=tmp_path)
    assert refused.returncode == 2
    assert says in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_driver_new_overwrites_nothing_and_leaves_nothing_half_made(tmp_path: Path) -> None:
    (tmp_path / "headgate-abc").mkdir()
    refused = run(BIN / "headgate", "driver", "new", "abc", cwd=tmp_path)
    assert refused.returncode == 2
    assert "nothing is overwritten" in refused.stderr
    assert list((tmp_path / "headgate-abc").iterdir()) == []
    (tmp_path / "file").write_text("")
    refused = run(BIN / "headgate", "driver", "new", "abc", "--folder", "file/x", cwd=tmp_path)
    assert refused.returncode == 2
    assert "cannot be written" in refused.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "headgate-abc"]


# --------------------------------------------------------------------------------- the docs' example


def test_the_example_driver_is_under_a_hundred_lines_and_imports_the_contract_alone() -> None:
    text = (EXAMPLE / "src/headgate_pms5003/driver.py").read_text()
    assert len(text.splitlines()) < 100
    ours = set(
        re.findall(r"^(?:from|import) ((?:agent|drivers|sync|cloud|firmware|config)\S*)", text, re.MULTILINE)
    )
    assert ours == {"drivers.contract"}


def test_the_docs_show_the_example_to_the_letter() -> None:
    docs = (ROOT / "docs/writing-a-driver.md").read_text()
    shown = re.findall(r"<!-- include: (\S+) -->\n```\w+\n(.*?)```\n<!-- end -->", docs, re.DOTALL)
    assert shown
    for name, text in shown:
        assert text == (ROOT / name).read_text(), f"docs/writing-a-driver.md shows an old {name}"


def test_every_file_and_command_that_the_docs_name_is_there() -> None:
    docs = (ROOT / "docs/writing-a-driver.md").read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", docs):
        assert (ROOT / "docs" / target).exists(), target
    for word in re.findall(r"`drivers/(\w+\.py)`", docs):
        assert (ROOT / "drivers" / word).exists(), word


def test_the_example_conforms_as_an_installed_package_and_is_typed(tmp_path: Path) -> None:
    package = copied(EXAMPLE, tmp_path / "headgate-pms5003")
    conforms(package, installed(package, tmp_path / "site"))
    is_typed(package)


def test_the_example_runs_in_the_agent_from_sensor_to_buffer(tmp_path: Path) -> None:
    package = copied(EXAMPLE, tmp_path / "headgate-pms5003")
    site = installed(package, tmp_path / "site")
    text = (package / "try.toml").read_text()
    port = tmp_path / "air" / "sensor"
    port.parent.mkdir()
    text = re.sub(r'port = ".*"', f'port = "{port}"', text).replace('"state"', f'"{tmp_path / "state"}"')
    config = tmp_path / "agent.toml"
    config.write_text(text)
    checked = run(BIN / "headgate", "config", "check", config, cwd=tmp_path, path=site)
    assert checked.returncode == 0, checked.stderr
    serve = (
        "import sys, time; from pathlib import Path; from sensor import Sensor\n"
        f"it = Sensor(Path({str(port.parent)!r}))\n"
        "while True: it.speak(); time.sleep(0.1)"
    )
    kept = {**os.environ, "PYTHONPATH": str(package / "tests")}
    with subprocess.Popen([sys.executable, "-c", serve], env=kept) as sensor:
        agent = subprocess.Popen(
            [BIN / "headgate", "run", "--config", config],
            env={**os.environ, "PYTHONPATH": str(site)},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            device: dict[str, object] = {}
            give_up_s = time.monotonic() + 60
            while device.get("state") != "ok" and time.monotonic() < give_up_s:
                told = run(BIN / "headgate", "status", "--config", config, "--json", cwd=tmp_path, path=site)
                if told.stdout:
                    device = next(iter(json.loads(told.stdout)["status"].get("devices", [])), {})
                time.sleep(0.2)
        finally:
            agent.terminate()
            _, said = agent.communicate(timeout=20)
            sensor.kill()
    assert device.get("state") == "ok", (device, said)
    assert "air: first scan, 2 of 2 points good" in said


def test_our_own_drivers_are_where_a_strangers_would_be() -> None:
    assert {"modbus", "serial_line", "ble", "simulator"} <= driver_types().keys()
