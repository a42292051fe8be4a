"""The distribution: what it holds, what it leaves alone, what its locks pin, and that the gate sees a trespass."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
ROOMS = ("agent", "drivers", "sync", "cloud", "firmware", "config")
COMMANDS = ("headgate", "headgate-cloud", "headgate-release")
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
GATEWAY_NEVER = {"numpy", "pyarrow", "sqlalchemy", "fastapi", "pandas", "deltalake", "duckdb"}
DEADLINE_S = 60.0
# `--help` is to answer in 0.3 s on an idle machine (tests/benchmarks measures that); here only a heavy import
# that slipped to the top of a module is looked for, on a machine that may be busy.
HELP_DEADLINE_S = 5.0


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
        stdin=subprocess.DEVNULL,
    )


# --------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_of_ours_belongs_to_nobody_else(room: str) -> None:
    """The index holds packages that would overwrite `config` or `agent`, and pip says nothing of it."""
    owners = importlib.metadata.packages_distributions().get(room, [])
    # An editable install is one path, and lists no package: then nobody must claim the name.
    assert set(owners) <= {"headgate"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_of_ours_is_imported_from_here(room: str) -> None:
    said = run(sys.executable, "-c", f"import {room}; print({room}.__file__)", cwd=Path("/"))
    assert said.stdout.strip() == str(ROOT / room / "__init__.py"), said.stderr


def test_every_init_is_a_docstring_and_nothing_else() -> None:
    found = [path for room in ROOMS for path in (ROOT / room).rglob("__init__.py")]
    assert {ROOT / room / "__init__.py" for room in ROOMS} <= set(found)
    for path in found:
        body = ast.parse(path.read_text()).body
        assert len(body) == 1, path
        statement = body[0]
        assert isinstance(statement, ast.Expr), path
        assert isinstance(statement.value, ast.Constant), path
        assert isinstance(statement.value.value, str), path


# --------------------------------------------------------------------------------------------- locks


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_pins_every_line_by_hash_and_holds_no_address(lock: Path) -> None:
    text = lock.read_text()
    assert not re.search(
        r"(?i)https?:|//|^\s*(-i|--index|--extra-index|--find-links|--trusted)\b", text, re.M
    )
    pinned = re.split(r"(?m)^(?=\S)", text.replace("\\\n", " "))
    for line in filter(str.strip, pinned):
        assert re.match(r"[a-z0-9._-]+==\S+", line), line
        assert "--hash=sha256:" in line, line


def names(lock: Path) -> set[str]:
    return set(re.findall(r"(?m)^([a-z0-9._-]+)==", lock.read_text()))


def test_the_gateways_lock_holds_nothing_heavy() -> None:
    assert names(ROOT / "requirements" / "agent.lock") & GATEWAY_NEVER == set()


def test_the_locks_hold_what_the_extras_ask_for() -> None:
    """A dependency that was added without `make lock` is found here, not on a stranger's machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]

    def asked(*which: str) -> set[str]:
        lines = [*project["dependencies"], *(line for extra in which for line in extras[extra])]
        found = (re.match(r"[A-Za-z0-9._-]+", line) for line in lines)
        return {match[0].lower().replace("_", "-").replace(".", "-") for match in found if match} - {
            "headgate"
        }

    for lock, which in (("agent", ["agent"]), ("cloud", ["cloud"]), ("dev", list(extras))):
        locked = {
            name.replace("_", "-").replace(".", "-") for name in names(ROOT / "requirements" / f"{lock}.lock")
        }
        assert asked(*which) - locked == set(), lock


def test_what_is_installed_here_is_what_the_lock_pins() -> None:
    """Only where `make setup` made this environment: a hand-made one may hold more, but not other versions."""
    wrong = []
    pattern = re.compile(r"(?m)^([a-z0-9._-]+)==([^\s;]+)((?: ;[^\\\n]*)?)")
    for name, version, marker in pattern.findall((ROOT / "requirements" / "dev.lock").read_text()):
        if "python_full_version >= '3.12'" in marker and sys.version_info < (3, 12):
            continue
        if "python_full_version < '3.12'" in marker and sys.version_info >= (3, 12):
            continue
        installed = importlib.metadata.version(name)
        if installed != version:
            wrong.append(f"{name} {installed}, pinned {version}")
    assert wrong == []


