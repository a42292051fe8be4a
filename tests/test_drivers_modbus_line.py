"""A Modbus line: one owner, turns that go round, silence where it is owed, units left alone, and never a wrong value.

`HEADGATE_FRAMES=100000` runs the soak at its full length.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest

from drivers import modbus_breaker, modbus_line
from drivers.contract import ConfigError, DeviceUnreachable, Reason
from drivers.modbus_address import reply_timeout_s
from drivers.modbus_breaker import Breaker, Verdict
from drivers.modbus_cost import CostMeter
from drivers.modbus_line import Failure, HostPort, Line, Reply, Request, SerialPort, line_of
from drivers.modbus_port import SerialTransport, open_tty
from drivers.port_key import port_key
from tests.fakes.faulty_slave import (
    ANSWERED,
    COUNT,
    UNANSWERED,
    FaultySlave,
    ascii_frame,
    rtu_frame,
    words_of,
)
from tests.fakes.modbus_peer import ScriptedTcp, pty_pair
from tests.fakes.serial_line_model import ModelUnit, SerialLineModel

FRAMES = int(os.environ.get("HEADGATE_FRAMES", "600"))
SEED = int(os.environ.get("HEADGATE_SEED", "4"))
TIMEOUT_S, LATEST_S = 0.006, 0.014


def reading(unit: int, address: int, count: int = COUNT, *, timeout_s: float, latest_s: float) -> Request:
    pdu = struct.pack(">BHH", 3, address, count)
    return Request(unit, pdu, bytes([3, 2 * count]), 2 + 2 * count, timeout_s, latest_s)


@contextlib.asynccontextmanager
async def line_at(address: modbus_line.Address, user: str = "test") -> AsyncIterator[Line]:
    line = line_of(address, user)
    try:
        await line.open(3.0)
        yield line
    finally:
        line.release(user)


# ------------------------------------------------------------------------------------------ never a wrong value


class _Noting:
    """Opens ports that note when each request is written."""

    def __init__(self) -> None:
        self.slave: FaultySlave | None = None

    def open(self, address: SerialPort, protocol_factory: Callable[[], asyncio.Protocol]) -> SerialTransport:
        transport = open_tty(address, protocol_factory)
        write, slave = transport.write, self.slave
        assert slave is not None

        def noted(data: bytes | bytearray | memoryview) -> None:
            slave.sent_at.append(time.monotonic())
            write(data)

        transport.write = noted  # type: ignore[method-assign]
        return transport


class _Tally(Counter[str]):
    def judge(self, unit: int, address: int, reply: Reply) -> None:
        if isinstance(reply, Failure):
            self[reply.reason.name] += 1
        elif struct.unpack(f">{COUNT}H", reply) == tuple(words_of(unit, address)):
            self["right"] += 1
        else:
            self["wrong"] += 1


def _anyhow(chance: random.Random) -> Callable[[int], str]:
    """Each request meets its own fate."""

    def fault(unit: int) -> str:
        return chance.choice(
            ("ok",) * 6 + ANSWERED
            if chance.random() < 0.75
            else ("late", "late", "late_bytewise", *UNANSWERED)
        )

    return fault


def _in_spells(chance: random.Random) -> Callable[[int], str]:
    """Each unit is well for a while and then fails for a while, with two faults at once too, so that it is left alone
    and tried again: what comes late may have the other unit's number."""
    left, fails = {1: 0, 2: 0}, {1: True, 2: True}
    mixed = ("late", "late", "none", "late_of_other_unit", "late_of_other_unit", "late_exception_of_other")

    def fault(unit: int) -> str:
        if not left[unit]:
            fails[unit] = not fails[unit]
            left[unit] = chance.randrange(4, 30) if fails[unit] else chance.randrange(5, 40)
        left[unit] -= 1
        if fails[unit]:
            return chance.choice(mixed + UNANSWERED)
        return chance.choice((*("ok",) * 60, *ANSWERED, *UNANSWERED))

    return fault


async def _soak(
    monkeypatch: pytest.MonkeyPatch,
    frames: int,
    fault: Callable[[int], str],
    seed: int,
    *,
    framing: str = "rtu",
    echo: bool = False,
    stalls: float,
    force: bool = True,
) -> tuple[_Tally, FaultySlave]:
    noting = _Noting()
    slave = noting.slave = FaultySlave(
        fault, ascii_=framing == "ascii", timeout_s=TIMEOUT_S, latest_s=LATEST_S, echo=echo, seed=seed
    )
    monkeypatch.setattr(modbus_line, "open_serial", noting.open)
    address = SerialPort(slave.path, 115200, "N", 1, framing="ascii" if framing == "ascii" else "rtu")
    tally = _Tally()
    left = iter(range(frames))
    upset = random.Random(seed + 1)

    async def poll(unit: int, line: Line) -> None:
        for n in left:
            register = n % 60_000
            request = reading(unit, register, timeout_s=TIMEOUT_S, latest_s=LATEST_S)
            try:
                replies = (await line.exchange([request], force=force)).replies
            except DeviceUnreachable:
                tally["left alone"] += 1
                await asyncio.sleep(0.01)
                continue
            tally.judge(unit, register, replies[0])
            if upset.random() < stalls:
                # The loop is held up now, or in the midst of the next request, or while the line owes its silence.
                at_s = upset.uniform(0, 2 * LATEST_S)
                asyncio.get_running_loop().call_later(at_s, time.sleep, upset.uniform(0.005, 0.06))
            await asyncio.sleep(0.001)

    try:
        async with line_at(address, "one") as one, line_at(address, "two") as two:
            await asyncio.gather(poll(1, one), poll(2, two))
    finally:
        slave.close()
    return tally, slave


