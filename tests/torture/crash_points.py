"""Killed at every named place: nothing kept is lost, nothing is doubled, and it is up again within seconds.

`reached("part.moment")` (`config/failpoint.py`) marks the places. This finds all of them in the source, kills the real
process at each one's n-th time, starts it again, and at the end of a round compares the gateway's account with every
sink, by identity and value. Rules:

1. Agent, broker and cloud run under load in one rig. The part that owns the place is ended by SIGKILL, started with the
   place armed, and dies there by itself: each such start is a restart after a crash, too.
2. What a quiet plant never reaches has a driver: a trigger in the embedded store refuses some rows (bisection, dead
   letters, their replay), and `crash_child` fills, refuses, damages, compacts and trims.
3. A place that is not reached within its time is an error, as are two places of one name.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import os
import random
import shutil
import signal
import socket
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal, TypeAlias

import msgspec
from deltalake import DeltaTable

from config.failpoint import VARIABLE
from tests.fakes.buffer import READINGS, ModelCloud, drain, opened
from tests.system.child import BIN, Child
from tests.system.rig import Rig, whole_system
from tests.torture.crash_child import PER_CALL
from tests.torture.report import Finding, record
from tests.torture.soak import balance

ROOT: Final = Path(__file__).resolve().parents[2]
PARTS: Final = ("agent", "cloud", "sync")
REACH_S: Final = 30.0  #: within which a place must be reached; the second try gets it, with n = 1
UP_S: Final = 5.0  #: the promise, on a machine that does nothing else
SLACK: Final = float(os.environ.get("HEADGATE_SLACK", "4"))  #: how much slower a busy machine may be
ROUND: Final = 40  #: kills between two audits
LATEST: Final = 6  #: the n-th time, at most
REFUSED_EVERY: Final = 200  #: one row in so many, by the trigger

Driver: TypeAlias = Literal["rig", "poison", "replay", "stores", "damage", "create", "evict", "vacuum", "refuse",
                            "compact", "trim"]  # fmt: skip

#: Where the plant itself does not come by. All others are of the rig.
DRIVERS: Final[dict[str, Driver]] = {
    "runner.before_half": "poison",
    "runner.after_bisection": "poison",
    "runner.before_letters": "poison",
    "runner.after_letters": "poison",
    "dead_letters.before_commit": "poison",
    "runner.after_replay": "replay",
    "influxdb.before_post": "stores",
    "influxdb.after_post": "stores",
    "store.before_set_aside": "damage",
    "store.after_rename": "damage",
    "store.after_set_aside": "damage",
    "store.before_create": "create",
    "store.before_evict": "refuse",
    "store.after_evict": "refuse",
    "store.before_drop": "evict",
    "store.after_drop": "evict",
    "store.before_vacuum": "vacuum",
    "store.after_vacuum": "vacuum",
    "store.after_split": "refuse",
    "store.before_park": "refuse",
    "store.after_park": "refuse",
    "forwarder.before_split": "refuse",
    "forwarder.after_split": "refuse",
    "forwarder.before_park": "refuse",
    "archive.before_compact": "compact",
    "archive.after_compact": "compact",
    "journal.before_trim": "trim",
    "journal.after_trim": "trim",
}
#: Boundaries of sinks: where a crash may leave a store and its cursor apart.
SINK: Final = ("runner.", "sql.", "archive", "influxdb.", "dead_letters.")

_BUFFER_WORDS: Final[dict[Driver, tuple[str, ...]]] = {
    "damage": (),
    "create": (),
    "evict": ("--max-mb", "8", "--down", "1000000", "--size", "3000"),
    "vacuum": ("--down", "4000", "--size", "3000"),
    "refuse": ("--refuse",),
}


class Place(msgspec.Struct, frozen=True):
    name: str
    part: Literal["agent", "cloud"]
    file: str

    @property
    def driver(self) -> Driver:
        return DRIVERS.get(self.name, "rig")


class Kill(msgspec.Struct, frozen=True):
    name: str
    nth: int
    up_s: float | None  #: from the start after it to work done; None where the driver does not tell


def places(root: Path = ROOT) -> list[Place]:
    """Every `reached("name")` of the source. Raises `ValueError` for a name that stands twice."""
    found: dict[str, Place] = {}
    for part in PARTS:
        for file in sorted((root / part).rglob("*.py")):
            text = file.read_text()
            if "reached(" not in text:
                continue
            for node in ast.walk(ast.parse(text)):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and node.func.id == "reached"
                    and isinstance(node.args[0], ast.Constant)
                ):
                    name = str(node.args[0].value)
                    where = str(file.relative_to(root))
                    if name in found:
                        raise ValueError(f"{name} stands twice: {found[name].file} and {where}")
                    found[name] = Place(name, "cloud" if part == "cloud" else "agent", where)
    return [found[name] for name in sorted(found)]


# --- in the rig ---


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
        return True
    return False


def _next_seq(rig: Rig) -> int:
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(
            sqlite3.connect(f"file:{rig.folder}/gateway/buffer.db?mode=ro", uri=True, timeout=1.0)
        ) as db,
    ):
        return int(db.execute("SELECT next_seq FROM ledger").fetchone()[0])
    return 0


def up_after(rig: Rig, part: str, timeout_s: float = UP_S * SLACK) -> float:
    """Start it, and wait until the agent has committed, or the cloud listens; how long that took."""
    before = _next_seq(rig) if part == "agent" else 0
    child = rig.children[part]
    began_s = time.monotonic()
    child.start()
    while True:
        took_s = time.monotonic() - began_s
        child.check()
        if _answers(rig.cloud_port) if part == "cloud" else _next_seq(rig) > before:
            return took_s
        if took_s > timeout_s:
            raise TimeoutError(f"{part} is not up after {took_s:.1f} s")
        time.sleep(0.01)


def die_at(child: Child, name: str, nth: int, timeout_s: float) -> bool:
    """Start it armed; whether it died there."""
    clean = child.env
    child.env = {**clean, VARIABLE: f"{name}:{nth}"}
    try:
        child.start()
    finally:
        child.env = clean
    assert child.process is not None
    try:
        status = child.process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        child.process.kill()
        child.process.wait()
        return False
    if status != -signal.SIGKILL:
        child.check()
    return True


def kill_in_rig(rig: Rig, place: Place, rng: random.Random, *, restart: bool) -> Kill:
    """Raises `TimeoutError` where the place is not reached. With `restart` it is up again when this returns."""
    child = rig.children[place.part]
    nth = rng.randint(1, LATEST)
    child.stop_hard()
    if not die_at(child, place.name, nth, REACH_S / 2):
        nth = 1
        if not die_at(child, place.name, nth, REACH_S):
            raise TimeoutError(f"{place.name} ({place.file}) was not reached")
    return Kill(place.name, nth, up_after(rig, place.part) if restart else None)


# --- refusals ---


def _sinks_db(rig: Rig, sql: str) -> None:
    with contextlib.closing(sqlite3.connect(rig.folder / "cloud/readings.sqlite", timeout=20.0)) as db, db:
        db.execute(sql)


def refuse_some(rig: Rig) -> None:
    """From now on the embedded store refuses some rows, by a rule of its own."""
    _sinks_db(
        rig,
        "CREATE TRIGGER IF NOT EXISTS refusing BEFORE INSERT ON readings"
        f" WHEN NEW.seq % {REFUSED_EVERY} = 0 BEGIN SELECT RAISE(ABORT, 'refused by a rule'); END",
    )


def refuse_nothing(rig: Rig) -> None:
    _sinks_db(rig, "DROP TRIGGER IF EXISTS refusing")


def letters(rig: Rig) -> dict[tuple[str, str], int]:
    """Dead letters by sink and reason."""
    with contextlib.closing(sqlite3.connect(rig.folder / "cloud/dead_letters.db", timeout=20.0)) as db:
        rows = db.execute("SELECT sink, reason, count(*) FROM letters GROUP BY sink, reason").fetchall()
    return {(sink, reason): count for sink, reason, count in rows}


def replay(rig: Rig, timeout_s: float = 120.0) -> int:
    """As an operator does it, until none is left; how many there were."""
    deadline_s = time.monotonic() + timeout_s
    replayed = 0
    while left := letters(rig):
        said = ""
        for sink in sorted({sink for sink, _ in left}):
            before = sum(letters(rig).values())
            done = replay_command(rig, sink)
            said += done.stdout + done.stderr
            replayed += max(0, before - sum(letters(rig).values()))
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{letters(rig)} are left: {said}")
        time.sleep(0.5)
    return replayed


def replay_command(rig: Rig, sink: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(str(BIN / "headgate-cloud"), "dead-letters", "replay", "--config", f"{rig.folder}/cloud.toml"),
            *("--sink", sink, "--ca-file", f"{rig.folder}/ca.pem"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def kill_in_replay(rig: Rig, place: Place) -> Kill:
    """The letters are being replayed when it dies."""
    refuse_some(rig)
    deadline_s = time.monotonic() + REACH_S
    while sum(letters(rig).values()) < 3:
        if time.monotonic() > deadline_s:
            raise TimeoutError("no dead letters came of the trigger")
        time.sleep(0.2)
    child = rig.children["cloud"]
    child.stop_hard()
    refuse_nothing(rig)
    clean = child.env
    child.env = {**clean, VARIABLE: f"{place.name}:2"}
    up_after(rig, "cloud")
    child.env = clean
    assert child.process is not None
    deadline_s = time.monotonic() + REACH_S
    while child.process.poll() is None:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{place.name} ({place.file}) was not reached")
        replay_command(rig, "embedded")
        time.sleep(0.2)
    return Kill(place.name, 2, up_after(rig, "cloud"))


# --- without the rig ---


class Driven:
    """One place with a driver of its own: killed there again and again in one folder, then audited."""

    def __init__(self, place: Place, folder: Path, rng: random.Random) -> None:
        self.place = place
        self.folder = folder
        self.rng = rng
        self.first = 1
        self.promised = 0  #: as the child said
        self.kills: list[Kill] = []

    def run(self, times: int) -> list[str]:
        """What is wrong afterwards."""
        for _ in range(times):
            self._prepare()
            nth = 1 if self.place.driver in ("damage", "create") else self.rng.randint(1, 3)
            if not self._die(nth, REACH_S / 2) and not self._die(nth := 1, REACH_S):
                return [f"{self.place.name} ({self.place.file}) was not reached"]
            self.kills.append(Kill(self.place.name, nth, None))
        if self.place.driver == "compact":
            return self._audit_archive()
        if self.place.driver == "trim":
            return self._audit_journal()
        return self._audit_buffer()

    def _prepare(self) -> None:
        if self.place.driver == "create":
            shutil.rmtree(self.folder)
            self.folder.mkdir()
        if self.place.driver == "damage":
            file = self.folder / "buffer.db"
            if not file.exists():
                self._work(3.0)
            if file.exists():
                data = bytearray(file.read_bytes())
                data[:4096] = bytes(4096)
                file.write_bytes(data)

    def _command(self) -> list[str]:
        driver = self.place.driver
        what = {"compact": "archive", "trim": "journal"}.get(driver, "buffer")
        words = _BUFFER_WORDS.get(driver, ())
        return [
            sys.executable,
            "-m",
            "tests.torture.crash_child",
            what,
            str(self.folder),
            str(self.first),
            *words,
        ]

    def _work(self, for_s: float) -> None:
        """Unharmed for a while, then gone."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(self._command(), cwd=ROOT, capture_output=True, timeout=for_s, check=False)

    def _die(self, nth: int, timeout_s: float) -> bool:
        said = self.folder.with_suffix(".said")
        with said.open("wb") as out:
            child = subprocess.Popen(
                self._command(),
                cwd=ROOT,
                env={**os.environ, VARIABLE: f"{self.place.name}:{nth}"},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            try:
                status = child.wait(timeout_s)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                status = 0
        lines = said.read_text(errors="replace").splitlines()
        numbers = [int(line) for line in lines if line.isdigit()]
        if numbers:
            self.promised = max(self.promised, numbers[-1])
            self.first = self.promised + (1 if self.place.driver == "trim" else 10_001)
        if status not in (0, -signal.SIGKILL):
            raise RuntimeError(
                "\n".join([f"{self.place.name}: the child ended with {status}:", *lines[-15:]])
            )
        return status == -signal.SIGKILL

    def _audit_buffer(self) -> list[str]:
        cloud = ModelCloud()
        file = self.folder / "cloud.bin"
        if file.exists():
            data = file.read_bytes()
            at = 0
            while at + 4 <= len(data):
                (size,) = struct.unpack_from(">I", data, at)
                if at + 4 + size <= len(data):  # the last may be cut short: it was never answered
                    cloud.take(data[at + 4 : at + 4 + size])
                at += 4 + size
        store = opened(self.folder)
        try:
            if self.place.driver == "damage":
                aside = list(self.folder.glob("buffer.db.damaged-*"))
                return [] if aside else ["the damaged file is not there any more"]
            drain(store, cloud)
            led = store.ledger
        finally:
            store.close()
        gapped = sum(gap.readings for gap in cloud.gaps())
        had = READINGS * len(cloud.numbers())
        wrong = []
        if led.kept_readings != had + gapped:
            wrong.append(f"{led.kept_readings} kept, {had} delivered and {gapped} reported as gaps")
        if led.kept_readings != led.settled_readings + led.gapped_readings:
            wrong.append(
                f"{led.settled_readings} settled and {led.gapped_readings} gapped of {led.kept_readings} kept"
            )
        if len(set(cloud.numbers())) != len(cloud.numbers()):
            wrong.append("a reading came under two numbers")
        if self.place.driver != "create" and not had + gapped:
            wrong.append("the driver drove nothing")
        return wrong

    def _audit_archive(self) -> list[str]:
        self._work(3.0)  # opens, mends and goes on
        table = DeltaTable(str(self.folder / "archive/readings"))
        columns = table.to_pyarrow_table(columns=["seq", "point"])
        rows = list(zip(columns["seq"].to_pylist(), columns["point"].to_pylist(), strict=True))
        wrong = []
        if len(set(rows)) != len(rows):
            wrong.append(f"{len(rows) - len(set(rows))} rows are doubled")
        missing = set(range(1, self.promised * PER_CALL + 1)) - {seq for seq, _ in rows}
        if missing:
            wrong.append(f"{len(missing)} of {self.promised * PER_CALL} promised scans are missing")
        return wrong

    def _audit_journal(self) -> list[str]:
        with contextlib.closing(sqlite3.connect(self.folder / "journal.db")) as db:
            held = db.execute("SELECT first, last FROM held ORDER BY first").fetchall()
            cursor = db.execute("SELECT offset FROM cursor").fetchone()[0]
            offsets = [row[0] for row in db.execute("SELECT offset FROM entry ORDER BY offset")]
            check = db.execute("PRAGMA integrity_check").fetchone()[0]
        wrong = [] if check == "ok" else [check]
        if held[0][0] != 1 or len(held) != 1 or held[0][1] < self.promised:
            wrong.append(f"promised up to {self.promised}, it remembers {held[:3]}")
        if not offsets or offsets != list(range(offsets[0], offsets[-1] + 1)) or offsets[0] > cursor + 1:
            wrong.append(f"offsets {offsets[:3]}..{offsets[-1:]} with the cursor at {cursor}")
        return wrong


# --- the run ---


class Result(msgspec.Struct):
    kills: list[Kill] = []
    wrong: list[str] = []
    rounds: int = 0
    readings: int = 0


@contextlib.contextmanager
def _rig(stores: bool) -> Iterator[Rig]:
    with (
        tempfile.TemporaryDirectory(prefix="crash-") as folder,
        whole_system(Path(folder), "mqtt", stores=stores, devices=4, period_ms=100) as rig,
    ):
        yield rig


def in_rig(
    chosen: Sequence[Place],
    rng: random.Random,
    result: Result,
    *,
    stores: bool,
    restart: bool,
    deadline_s: float,
) -> int:
    """One round: a rig, these kills, the audit. How many of them were done before the deadline."""
    done = 0
    wrong: list[str] = []
    with _rig(stores) as rig:
        poison = any(place.driver in ("poison", "replay") for place in chosen)
        for place in chosen:
            if time.monotonic() > deadline_s:
                break
            done += 1
            if place.driver == "poison":
                refuse_some(rig)
            try:
                if place.driver == "replay":
                    kill = kill_in_replay(rig, place)
                else:
                    kill = kill_in_rig(rig, place, rng, restart=restart)
            except TimeoutError as err:
                wrong.append(str(err))
                rig.children[place.part].stop_hard()
                up_after(rig, place.part)
                continue
            result.kills.append(kill)
            print(f"{len(result.kills):5d} {kill.name}:{kill.nth} up {kill.up_s or 0:.2f} s", flush=True)
        for part, child in rig.children.items():
            if child.process is None or child.process.poll() is not None:
                up_after(rig, part)
        rig.wait_for_acks()
        if poison:
            refuse_nothing(rig)
            settle_letters(rig)
        account = rig.finish(timeout_s=120.0)
    print(account, flush=True)
    result.rounds += 1
    result.readings += account.kept
    result.wrong += wrong + balance(account)
    return done


def settle_letters(rig: Rig) -> int:
    """The rule is gone: what was refused so far is delivered, and so is what was still on its way there."""
    replayed = 0
    for _ in range(3):
        replayed += replay(rig)
        time.sleep(1.5)
    return replayed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture.crash_points", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--names", default="", help="only these, comma-separated; default: all")
    parser.add_argument("--each", type=int, default=1, help="how often each")
    parser.add_argument(
        "--sink-kills", type=int, default=0, help="beside these, so many at boundaries of sinks"
    )
    parser.add_argument("--sinks", choices=("embedded", "all"), default="embedded")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after these; what was done is told")
    parser.add_argument("--record", action="store_true")
    told = parser.parse_args(argv)
    print(f"seed {told.seed}", flush=True)
    rng = random.Random(told.seed)
    began_s = time.monotonic()
    deadline_s = began_s + told.minutes * 60 if told.minutes else float("inf")
    every = places()
    names = set(told.names.split(",")) if told.names else {place.name for place in every}
    if unknown := names - {place.name for place in every}:
        parser.error(f"no such place: {', '.join(sorted(unknown))}")
    wanted = [place for place in every if place.name in names]
    result = Result()

    driven = [p for p in wanted if p.driver not in ("rig", "poison", "replay", "stores")]
    for place in driven if told.each else []:
        with tempfile.TemporaryDirectory(prefix="crash-") as folder:
            one = Driven(place, Path(folder) / "state", rng)
            one.folder.mkdir()
            wrong = one.run(told.each)
            result.kills += one.kills
            result.wrong += [f"{place.name}: {text}" for text in wrong]
            print(f"{len(result.kills):5d} {place.name} {'; '.join(wrong) or 'well'}", flush=True)

    queue = [p for p in wanted if p.driver == "rig"] * told.each
    rng.shuffle(queue)
    queue += [p for p in wanted if p.driver in ("poison", "replay")] * told.each
    with_stores = [p for p in wanted if p.driver == "stores"]
    if told.sinks == "all":
        queue += with_stores * told.each
    while queue and time.monotonic() < deadline_s:
        in_rig(queue[:ROUND], rng, result, stores=told.sinks == "all", restart=True, deadline_s=deadline_s)
        del queue[:ROUND]
    if told.sinks == "embedded" and with_stores and told.each:
        in_rig(with_stores * told.each, rng, result, stores=True, restart=True, deadline_s=deadline_s)

    boundaries = [
        p
        for p in every
        if p.name.startswith(SINK)
        and (p.driver in ("rig", "poison") or (p.driver == "stores" and told.sinks == "all"))
    ]
    sink_kills = 0
    while sink_kills < told.sink_kills and time.monotonic() < deadline_s:
        chosen = [rng.choice(boundaries) for _ in range(min(ROUND, told.sink_kills - sink_kills))]
        # What needs the trigger comes last: it stays until the audit.
        chosen.sort(key=lambda place: place.driver == "poison")
        sink_kills += in_rig(
            chosen, rng, result, stores=told.sinks == "all", restart=False, deadline_s=deadline_s
        )
    return _tell(told, result, began_s)


