"""`headgate driver new`: a package with a driver that passes, to be changed into your own."""

from __future__ import annotations

import json
import keyword
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final, NoReturn

import click

_TEMPLATES: Final = Path(__file__).parent / "driver_new"
_NAME: Final = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_LONGEST: Final = 40


@click.group()
def driver() -> None:
    """Write a driver of your own."""


@driver.command()
@click.argument("name")
@click.option("--push", is_flag=True, help="For a device that speaks by itself; unset: one that answers.")
@click.option(
    "--folder", type=click.Path(path_type=Path), default=None, help="Where to; unset: ./headgate-NAME."
)
@click.option("--json", "as_json", is_flag=True, help="What was written, as JSON.")
def new(name: str, folder: Path | None, *, push: bool, as_json: bool) -> None:
    """Write a package with a driver NAME that passes the conformance suite, to be changed into your own.

    NAME is what a configuration will say: driver = "NAME". Exit: 0 written, 2 refused (nothing was written).
    """
    refused = _refusal(name)
    if refused is not None:
        _fail(refused)
    folder = folder or Path(f"headgate-{name.replace('_', '-')}")
    if folder.exists() or folder.is_symlink():
        _fail(f"{folder} is there already; nothing is overwritten: choose another with --folder")
    try:
        files = write_package(folder, name, push=push)
    except OSError as err:
        _fail(f"{folder} cannot be written: {err.strerror}")
    steps = [f"cd {folder}", "pip install -e '.[dev]'", "pytest", "headgate config check try.toml"]
    if as_json:
        click.echo(json.dumps({"driver": name, "folder": str(folder), "files": files, "next": steps}))
        return
    click.echo(f"{folder}: a driver {name!r} that passes. Now:")
    for step in steps:
        click.echo(f"  {step}")
    click.echo(f"then change src/headgate_{name}/driver.py into yours; docs/writing-a-driver.md tells how")


def _refusal(name: str) -> str | None:
    """Why this cannot be a driver's name."""
    from drivers.contract import ConfigError
    from drivers.registry import driver_types

    if len(name) > _LONGEST or not _NAME.fullmatch(name):
        return (
            f"{name!r} cannot be a driver's name: small letters, digits and single underscores, beginning with "
            f"a letter, at most {_LONGEST}, as in pms5003 or cooling_tower"
        )
    if keyword.iskeyword(name) or name in ("new", "none", "true", "false"):
        return f"{name!r} is a word of Python or of ours; choose another, as in my_{name}"
    try:
        known = driver_types()
    except ConfigError as err:
        return str(err)
    if name in known:
        return f"a driver {name!r} is installed already ({known[name].value}); choose another name"
    return None


def files_of(name: str, *, push: bool) -> dict[str, str]:
    """The package's files by path, as text."""
    kind = "push" if push else "pull"
    package = f"src/headgate_{name}"
    sources = {
        "pyproject.toml": ["pyproject.toml"],
        "README.md": ["readme.md"],
        ".gitignore": ["gitignore"],
        "try.toml": ["try.toml", f"sample_{kind}.toml"],
        f"{package}/__init__.py": ["init.py"],
        f"{package}/py.typed": [],
        f"{package}/driver.py": [f"driver_{kind}.py"],
        f"{package}/{name}.toml": [f"sample_{kind}.toml"],
        "tests/device.py": [f"device_{kind}.py"],
        f"tests/test_{name}.py": [f"test_{kind}.py"],
    }
    words = {
        "@name@": name,
        "@dashed@": name.replace("_", "-"),
        "@Class@": "".join(part.capitalize() for part in name.split("_")),
    }

    def text_of(parts: list[str]) -> str:
        text = "".join((_TEMPLATES / f"{part}.txt").read_text(encoding="utf-8") for part in parts)
        for word, meant in words.items():
            text = text.replace(word, meant)
        return text

    return {path: text_of(parts) for path, parts in sources.items()}


def write_package(folder: Path, name: str, *, push: bool) -> list[str]:
    """Write it whole or not at all. Raises `OSError`, also where `folder` is there already."""
    files = files_of(name, push=push)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for path, text in files.items():
            target = made / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        made.chmod(0o755)
        made.rename(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return sorted(files)


def _fail(text: str) -> NoReturn:
    click.echo(f"headgate driver new: {text}", err=True)
    sys.exit(2)