@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    ("framing", "echo", "stalls", "share"),
    [
        ("rtu", False, 0.0, 1.0),
        ("rtu", True, 0.02, 0.2),
        ("rtu", False, 0.1, 0.2),
        ("ascii", False, 0.02, 0.2),
    ],
)
async def test_frames_with_every_fault_give_no_wrong_value(
    monkeypatch: pytest.MonkeyPatch, framing: str, echo: bool, stalls: float, share: float
) -> None:
    frames = int(FRAMES * share)
    fault = _anyhow(random.Random(SEED))
    tally, slave = await _soak(monkeypatch, frames, fault, SEED, framing=framing, echo=echo, stalls=stalls)
    print(
        f"seed {SEED}, {frames} frames, {framing}: {dict(tally)}; late {slave.late}, dropped {slave.dropped}"
    )
    print(dict(slave.did))
    assert tally["wrong"] == 0
    assert tally["right"] > frames / 3
    assert set(slave.did) == {*ANSWERED, *UNANSWERED}
    assert slave.late - slave.dropped > frames / 40, "too few late replies to mean anything"
    assert sum(tally.values()) == frames
    assert {"TIMEOUT", "FRAMING", "CRC", "EXCEPTION", "BUSY"} <= set(tally)
    assert Reason.DISCONNECTED.name not in tally


@pytest.mark.timeout(0)
async def test_units_that_are_left_alone_and_tried_again_give_no_wrong_value_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a brief read the line is not silent for the others: what comes late has another form than they wait for,
    be it with their number."""
    for name, shorter_s in {
        "FIRST_S": 0.01,
        "LEAST_LONGEST_S": 0.04,
        "MOST_LONGEST_S": 0.04,
        "BUSY_FIRST_S": 0.01,
    }.items():
        monkeypatch.setattr(modbus_breaker, name, shorter_s)
    frames = FRAMES
    tally, slave = await _soak(
        monkeypatch, frames, _in_spells(random.Random(SEED)), SEED, stalls=0.02, force=False
    )
    print(f"seed {SEED}, {frames} frames: {dict(tally)}; late {slave.late}, dropped {slave.dropped}")
    print(dict(slave.did))
    assert tally["wrong"] == 0
    assert tally["right"] > frames / 20
    assert tally["left alone"] > frames / 20
    assert slave.did["late_of_other_unit"] + slave.did["late_exception_of_other"] > frames / 60


async def test_a_late_reply_that_came_while_the_loop_was_held_up_is_thrown_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reply waits in the kernel when the next request is made: without a flush in the same turn, it is the first
    thing that is read after it."""
    noting, script = _Noting(), ["late", "ok"] * 20
    slave = noting.slave = FaultySlave(lambda _: script.pop(0), timeout_s=TIMEOUT_S, latest_s=LATEST_S)
    monkeypatch.setattr(modbus_line, "open_serial", noting.open)
    tally = _Tally()
    try:
        async with line_at(SerialPort(slave.path, 115200, "N", 1)) as line:
            for n in range(0, 40, 2):
                late = reading(1, n, timeout_s=TIMEOUT_S, latest_s=LATEST_S)
                tally.judge(1, n, (await line.exchange([late], force=True)).replies[0])
                time.sleep(0.06)  # noqa: ASYNC251 - holds up the loop, which is the point
                patient = reading(1, n + 1, timeout_s=0.5, latest_s=0.5)
                tally.judge(1, n + 1, (await line.exchange([patient], force=True)).replies[0])
    finally:
        slave.close()
    # A reply at the very end of the timeout may be in time.
    assert set(tally) == {"TIMEOUT", "right"}
    assert tally["right"] < 25
    assert slave.late - slave.dropped >= 15


# ------------------------------------------------------------------------------------------ an echo


@contextlib.asynccontextmanager
async def answering(answer: Callable[[bytes], bytes], **settings: str) -> AsyncIterator[Line]:
    """A line whose other end is told each request as it arrives and says what is sent back."""
    async with pty_pair() as (ours, theirs):
        loop = asyncio.get_running_loop()
        fd = os.open(theirs, os.O_RDWR | os.O_NOCTTY)
        loop.add_reader(fd, lambda: os.write(fd, answer(os.read(fd, 1024))))
        try:
            framing = settings.get("framing", "rtu")
            address = SerialPort(ours, 115200, "N", 1, framing="ascii" if framing == "ascii" else "rtu")
            async with line_at(address) as line:
                yield line
        finally:
            loop.remove_reader(fd)
            os.close(fd)


