"""32 RTU units on one line at 115,200 baud: frames per second against what the line can carry.

    python -m tests.benchmarks.bench_modbus_line [--seconds 10] [--units 32] [--registers 60] [--json]

The other end is a model of the line in a process of its own, on a pty: a request takes its characters' time to arrive,
the slave waits for 3.5 characters of silence (1.75 ms above 19,200 baud) before it may take it for ended, and its reply
comes in the pieces that a UART's 16-byte FIFO gives, the last one when its last stop bit is over.

Theory: a cycle is the request's and the reply's characters, 10 bits each (8N1), and two silences: the one before the
reply and the one before the next request. Nothing else; a slave that thinks, a kernel that schedules and a master that
computes are all loss. The model's own lateness is counted against us, too, and told apart. The raw baseline of the same
run is a bare master on the same model: it writes, blocks until the reply is whole, burns the silence away in a loop and
checks nothing. Rounds of both take turns; the median and the best round are told.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pty
import select
import subprocess
import sys
import time
import tty
from statistics import median

from drivers.modbus import ModbusDriver
from drivers.registry import build
from tests.fakes.modbus_peer import framed

BAUD = 115_200
CHARACTER_S = 10 / BAUD
SILENCE_S = 0.00175
FIFO = 16  #: bytes of a 16550's FIFO


def theory_s(registers: int) -> float:
    """One cycle: request of 8 bytes, reply of 5 and the registers, two silences."""
    return (8 + 5 + 2 * registers) * CHARACTER_S + 2 * SILENCE_S


def _wait_until(when_s: float) -> None:
    """To the tenth of a millisecond, which a sleep alone does not keep."""
    while (left_s := when_s - time.perf_counter()) > 0:
        if left_s > 0.0006:
            time.sleep(left_s - 0.0005)


def serve() -> None:
    """The slaves. Prints the port's name; at the end of its input, how late it was itself, in seconds."""
    master, slave = pty.openpty()
    tty.setraw(master)
    tty.setraw(slave)
    print(os.ttyname(slave), flush=True)
    late_s = 0.0
    frames = 0
    while True:
        ready, _, _ = select.select([master, sys.stdin], [], [])
        if sys.stdin in ready:
            break
        request = os.read(master, 256)
        at_s = time.perf_counter()
        if len(request) != 8:
            continue
        count = int.from_bytes(request[4:6], "big")
        data = b"".join(((request[0] * 256 + i) & 0xFFFF).to_bytes(2, "big") for i in range(count))
        reply = framed(bytes([request[0], request[1], len(data)]) + data)
        at_s += 8 * CHARACTER_S + SILENCE_S
        for begin in range(0, len(reply), FIFO):
            piece = reply[begin : begin + FIFO]
            at_s += len(piece) * CHARACTER_S
            _wait_until(at_s)
            os.write(master, piece)
        late_s += time.perf_counter() - at_s
        frames += 1
    print(json.dumps({"late_s": late_s, "frames": frames}), flush=True)


def bare(port: str, units: int, registers: int, seconds: float) -> float:
    """Frames per second of a master that does nothing else."""
    descriptor = os.open(port, os.O_RDWR | os.O_NOCTTY)
    tty.setraw(descriptor)
    requests = [framed(bytes([unit, 3, 0, 0, 0, registers])) for unit in range(1, units + 1)]
    frames, begun_s = 0, time.perf_counter()
    while time.perf_counter() - begun_s < seconds:
        os.write(descriptor, requests[frames % units])
        missing = 5 + 2 * registers
        while missing > 0:
            missing -= len(os.read(descriptor, missing))
        frames += 1
        silent_s = time.perf_counter() + SILENCE_S
        while time.perf_counter() < silent_s:
            pass
    took_s = time.perf_counter() - begun_s
    os.close(descriptor)
    return frames / took_s


async def measure(port: str, units: int, registers: int, seconds: float) -> tuple[int, int, float, float]:
    """Frames, wrong or missing values, seconds, CPU seconds."""
    points: list[dict[str, object]] = [{"name": f"p{i}", "register": i} for i in range(registers)]
    drivers: list[ModbusDriver] = []
    for unit in range(1, units + 1):
        options: dict[str, object] = {"serial": port, "baud": BAUD, "parity": "none", "unit": unit}
        driver = build(f"unit {unit}", "modbus", options, points)
        assert isinstance(driver, ModbusDriver)
        drivers.append(driver)
    for driver in drivers:
        await driver.connect()
    frames = wrong = 0

    async def poll(unit: int, driver: ModbusDriver, until_s: float) -> None:
        nonlocal frames, wrong
        expected = [(unit * 256 + i) & 0xFFFF for i in range(registers)]
        while time.monotonic() < until_s:
            scan = await driver.read(driver.points)
            frames += 1
            wrong += list(scan.values) != expected

    await asyncio.gather(*(poll(i + 1, driver, 0.0) for i, driver in enumerate(drivers)))
    begun_s, cpu_s = time.monotonic(), time.process_time()
    await asyncio.gather(*(poll(i + 1, driver, begun_s + seconds) for i, driver in enumerate(drivers)))
    took_s, cpu_s = time.monotonic() - begun_s, time.process_time() - cpu_s
    for driver in drivers:
        await driver.close()
    return frames, wrong, took_s, cpu_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--units", type=int, default=32)
    parser.add_argument("--registers", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    with subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.bench_modbus_line", "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as model:
        assert model.stdout is not None
        port = model.stdout.readline().strip()
        rates, bare_rates, wrong, cpu = [], [], 0, []
        for _ in range(arguments.rounds):
            frames, bad, took_s, cpu_s = asyncio.run(
                measure(port, arguments.units, arguments.registers, arguments.seconds)
            )
            rates.append(frames / took_s)
            cpu.append(cpu_s / took_s)
            wrong += bad
            bare_rates.append(bare(port, arguments.units, arguments.registers, arguments.seconds / 2))
        told = json.loads(model.communicate("\n")[0])
    possible = 1 / theory_s(arguments.registers)
    result = {
        "theory_per_s": possible,
        "frames_per_s": median(rates),
        "ratio": median(rates) / possible,
        "best_ratio": max(rates) / possible,
        "bare_ratio": median(bare_rates) / possible,
        "bare_best_ratio": max(bare_rates) / possible,
        "wrong": wrong,
        "cpu_share": median(cpu),
        "model_late_ms": 1000 * told["late_s"] / max(1, told["frames"]),
    }
    if arguments.json:
        print(json.dumps(result))
        return
    print(
        f"{arguments.units} units, {arguments.registers} registers a frame, {BAUD} baud 8N1: {possible:.1f} frames/s"
    )
    print(
        f"  Headgate: {result['frames_per_s']:.1f} frames/s, {result['ratio']:.3f} of theory "
        f"(best round {result['best_ratio']:.3f}); wrong: {wrong}; {100 * result['cpu_share']:.0f} % of a core"
    )
    print(
        f"  bare master: {result['bare_ratio']:.3f} of theory (best {result['bare_best_ratio']:.3f}); "
        f"Headgate to bare {median(rates) / median(bare_rates):.3f}; "
        f"the model was {result['model_late_ms']:.2f} ms late a frame"
    )


if __name__ == "__main__":
    main()
