"""200 Bluetooth sensors at one advertisement a second each: what the receiving process costs, beside bare bleak.

    python -m tests.benchmarks.bench_ble [--sensors 200] [--seconds 10] [--json]

A simulated BlueZ advertises from a process of its own, on another core where there is one. Three receivers take turns,
each a process of its own whose CPU time is its figure: dbus-fast with an empty handler (what no client in Python can be
below), bleak's scanner with an empty callback, and our driver: one device per sensor with four points, every scan taken
by a task of its own. Not in it: dbus-daemon and bluetoothd, which cost the same whoever listens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

OBJECTS = ("temperature", "humidity", "battery", "rssi")
SIDES = ("dbus-fast", "bleak", "ours")
ROUNDS = 3
SETTLE_S = 2.0  # until all have been heard once


class Heard:
    count = 0


async def _ours(addresses: list[str], heard: Heard) -> list[object]:
    from drivers.ble import BleDriver, BleOptions, BlePoint

    points = [BlePoint(name=name, object=name) for name in OBJECTS]
    drivers = [
        BleDriver(f"sensor-{n}", BleOptions(address=address), points) for n, address in enumerate(addresses)
    ]
    await asyncio.gather(*(driver.connect() for driver in drivers))

    async def take(driver: BleDriver) -> None:
        async for scan in driver.scans():
            heard.count += not scan.reasons

    return [asyncio.create_task(take(driver)) for driver in drivers]


async def _bleak(addresses: list[str], heard: Heard) -> list[object]:
    from bleak import BleakScanner
    from bleak.backends.device import BLEDevice
    from bleak.backends.scanner import AdvertisementData

    def callback(device: BLEDevice, advert: AdvertisementData) -> None:
        heard.count += 1

    scanner = BleakScanner(callback, bluez={"filters": {"DuplicateData": True}})
    await scanner.start()
    return [scanner]


async def _bare(addresses: list[str], heard: Heard) -> list[object]:
    from dbus_fast import BusType, Message, Variant
    from dbus_fast.aio import MessageBus

    def handler(message: Message) -> None:
        heard.count += message.member == "PropertiesChanged"

    async def call(to: str, path: str, interface: str, member: str, signature: str, *body: object) -> None:
        await bus.call(
            Message(
                destination=to,
                path=path,
                interface=interface,
                member=member,
                signature=signature,
                body=list(body),
            )
        )

    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
    bus.add_message_handler(handler)
    name, adapter = "org.freedesktop.DBus", "org.bluez.Adapter1"
    rule = "type='signal',sender='org.bluez',member='PropertiesChanged',arg0='org.bluez.Device1'"
    await call(name, "/org/freedesktop/DBus", name, "AddMatch", "s", rule)
    wish = {"DuplicateData": Variant("b", True)}
    await call("org.bluez", "/org/bluez/hci0", adapter, "SetDiscoveryFilter", "a{sv}", wish)
    await call("org.bluez", "/org/bluez/hci0", adapter, "StartDiscovery", "")
    return [bus]


async def _receive(side: str, addresses: list[str], seconds: float) -> dict[str, float]:
    heard = Heard()
    kept = await {"ours": _ours, "bleak": _bleak, "dbus-fast": _bare}[side](addresses, heard)
    await asyncio.sleep(SETTLE_S)
    heard.count = 0
    cpu_s, wall_s = time.process_time(), time.monotonic()
    await asyncio.sleep(seconds)
    cpu_s, wall_s = time.process_time() - cpu_s, time.monotonic() - wall_s
    del kept
    return {
        "per_s": heard.count / wall_s,
        "core": cpu_s / wall_s,
        "us_each": cpu_s / max(heard.count, 1) * 1e6,
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _child(side: str, addresses: list[str], seconds: float) -> dict[str, float]:
    words = [sys.executable, "-m", "tests.benchmarks.bench_ble", "--side", side, "--seconds", str(seconds)]
    done = subprocess.run(words, input=json.dumps(addresses), capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(sensors: int, seconds: float, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    cores = sorted(os.sched_getaffinity(0))
    best: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="bus-") as folder:
        words = [sys.executable, "-m", "tests.fakes.bluez", "--folder", folder, "--sensors", str(sensors)]
        plant = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        try:
            os.sched_setaffinity(plant.pid, {cores[-1]})
            os.sched_setaffinity(0, {cores[0]})
            assert plant.stdout is not None
            ready = json.loads(plant.stdout.readline())
            os.environ["DBUS_SYSTEM_BUS_ADDRESS"] = ready["address"]
            for _ in range(ROUNDS):
                for side in SIDES:
                    found = _child(side, ready["sensors"], seconds / ROUNDS)
                    say(f"  {side}: {found['per_s']:.0f}/s, {found['core']:.2%} of a core")
                    if side not in best or found["us_each"] < best[side]["us_each"]:
                        best[side] = found
        finally:
            plant.terminate()
            plant.wait()
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sensors", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=15.0, help="for each receiver, in all its rounds")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(asyncio.run(_receive(given.side, json.loads(sys.stdin.read()), given.seconds))))
        return
    best = measure(given.sensors, given.seconds, lambda line: None)
    if given.json:
        print(json.dumps(best))
        return
    for side, found in best.items():
        ratio = found["us_each"] / best["bleak"]["us_each"]
        print(
            f"{side:>10}: {found['per_s']:5.0f} advertisements/s for {found['core']:.2%} of a core "
            f"({found['us_each']:.0f} us each, {ratio:.2f} of bare bleak), RSS {found['rss_mb']:.0f} MB"
        )


if __name__ == "__main__":
    main()