COILS = Request(1, bytes.fromhex("0103000014"), bytes.fromhex("0103"), 5, 0.08, 0.08)
"""20 coils from 0x0300: the request, heard again, has a reply's form to the last bit of its check."""
REGISTER = Request(1, bytes.fromhex("0300000001"), bytes.fromhex("0302"), 4, 0.08, 0.08)
WRITE = Request(1, bytes.fromhex("0600070009"), bytes.fromhex("0600070009"), 5, 0.08, 0.08)


MASK = Request(1, bytes.fromhex("16000400120025"), bytes.fromhex("16000400120025"), 7, 0.08, 0.08)


@pytest.mark.parametrize("request_", [WRITE, MASK], ids=["6", "22"])
async def test_the_first_thing_on_a_line_may_be_a_write_whose_confirmation_is_its_request(
    request_: Request,
) -> None:
    async with answering(lambda request: request) as line:
        assert (await line.exchange([request_])).replies == [b""]


@pytest.mark.parametrize("framing", ["rtu", "ascii"])
async def test_an_echo_of_the_request_is_never_taken_for_its_reply(framing: str) -> None:
    frame = rtu_frame if framing == "rtu" else ascii_frame
    alive = True

    def answer(request: bytes) -> bytes:
        if not alive:
            return request  # the adapter hears itself, and nobody else speaks
        if request == frame(b"\x01" + COILS.pdu):
            return request + frame(bytes.fromhex("010103aabb0c"))
        if request == frame(b"\x01" + WRITE.pdu):
            return request + request
        return request + frame(bytes.fromhex("0103020102"))

    async with answering(answer, framing=framing) as line:

        async def ask(request: Request) -> Reply:
            return (await line.exchange([request], force=True)).replies[0]

        assert await ask(COILS) == bytes.fromhex("aabb0c")
        assert await ask(REGISTER) == bytes.fromhex("0102")
        assert await ask(COILS) == bytes.fromhex("aabb0c")
        assert await ask(WRITE) == b""
        alive = False
        for request in (COILS, REGISTER, WRITE):
            assert await ask(request) == Failure(Reason.TIMEOUT)


async def test_coils_that_happen_to_read_as_their_request_are_good_on_a_line_without_echo() -> None:
    reply = rtu_frame(bytes.fromhex("0103020102"))
    replies = {rtu_frame(b"\x01" + REGISTER.pdu): reply}
    async with answering(lambda request: replies.get(request, request)) as line:
        assert (await line.exchange([REGISTER])).replies == [bytes.fromhex("0102")]
        assert (await line.exchange([COILS])).replies == [COILS.pdu[2:]]
        assert (await line.exchange([WRITE])).replies == [b""]


# ------------------------------------------------------------------------------------------ turns


async def test_a_long_series_lets_the_others_in_between_its_requests() -> None:
    order: list[int] = []
    async with ScriptedTcp() as peer, contextlib.AsyncExitStack() as stack:
        address = HostPort("127.0.0.1", peer.port)
        lines = [await stack.enter_async_context(line_at(address, f"user {n}")) for n in range(4)]

        async def ask(n: int, count: int) -> None:
            series = [reading(1, 100 * n, timeout_s=2.0, latest_s=2.0)] * count
            assert len((await lines[n].exchange(series)).replies) == count
            order.append(n)

        peer.late_s = 0.01
        peer.script = ["late"] * 100
        polls = [asyncio.create_task(ask(n, 20)) for n in range(3)]
        await asyncio.sleep(0.05)
        before = peer.requests
        await ask(3, 1)  # a technician's probe: at most one request of each of the three comes first
        assert peer.requests - before <= 4
        await asyncio.gather(*polls)
        assert order[0] == 3


async def test_a_user_that_goes_away_while_it_waits_or_asks_leaves_the_line_to_the_others() -> None:
    async with ScriptedTcp() as peer, line_at(HostPort("127.0.0.1", peer.port)) as line:
        request = reading(1, 5, timeout_s=1.0, latest_s=1.0)
        peer.script = ["none"]
        asking = asyncio.create_task(line.exchange([request]))
        waiting = asyncio.create_task(line.exchange([request]))
        staying = asyncio.create_task(line.exchange([request] * 3))
        await asyncio.sleep(0.05)
        waiting.cancel()
        asking.cancel()
        replies = (await staying).replies
        assert [type(reply) for reply in replies] == [bytes] * 3
        assert peer.requests == 4


@pytest.mark.parametrize(
    ("unit", "pdu", "timeout_s"),
    [(256, b"x", 1), (-1, b"x", 1), (1, b"", 1), (1, b"x", 0), (1, bytes(254), 1)],
)
def test_a_request_that_no_frame_can_carry_is_refused_when_it_is_made(
    unit: int, pdu: bytes, timeout_s: float
) -> None:
    with pytest.raises(ValueError, match="no such request"):
        Request(unit, pdu, b"x", 2, timeout_s, 1.0)


