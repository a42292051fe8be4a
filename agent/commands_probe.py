"""`headgate probe`: read registers nobody described, and see what they could mean.

The questions are decided in `drivers.modbus_hunt` (what to ask), the answers judged in `drivers.modbus_guess`; this
asks and prints.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Final

import click
import msgspec

from agent import technician
from agent.field import Field
from agent.technician import EXITS, Cannot, LineOptions, Trouble, Way
from drivers import modbus_guess as guess
from drivers import modbus_hunt as hunt
from drivers.contract import DeviceUnreachable, Reason
from drivers.modbus_address import Address
from drivers.modbus_guess import Expected, Guess, Match, Observation, Snapshot, Text
from drivers.modbus_line import Failure, Reply
from drivers.modbus_plan import LAST_ADDRESS, MAX_BITS, MAX_REGISTERS, Table
from drivers.modbus_scan import numbers_of

_REFUSALS: Final = (
    2,
    3,
    4,
)  #: exceptions that speak of the address (some devices fail, 4, where others refuse)
_UNKNOWN_FUNCTION: Final = 1
_SILENT: Final = 4  #: unanswered requests in a row at the start: there is nobody
_SILENT_BLOCKS: Final = (
    8  #: the same, of blocks that are halved: a device may be silent about each that has a hole
)
_KNOWN_ANSWERS: Final = 2  #: answers that show how quick it is
_HASTE: Final = 5.0  #: times as long as its slowest answer is waited for, once that is known
_LEAST_HASTE_S: Final = 0.1
_MOST_WATCHED: Final = 2_000  #: registers read again and again to see what moves
_SHOWN: Final = 6  #: places shown for a value off the display
_WATCH_S: Final = 2.0  #: with --expect, unless said
_WORTH_A_LOOK: Final = (
    1.5  #: digits of evidence from which a place is looked at again, to see whether it moves
)
_NEIGHBOURS: Final = 100  #: registers: the values of one display stand no farther apart, mostly
_PAUSE_S: Final = 0.3  #: between two looks


@click.command(epilog=EXITS)
@technician.field_options
@technician.line_options
@click.option("--found", type=click.IntRange(1), help="The device of this number in the last scan.")
@click.option("--registers", help="What to read: 0-99 or 0-9,100-131. Unset: whatever the device has.")
@click.option(
    "--table", "tables", multiple=True, type=click.Choice(["holding", "input", "coil", "discrete"]),
    help="Unset: holding; with --expect or without --registers, holding and input.",
)  # fmt: skip
@click.option(
    "--expect", "expects", multiple=True, metavar="VALUE",
    help="A value off the display: 230.5, voltage=230.5, 'voltage=230.5 V'. May be given several times.",
)  # fmt: skip
@click.option(
    "--seconds", type=click.FloatRange(0, 3600), help="Look so long, and tell which registers move."
)
@click.option(
    "--all", "everything", is_flag=True, help="Every decoding of every register, one below the other."
)
@click.option("--thorough", is_flag=True, help="Search every single address, not every fourth.")
def probe(
    way: Way, line: LineOptions, found: int | None, registers: str | None, tables: tuple[str, ...],
    expects: tuple[str, ...], seconds: float | None, *, everything: bool, thorough: bool, as_json: bool,
) -> None:  # fmt: skip
    """Read registers of a device that nobody described, and show what they could mean.

    \b
    headgate probe --port /dev/ttyUSB0 --unit 7 --registers 0-99
    headgate probe --host 192.0.2.10 --unit 1 --expect 'voltage=230.5 V'

    With --expect the register, type, order and scale that show the value are found, in the holding and the input
    registers, and the `headgate add` line is written. Write the value as the display shows it: its digits tell how
    exact it is. Without --registers the whole device is searched, likely places first; Ctrl-C ends the search and
    shows what was found. Exit 1 if a value is shown by no register exactly.
    """
    technician.run(
        _probe(
            way, line, found, registers, tables, expects, seconds,
            everything=everything, thorough=thorough, as_json=as_json,
        )
    )  # fmt: skip


async def _probe(
    way: Way, line: LineOptions, found: int | None, registers: str | None, tables: tuple[str, ...],
    expects: tuple[str, ...], seconds: float | None, *, everything: bool, thorough: bool, as_json: bool,
) -> int:  # fmt: skip
    wanted = _expected(expects)
    if found is not None:
        from agent.found import recall

        it = recall(found)
        address, unit = it.address, it.unit
    else:
        address, unit = line.address(), 1 if line.unit is None else line.unit
    searched = [Table(name) for name in tables] or (
        [Table.HOLDING, Table.INPUT] if wanted or registers is None else [Table.HOLDING]
    )
    if any(table.of_bits for table in searched) and (wanted or registers is None):
        raise Cannot("--table coil and discrete hold bits: they are read with --registers, without --expect")
    ranges = _ranges(registers, searched)
    async with way.field() as field:
        session = _Session(field, address, unit, silent=as_json)
        try:
            if ranges:
                await session.read(ranges)
            else:
                await session.search(searched, wanted, finest_step=1 if thorough else 4 if wanted else 8)
        except asyncio.CancelledError:
            session.progress_clear()
            if not session.has_any:
                raise
            session.stop()
        if not session.answers:
            raise session.nobody()
        if not session.has_any:
            raise Trouble(
                f"{address}, unit {unit} answers, and has no {' or '.join(searched)} registers here"
                + ("; try --table input or other --registers" if ranges else "")
            )
        code = await _tell(session, wanted, seconds, everything=everything, as_json=as_json)
    return technician.STOPPED if session.stopped else code


async def _tell(
    session: _Session, wanted: dict[str, Expected], seconds: float | None, *, everything: bool, as_json: bool
) -> int:  # fmt: skip
    if wanted:
        observations = await session.observe(wanted, seconds)
        found = guess.match_all(observations)
        if not as_json and sys.stdin.isatty() and sys.stderr.isatty():
            found = await _ask_again(session, wanted, observations, found)
        if as_json:
            technician.say(technician.as_json(_told_matches(session, wanted, found)))
        else:
            _show_matches(session, wanted, found)
        return technician.OK if all(one and one[0].exact for one in found.values()) else technician.TROUBLE
    moves = await session.moving(seconds) if seconds else set()
    if as_json:
        technician.say(technician.as_json(_told_registers(session, moves, watched=bool(seconds))))
    else:
        _show_registers(session, moves, everything=everything, watched=bool(seconds))
    return technician.OK


def _expected(texts: Iterable[str]) -> dict[str, Expected]:
    """By name; where none is given, `value`, `value_2`, …"""
    found: dict[str, Expected] = {}
    for text in texts:
        try:
            one = guess.parse_expected(text)
        except ValueError as err:
            raise Cannot(f"--expect: {err}") from err
        name = one.name or ("value" if "value" not in found else f"value_{len(found) + 1}")
        if name in found:
            raise Cannot(f"--expect: {name!r} is given twice")
        found[name] = one
    return found


def _ranges(text: str | None, tables: Sequence[Table]) -> list[hunt.Ask] | None:
    if text is None:
        return None
    try:
        addresses = sorted(numbers_of(text, 0, LAST_ADDRESS, "register"))
    except ValueError as err:
        raise Cannot(f"--registers: {err}") from err
    found: list[hunt.Ask] = []
    for table in tables:
        for first, run in guess.runs(dict.fromkeys(addresses, 0)):
            found.append(hunt.Ask(table, first, len(run)))
    return found


class _Session:
    """One device under the eyes of a technician."""

    def __init__(self, field: Field, address: Address, unit: int, *, silent: bool) -> None:
        self.address = address
        self.unit = unit
        self.words: dict[Table, dict[int, int]] = {}
        self.holes: dict[Table, set[int]] = {}
        self.silent: dict[Table, set[int]] = {}
        self.stopped = False
        self.requests = 0
        self._field = field
        self._silent = silent
        self._answers = 0
        self._silences = 0
        self._patience = _SILENT
        self._slowest_s = 0.0
        self._doubtful = False  #: the last request was given up early: its reply may come for the next one
        self._progress: technician.Progress | None = None
        self._said: set[tuple[str, int]] = set()  #: what may be it, told already

    @property
    def has_any(self) -> bool:
        return any(self.words.values())

    def stop(self) -> None:
        """Ctrl-C came: it ends what is under way, and what was found is shown."""
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()
        self.stopped = True

    def progress_clear(self) -> None:
        if self._progress is not None:
            self._progress.clear()

    # --------------------------------------------------------------------------------- asking

    async def ask(self, ask: hunt.Ask, *, hasty: bool = False) -> list[int] | hunt.Outcome:
        """One request; once more where the line, not the device, was at fault. Raises `Trouble` if there is nobody.
        `hasty`: of many requests that a device may leave unanswered, each waits no longer than it usually takes."""
        timeout_s = None
        if hasty and self._answers >= _KNOWN_ANSWERS:
            usual_s = technician.reading(self.address, self.unit, ask.table, ask.first, ask.count).timeout_s
            timeout_s = min(usual_s, max(_LEAST_HASTE_S, _HASTE * self._slowest_s))
        request = technician.reading(
            self.address, self.unit, ask.table, ask.first, ask.count, timeout_s=timeout_s
        )
        reply: Reply = Failure(Reason.DISCONNECTED)
        for attempt in (1, 2):
            self.requests += 1
            began_s = time.monotonic()
            try:
                outcome = await self._field.ask(self.address, [request])
            except DeviceUnreachable as err:
                if attempt == 1 and self._answers:
                    continue  # the connection was closed under us: it is opened anew
                raise Trouble(str(err)) from err
            reply = outcome.replies[0]
            doubtful, self._doubtful = self._doubtful, False
            if isinstance(reply, Failure) and not reply.code:
                self._doubtful = timeout_s is not None
            elif doubtful:
                return await self.ask(ask)
            elif self._answers:  # the first opens the line too
                self._slowest_s = max(self._slowest_s, time.monotonic() - began_s)
            if isinstance(reply, bytes):
                self._answers += 1
                return _numbers(reply, ask)
            if reply.code in _REFUSALS:
                self._answers += 1
                return hunt.Outcome.REFUSED
            if reply.code == _UNKNOWN_FUNCTION:
                self._answers += 1
                return hunt.Outcome.NO_FUNCTION
            if timeout_s is not None and reply.reason is Reason.TIMEOUT:
                break
            if reply.code:
                await asyncio.sleep(_PAUSE_S)
        return self._unanswered(reply if isinstance(reply, Failure) else Failure(Reason.FRAMING))

    def _unanswered(self, reply: Failure) -> hunt.Outcome:
        if not self._answers:
            self._silences += 1
            if self._silences >= self._patience or reply.code:
                raise self.nobody(technician.why_not(reply))
        return hunt.Outcome.SILENCE if reply.reason is Reason.TIMEOUT else hunt.Outcome.TROUBLE

    @property
    def answers(self) -> int:
        """Requests that the device answered, if only to refuse."""
        return self._answers

    def nobody(self, why: str = "no answer") -> Trouble:
        scan = technician.command_line("headgate", "scan", "modbus", *technician.words_of(self.address)[:2])
        return Trouble(f"{self.address}, unit {self.unit}: {why}; `{scan}` finds what answers, and how")

    async def read(self, ranges: Sequence[hunt.Ask]) -> None:
        """What stands in these ranges, around their holes."""
        self._patience = _SILENT_BLOCKS
        for of_bits in (False, True):
            chosen = [one for one in ranges if one.table.of_bits is of_bits]
            reader = hunt.Reader(chosen, longest=MAX_BITS if of_bits else MAX_REGISTERS)
            while (ask := reader.next()) is not None:
                reader.told(ask, await self.ask(ask, hasty=True))
                self.words |= reader.words
            self.holes |= reader.holes
            self.silent |= reader.silent

    async def search(self, tables: Sequence[Table], wanted: dict[str, Expected], *, finest_step: int) -> None:
        """Look for registers over all addresses; with values off the display, until they are found."""
        search = hunt.Hunt(tables, finest_step=finest_step)
        self.words = search.words
        self._progress = progress = technician.Progress(0, silent=self._silent)
        loop = asyncio.get_running_loop()
        if not self._silent:
            technician.note(
                "Searching all addresses, likely ones first"
                + (", until the value is found" if wanted else "")
                + "; Ctrl-C ends it and shows what was found."
            )
        began_s = loop.time()
        judged: dict[Table, set[int]] = {table: set() for table in tables}
        while (ask := search.next()) is not None:
            came = await self.ask(ask, hasty=True)
            search.told(ask, came)
            per_ask_s = (loop.time() - began_s) / search.asked
            have = sum(map(len, self.words.values()))
            progress.at(search.left() * per_ask_s, f"{have} registers, at {ask.table} {ask.first}")
            if wanted and not search.following and await self._is_found(wanted, judged):
                break
            if self.stopped:
                break
        progress.clear()

    async def _is_found(self, wanted: dict[str, Expected], judged: dict[Table, set[int]]) -> bool:
        """Whether the registers found since the last time, with the others, show every value beyond doubt."""
        fresh: dict[Table, dict[int, int]] = {}
        for table, words in self.words.items():
            new = words.keys() - judged[table]
            judged[table] |= new
            near = {address + away for address in new for away in range(-3, 4)}
            fresh[table] = {address: words[address] for address in near if address in words}
        if not any(fresh.values()):
            return False
        small = sum(map(len, self.words.values())) <= _MOST_WATCHED
        looked_at: Snapshot = self.words if small else fresh
        found = guess.match_all({name: [Observation(one, [looked_at])] for name, one in wanted.items()})
        if _settled(found):
            return True
        close = [one for matches in found.values() for one in matches[:3] if one.score >= _WORTH_A_LOOK]
        if not all(matches and matches[0].score >= _WORTH_A_LOOK for matches in found.values()):
            return False
        # Perhaps they move: look whether the display's values are among what they pass through.
        snapshots = await self.snapshots(1.5, _around(close, self.words))
        found = guess.match_all({name: [Observation(one, snapshots)] for name, one in wanted.items()})
        if _settled(found):
            return True
        self._say_near(found)
        return False

    def _say_near(self, found: dict[str, list[Match]]) -> None:
        """What may be it, while the search goes on: the technician may know better."""
        for name, matches in found.items():
            best = matches[0] if matches else None
            if best is not None and not guess.is_sure(matches) and (name, best.register) not in self._said:
                self._said.add((name, best.register))
                self.progress_clear()
                place = f"{best.table} {best.register} shows {technician.number(best.value)}"
                if not self._silent:
                    technician.note(f"{name}: {place}, perhaps; the search goes on (Ctrl-C: enough)")

    # ------------------------------------------------------------------------------- watching

    async def snapshots(self, seconds: float, words: Snapshot | None = None) -> list[Snapshot]:
        """What the registers (all that were found, unless said) hold, again and again; Ctrl-C: enough."""
        words = words or self.words
        told: list[Snapshot] = []
        loop = asyncio.get_running_loop()
        end_s = loop.time() + seconds
        try:
            while not self.stopped:
                if now := await self._look(words):
                    told.append(now)
                if loop.time() + _PAUSE_S >= end_s:
                    break
                await asyncio.sleep(_PAUSE_S)
        except asyncio.CancelledError:
            self.stop()
        return told

    async def _look(self, words: Snapshot) -> dict[Table, dict[int, int]]:
        now: dict[Table, dict[int, int]] = {}
        for table, held in words.items():
            for first, run in guess.runs(held):
                longest = MAX_BITS if table.of_bits else MAX_REGISTERS
                for at in range(first, first + len(run), longest):
                    count = min(longest, first + len(run) - at)
                    came = await self.ask(hunt.Ask(table, at, count))
                    if not isinstance(came, hunt.Outcome):
                        now.setdefault(table, {}).update(zip(range(at, at + count), came, strict=True))
        return now

    async def observe(
        self, wanted: dict[str, Expected], seconds: float | None
    ) -> dict[str, list[Observation]]:
        """What the registers held around the time at which the display was read: now, and a little while."""
        watch_s = _WATCH_S if seconds is None else seconds
        first: Snapshot = {table: dict(held) for table, held in self.words.items()}
        chosen: Snapshot = first
        if sum(map(len, first.values())) > _MOST_WATCHED:
            best = [m for name in wanted for m in guess.match([Observation(wanted[name], [first])])[:40]]
            chosen = _around(best, first)
        if watch_s and any(chosen.values()):
            later = await self.snapshots(watch_s, chosen)
        else:
            later = []
        # The last look holds all that was found, as it was seen last.
        last = {
            table: {**held, **(later[-1].get(table, {}) if later else {})} for table, held in first.items()
        }
        seen = [first, *later[:-1], last]
        return {name: [Observation(expected, seen)] for name, expected in wanted.items()}

    async def moving(self, seconds: float) -> set[tuple[Table, int]]:
        if sum(map(len, self.words.values())) > _MOST_WATCHED:
            technician.note(f"More than {_MOST_WATCHED} registers: this takes longer than {seconds:g} s.")
        first: Snapshot = {table: dict(held) for table, held in self.words.items()}
        return guess.moving([first, *await self.snapshots(seconds)])


def _settled(found: dict[str, list[Match]]) -> bool:
    """Each value beyond doubt; or one or more of them, and the rest shown by registers close by: a map is one place."""
    sure = [matches[0] for matches in found.values() if guess.is_sure(matches)]
    if not sure:
        return False
    return all(
        guess.is_sure(matches)
        or any(
            one.score > 0 and one.table is anchor.table and abs(one.register - anchor.register) <= _NEIGHBOURS
            for one in matches[:_SHOWN]
            for anchor in sure
        )
        for matches in found.values()
    )


def _numbers(reply: bytes, ask: hunt.Ask) -> list[int]:
    if ask.table.of_bits:
        return [reply[i // 8] >> i % 8 & 1 for i in range(ask.count)]
    return [reply[i] << 8 | reply[i + 1] for i in range(0, 2 * ask.count, 2)]


def _around(matches: Iterable[Match], words: Snapshot) -> dict[Table, dict[int, int]]:
    """The registers of these matches, with their neighbours."""
    told: dict[Table, dict[int, int]] = {}
    for one in matches:
        held = words[one.table]
        near = range(one.register - 4, one.register + one.kind.registers + 4)
        told.setdefault(one.table, {}).update((at, held[at]) for at in near if at in held)
    return told


async def _ask_again(
    session: _Session, wanted: dict[str, Expected], observations: dict[str, list[Observation]],
    found: dict[str, list[Match]],
) -> dict[str, list[Match]]:  # fmt: skip
    """As long as a value stands in several places alike, ask what the display shows now: the places that follow it
    are fewer every time."""
    for name in wanted:
        while found[name] and not guess.is_sure(found[name]) and not session.stopped:
            close = sum(found[name][0].score - one.score < 0.5 for one in found[name])
            question = f"{name}: {close} places may show it. What does the display show now? (Enter: enough)"
            try:
                answer = await technician.answer_to(question)
            except asyncio.CancelledError:
                session.stop()
                return found
            if not answer:
                break
            try:
                now = guess.parse_expected(answer)
            except ValueError as err:
                technician.note(str(err))
                continue
            snapshots = await session.snapshots(0.5, _around(found[name][:200], session.words))
            if not snapshots:
                return found
            observations[name].append(Observation(msgspec.structs.replace(now, name=name), snapshots))
            found = guess.match_all(observations)
    return found


# --------------------------------------------------------------------------------- matches, shown


def _told_matches(
    session: _Session, wanted: dict[str, Expected], found: dict[str, list[Match]]
) -> dict[str, object]:
    told: list[dict[str, object]] = []
    for name, expected in wanted.items():
        places = [
            {
                "table": one.table, "register": one.register, "type": one.kind, "order": one.order, "scale": one.scale,
                "offset": one.offset,
                "raw": one.raw, "value": one.value, "off": one.off, "score": one.score, "moves": one.moves,
                "exact": one.exact, "point": guess.point_table(name, expected.unit, one),
            }
            for one in found[name][:20]
        ]  # fmt: skip
        told.append(
            {
                "name": name, "expected": expected.value, "unit": expected.unit,
                "sure": guess.is_sure(found[name]), "matches": places,
            }
        )  # fmt: skip
    return {
        "address": str(session.address), "unit": session.unit, "stopped": session.stopped,
        "registers_read": sum(map(len, session.words.values())), "requests": session.requests,
        "expected": told, "add": _add_line(session, wanted, found),
    }  # fmt: skip


def _show_matches(session: _Session, wanted: dict[str, Expected], found: dict[str, list[Match]]) -> None:
    have = sum(map(len, session.words.values()))
    for line in technician.wrapped(f"{session.address}, unit {session.unit}: {have} registers read"):
        technician.say(line)
    for name, expected in wanted.items():
        matches = found[name]
        technician.say()
        shown = f"{name} = {expected.value:.{expected.decimals}f} {expected.unit}".rstrip()
        if not matches:
            technician.say(f"{shown}: no register shows it")
            continue
        exact = sum(one.exact for one in matches)
        sure = ", the first is almost certain" if guess.is_sure(matches) else ""
        technician.say(f"{shown}: {exact} exact, {len(matches) - exact} near it{sure}")
        rows = [["table", "reg", "type", "order", "scale", "raw", "shows", "off", "moves"]]
        rows += [
            [
                one.table.value, str(one.register), _type_words(one), one.order if one.kind.registers > 1 or
                one.order != "ABCD" else "-", f"{one.scale:g}" + " K" * bool(one.offset), technician.number(one.raw),
                technician.number(one.value), f"{one.off:.3g}" if one.off else "-", "yes" if one.moves else "-",
            ]
            for one in matches[:_SHOWN]
        ]  # fmt: skip
        for line in technician.columns(rows, lead="  ", right=(1, 4, 5, 6, 7)):
            technician.say(line)
        if len(matches) > _SHOWN:
            technician.say(f"  … and {len(matches) - _SHOWN} less likely ones (--json has 20)")
        wider = next(
            (m for m in matches[1:] if m.same_place(matches[0]) and m.order == matches[0].order), None
        )
        if wider is not None and wider.exact and matches[0].score - wider.score < 1.0:
            words = (
                f"{matches[0].kind} or {wider.kind}: the same today. More values with --expect tell which."
            )
            for line in technician.wrapped(words, lead="  "):
                technician.say(line)
        if not guess.is_sure(matches):
            for line in technician.wrapped(_advice(expected, matches), lead="  "):
                technician.say(line)
    add = _add_line(session, wanted, found)
    if add:
        technician.say()
        technician.say("To add it (write your own name for NAME):")
        technician.say(add)


def _type_words(one: Match) -> str:
    return f"{one.kind} ({one.or_kind}?)" if one.or_kind else one.kind.value


def _advice(expected: Expected, matches: Sequence[Match]) -> str:
    if not matches[0].exact:
        return (
            "None shows it exactly: the value moves, or was read off another place. Try again with what the display "
            "shows now, or with --seconds 10."
        )
    if len(f"{abs(expected.value):g}".replace(".", "").strip("0")) < 3:
        return "So short a number stands in many places: take a value with more digits."
    return "Not certain: try again when the display shows something else, and keep the place that follows it."


def _add_line(session: _Session, wanted: dict[str, Expected], found: dict[str, list[Match]]) -> str:
    points: list[str] = []
    for name, expected in wanted.items():
        # What only comes near is shown, and is for the technician to judge.
        if found[name] and (found[name][0].exact or found[name][0].score >= guess.SURE):
            table = guess.point_table(name, expected.unit, found[name][0])
            points += ["--point", technician.point_words(table)]
    if not points:
        return ""
    return technician.command_line(
        "headgate", "add", "NAME", *technician.words_of(session.address, session.unit), *points
    )


# ------------------------------------------------------------------------------- registers, shown

_PLAUSIBLE_FLOAT: Final = (1e-6, 1e9)


def _told_registers(session: _Session, moves: set[tuple[Table, int]], *, watched: bool) -> dict[str, object]:
    tables: list[dict[str, object]] = []
    for table, words in session.words.items():
        if table.of_bits:
            tables.append({"table": table, "bits": {str(at): bool(bit) for at, bit in sorted(words.items())}})
            continue
        by_place: dict[int, list[dict[str, object]]] = {}
        likely = {(g.register, g.kind, g.order) for g in guess.layout(words) if isinstance(g, Guess)}
        for one in guess.guesses(words):
            by_place.setdefault(one.register, []).append(
                {
                    "type": one.kind, "order": one.order, "value": one.value, "likely": one.likely,
                    "chosen": (one.register, one.kind, one.order) in likely, "note": one.note,
                }
            )  # fmt: skip
        tables.append(
            {
                "table": table,
                "registers": [
                    {
                        "register": at, "hex": f"{word:04x}", "bits": f"{word:016b}",
                        "moves": (table, at) in moves if watched else None, "decodings": by_place.get(at, []),
                    }
                    for at, word in sorted(words.items())
                ],
                "texts": [
                    {"register": t.register, "text": t.text, "registers": t.registers} for t in guess.texts(words)
                ],
                "refused": _stretches(session.holes.get(table, ())),
                "silent": _stretches(session.silent.get(table, ())),
            }
        )  # fmt: skip
    return {
        "address": str(session.address), "unit": session.unit, "stopped": session.stopped,
        "requests": session.requests, "tables": tables,
    }  # fmt: skip


def _show_registers(
    session: _Session, moves: set[tuple[Table, int]], *, everything: bool, watched: bool
) -> None:
    for line in technician.wrapped(f"{session.address}, unit {session.unit}"):
        technician.say(line)
    for table, words in session.words.items():
        if not words:
            continue
        technician.say()
        if table.of_bits:
            _show_bits(table, words, moves)
        elif everything:
            _show_everything(table, words, moves)
        else:
            _show_table(table, words, moves, watched=watched)
        for what, addresses in (("Not there", session.holes), ("No answer", session.silent)):
            told = ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in _stretches(addresses.get(table, ())))
            for line in technician.wrapped(f"{what}: {told}") if told else ():
                technician.say(line)


def _stretches(addresses: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of each."""
    return [(first, first + len(run) - 1) for first, run in guess.runs(dict.fromkeys(addresses, 0))]


