"""A fleet that loses its broker in one instant comes back spread out, and catches up: nothing lost.

What is real: Mosquitto (killed with SIGKILL, it keeps nothing), the cloud's own process with its journal, and for each
gateway the forwarder, the backoff and the MQTT uplink with a connection of its own. What is not: a thousand SQLite
buffers do not fit beside it on two cores; each gateway keeps its frames in memory, and all share one process.

Judged: connects spread over at least what the cloud told (60 s for 1,000), no second with more than 50, every gateway
caught up, every reading in the cloud's journal.

`python -m tests.torture.reconnect [--agents 1000] [--seed 1] [--down 5] [--record]`
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import secrets
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, cast

import msgspec

from agent.buffer import Buffer
from agent.forwarder import Forwarder
from agent.status import LinkHealth
from agent.store import Batch, Bounds
from cloud.fleet import spread_s
from config.agent import Uplink as UplinkSettings
from drivers.contract import Point, Scan, ValueType
from sync.identity import GatewayName, Secret
from sync.mqtt import MqttUplink
from sync.wire import Ack, ClockRow, Packing, encode_scan, layout_of, open_head, seal
from tests.servers import run
from tests.servers.process import free_port, port_open, wait_until
from tests.system.child import BIN, Child
from tests.torture.report import Finding, record

PERIOD_S: Final = 10.0  #: one scan of each gateway
MOST_A_SECOND: Final = 50
FIRST_CONNECTS_A_S: Final = 50  #: when the fleet is brought up; no part of what is judged
SETTLE_S: Final = 300.0
_POINTS: Final = tuple(Point(name=f"p{k}", type=ValueType.U32) for k in range(4))
_LAYOUT: Final = layout_of("meter", "simulator", "simulator", _POINTS)


class Outcome(msgspec.Struct, kw_only=True):
    """What was measured."""

    agents: int
    told_spread_s: int
    connects: int = 0  #: logins after the restart
    tries: int = 0  #: connects begun from the kill on, those to the closed port included
    span_s: float = 0.0  #: from the first login to the last
    busiest: int = 0  #: most logins in one second
    middle_s: float = 0.0  #: half of them were back
    caught_up_s: float = 0.0  #: after the restart: all that was kept until then is acked
    readings: int = 0
    missing: int = 0  #: kept on a gateway and not in the journal

    def violations(self) -> list[str]:
        least_s = min(60.0, 0.9 * self.told_spread_s)
        found = []
        if self.connects < self.agents:
            found.append(f"{self.agents - self.connects} gateways never came back")
        if self.span_s < least_s:
            found.append(f"all were back within {self.span_s:.1f} s; the spread is to be {least_s:.0f} s")
        if self.busiest > MOST_A_SECOND:
            found.append(f"{self.busiest} connects in one second; {MOST_A_SECOND} at most")
        if self.missing:
            found.append(f"{self.missing} readings are not in the journal")
        return found


class _State(msgspec.Struct):
    buffered_readings: int = 0


class MemoryBuffer:
    """What a forwarder asks of its buffer, in memory."""

    def __init__(self, gateway: GatewayName, rng: random.Random) -> None:
        self.epoch = rng.getrandbits(62)
        self.on_live: Callable[[Sequence[Batch]], None] | None = None
        self.live_room = 0
        self.made = 0
        self.state = _State()
        self._gateway = gateway
        self._packing = Packing(_LAYOUT)
        self._loose: list[bytes] = []
        self._first = 1  #: seq of the first loose frame
        self._recorded: dict[Bounds, Batch] = {}
        self._clock = ClockRow(1, secrets.token_hex(16), 0, time.time_ns() - time.monotonic_ns(), True, 1000)

    @property
    def empty(self) -> bool:
        return not self._loose and not self._recorded

    @property
    def has_backlog(self) -> bool:
        return bool(self._loose)

    def keep(self) -> None:
        """One scan, cut at once where there is room."""
        self.made += len(_POINTS)
        scan = Scan(time.monotonic_ns(), _POINTS, [self.made + k for k in range(len(_POINTS))])
        self._loose.append(encode_scan(self._packing, scan, 1))
        if self.on_live is not None:
            self.on_live(self._cut() if self.live_room > 0 else [])

    def recorded(self) -> list[Bounds]:
        return list(self._recorded)

    async def claim(self, _count: int) -> list[Batch]:
        return self._cut()

    async def rebuild(self, bounds: Bounds) -> list[Batch]:
        found = self._recorded.get(bounds)
        return [] if found is None else [found]

    def settle(self, ack: Ack) -> None:
        for bounds in list(self._recorded):
            if ack.epoch == bounds.epoch and any(
                a <= bounds.first and bounds.last <= b for a, b in ack.ranges
            ):
                del self._recorded[bounds]

    def _cut(self) -> list[Batch]:
        if not self._loose:
            return []
        frames, self._loose = self._loose, []
        sealed = seal(
            str(self._gateway), self.epoch, self._first, frames, [_LAYOUT], [self._clock],
            len(frames) * len(_POINTS),
        )  # fmt: skip
        self._first += len(frames)
        batch = Batch(sealed, len(frames) * len(_POINTS))
        self._recorded[batch.bounds] = batch
        return [batch]


class CountedUplink(MqttUplink):
    """Notes when it is opened, and when that worked."""

    tries: deque[float]
    logins: deque[float]

    async def open(self) -> None:
        self.tries.append(time.monotonic())
        await super().open()
        self.logins.append(time.monotonic())


class Gateway:
    """One of the fleet."""

    def __init__(self, name: GatewayName, port: int, token: str, seed: int) -> None:
        rng = random.Random(seed)
        settings = UplinkSettings(host="127.0.0.1", port=port, tls=False)
        self.buffer = MemoryBuffer(name, rng)
        self.uplink = CountedUplink(name, settings, Secret(token))
        self.uplink.tries, self.uplink.logins = deque(), deque()
        self.forwarder = Forwarder(cast(Buffer, self.buffer), self.uplink, settings, LinkHealth(), rng)
        self._phase_s = rng.uniform(0.0, PERIOD_S)

    async def live(self, start_s: float) -> None:
        await asyncio.sleep(start_s)
        forwarding = asyncio.create_task(self.forwarder.run())
        try:
            await asyncio.sleep(self._phase_s)
            while True:
                self.buffer.keep()
                await asyncio.sleep(PERIOD_S)
        finally:
            forwarding.cancel()
            await asyncio.gather(forwarding, return_exceptions=True)


async def fleet(
    agents: int, broker: run.Mosquitto, users: dict[str, str], seed: int, down_s: float
) -> Outcome:
    """Bring the fleet up, kill the broker, bring it back, wait until all have caught up."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(32))
    names = [GatewayName("fleet", f"g{n}") for n in range(agents)]
    gateways = [Gateway(name, broker.port, users[str(name)], seed + n) for n, name in enumerate(names)]
    tasks = [asyncio.create_task(gateway.live(n / FIRST_CONNECTS_A_S)) for n, gateway in enumerate(gateways)]
    wanted = spread_s(agents)
    outcome = Outcome(agents=agents, told_spread_s=wanted)
    try:
        await _until(
            lambda: all(gateway.forwarder.told_spread_s >= 0.9 * wanted for gateway in gateways) and
            all(gateway.forwarder.health.acked_batches for gateway in gateways),
            "every gateway to know the fleet's spread",
        )  # fmt: skip
        killed_s = time.monotonic()
        await asyncio.to_thread(broker.process.kill)
        await asyncio.sleep(down_s)
        await asyncio.to_thread(broker.process.start)
        back_s = time.monotonic()
        await _until(
            lambda: all(gateway.uplink.logins[-1] > killed_s for gateway in gateways), "every gateway's login"
        )
        await _until(lambda: all(gateway.buffer.empty for gateway in gateways), "every gateway to catch up")
        outcome.caught_up_s = round(time.monotonic() - back_s, 1)
        logins = sorted(at for gateway in gateways for at in gateway.uplink.logins if at > killed_s)
        outcome.connects = len(logins)
        outcome.tries = sum(at > killed_s for gateway in gateways for at in gateway.uplink.tries)
        outcome.span_s = round(logins[-1] - logins[0], 1)
        outcome.busiest = max(Counter(int(at - logins[0]) for at in logins).values())
        outcome.middle_s = round(logins[len(logins) // 2] - back_s, 1)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    outcome.readings = sum(gateway.buffer.made for gateway in gateways)
    return outcome


async def _until(happened: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(SETTLE_S):
            while not happened():  # noqa: ASYNC110 - in a thousand others' hands
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise TimeoutError(f"{what}: not within {SETTLE_S:g} s") from None


def held(journal: Path) -> int:
    """Readings in the cloud's journal, each batch once."""
    with sqlite3.connect(f"file:{journal}?mode=ro", uri=True) as db:
        heads = {open_head(payload)[0] for (payload,) in db.execute("SELECT payload FROM entry")}
    return sum(head.readings for head in heads)


def prove(agents: int, seed: int, down_s: float) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="hg-fleet-") as name:
        folder = Path(name)
        users = {f"fleet/g{n}": secrets.token_urlsafe(18) for n in range(agents)}
        users["headgate-cloud"] = secrets.token_urlsafe(18)
        (folder / "word").touch(0o600)
        (folder / "word").write_text(users["headgate-cloud"])
        with run.mosquitto(users=users, extra=["max_queued_messages 0"]) as broker:
            port = free_port()
            (folder / "cloud.toml").write_text(
                f'[server]\ndata_dir = "{folder}/cloud"\nport = {port}\n[embedded]\nenabled = false\n'
                f'[mqtt]\nhost = "127.0.0.1"\nport = {broker.port}\ntls = false\npassword_file = "{folder}/word"\n'
            )
            serve = [str(BIN / "headgate-cloud"), "serve", "--config", f"{folder}/cloud.toml"]
            cloud = Child("cloud", serve, folder, dict(os.environ))
            cloud.start()
            try:
                wait_until(lambda: port_open(port), timeout_s=60, what="the cloud to listen")
                outcome = asyncio.run(fleet(agents, broker, users, seed, down_s))
                cloud.check()
                cloud.end(signal.SIGTERM)
            finally:
                cloud.stop_hard()
        outcome.missing = max(0, outcome.readings - held(folder / "cloud/journal.db"))
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture.reconnect", description=__doc__)
    parser.add_argument("--agents", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--down", type=float, default=5.0, help="seconds that the broker is away")
    parser.add_argument("--record", action="store_true")
    told = parser.parse_args(argv)
    print(f"seed {told.seed}", flush=True)
    began_s = time.monotonic()
    outcome = prove(told.agents, told.seed, told.down)
    broken = outcome.violations()
    print(msgspec.json.format(msgspec.json.encode(outcome), indent=1).decode())
    for violation in broken:
        print(f"VIOLATED: {violation}")
    if told.record:
        figures = cast("dict[str, int | float | str]", msgspec.to_builtins(outcome))
        record(
            Finding(
                proof="reconnect",
                promise="a fleet that loses its broker at once comes back spread over a minute, and catches up",
                command=f"python -m tests.torture.reconnect --agents {told.agents} --seed {told.seed}",
                passed=not broken,
                figures=figures,
                seed=told.seed,
                took_s=time.monotonic() - began_s,
            )
        )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
