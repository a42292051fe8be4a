"""`headgate profiles`: the device models that are described already, one of them in full, or a file checked.

Exit: 0 well, 1 a profile is bad, 2 there is none of that name.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from drivers.profiles import Profile

_WIDEST = 100  #: of a terminal, for prose


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option(
    "--check",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Check a profile's FILE, wherever it lies.",
)
def profiles(name: str | None, file: Path | None, *, as_json: bool) -> None:
    """List the device models that are described (in yours and in our folders), or show NAME with its points.

    Yours are looked for in the folders of $HEADGATE_PROFILES (parted by colons) and in /etc/headgate/profiles, before
    ours. Exit: 0 well, 1 a profile is bad, 2 there is none of that name.
    """
    from drivers import profiles as described
    from drivers.contract import ConfigError

    if file is not None:
        _check(file, as_json=as_json)
        return
    if name is not None:
        if described.find(name) is None:
            click.echo(f"headgate: {described.unknown(name)}", err=True)
            sys.exit(2)
        try:
            profile = described.load(name)
            _sound(profile)
        except ConfigError as err:
            click.echo(f"headgate: {err}", err=True)
            sys.exit(1)
        click.echo(_json(_whole(profile)) if as_json else "\n".join(_shown(profile)))
        return
    sys.exit(_list(as_json=as_json))


def _list(*, as_json: bool) -> int:
    from drivers import profiles as described
    from drivers.contract import ConfigError

    good: list[Profile] = []
    bad: list[str] = []
    for name in described.names():
        try:
            profile = described.load(name)
            _sound(profile)
            good.append(profile)
        except ConfigError as err:
            bad.append(str(err))
    if as_json:
        click.echo(_json({"profiles": [_brief(profile) for profile in good], "errors": bad}))
    else:
        rows = [("PROFILE", "MODEL", "KIND", "POINTS")]
        rows += [(p.name, f"{p.maker} {p.model}", p.kind, str(len(p.points))) for p in good]
        for line in _columns(rows, shutil.get_terminal_size((80, 24)).columns):
            click.echo(line)
        for profile in good:
            if profile.hides is not None:
                click.echo(
                    f"note: {profile.file} is used instead of {profile.hides}, which has the same name"
                )
    for error in bad:
        click.echo(f"headgate: {error}", err=True)
    return 1 if bad else 0


def _check(file: Path, *, as_json: bool) -> None:
    from drivers import profiles as described
    from drivers.contract import ConfigError

    try:
        profile = described.load_file(file)
        _sound(profile)
    except ConfigError as err:
        text = str(err) if str(file) in str(err) else f"{file}: {err}"
        click.echo(_json({"ok": False, "error": text}) if as_json else text, err=not as_json)
        sys.exit(1)
    if as_json:
        click.echo(_json({"ok": True, **_brief(profile)}))
        return
    click.echo(
        f"{file}: OK: {profile.maker} {profile.model}, {len(profile.points)} points, driver {profile.driver}"
    )
    taken = described.find(profile.name)
    if taken is None or taken.resolve() != file.resolve():
        click.echo(
            f'note: to use it as profile = "{profile.name}", put it into {described.OPERATORS} or a folder of '
            f"${described.FOLDERS_ENV}" + (f" (now that name means {taken})" if taken is not None else "")
        )


def _sound(profile: Profile) -> None:
    """Would a device with it be accepted, as `config check` judges? Raises `ConfigError`."""
    import msgspec

    from agent.devices import check_rules
    from drivers import profiles as described
    from drivers import registry

    described.check(profile)
    kind = registry.load(profile.driver)
    try:
        check_rules([msgspec.convert(point, kind.point_type) for point in profile.points], "")
    except registry.TableError as err:
        where = described.where_of(profile, profile.points, err) or profile.file
        raise described.ProfileError(f"{where}: {err}") from err


def _brief(profile: Profile) -> dict[str, Any]:
    return {
        "name": profile.name,
        "model": profile.model,
        "maker": profile.maker,
        "kind": profile.kind,
        "driver": profile.driver,
        "points": len(profile.points),
        "file": profile.file,
        "hides": profile.hides,
    }


def _whole(profile: Profile) -> dict[str, Any]:
    from drivers import profiles as described

    return {
        **_brief(profile),
        "source": profile.source,
        "notes": described.notes(profile),
        "extends": list(profile.extends),
        "options": profile.options,
        "points": list(profile.points),
    }


def _shown(profile: Profile) -> list[str]:
    import textwrap

    from drivers import profiles as described

    width = min(shutil.get_terminal_size((80, 24)).columns, _WIDEST)
    lines = [f"{profile.name}: {profile.maker} {profile.model}, {profile.kind}"]
    told = [("driver", profile.driver), ("source", profile.source), ("file", profile.file)]
    if profile.extends:
        told.append(("extends", " -> ".join(profile.extends)))
    if profile.hides:
        told.append(("hides", profile.hides))
    if profile.options:
        told.append(("options", ", ".join(f"{key} = {value}" for key, value in profile.options.items())))
    if notes := described.notes(profile):
        told.append(("notes", notes))
    for label, text in told:
        lines += textwrap.wrap(
            f"{label + ':':<9}{text}", width, subsequent_indent=" " * 9, break_on_hyphens=False
        )
    lines.append("")
    rows = [("POINT", "UNIT", "WHERE")]
    rows += [(point["name"], str(point.get("unit", "")), _where(point)) for point in profile.points]
    return lines + _columns(rows, width)


def _where(point: dict[str, Any]) -> str:
    """Where a driver finds the point: its own keys, in short."""
    said = {
        "name",
        "unit",
        "valid_min",
        "valid_max",
        "not_available",
        "one_of",
        "stuck_after_s",
        "max_rate_per_s",
    }
    parts = []
    if "register" in point:
        parts.append(f"{point.get('table', 'holding')} {point['register']}")
        said |= {"register", "table"}
    if "type" in point:
        parts.append(str(point["type"]))
        said |= {"type"}
    parts += [f"{key} {value}" for key, value in point.items() if key not in said]
    return " ".join(parts)


def _columns(rows: Sequence[tuple[str, ...]], width: int) -> list[str]:
    """Left-justified; what does not fit the width is cut in the last column but one, never wrapped."""
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    over = sum(wide) + 2 * (len(wide) - 1) - width
    if over > 0:
        widest = max(range(len(wide)), key=wide.__getitem__)
        wide[widest] = max(8, wide[widest] - over)
    lines = []
    for row in rows:
        cells = [
            cell if len(cell) <= room else cell[: room - 1] + "…"
            for cell, room in zip(row, wide, strict=True)
        ]
        lines.append("  ".join(f"{cell:<{room}}" for cell, room in zip(cells, wide, strict=True)).rstrip())
    return lines


def _json(value: object) -> str:
    import json

    return json.dumps(value, indent=2, ensure_ascii=False)