def _show_bits(table: Table, words: dict[int, int], moves: set[tuple[Table, int]]) -> None:
    technician.say(f"{table}: 1 is on, ! moves")
    for first, run in guess.runs(words):
        for at in range(0, len(run), 10):
            cells = " ".join(
                f"{bit}{'!' if (table, first + at + i) in moves else ' '}"
                for i, bit in enumerate(run[at : at + 10])
            )
            technician.say(f"{first + at:>7}  {cells}".rstrip())


def _show_table(table: Table, words: dict[int, int], moves: set[tuple[Table, int]], *, watched: bool) -> None:
    """One line a register; the likeliest decoding is marked with a star."""
    chosen = guess.layout(words)
    marked = {
        (one.register, one.kind, one.order): one
        for one in chosen
        if isinstance(one, Guess) and one.likely >= guess.LIKELY
    }
    told = {(one.register, one.kind, one.order): one.value for one in guess.guesses(words)}
    says = "; * likely" + (", ! moves" if watched else "")
    technician.say(f"{table} registers, counted from 0{says}")
    head = (
        f"{'reg':>6} {'hex':>4} {'u16':>6} {'i16':>7} {'u32':>11} {'CDAB':>11} {'f32':>10} {'CDAB':>10} text"
    )
    technician.say(head)
    places: list[tuple[guess.Kind, str, int]] = [
        (guess.Kind.U16, "ABCD", 6), (guess.Kind.I16, "ABCD", 7), (guess.Kind.U32, "ABCD", 11),
        (guess.Kind.U32, "CDAB", 11), (guess.Kind.F32, "ABCD", 10), (guess.Kind.F32, "CDAB", 10),
    ]  # fmt: skip
    before: int | None = None
    for at, word in sorted(words.items()):
        if before is not None and at != before + 1:
            technician.say("     …")
        before = at
        cells = []
        for kind, order, width in places:
            star = "*" if (at, kind, order) in marked else " "
            cells.append(star + _cell(told.get((at, kind, order)), kind, word).rjust(width - 1))
        mark = "!" if (table, at) in moves else " "
        text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in (word >> 8, word & 0xFF))
        line = f"{mark}{at:>5} {word:04x} " + " ".join(cells) + " " + text
        technician.say(line.rstrip())
    _show_likely(table, chosen, words, moves)


