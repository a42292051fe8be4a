"""Whatever bytes come on a Modbus line: nothing breaks, nothing grows, and no value passes without its proof.

`HEADGATE_FUZZ=10000000` is the nightly size; `HEADGATE_SEED` another seed.
"""

from __future__ import annotations

import asyncio
import os
import random
import struct
from collections.abc import Callable

import pytest

from drivers.contract import Reason
from drivers.modbus_wire import (
    AsciiWire,
    DatagramWire,
    Failure,
    Listener,
    MbapWire,
    Reply,
    Request,
    RtuWire,
    Wire,
)
from tests.fakes.faulty_slave import ascii_frame, rtu_frame

INPUTS = int(os.environ.get("HEADGATE_FUZZ", "2000"))
SEED = int(os.environ.get("HEADGATE_SEED", "1"))
LARGEST = 4096  #: bytes kept, of whatever comes

REQUESTS = [
    Request(1, bytes.fromhex("0300000002"), bytes.fromhex("0304"), 6, 1e6, 1e6),
    Request(1, bytes.fromhex("0103000014"), bytes.fromhex("0103"), 5, 1e6, 1e6),
    Request(17, bytes.fromhex("0600070009"), bytes.fromhex("0600070009"), 5, 1e6, 1e6),
    Request(247, bytes.fromhex("2b0e0100"), bytes.fromhex("2b0e"), 30, 1e6, 1e6),
]


class _Sink(asyncio.Transport):
    """Takes what is written."""

    sent = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent = bytes(data)

    def sendto(self, data: bytes) -> None:
        self.sent = data

    def abort(self) -> None:
        pass


class _Told:
    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.wire: Wire | None = None

    def answered(self, reply: Reply) -> None:
        self.replies.append(reply)

    def unanswered(self, failure: Failure) -> None:
        self.replies.append(failure)
        assert self.wire is not None
        self.wire.drop()


def _mbap_frame(transaction: int) -> Callable[[bytes], bytes]:
    return lambda body: struct.pack(">HHH", transaction, 0, len(body)) + body


def _feed(wire: Wire, chunk: bytes) -> None:
    if isinstance(wire, MbapWire):
        while chunk and wire.lost_because is None:
            room = wire.get_buffer(-1)
            assert len(room) > 0, "asyncio cannot go on with no room to receive into"
            part, chunk = chunk[: len(room)], chunk[len(room) :]
            room[: len(part)] = part
            wire.buffer_updated(len(part))
    elif isinstance(wire, DatagramWire):
        wire.datagram_received(chunk, ("127.0.0.1", 502))
    elif isinstance(wire, RtuWire | AsciiWire):
        wire.data_received(chunk)


def _chunk(chance: random.Random, request: Request, frame: Callable[[bytes], bytes], sent: bytes) -> bytes:
    unit = bytes([request.unit])
    body = unit + request.reply_head + chance.randbytes(request.reply_size - len(request.reply_head))
    right = frame(body)
    match chance.randrange(10):
        case 0:
            return chance.randbytes(chance.choice([1, 3, 8, 40, 300, 2000]))
        case 1:
            return right[: chance.randrange(len(right))]
        case 2:
            at = chance.randrange(len(right))
            return right[:at] + chance.randbytes(1) + right[at + chance.randrange(2) :]
        case 3:
            return frame(unit + bytes([request.pdu[0] | 0x80, chance.randrange(256)]))
        case 4:
            return frame(bytes([chance.randrange(256)]) + body[1:])
        case 5:
            return frame(body[: chance.randrange(1, len(body))])
        case 6:
            return sent + right
        case 7:
            return sent
        case 8:
            return unit + request.reply_head
        case _:
            return right


def _proven(
    frame: Callable[[bytes], bytes], request: Request, reply: Reply, stream: bytes, *, text: bool
) -> bool:
    if isinstance(reply, bytes):
        body = bytes([request.unit]) + request.reply_head + reply
        assert len(body) == request.reply_size + 1
    elif reply.code or reply.reason is Reason.EXCEPTION:
        body = bytes([request.unit, request.pdu[0] | 0x80, reply.code])
    else:
        return True
    return frame(body) in (stream.upper() if text else stream)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("framing", ["tcp", "udp", "rtu", "ascii"])
async def test_no_bytes_break_the_decoder_and_none_pass_without_their_proof(framing: str) -> None:
    chance = random.Random(f"{SEED} {framing}")
    loop = asyncio.get_running_loop()
    kinds: dict[str, Callable[[asyncio.AbstractEventLoop, Listener], Wire]] = {
        "tcp": MbapWire,
        "udp": DatagramWire,
        "rtu": RtuWire,
        "ascii": AsciiWire,
    }
    done = answers = lost = 0
    while done < INPUTS:
        told = _Told()
        wire = told.wire = kinds[framing](loop, told)
        sink = _Sink()
        wire.connection_made(sink)
        stream = b""
        for _ in range(chance.randrange(1, 30)):
            request = chance.choice(REQUESTS)
            wire.send(request)
            if framing in ("tcp", "udp"):
                frame = _mbap_frame(struct.unpack(">H", sink.sent[:2])[0])
            else:
                frame = rtu_frame if framing == "rtu" else ascii_frame
            told.replies.clear()
            if framing != "tcp":
                stream = (
                    b""  # what came before a request proves nothing; on TCP a frame may have begun before
                )
            for _ in range(chance.randrange(1, 8)):
                chunk = _chunk(chance, request, frame, sink.sent)
                stream += chunk
                _feed(wire, chunk)
                done += 1
                held = getattr(wire, "_buffer", b"")
                assert len(held) <= LARGEST
                if told.replies or wire.lost_because is not None:
                    break
            assert len(told.replies) <= 1
            for reply in told.replies:
                answers += isinstance(reply, bytes)
                proven = _proven(frame, request, reply, stream, text=framing == "ascii")
                assert proven, (SEED, request, reply, stream)
            wire.drop()
            if wire.lost_because is not None:
                lost += 1
                break
        wire.close()
    print(f"{framing}, seed {SEED}: {done} inputs, {answers} answers, {lost} connections given up")
    assert answers > INPUTS / 50
