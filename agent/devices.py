"""From the configuration to devices that can be polled, or to every error that stands in the way.

Pure but for importing the drivers that the configuration names. `headgate run` and `headgate config check` both come
through here, so what the check accepts is what runs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence

import msgspec

from agent.poller import DEADLINE_S, LONGEST_DEADLINE_S, Plan, phase_of
from agent.validation import Rules
from config.agent import Agent, Device
from config.load import ConfigFileError, line_of
from drivers import profiles, registry
from drivers.contract import ConfigError, LineClaim, Point, Priority
from drivers.registry import AnyDriver, TableError
from sync.wire import MAX_POINTS


class Built(msgspec.Struct, frozen=True):
    """One enabled device: its plan, and its first driver."""

    plan: Plan
    driver: AnyDriver
    claim: LineClaim | None = None  #: the line it needs
    isolated: bool = False  #: its driver runs in a process of its own
    line: Callable[[], LineClaim | None] = lambda: (
        None
    )  #: the claim as of now: a port by identity moves when replugged

    def is_as(self, other: Built) -> bool:
        """Whether the other is this very device, so that it need not be touched when the configuration is reloaded."""
        mine, theirs = (msgspec.structs.replace(b.plan, build=_no_driver) for b in (self, other))
        return (
            mine == theirs and self.isolated == other.isolated and self.driver.options == other.driver.options
        )


def _no_driver() -> AnyDriver:
    raise NotImplementedError


def build_devices(
    config: Agent, *, file: str = "", text: str = ""
) -> tuple[list[Built], list[ConfigFileError]]:
    """Every enabled device, and every error found (a disabled device is checked too, and not built)."""
    built: list[Built] = []
    places: dict[str, str] = {}
    errors: list[ConfigFileError] = []
    for index, device in enumerate(config.device):
        at = f"device[{index}]"
        try:
            made = build_device(device)
        except ConfigError as err:
            path = f"{at}.{err.path}" if isinstance(err, TableError) and err.path else at
            errors.append(ConfigFileError(str(err), file=file, line=line_of(text, path), path=path))
            continue
        if device.enabled:
            built.append(made)
            places[device.name] = at
    for name, wrong in line_clashes(built):
        path = f"{places[name]}.options"
        errors.append(ConfigFileError(wrong, file=file, line=line_of(text, path), path=path))
    return built, errors


def line_clashes(built: Sequence[Built]) -> list[tuple[str, str]]:
    """Devices that cannot share a line with one named before them: their names, and what to do about it. Pure."""
    found: list[tuple[str, str]] = []
    holders: dict[str, Built] = {}
    for made in built:
        if made.claim is None:
            continue
        first = holders.setdefault(made.claim.key, made)
        if first is made or first.claim is None:
            continue
        wrong = _clash(made, made.claim, first, first.claim)
        if wrong is not None:
            found.append((made.plan.name, wrong))
    return found


def _clash(made: Built, claim: LineClaim, first: Built, held: LineClaim) -> str | None:
    name, other = made.plan.name, first.plan.name
    if claim.settings != held.settings:
        return (
            f"{name!r} wants {claim.settings} on {claim.key}, but {other!r} has {held.settings} there; "
            "all devices of one line need the same settings"
        )
    if not (claim.shared and held.shared):
        alone = name if not claim.shared else other
        return (
            f"{name!r} and {other!r} both use {claim.key}, and {alone!r} needs it for itself; give one of them "
            "another port, or set enabled = false"
        )
    if made.isolated or first.isolated:
        alone = name if made.isolated else other
        return (
            f"{name!r} and {other!r} share {claim.key}, and {alone!r} has isolate = true; a line has one owner, so "
            "devices that share one run in one process: remove isolate"
        )
    return None


def build_device(device: Device) -> Built:
    """One device. Raises `ConfigError` (`TableError` where the key is known)."""
    where = f"device {device.name!r}"
    driver_name, options, points = _described(device, where)
    if not points:
        raise TableError(f"{where}: it has no points; add at least one [[device.point]]", "point")
    if len(points) > MAX_POINTS:
        raise TableError(
            f"{where}: {len(points)} points; at most {MAX_POINTS} fit one device, so make it two",
            "point",
        )
    build: Callable[[], AnyDriver] = functools.partial(
        registry.build, device.name, driver_name, options, points
    )
    try:
        driver = build()
    except TableError as err:
        raise _blamed(device, points, err) from err
    try:
        check_rules(driver.points, where)
    except TableError as err:
        raise _blamed(device, points, err) from err
    try:
        claim = driver.line()
    except ConfigError as err:
        raise ConfigError(f"{where}: {err}") from err
    except Exception as err:
        raise ConfigError(f"{where}: {driver_name}.line() failed: {type(err).__name__}: {err}") from err
    patience_s, line = driver.patience_s, driver.line
    if device.isolate:
        from agent.isolation import isolated

        build = functools.partial(isolated, driver, driver_name, options, points)
        driver = build()
    period_s = device.period_ms / 1000
    phase_s = phase_of(device.name, period_s) if device.phase_ms is None else device.phase_ms / 1000
    if device.timeout_ms is not None:
        deadline_s = device.timeout_ms / 1000
    else:
        deadline_s = max(DEADLINE_S, patience_s, min(period_s, LONGEST_DEADLINE_S))
    plan = Plan(
        name=device.name,
        driver=driver_name,
        measurement=device.measurement or driver_name,
        tags=tuple(sorted(device.tags.items())),
        points=tuple(driver.points),
        priority=Priority(device.priority),
        period_s=period_s,
        phase_s=phase_s,
        deadline_s=deadline_s,
        build=build,
    )
    return Built(plan, driver, claim, device.isolate, line)


def check_rules(points: Sequence[Point], where: str) -> None:
    """Raises `TableError` for a rule of a point that no value could ever pass or fail."""
    try:
        Rules(points)
    except ConfigError as err:
        text = str(err)
        index = next((i for i, point in enumerate(points) if text.startswith(f"point {point.name!r}:")), None)
        if index is None:
            raise TableError(f"{where} {text}".lstrip(), "point") from err
        keys = points[index].__struct_fields__
        said = re.findall(r"\w+", text.removeprefix(f"point {points[index].name!r}"))
        key = next((word for word in said if word in keys and word != "type"), "")
        raise TableError(f"{where} {text}".lstrip(), f"point[{index}].{key}".rstrip(".")) from err


def _described(
    device: Device, where: str
) -> tuple[str, Mapping[str, object], Sequence[Mapping[str, object]]]:
    """The driver's name, options and points, with the profile's where one is named. Raises `TableError`."""
    if device.profile is None:
        return device.driver or "", device.options, device.point
    try:
        profile = profiles.load(device.profile)
        options, points = profiles.merge(profile, device.options, device.point, device.only)
    except ConfigError as err:
        raise TableError(f"{where}: {err}", "profile") from err
    return device.driver or profile.driver, options, points


def _blamed(device: Device, points: Sequence[Mapping[str, object]], err: TableError) -> TableError:
    """The error where it stands: a device that follows a profile may be wrong in the profile's file."""
    if device.profile is None:
        return err
    return profiles.blame(profiles.load(device.profile), device.options, device.point, points, err)


def all_points(built: Sequence[Built]) -> int:
    """How many points are read in all."""
    return sum(len(made.plan.points) for made in built)