# ------------------------------------------------------------------------------------------ the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in the wheel that this tree builds."""
    folder = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(path).namelist())


def test_the_wheel_holds_the_six_rooms_with_their_types_and_nothing_else(wheel: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(ROOMS)
    assert {f"{room}/py.typed" for room in ROOMS} <= wheel


def test_the_wheel_holds_every_module_sql_file_and_sample(wheel: set[str]) -> None:
    tracked = run("git", "ls-files", "--", *ROOMS)
    if tracked.returncode == 0 and tracked.stdout:
        files = [name for name in tracked.stdout.splitlines() if (ROOT / name).exists()]
    else:  # an unpacked sdist has no git
        files = [str(path.relative_to(ROOT)) for room in ROOMS for path in (ROOT / room).rglob("*.*")]
    wanted = {
        name for name in files if name.endswith((".py", ".sql", ".toml", ".html", ".css", ".js", ".service"))
    }
    assert wanted - wheel == set()


def test_the_wheel_holds_nothing_secret_or_made(wheel: set[str]) -> None:
    assert [
        name for name in wheel if re.search(r"secrets/|\.env$|__pycache__|\.pyc$|\.db$|\.sqlite$", name)
    ] == []


# --------------------------------------------------------------------------------------- the commands


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_answers_help_soon(command: str) -> None:
    started_s = time.monotonic()
    said = run(BIN / command, "--help")
    took_s = time.monotonic() - started_s
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("Usage:")
    assert took_s < HELP_DEADLINE_S


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command: str) -> None:
    target = next(
        entry for entry in importlib.metadata.entry_points(group="console_scripts") if entry.name == command
    )
    heavy = GATEWAY_NEVER | {"bleak", "httpx", "pymodbus", "cryptography", "rich", "uvicorn", "minio", "paho"}
    said = run(
        sys.executable,
        "-c",
        f"import sys, {target.module}\nprint(*({heavy!r} & set(sys.modules)))",
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.split() == []


@pytest.mark.parametrize("command", ["build", "sign", "publish"])
def test_the_release_program_says_plainly_what_it_cannot_do_yet(command: str) -> None:
    said = run(BIN / "headgate-release", command)
    assert said.returncode == 2
    assert "comes with the updates release" in said.stderr


def test_every_driver_that_is_declared_can_be_loaded() -> None:
    drivers = importlib.metadata.entry_points(group="headgate.drivers")
    assert {"modbus", "serial_line", "ble", "simulator"} <= drivers.names
    for entry in drivers.select():
        assert isinstance(entry.load(), type), entry


# -------------------------------------------------------------------------------------------- the gate


TRESPASSES = {
    "agent_imports_cloud": ("agent/trespass.py", "import cloud.journal"),
    "cloud_imports_agent": ("cloud/trespass.py", "import agent.clock"),
    "cloud_reads_a_driver": ("cloud/trespass.py", "import drivers.modbus"),
    "cloud_takes_the_uplink": ("cloud/trespass.py", "import sync.uplink"),
    "firmware_imports_sync": ("firmware/trespass.py", "import sync.wire"),
    "drivers_import_sync": ("drivers/trespass.py", "import sync.wire"),
    "config_imports_drivers": ("config/trespass.py", "import drivers.contract"),
    "agent_imports_numpy": ("agent/trespass.py", "import numpy"),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rooms and the rules, where a trespass hurts nobody."""
    folder = tmp_path_factory.mktemp("copy")
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__", "deploy"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "lint-imports"), "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )


@pytest.mark.parametrize("trespass", TRESPASSES)
def test_the_gate_sees_a_room_that_imports_where_it_must_not(copy: Path, trespass: str) -> None:
    name, line = TRESPASSES[trespass]
    (copy / name).write_text(f"{line}\n")
    try:
        said = lint_imports(copy)
    finally:
        (copy / name).unlink()
    assert said.returncode == 1, said.stdout + said.stderr
    assert f"{Path(name).parent}.trespass" in said.stdout


def test_the_four_meeting_places_are_open_to_the_cloud(copy: Path) -> None:
    meeting = copy / "cloud" / "meeting.py"
    (copy / "firmware" / "manifest.py").touch()
    meeting.write_text("import drivers.contract, firmware.manifest, sync.identity, sync.wire\n")
    try:
        said = lint_imports(copy)
    finally:
        meeting.unlink()
    assert said.returncode == 0, said.stdout + said.stderr