# ------------------------------------------------------------------------------------------ names of a port


def test_all_names_of_a_port_have_one_key(tmp_path: Path) -> None:
    link = tmp_path / "by-id"
    link.symlink_to("/dev/ptmx")
    # Two nodes of one device number, on every Linux: the kernel's name of it decides.
    assert port_key("/dev/pts/ptmx") == port_key("/dev/ptmx") == port_key(str(link)) == "/dev/ptmx"
    assert port_key(str(tmp_path / "unplugged")) == str(tmp_path / "unplugged")


def test_addresses_of_one_line_share_its_key_and_differ_in_settings() -> None:
    tcp, rtu, udp = (HostPort("Gw", 502, framing) for framing in ("tcp", "rtu_over_tcp", "udp"))
    assert tcp.key == rtu.key == "gw:502"
    assert udp.key != tcp.key
    assert len({each.claim().settings for each in (tcp, rtu, udp)}) == 3
    slow, fast = (SerialPort("/dev/no-such-port", baud, "E", 1) for baud in (9600, 19200))
    assert slow.key == fast.key
    assert slow.settings == "9600 baud, 8E1, rtu"
    assert SerialPort("/dev/x", 9600, "E", 1, 7, "ascii").settings == "9600 baud, 7E1, ascii"


async def test_a_name_that_means_another_port_after_a_replug_is_another_line(tmp_path: Path) -> None:
    name = tmp_path / "usb-meter"
    async with pty_pair() as (first, second):
        name.symlink_to(first)
        by_name, by_path = SerialPort(str(name), 9600, "N", 1), SerialPort(first, 9600, "N", 1)
        async with line_at(by_name, "a") as a, line_at(by_path, "b") as b:
            name.unlink()
            name.symlink_to(second)
            await a.open(1.0)
            await b.open(1.0)
            # Had both been served by the first port still, no second program could not have opened the other.
            with pytest.raises(DeviceUnreachable, match="another program holds it"):
                open_tty(SerialPort(second, 9600, "N", 1), asyncio.Protocol)


async def test_a_port_that_another_program_holds_is_refused_and_the_program_named() -> None:
    holding = (
        "import fcntl, sys; f = open(sys.argv[1], 'rb+', 0); fcntl.flock(f, 6); print(flush=True); input()"
    )
    async with pty_pair() as (port, _):
        with subprocess.Popen(  # noqa: ASYNC220 - starts at once
            [sys.executable, "-c", holding, port], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other:
            assert other.stdout is not None
            await asyncio.to_thread(other.stdout.readline)
            line = line_of(SerialPort(port, 9600, "N", 1), "test")
            with pytest.raises(
                DeviceUnreachable, match=rf"another program holds it: python\S* \(pid {other.pid}\)"
            ):
                await line.open(1.0)
            other.communicate(b"\n")
            await line.open(1.0)
            line.release("test")


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ((5, "N", 1), True),
        ((8, "M", 1), True),
        ((8, "N", 1), False),
        ((8, "E", 1), True),
        ((7, "N", 1), True),
        ((8, "N", 2), False),
    ],
)
async def test_a_port_that_silently_drops_a_setting_is_refused(
    settings: tuple[int, str, int], refused: bool
) -> None:
    """A pty does, with parity and 7 data bits."""
    data_bits, parity, stop_bits = settings
    async with pty_pair() as (port, _):
        line = line_of(SerialPort(port, 9600, parity, stop_bits, data_bits), "test")
        with pytest.raises(ConfigError, match="does not take") if refused else contextlib.nullcontext():
            await line.open(1.0)
        line.release("test")


# ------------------------------------------------------------------------------------------ UDP, ASCII over TCP


class _Datagrams(asyncio.DatagramProtocol):
    """A Modbus UDP device: register n holds n."""

    def __init__(self) -> None:
        self.script: list[str] = []
        self.transport: asyncio.DatagramTransport | None = None
        self.stranger: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        assert self.transport is not None
        transaction, _, _, unit, function, address, count = struct.unpack(">HHHBBHH", data)

        def reply(transaction: int = transaction, first: int = address) -> bytes:
            body = bytes([unit, function, 2 * count]) + struct.pack(
                f">{count}H", *range(first, first + count)
            )
            return struct.pack(">HHH", transaction & 0xFFFF, 0, len(body)) + body

        match self.script.pop(0) if self.script else "ok":
            case "ok":
                self.transport.sendto(reply(), addr)
            case "stale":
                self.transport.sendto(reply(transaction - 1, 900), addr)
                self.transport.sendto(reply(), addr)
            case "stranger":
                assert self.stranger is not None
                self.stranger.sendto(reply(first=900), addr)
            case "short":
                self.transport.sendto(reply()[:-1], addr)
            case "tiny":
                self.transport.sendto(b"x", addr)
            case "lost":
                pass