def _cell(value: guess.Number | None, kind: guess.Kind, word: int) -> str:
    if value is None:
        return ""
    if kind.is_float:
        size = abs(value)
        if size and not _PLAUSIBLE_FLOAT[0] <= size <= _PLAUSIBLE_FLOAT[1]:
            return "-"  # no measured value looks like this
        return f"{value:.6g}"
    if kind is guess.Kind.I16 and value >= 0:
        return ""  # as u16
    return str(value)


def _show_likely(
    table: Table, chosen: Sequence[Guess | Text], words: dict[int, int], moves: set[tuple[Table, int]]
) -> None:
    rows: list[list[str]] = []
    for one in chosen:
        if isinstance(one, Text):
            rows.append(
                [
                    str(one.register),
                    f"text, {2 * one.registers} bytes",
                    one.text,
                    "bytes swapped" * one.swapped,
                ]
            )
            continue
        moving = any((table, at) in moves for at in range(one.register, one.end))
        # One register that is just a number says nothing that the table does not.
        if one.likely < guess.LIKELY or (one.kind.registers == 1 and not one.note):
            continue
        kind = one.kind.value + (f" {one.order}" if one.order != "ABCD" else "")
        notes = [*([one.note] if one.note else []), *(["moves"] if moving else [])]
        rows.append([str(one.register), kind, technician.number(one.value), ", ".join(notes)])
    if rows:
        technician.say()
        technician.say("Likely:")
        for line in technician.columns(rows, lead="  ", right=(0, 2)):
            technician.say(line)


