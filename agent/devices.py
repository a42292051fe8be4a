"""From the configuration to devices that can be polled, or to every error that stands in the way.

Pure but for importing the drivers that the configuration names. `headgate run` and `headgate config check` both come
through here, so what the check accepts is what runs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import msgspec

from agent.poller import DEADLINE_S, LONGEST_DEADLINE_S, Plan, phase_of
from agent.validation import Rules
from config.agent import Agent, Device
from config.load import ConfigFileError, line_of
from drivers import profiles, registry
from drivers.contract import ConfigError
from drivers.registry import AnyDriver, TableError
from sync.wire import MAX_POINTS


class Built(msgspec.Struct, frozen=True):
    """One enabled device: its plan, and its first driver."""

    plan: Plan
    driver: AnyDriver


def build_devices(
    config: Agent, *, file: str = "", text: str = ""
) -> tuple[list[Built], list[ConfigFileError]]:
    """Every enabled device, and every error found (a disabled device is checked too, and not built)."""
    built: list[Built] = []
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
    return built, errors


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
    build = functools.partial(registry.build, device.name, driver_name, options, points)
    try:
        driver = build()
    except TableError as err:
        raise _blamed(device, points, err) from err
    try:
        Rules(driver.points)
    except ConfigError as err:
        raise ConfigError(f"{where}: {err}") from err
    period_s = device.period_ms / 1000
    phase_s = phase_of(device.name, period_s) if device.phase_ms is None else device.phase_ms / 1000
    if device.timeout_ms is not None:
        deadline_s = device.timeout_ms / 1000
    else:
        deadline_s = max(DEADLINE_S, min(period_s, LONGEST_DEADLINE_S))
    plan = Plan(
        name=device.name,
        driver=driver_name,
        measurement=device.measurement or driver_name,
        tags=tuple(sorted(device.tags.items())),
        points=tuple(driver.points),
        period_s=period_s,
        phase_s=phase_s,
        deadline_s=deadline_s,
        build=build,
    )
    return Built(plan, driver)


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