def _tell(told: argparse.Namespace, result: Result, began_s: float) -> int:
    counts = collections.Counter(kill.name for kill in result.kills)
    part_of = {place.name: place.part for place in places()}
    ups: dict[str, list[float]] = {"agent": [], "cloud": []}
    for kill in result.kills:
        if kill.up_s is not None:
            ups[part_of[kill.name]].append(kill.up_s)
    slow = [
        f"{part} took {max(took):.1f} s" for part, took in ups.items() if took and max(took) > UP_S * SLACK
    ]
    wrong = result.wrong + slow
    for line in wrong:
        print(f"VIOLATION: {line} (seed {told.seed})")
    took_s = time.monotonic() - began_s
    print(f"{len(result.kills)} kills at {len(counts)} places, {result.rounds} audits, {took_s:.0f} s")
    figures: dict[str, int | float | str] = {
        "places in the source": len(part_of),
        "places killed at": len(counts),
        "kills": len(result.kills),
        "kills at boundaries of sinks": sum(n for name, n in counts.items() if name.startswith(SINK)),
        "audits": result.rounds,
        "readings kept": result.readings,
        "violations": len(wrong),
    }
    for part, took in ups.items():
        if took:
            figures[f"{part} up, median s"] = round(statistics.median(took), 2)
            figures[f"{part} up, longest s"] = round(max(took), 2)
            print(f"{part}: up in {statistics.median(took):.2f} s (median), {max(took):.2f} s (longest)")
    if told.record:
        record(
            Finding(
                proof="crash_points",
                promise="killed at every named place nothing kept is lost or doubled in any sink, and it is up within "
                f"{UP_S:g} s",
                command=f"python -m tests.torture.crash_points --each {told.each} --sink-kills {told.sink_kills}"
                f" --sinks {told.sinks} --seed {told.seed} --record",
                passed=not wrong,
                figures=figures,
                seed=told.seed,
                took_s=took_s,
            )
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