async def test_udp_a_reply_counts_only_from_its_device_and_with_its_transaction() -> None:
    loop = asyncio.get_running_loop()
    transport, device = await loop.create_datagram_endpoint(_Datagrams, local_addr=("127.0.0.1", 0))
    device.stranger, _ = await loop.create_datagram_endpoint(_Datagrams, local_addr=("127.0.0.1", 0))
    port = transport.get_extra_info("sockname")[1]
    try:
        async with line_at(HostPort("127.0.0.1", port, "udp")) as line:
            right = struct.pack(">4H", 7, 8, 9, 10)
            request = reading(3, 7, timeout_s=0.08, latest_s=0.08)
            expected = {
                "ok": right,
                "stale": right,
                "lost": Failure(Reason.TIMEOUT),
                "stranger": Failure(Reason.TIMEOUT),
                "short": Failure(Reason.FRAMING),
                "tiny": Failure(Reason.FRAMING),
            }
            for what, reply in expected.items():
                device.script = [what]
                assert (await line.exchange([request], force=True)).replies == [reply], what
                assert (await line.exchange([request], force=True)).replies == [right], what
            transport.close()
            await asyncio.sleep(0.02)
            assert (await line.exchange([request], force=True)).replies == [Failure(Reason.DISCONNECTED)]
    finally:
        transport.close()
        device.stranger.close()


async def test_ascii_over_tcp_is_read() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await reader.readuntil(b"\r\n"):
                writer.write(b":0000" + ascii_frame(bytes.fromhex("0103020102")).lower())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, line_at(HostPort("127.0.0.1", port, "ascii_over_tcp")) as line:
        assert (await line.exchange([REGISTER])).replies == [bytes.fromhex("0102")]


# ------------------------------------------------------------------------------------------ time on the line


def test_a_timeout_is_both_frames_their_silences_and_the_turnaround_in_whole_milliseconds() -> None:
    # 9600 8E1: 11 bits a character. Request 8, reply 5 + 250, each after 3.5 characters of silence.
    slow = SerialPort("/dev/x", 9600, "E", 1)
    assert reply_timeout_s(slow, 5, 252, 0.3) == pytest.approx(0.3 + (8 + 255 + 7) * 11 / 9600, abs=0.001)
    # Above 19200 baud the silence is 1.75 ms.
    fast = SerialPort("/dev/x", 115200, "N", 1)
    assert reply_timeout_s(fast, 5, 252, 0.0) == pytest.approx((8 + 255) * 10 / 115200 + 0.0035, abs=0.001)
    # ASCII: two characters a byte, LRC instead of CRC, colon and line end; 7E1 is 10 bits.
    ascii_ = SerialPort("/dev/x", 9600, "E", 1, 7, "ascii")
    assert ascii_.frame_s(5) == pytest.approx(17 * 10 / 9600)
    assert (1000 * reply_timeout_s(slow, 5, 252)) % 1 == pytest.approx(0, abs=1e-6)


def test_cost_on_a_serial_line_is_the_round_trip_without_its_data() -> None:
    address = SerialPort("/dev/x", 9600, "N", 1)
    meter, first = CostMeter(address), CostMeter(address).cost
    for _ in range(64):
        meter.note(address.frame_s(5) + 0.02 + address.frame_s(42), 42)
        meter.note(address.frame_s(5) + 0.2 + address.frame_s(122), 122)  # it waited for something else
    assert meter.cost.register_s == first.register_s == pytest.approx(2 * 10 / 9600)
    assert meter.cost.request_s == pytest.approx((8 + 5) * 10 / 9600 + 0.02 + 3.5 * 10 / 9600, rel=0.01)


def test_cost_behind_a_host_grows_with_the_registers_as_measured() -> None:
    meter = CostMeter(HostPort("gw", 4001, "rtu_over_tcp"))
    for _ in range(200):
        meter.note(0.03 + 10 * 0.002, 22)
        meter.note(0.03 + 100 * 0.002, 202)
    assert meter.cost.register_s == pytest.approx(0.002, rel=0.05)
    assert meter.cost.request_s == pytest.approx(0.03, rel=0.05)
    quick = CostMeter(HostPort("plc", 502))
    for _ in range(100):
        quick.note(0.0002, 252)
    assert 100 * quick.cost.register_s < quick.cost.request_s


async def test_a_line_tells_the_cost_that_it_measured() -> None:
    async with ScriptedTcp() as peer, line_at(HostPort("127.0.0.1", peer.port)) as line:
        before = line.cost()
        for _ in range(600):
            await line.exchange([reading(1, 5, timeout_s=1.0, latest_s=1.0)])
        assert 0 < line.cost().request_s < before.request_s


# ------------------------------------------------------------------------------------------ a unit left alone


def waits_of(breaker: Breaker, reason: Reason, *, cost_s: float, until_s: float) -> list[float]:
    """How long it is left alone each time, if it never answers and is asked whenever it may be."""
    now_s, waits = 0.0, []
    while now_s < until_s:
        verdict = breaker.verdict(now_s)
        assert verdict is not Verdict.REFUSE
        assert verdict is Verdict.PASS or breaker.verdict(now_s) is Verdict.REFUSE  # one probe at a time
        now_s += cost_s
        breaker.failed(reason, now_s, cost_s)
        if breaker.is_open:
            waits.append(round(breaker.again_s - now_s, 6))
            now_s = breaker.again_s
    return waits


