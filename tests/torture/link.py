"""A line that dies silently and one that flaps, at the shipped defaults: the real agent, broker and cloud.

Judged: a half-open link is found within 45 s, with readings to send and with none; on a line that is 10 s up and 10 s
away, readings go on being delivered, connects stay few (waits are 0.5, 1, 2, 4 s and so on, each with full jitter: in
10 s of outage some eight), and an hour costs at most 200 lines of log.

`python -m tests.torture.link [--minutes 60] [--seed 1] [--record]`; the short form, with waits a tenth as long and
HTTPS too, is `tests/test_agent_link.py`.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from agent import status as status_file
from tests.fakes.fault_proxy import ProxyProcess, proxy_process
from tests.servers import run
from tests.servers.process import free_port, port_open, wait_until
from tests.system.child import BIN, Child
from tests.torture.report import Finding, record

FOUND_WITHIN_S: Final = 45.0
ON_S, OFF_S = 10.0, 10.0
CONNECTS_A_FLAP: Final = 14  #: 10 s of waits with full jitter: more than this many tries is one in millions
LINES_AN_HOUR: Final = 200
BURST: Final = 30  #: lines of the first losses, which are all told


class Gateway:
    """One agent over a line of its own."""

    def __init__(self, name: str, line: ProxyProcess, folder: Path, device: str) -> None:
        self.line = line
        self.state = folder / name
        self.state.mkdir(mode=0o700)
        file = folder / f"{name}.toml"
        file.write_text(
            f'[gateway]\ntenant = "link"\nname = "{name}"\nstate_dir = "{self.state}"\n[uplink]\nhost = "127.0.0.1"\n'
            f'port = {line.port}\ntls = false\ntoken_file = "{folder}/{name}.token"\n{device}'
        )
        self.child = Child(
            name, [str(BIN / "headgate"), "run", "--config", str(file)], folder, dict(os.environ)
        )

    def said(self, what: str) -> int:
        return self.child.log.read_text().count(what) if self.child.log.exists() else 0

    def lines(self) -> int:
        return len(self.child.log.read_text().splitlines())

    def delivered(self) -> int:
        told = status_file.read(self.state)
        return 0 if told is None or told.buffer is None else told.buffer.settled_readings


def half_open(gateways: Sequence[Gateway]) -> dict[str, float]:
    """Seconds until each has found its line dead."""
    before = {id(gateway): gateway.said("link down") for gateway in gateways}
    for gateway in gateways:
        gateway.line.set(blackhole=True)
    began_s = time.monotonic()
    found: dict[str, float] = {}
    while len(found) < len(gateways) and time.monotonic() - began_s < 2 * FOUND_WITHIN_S:
        for gateway in gateways:
            if gateway.child.name not in found and gateway.said("link down") > before[id(gateway)]:
                found[gateway.child.name] = round(time.monotonic() - began_s, 1)
        time.sleep(0.1)
    for gateway in gateways:
        gateway.line.reset()
        gateway.line.heal()
    return found


def flap(gateway: Gateway, minutes: float) -> tuple[int, int, int, int]:
    """Flaps, connects, flaps in which nothing was delivered, lines of log."""
    lines, connects = gateway.lines(), gateway.line.seen().connects
    flaps = stuck = 0
    end_s = time.monotonic() + minutes * 60
    while time.monotonic() < end_s:
        had = gateway.delivered()
        gateway.line.heal()
        time.sleep(ON_S)
        gateway.line.set(refuse=True)
        gateway.line.reset()
        time.sleep(OFF_S)
        flaps += 1
        stuck += gateway.delivered() <= had
        gateway.child.check()
    gateway.line.heal()
    return flaps, gateway.line.seen().connects - connects, stuck, gateway.lines() - lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture.link", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="of flapping")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--record", action="store_true")
    told = parser.parse_args(argv)
    print(f"seed {told.seed}", flush=True)
    began_s = time.monotonic()
    broken: list[str] = []
    with tempfile.TemporaryDirectory(prefix="hg-link-") as name:
        folder = Path(name)
        users = {"link/busy": secrets.token_urlsafe(18), "link/idle": secrets.token_urlsafe(18)}
        users["headgate-cloud"] = secrets.token_urlsafe(18)
        for who, file in (
            ("link/busy", "busy.token"),
            ("link/idle", "idle.token"),
            ("headgate-cloud", "word"),
        ):
            (folder / file).touch(0o600)
            (folder / file).write_text(users[who])
        with (
            run.mosquitto(users=users) as broker,
            proxy_process(broker.port, seed=told.seed) as one,
            proxy_process(broker.port, seed=told.seed + 1) as other,
        ):
            port = free_port()
            (folder / "cloud.toml").write_text(
                f'[server]\ndata_dir = "{folder}/cloud"\nport = {port}\n[embedded]\nenabled = false\n'
                f'[mqtt]\nhost = "127.0.0.1"\nport = {broker.port}\ntls = false\npassword_file = "{folder}/word"\n'
            )
            serve = [str(BIN / "headgate-cloud"), "serve", "--config", f"{folder}/cloud.toml"]
            cloud = Child("cloud", serve, folder, dict(os.environ))
            device = '[[device]]\nname = "d"\ndriver = "simulator"\n[[device.point]]\nname = "p"\n'
            busy, idle = Gateway("busy", one, folder, device), Gateway("idle", other, folder, "")
            children = (cloud, busy.child, idle.child)
            try:
                cloud.start()
                wait_until(lambda: port_open(port), timeout_s=60, what="the cloud to listen")
                for gateway in (busy, idle):
                    gateway.child.start()
                for gateway in (busy, idle):
                    wait_until(lambda g=gateway: g.said("link up") > 0, timeout_s=60, what="a link")  # type: ignore[misc]
                found = half_open((busy, idle))
                print(f"half-open found after {found} s", flush=True)
                broken += [
                    f"{who}: half-open found after {found.get(who, 'never')} s"
                    for who in ("busy", "idle")
                    if found.get(who, 999.0) > FOUND_WITHIN_S
                ]
                wait_until(lambda: busy.said("link back") > 0, timeout_s=90, what="the link to be back")
                flaps, connects, stuck, lines = flap(busy, told.minutes)
                print(
                    f"{flaps} flaps: {connects} connects, {stuck} without progress, {lines} lines", flush=True
                )
                if connects > flaps * CONNECTS_A_FLAP:
                    broken.append(f"{connects} connects in {flaps} flaps")
                if stuck > flaps // 2:
                    broken.append(f"nothing was delivered in {stuck} of {flaps} flaps")
                if lines > min(LINES_AN_HOUR, BURST + told.minutes * (LINES_AN_HOUR - BURST) / 60):
                    broken.append(f"{lines} lines in {told.minutes:g} minutes")
                for child in children:
                    child.end(signal.SIGTERM)
            finally:
                for child in children:
                    child.stop_hard()
    for violation in broken:
        print(f"VIOLATED: {violation}")
    if told.record:
        record(
            Finding(
                proof="link",
                promise="a link that died silently is found within 45 s; one that flaps makes progress, quietly",
                command=f"python -m tests.torture.link --minutes {told.minutes:g}",
                passed=not broken,
                figures={
                    "half-open found, sending (s)": found.get("busy", -1.0),
                    "half-open found, idle (s)": found.get("idle", -1.0),
                    "flaps": flaps,
                    "connects": connects,
                    "flaps without progress": stuck,
                    "log lines": lines,
                },
                seed=told.seed,
                took_s=time.monotonic() - began_s,
            )
        )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
