"""A serial port, listened to: at each likely speed for a while, sending nothing. What bytes look like is decided in
`drivers.serial_detect`.

Rules: a line that speaks is heard at any speed, if only as noise, so a port that is silent at the first speed is not
tried at the others. Only where it was asked for, a port that is silent is asked, in protocols whose devices never speak
by themselves, with their gentlest question.
"""

from __future__ import annotations

import asyncio
import os
import termios
from collections.abc import Callable
from typing import Final

import msgspec

from drivers.contract import DriverError, Found, Value
from drivers.serial_detect import Guess, recognise
from drivers.serial_port import PortInfo, PortSettings, open_port

#: The likeliest first: what free-running instruments and GNSS receivers are set to.
SPEEDS: Final = (9600, 4800, 19200, 115200, 38400, 2400, 1200, 57600)
SURE: Final = 0.7  #: a guess from here on ends the search of speeds

_IEC_SIGN_ON: Final = b"/?!\r\n"  #: IEC 62056-21, 6.3.1: to whatever meter is there, at 300 baud, 7E1
_SDI_ADDRESS_QUERY: Final = b"?!"  #: SDI-12 1.4, 4.4.2: the only sensor on the line tells its address
_IEC_ANSWER_S: Final = 3.0  #: 1.5 s at most to begin, and 20 characters at 300 baud
_SDI_ANSWER_S: Final = 0.5
_SDI_BREAK_S: Final = 0.015  #: at least 12 ms (SDI-12 1.4, 4.2)
_SDI_MARK_S: Final = 0.010  #: at least 8.33 ms


class Asked(msgspec.Struct, frozen=True):
    """A question to a silent line."""

    name: str
    settings: PortSettings
    question: bytes
    answer_s: float
    breaks: bool = False


QUESTIONS: Final = (
    Asked("IEC 62056-21", PortSettings(baud=300, data_bits=7, parity="even"), _IEC_SIGN_ON, _IEC_ANSWER_S),
    Asked(
        "SDI-12", PortSettings(baud=1200, data_bits=7, parity="even"), _SDI_ADDRESS_QUERY, _SDI_ANSWER_S, breaks=True
    ),
)  # fmt: skip


async def survey_port(port: PortInfo, seconds: float, *, ask: bool, tell: Callable[[str], None]) -> Found:
    """What is at the other end of this port. Raises `DriverError` where it cannot be opened."""
    heard = await _listen(port.device, PortSettings(baud=SPEEDS[0]), seconds)
    settings, guess = PortSettings(baud=SPEEDS[0]), recognise(heard)[0]
    if heard:
        for baud in SPEEDS[1:]:
            if guess.likelihood >= SURE and guess.kind != "noise":
                break
            tell(f"{port.stable}: something at {settings.baud} baud; listening at {baud}")
            other = PortSettings(baud=baud)
            best = recognise(await _listen(port.device, other, seconds))[0]
            if _better(best, guess):
                settings, guess = other, best
    elif ask:
        for asked in QUESTIONS:
            tell(f"{port.stable}: silent; asking by {asked.name}")
            answer = await _ask(port.device, asked)
            if answer:
                settings, guess = asked.settings, _answered(asked, answer)
                break
    return _found(port, settings, guess)


def _better(one: Guess, other: Guess) -> bool:
    if (one.kind in ("noise", "silence")) != (other.kind in ("noise", "silence")):
        return other.kind in ("noise", "silence")
    return one.likelihood > other.likelihood


def _answered(asked: Asked, answer: bytes) -> Guess:
    """An answer to our own question is more than its looks."""
    if asked.breaks:
        address = answer.replace(asked.question, b"").strip()
        if len(address) == 1 and address.isalnum():
            text = f"SDI-12 sensor at address {address.decode()}"
            return Guess(kind="sdi12", description=text, likelihood=0.95, driver="sdi12",
                         options={"address": address.decode()})  # fmt: skip
    return recognise(answer)[0]


def _found(port: PortInfo, settings: PortSettings, guess: Guess) -> Found:
    what = port.description or port.device
    if guess.driver is None or guess.driver == "modbus":
        return Found(
            driver=guess.driver or "serial_line", address=port.stable, description=f"{what}: {guess.description}",
            likelihood=guess.likelihood if guess.kind not in ("noise", "silence") else 0.1,
            readings={"heard": guess.sample} if guess.sample else {},
        )  # fmt: skip
    options: dict[str, Value] = {"port": port.stable}
    if guess.driver == "serial_line":
        options["baud"] = settings.baud
        if guess.seven_bits or settings.data_bits == 7:
            options |= {"data_bits": 7, "parity": "even"}
    return Found(
        driver=guess.driver, address=port.stable, description=f"{what}: {guess.description}",
        options=options | guess.options, likelihood=guess.likelihood,
        readings={"heard": guess.sample} if guess.sample else {},
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- the port


async def _listen(device: str, settings: PortSettings, seconds: float) -> bytes:
    """All that comes in that time. A port that does not know the setting has nothing to say at it."""
    with open_port(device, settings, _ignore) as port:
        return await _hear(port.fileno(), seconds)


async def _ask(device: str, asked: Asked) -> bytes:
    try:
        port = open_port(device, asked.settings, _ignore)
    except DriverError:
        return b""  # it could be opened before: it does not take this setting
    with port:
        if asked.breaks:
            port.break_condition = True
            await asyncio.sleep(_SDI_BREAK_S)
            port.break_condition = False
            await asyncio.sleep(_SDI_MARK_S)
        os.write(port.fileno(), asked.question)
        return await _hear(port.fileno(), asked.answer_s)


async def _hear(descriptor: int, seconds: float) -> bytes:
    loop = asyncio.get_running_loop()
    heard = bytearray()
    gone = asyncio.Event()

    def readable() -> None:
        try:
            data = os.read(descriptor, 4096)
        except BlockingIOError:
            return
        except (OSError, termios.error):
            data = b""
        if not data:
            loop.remove_reader(descriptor)
            gone.set()
        heard.extend(data)

    loop.add_reader(descriptor, readable)
    try:
        async with asyncio.timeout(seconds):
            await gone.wait()
    except TimeoutError:
        pass
    finally:
        loop.remove_reader(descriptor)
    return bytes(heard)


def _ignore(_skipped: int) -> None:
    """What came before the port was opened is nobody's."""