def test_a_silent_unit_is_left_alone_longer_and_longer() -> None:
    waits = waits_of(Breaker(), Reason.TIMEOUT, cost_s=0.5, until_s=1200)
    assert waits[:6] == [1, 2, 4, 8, 8, 8]
    assert waits[-1] == 60
    assert (
        max(waits_of(Breaker(), Reason.TIMEOUT, cost_s=0.1, until_s=500)) == 2
    )  # cheap to ask: asked more often


def test_some_probes_are_patient_and_the_second_is_the_whole_request() -> None:
    breaker, now_s, verdicts = Breaker(), 0.0, []
    for _ in range(3 + 20):
        verdicts.append(breaker.verdict(now_s))
        breaker.failed(Reason.TIMEOUT, now_s, 0.1)
        now_s = max(now_s, breaker.again_s)
    brief, patient, whole = Verdict.PROBE, Verdict.PATIENT_PROBE, Verdict.WHOLE_PROBE
    usual = [brief, brief, brief, patient]
    probes = [brief, whole, brief, patient, *usual * 3, brief, whole, brief, patient]
    assert verdicts == [Verdict.PASS] * 3 + probes


def test_a_busy_unit_is_asked_again_soon() -> None:
    assert waits_of(Breaker(), Reason.BUSY, cost_s=0.01, until_s=5)[:5] == [0.25, 0.5, 1, 2, 2]


def test_a_few_failures_leave_nobody_alone() -> None:
    for reason, times in ((Reason.TIMEOUT, 2), (Reason.BUSY, 2), (Reason.BEHIND_GATEWAY, 1), (Reason.CRC, 5)):
        breaker = Breaker()
        for _ in range(times):
            breaker.failed(reason, 0.0, 1.0)
        assert breaker.verdict(0.0) is Verdict.PASS
        breaker.failed(reason, 0.0, 1.0)
        assert breaker.verdict(0.1) is Verdict.REFUSE


def test_a_probe_that_nobody_made_may_be_made_again() -> None:
    breaker = Breaker()
    for _ in range(3):
        breaker.failed(Reason.TIMEOUT, 0.0, 1.0)
    assert breaker.verdict(2.0) is Verdict.PROBE
    breaker.released()
    assert breaker.verdict(2.0) is Verdict.PROBE
    breaker.expects(9.0)
    breaker.released()
    assert breaker.verdict(8.9) is Verdict.REFUSE  # a reply to the probe may still come
    breaker.hurry(3.0)
    assert breaker.verdict(8.9) is Verdict.REFUSE


async def test_a_dead_unit_costs_nothing_until_its_probe_and_is_back_with_its_first_answer() -> None:
    loop = asyncio.get_running_loop()
    async with ScriptedTcp() as peer, contextlib.AsyncExitStack() as stack:
        address = HostPort("127.0.0.1", peer.port)
        one, two = [await stack.enter_async_context(line_at(address, name)) for name in ("one", "two")]
        request = reading(9, 5, timeout_s=0.05, latest_s=0.05)
        peer.script = ["none"] * 3
        for line in (one, two, one):  # two devices of one unit: what one learns, the other knows
            assert (await line.exchange([request])).replies == [Failure(Reason.TIMEOUT)]
        for line in (one, two):
            begun_s = loop.time()
            with pytest.raises(
                DeviceUnreachable, match=r"unit 9 does not answer; asked again in [01]\.\d s"
            ) as failed:
                await line.exchange([request])
            assert failed.value.reason is Reason.TIMEOUT
            again_s = failed.value.retry_within_s  # so that whoever polls it comes in time
            assert again_s is not None
            assert again_s == pytest.approx(line.left_alone_s(9), abs=0.05)
            assert loop.time() - begun_s < 0.05
        assert peer.requests == 3
        other = reading(8, 5, timeout_s=1.0, latest_s=1.0)
        assert isinstance((await one.exchange([other])).replies[0], bytes)
        peer.script = ["none"]
        assert (await one.exchange([request], force=True)).replies == [
            Failure(Reason.TIMEOUT)
        ]  # a technician may
        asked_at_s = loop.time() + 5
        while loop.time() < asked_at_s:
            with contextlib.suppress(DeviceUnreachable):
                assert isinstance((await one.exchange([request])).replies[0], bytes)
                break
            await asyncio.sleep(0.05)
        for _ in range(3):
            assert isinstance((await two.exchange([request])).replies[0], bytes)