def _show_everything(table: Table, words: dict[int, int], moves: set[tuple[Table, int]]) -> None:
    """Every decoding: four orders side by side, a block a register."""
    told = {(one.register, one.kind, one.order): one for one in guess.guesses(words)}
    technician.say(f"{table} registers, counted from 0; * likely")
    text_at = {one.register: one for one in guess.texts(words)}
    for at, word in sorted(words.items()):
        moving = ", moves" if (table, at) in moves else ""
        technician.say(f"{at}: 0x{word:04x}  {word:016b}{moving}")
        if at in text_at:
            technician.say(technician.cut(f"    text    {text_at[at].text!r}"))
        for kind in guess.KINDS:
            cells: list[str] = []
            for order in guess.orders_of(kind):
                one = told.get((at, kind, order))
                if one is None:
                    continue
                star = "*" if one.likely >= guess.LIKELY else ""
                value = f"{one.value:.6g}" if kind.is_float else str(one.value)
                cells.append(f"{order} {value}{star}")
            for line in _packed(cells, lead=f"    {kind.value:<6}  "):
                technician.say(line)


def _packed(cells: Sequence[str], *, lead: str) -> list[str]:
    """Cells in as few lines of 80 as they fit."""
    lines: list[str] = []
    line = lead
    for cell in cells:
        if len(line) + len(cell) > technician.WIDTH and line.strip():
            lines.append(line.rstrip())
            line = " " * len(lead)
        line += cell + "   "
    return [*lines, line.rstrip()] if cells else []
