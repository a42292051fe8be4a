"""How long `headgate scan modbus` takes, against what it must reach. `--full` takes the second in real time too.

1. One unit among addresses 1-32 at an unlisted one of the six commonest line settings: 60 s. Worst of the six, in real
   time on a modelled line (a pty has no parity).
2. The full sweep (247 addresses, six settings): within 10 % of the estimate that it printed. Takes five minutes in real
   time with --full; without, on a loop whose waiting takes no time.
3. 254 TCP addresses on loopback, half of them silent rather than refusing: 15 s. Of the silent ones half take the
   connection and never answer, half do not even take it (a full backlog).
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import cast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from agent import commands_scan
from agent.technician import Way
from drivers import modbus_line
from drivers.modbus_scan import COMMON
from tests.fakes.quick_loop import run_quickly
from tests.fakes.serial_line_model import ModelUnit, SerialLineModel

TURNAROUND_S = 0.2


async def scan(wanted: commands_scan.Wanted, folder: Path) -> int:
    way = Way(folder / "agent.toml", folder / "state")
    return await commands_scan.search_all(
        way, as_json=True, searches=[lambda search: commands_scan.search_modbus(search, wanted)]
    )


def told(output: str) -> dict[str, float]:
    document = json.loads(output)
    return {
        "found": len(document["found"]),
        "asked": document["asked"],
        "took_s": document["took_s"],
        "estimate_s": document["estimate_s"],
    }


def on_a_line(
    model: SerialLineModel, wanted: commands_scan.Wanted, folder: Path, *, real: bool
) -> dict[str, float]:
    modbus_line.open_serial = model.open
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        if real:
            asyncio.run(scan(wanted, folder))
        else:
            run_quickly(scan(wanted, folder))
    return told(output.getvalue())


def serial(folder: Path, *, full: bool) -> None:
    wanted = commands_scan.Wanted(ports=("/dev/model",), tcp_port=502, turnaround_s=TURNAROUND_S, first=True)
    worst = 0.0
    for setting in COMMON:
        unit = ModelUnit(holding=[1, 2, 3], turnaround_s=0.05)
        last = setting == COMMON[-1]
        model = SerialLineModel(
            {32: unit},
            baud=setting.baud,
            parity=setting.parity,
            stop_bits=setting.stop_bits,
            device="/dev/model",
        )
        came = on_a_line(model, wanted, folder, real=last)
        assert came["found"] == 1, setting
        worst = max(worst, came["took_s"])
        how = "real time" if last else "no waiting"
        print(f"  unit 32 at {setting!s:<11} {came['took_s']:6.1f} s  ({came['asked']:.0f} requests, {how})")
    verdict("one unit at one of the six commonest settings", worst, 60.0, "s")
    model = SerialLineModel({}, device="/dev/model")
    everything = commands_scan.Wanted(ports=("/dev/model",), tcp_port=502, turnaround_s=TURNAROUND_S)
    came = on_a_line(model, everything, folder, real=full)
    off = abs(came["took_s"] / came["estimate_s"] - 1) * 100
    took = f"took {came['took_s']:.1f} s ({came['asked']:.0f} requests)"
    print(f"  full sweep: estimated {came['estimate_s']:.1f} s, {took}")
    verdict(f"full sweep against its estimate ({'real time' if full else 'no waiting'})", off, 10.0, "%")


def hosts(folder: Path) -> None:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        asyncio.run(_hosts(folder))
    came = told(output.getvalue())
    print(
        f"  254 hosts: found {came['found']:.0f}, {came['asked']:.0f} requests, estimated {came['estimate_s']:.1f} s"
    )
    verdict("254 TCP addresses, half of them silent", came["took_s"], 15.0, "s")


async def _hosts(folder: Path) -> None:
    """Of 254 addresses: a tenth answer, two fifths refuse, a quarter take the connection and are silent, a quarter do
    not take it."""
    async with contextlib.AsyncExitStack() as stack:
        port = _free_port()
        for last in range(1, 255):
            address = f"127.0.0.{last}"
            if last % 2:
                silent = socket.socket()
                stack.callback(silent.close)
                silent.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                silent.bind((address, port))
                silent.listen(0 if last % 4 == 1 else 64)
                if last % 4 == 1:
                    # One connection fills the backlog of 0; a second one's SYN is dropped.
                    for _ in range(2):
                        filler = socket.socket()
                        stack.callback(filler.close)
                        filler.setblocking(False)
                        filler.connect_ex((address, port))
            elif last % 10 == 0:
                server = await asyncio.get_running_loop().create_server(_Device, address, port)
                stack.callback(server.close)
        wanted = commands_scan.Wanted(networks=("127.0.0.0/24",), tcp_port=port, turnaround_s=TURNAROUND_S)
        await scan(wanted, folder)


class _Device(asyncio.Protocol):
    """Knows no function, and says so."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(data[:4] + b"\0\3" + data[6:7] + bytes([data[7] | 0x80, 1]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


def verdict(what: str, measured: float, target: float, unit: str) -> None:
    word = "ok" if measured <= target else "MISSED"
    print(f"{what}: {measured:.1f} {unit} (target {target:g} {unit}): {word}", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_STATE_HOME"] = name
        hosts(folder)
        serial(folder, full="--full" in sys.argv)


if __name__ == "__main__":
    main()