@pytest.mark.parametrize(("fault", "reason"), [("gateway", Reason.BEHIND_GATEWAY), ("busy", Reason.BUSY)])
async def test_a_unit_that_its_gateway_misses_or_that_is_busy_leaves_line_and_others_as_they_are(
    fault: str, reason: Reason
) -> None:
    async with ScriptedTcp() as peer, line_at(HostPort("127.0.0.1", peer.port)) as line:
        request, other = (reading(unit, 5, timeout_s=1.0, latest_s=1.0) for unit in (9, 8))
        for _ in range(3 if reason is Reason.BUSY else 2):
            peer.script = [fault]
            failure = (await line.exchange([request])).replies[0]
            assert isinstance(failure, Failure)
            assert failure.reason is reason
        with pytest.raises(DeviceUnreachable, match="asked again in") as failed:
            await line.exchange([request])
        assert failed.value.reason is reason
        peer.script = []
        assert isinstance((await line.exchange([other])).replies[0], bytes)
        assert peer.connections == 1


async def _left_alone(line: Line, request: Request, slave: FaultySlave) -> None:
    """Ask it until it is left alone, and then until it has been probed once."""
    probed: int | None = None
    while probed is None or slave.requests == probed:
        try:
            assert isinstance((await line.exchange([request])).replies[0], Failure)
        except DeviceUnreachable:
            probed = slave.requests if probed is None else probed
            await asyncio.sleep(0.005)


async def test_a_late_reply_to_a_probe_is_nobodys_after_the_line_was_given_back_and_taken_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a reload of the configuration."""
    monkeypatch.setattr(modbus_breaker, "FIRST_S", 0.02)
    fate, noting = ["none"], _Noting()
    slave = noting.slave = FaultySlave(lambda _: fate[0], timeout_s=0.05, latest_s=0.3)
    monkeypatch.setattr(modbus_line, "open_serial", noting.open)
    address = SerialPort(slave.path, 115200, "N", 1)
    try:
        async with line_at(address) as line:
            await _left_alone(line, reading(1, 7, 1, timeout_s=0.05, latest_s=0.3), slave)
            fate[0] = "late"
            await _left_alone(line, reading(1, 8, 1, timeout_s=0.05, latest_s=0.3), slave)
        fate[0] = "none"
        async with line_at(address) as line:
            # Of the form of the probe, and with more patience than its late reply needs.
            request = reading(1, 9, 1, timeout_s=0.4, latest_s=0.4)
            reply = (await line.exchange([request], force=True)).replies[0]
        assert reply == Failure(Reason.TIMEOUT)
    finally:
        slave.close()


async def test_while_a_late_answer_to_a_brief_read_may_come_its_unit_is_not_asked_and_no_exception_is_believed() -> (
    None
):
    """An exception has one form for all requests of a function: it may be the late answer, with another's number."""
    loop = asyncio.get_running_loop()
    asked_at_s: dict[int, list[float]] = {1: [], 2: []}

    def answer(request: bytes) -> bytes:
        unit = request[0]
        asked_at_s[unit].append(loop.time())
        if unit == 2:
            return rtu_frame(bytes.fromhex("028302"))
        return rtu_frame(bytes.fromhex("0103080001000200030004")) if len(asked_at_s[1]) == 1 else b""

    silent, other = (reading(unit, 5, timeout_s=0.1, latest_s=0.6) for unit in (1, 2))
    async with answering(answer) as line:
        assert isinstance((await line.exchange([silent])).replies[0], bytes)
        assert (await line.exchange([other])).replies == [Failure(Reason.EXCEPTION, 2)]
        for _ in range(3):  # from the second time on by a brief read
            assert (await line.exchange([silent])).replies == [Failure(Reason.TIMEOUT)]
        assert (await line.exchange([other])).replies == [Failure(Reason.FRAMING)]
        assert asked_at_s[1][3] - asked_at_s[1][2] >= 0.6
        assert asked_at_s[2][1] - asked_at_s[1][3] < 0.5  # the line was not silent for it
        await asyncio.sleep(0.7)
        assert (await line.exchange([other])).replies == [Failure(Reason.EXCEPTION, 2)]


async def test_a_unit_that_is_back_is_found_by_a_brief_read_and_its_values_come_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(modbus_breaker, "FIRST_S", 0.05)
    units = {1: ModelUnit(holding=list(range(60))), 2: ModelUnit(holding=list(range(60)))}
    model = SerialLineModel(units, baud=115200)
    monkeypatch.setattr(modbus_line, "open_serial", model.open)
    request = reading(1, 5, 40, timeout_s=0.05, latest_s=0.1)
    async with line_at(SerialPort("model", 115200, "N", 1)) as line:
        assert isinstance((await line.exchange([request])).replies[0], bytes)
        away = units.pop(1)
        for _ in range(3):
            assert (await line.exchange([request])).replies == [Failure(Reason.TIMEOUT)]
        units[1] = away
        model.asked.clear()
        deadline_s = asyncio.get_running_loop().time() + 5
        while True:
            with contextlib.suppress(DeviceUnreachable):
                reply = (await line.exchange([request])).replies[0]
                break
            assert asyncio.get_running_loop().time() < deadline_s
            await asyncio.sleep(0.01)
        assert reply == struct.pack(">40H", *range(5, 45))
        assert [pdu for _, pdu in model.asked] == [bytes.fromhex("0300050002"), request.pdu]
        # That it answers brief reads is known from now on: no probe is a whole request, of a form that others have too.
        del units[1]
        sizes: list[int] = []

        def note(sent: bytes, _: object) -> bytes:
            sizes.append(sent[5])
            return sent

        monkeypatch.setattr(model, "understood", note)
        while len(sizes) < 6:
            with contextlib.suppress(DeviceUnreachable):
                await line.exchange([request])
            assert asyncio.get_running_loop().time() < deadline_s
            await asyncio.sleep(0.01)
        assert sizes == [40, 2, 2, 2, 2, 2]


async def test_a_unit_that_is_silent_to_brief_reads_is_back_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(modbus_breaker, "FIRST_S", 0.02)
    frame = rtu_frame(b"\x01" + bytes.fromhex("0300050004"))
    alive = False

    def answer(request: bytes) -> bytes:
        return rtu_frame(bytes.fromhex("0103080001000200030004")) if alive and request == frame else b""

    request = reading(1, 5, timeout_s=0.05, latest_s=0.06)
    async with answering(answer) as line:
        for _ in range(3):
            assert (await line.exchange([request])).replies == [Failure(Reason.TIMEOUT)]
        alive = True
        tries = 0
        while True:
            with contextlib.suppress(DeviceUnreachable):
                tries += 1
                if isinstance((await line.exchange([request])).replies[0], bytes):
                    break
            assert tries < 300
            await asyncio.sleep(0.01)


async def test_a_write_to_a_unit_that_failed_before_has_its_whole_time() -> None:
    """A device that stores what it is told may take ten times longer than for a read."""
    async with pty_pair() as (ours, theirs):
        loop = asyncio.get_running_loop()
        fd = os.open(theirs, os.O_RDWR | os.O_NOCTTY)
        answers: list[tuple[float, bytes]] = []

        def asked() -> None:
            os.read(fd, 1024)
            after_s, answer = answers.pop(0)
            loop.call_later(after_s, os.write, fd, answer)

        loop.add_reader(fd, asked)
        try:
            async with line_at(SerialPort(ours, 115200, "N", 1)) as line:
                write = Request(1, WRITE.pdu, WRITE.reply_head, WRITE.reply_size, 1.0, 1.0)
                answers += [
                    (0.0, rtu_frame(bytes.fromhex("0103020102"))),
                    (0.0, b""),
                    (0.4, rtu_frame(b"\x01" + WRITE.pdu)),
                ]
                assert isinstance((await line.exchange([REGISTER])).replies[0], bytes)
                assert (await line.exchange([REGISTER])).replies == [Failure(Reason.TIMEOUT)]
                assert (await line.exchange([write])).replies == [b""]
        finally:
            loop.remove_reader(fd)
            os.close(fd)


async def test_with_ten_units_at_9600_baud_and_one_dead_the_others_keep_their_period(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model of the line: 60 registers from each of ten units every 2.2 s take two thirds of it."""
    units = {n: ModelUnit(holding=list(range(60)), turnaround_s=0.01) for n in range(1, 11)}
    model = SerialLineModel(units, baud=9600, parity="E")
    monkeypatch.setattr(modbus_line, "open_serial", model.open)
    address = SerialPort("model", 9600, "E", 1)
    timeout_s = reply_timeout_s(address, 5, 122)
    period_s, begun_s, loop = 2.2, asyncio.get_running_loop().time(), asyncio.get_running_loop()
    read_at_s: dict[int, list[float]] = {n: [] for n in units}
    ends_s = begun_s + 9 * period_s

    async def poll(unit: int) -> None:
        async with line_at(address, f"unit {unit}") as line:
            request = reading(unit, 0, 60, timeout_s=timeout_s, latest_s=2 * timeout_s)
            slot = 0
            while True:
                due_s = begun_s + (slot + unit / 10) * period_s
                if due_s > ends_s:
                    return
                await asyncio.sleep(due_s - loop.time())
                with contextlib.suppress(DeviceUnreachable):
                    if isinstance((await line.exchange([request])).replies[0], bytes):
                        read_at_s[unit].append(loop.time())
                slot = max(slot + 1, int((loop.time() - begun_s) / period_s - unit / 10) + 1)

    loop.call_later(2 * period_s, units.pop, 4)
    async with line_at(address, "holds it open"):
        await asyncio.gather(*(poll(unit) for unit in range(1, 11)))
    steps = {n: [b - a for a, b in pairwise(at)] for n, at in read_at_s.items() if n != 4}
    means = [sum(each) / len(each) / period_s for each in steps.values()]
    worst = max(max(each) for each in steps.values()) / period_s
    print(
        f"mean period {min(means):.3f}..{max(means):.3f} of what was asked, longest single step {worst:.2f}"
    )
    kept = [abs(step / period_s - 1) < 0.1 for each in steps.values() for step in each]
    print(f"{sum(kept)} of {len(kept)} steps within 10 %")
    assert len(read_at_s[4]) <= 3
    assert all(len(each) >= 7 for each in steps.values())
    assert min(means) > 0.9
    assert max(means) < 1.1
