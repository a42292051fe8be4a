"""Stores that are down, hang, are slow, refuse, or are locked by somebody else: in the end all sinks hold the same.

One gateway under load, the cloud with all four sinks, each store behind a line of its own. Rules:

1. Every trouble is real: the process killed or stopped (SIGSTOP), 5 s added on the line, a rule of the database that
   refuses one reading in a thousand (errors 1264 and SQLITE_CONSTRAINT), row locks of a second connection.
2. While one store has trouble, the other sinks' lag stays what it is without.
3. What is refused is in the dead letters with the store's own reason. When the rule is gone it is replayed with
   `headgate-cloud dead-letters replay`, and none is left.
4. The end state is that of a run without faults: each sink holds exactly what the gateway's ledger has counted, and the
   same identities and values as the others. (Killed at each step: `crash_points --sinks all`.)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from tests.servers.process import wait_until
from tests.system.rig import Rig, whole_system
from tests.torture.crash_points import SLACK, letters, refuse_nothing, refuse_some, settle_letters
from tests.torture.report import Finding, record
from tests.torture.soak import balance

SINK_OF: Final = {"influxdb": "influxdb", "mariadb": "mysql", "s3": "archive"}
OTHERS_LAG_S: Final = 6.0  #: the archive waits 2 s by its configuration
CAUGHT_UP_S: Final = 5.0
REFUSED_EVERY: Final = 1000
SLOW_S: Final = 2.5  #: each way
REFUSE_MYSQL: Final = (
    "CREATE TRIGGER refusing BEFORE INSERT ON readings FOR EACH ROW BEGIN"
    f" IF (NEW.seq * 31 + NEW.point_id) MOD {REFUSED_EVERY} = 0 THEN"
    " SIGNAL SQLSTATE '22003' SET MYSQL_ERRNO = 1264, MESSAGE_TEXT = 'out of range by a rule'; END IF; END"
)
#: The rows that every write of the sink updates too, in the opposite order, and slowly.
LOCKING: Final = "START TRANSACTION; " + "".join(
    f"UPDATE latest SET received_at_ns = received_at_ns WHERE point_id = {point}; DO SLEEP(0.02); "
    for point in range(96, 0, -8)
) + "COMMIT;"  # fmt: skip


def lags(rig: Rig) -> dict[str, float]:
    """What `/readyz` says of each sink, in seconds."""
    trust = ssl.create_default_context(cafile=str(rig.folder / "ca.pem"))
    try:
        with urllib.request.urlopen(
            f"https://localhost:{rig.cloud_port}/readyz", context=trust, timeout=20
        ) as answer:
            told = json.load(answer)
    except urllib.error.HTTPError as err:  # not ready is 503, with the same document
        told = json.load(err)
    return {sink["name"]: float(sink["lag_s"]) for sink in told["sinks"]}


class Torture:
    def __init__(self, rig: Rig, for_s: float) -> None:
        self.rig = rig
        self.for_s = for_s
        self.wrong: list[str] = []
        self.faults = 0
        self.worst_s = 0.0  #: lag of a sink whose store was well

    def trouble(self, what: str, sink: str, begin: Callable[[], object], end: Callable[[], object]) -> None:
        """One store in trouble for a while, the others watched, until it has caught up."""
        self.faults += 1
        begin()
        try:
            until = time.monotonic() + self.for_s
            others = 0.0
            while time.monotonic() < until:
                found = lags(self.rig)
                others = max([others, *(lag for name, lag in found.items() if name != sink)])
                time.sleep(0.5)
        finally:
            end()
        self.worst_s = max(self.worst_s, others)
        if others > OTHERS_LAG_S * SLACK:
            self.wrong.append(f"{sink} {what}: another sink was {others:.1f} s behind")
        wait_until(
            lambda: lags(self.rig)[sink] < CAUGHT_UP_S,
            timeout_s=60 * SLACK,
            what=f"{sink} to catch up after it was {what}",
        )
        print(f"{sink} {what}: the others at most {others:.1f} s behind", flush=True)

    def down(self, store: str) -> None:
        process = self.rig.servers[store]
        self.trouble("down", SINK_OF[store], process.kill, process.start)

    def hung(self, store: str) -> None:
        process = self.rig.servers[store]
        self.trouble("hung", SINK_OF[store], process.pause, process.resume)

    def slow(self, store: str) -> None:
        line = self.rig.links[store]
        self.trouble("slow", SINK_OF[store], lambda: line.set(delay_s=SLOW_S), line.heal)

    def locked(self) -> int:
        """Somebody else's transactions on the same rows; how many deadlocks the server has seen."""
        before = self._deadlocks()
        client: list[subprocess.Popen[bytes]] = []
        maria = self.rig.maria
        assert maria is not None

        def begin() -> None:
            words = [
                "mariadb",
                "--no-defaults",
                "-h",
                maria.host,
                "-P",
                str(maria.port),
                "-u",
                maria.user,
                "--force",
            ]
            client.append(
                subprocess.Popen(
                    [*words, maria.database],
                    env={**os.environ, "MYSQL_PWD": maria.password},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
            stdin = client[0].stdin
            assert stdin is not None
            stdin.write((LOCKING * max(1, int(self.for_s * 3))).encode())
            with contextlib.suppress(BrokenPipeError):
                stdin.close()

        def end() -> None:
            client[0].kill()
            client[0].wait()

        self.trouble("locked", "mysql", begin, end)
        return self._deadlocks() - before

    def _deadlocks(self) -> int:
        return int(self.rig._mariadb("SHOW GLOBAL STATUS LIKE 'Innodb_deadlocks'")[0][1])

    def refusing(self) -> int:
        """MySQL and the embedded store refuse some readings; how many letters came of it, all replayed."""
        self.faults += 2
        refuse_some(self.rig)
        self.rig._mariadb(f"DELIMITER //\n{REFUSE_MYSQL} //")
        try:
            wait_until(
                lambda: {sink for sink, _ in letters(self.rig)} >= {"mysql", "embedded"},
                timeout_s=60 * SLACK,
                what="dead letters of both",
            )
            time.sleep(self.for_s)
            found = lags(self.rig)
        finally:
            refuse_nothing(self.rig)
            self.rig._mariadb("DROP TRIGGER refusing")
        for sink, reason in letters(self.rig):
            if "rule" not in reason:
                self.wrong.append(f"a letter of {sink} has a reason that is not the store's: {reason}")
        others = max(lag for name, lag in found.items() if name in ("influxdb", "archive"))
        if others > OTHERS_LAG_S * SLACK:
            self.wrong.append(f"while two refused, another sink was {others:.1f} s behind")
        replayed = settle_letters(self.rig)
        print(f"{replayed} letters, all replayed", flush=True)
        return replayed


def torture(rig: Rig, for_s: float, words: Sequence[str]) -> tuple[Torture, dict[str, int]]:
    """These troubles in order; "store:what", "mysql:locked", "both:refusing"."""
    at_work = Torture(rig, for_s)
    counts = {"deadlocks": 0, "letters replayed": 0}
    for word in words:
        store, _, what = word.partition(":")
        match what:
            case "down":
                at_work.down(store)
            case "hung":
                at_work.hung(store)
            case "slow":
                at_work.slow(store)
            case "locked":
                counts["deadlocks"] += at_work.locked()
            case "refusing":
                counts["letters replayed"] += at_work.refusing()
            case _:
                raise ValueError(f"no such trouble: {word}")
    return at_work, counts


ALL: Final = (
    *(f"{store}:{what}" for store in SINK_OF for what in ("down", "hung", "slow")),
    "mariadb:locked",
    "both:refusing",
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture.sinks", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--for-s", type=float, default=600.0, help="how long each trouble lasts")
    parser.add_argument("--only", default="", help=f"of {','.join(ALL)}")
    parser.add_argument("--record", action="store_true")
    told = parser.parse_args(argv)
    print(f"seed {told.seed}", flush=True)
    words = told.only.split(",") if told.only else list(ALL)
    random.Random(told.seed).shuffle(words)
    began_s = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="sinks-") as folder,
        whole_system(Path(folder), "mqtt", links=True, period_ms=200) as rig,
    ):
        at_work, counts = torture(rig, told.for_s, words)
        account = rig.finish(timeout_s=120.0 * SLACK)
    print(account, flush=True)
    wrong = at_work.wrong + balance(account)
    if "mariadb:locked" in words and not counts["deadlocks"]:
        print("no deadlock came about, lock waits only")
    for line in wrong:
        print(f"VIOLATION: {line} (seed {told.seed})")
    if told.record:
        figures: dict[str, int | float | str] = {
            "troubles": at_work.faults,
            "each lasts s": told.for_s,
            "readings kept": account.kept,
            "longest lag of a healthy sink s": round(at_work.worst_s, 1),
            **counts,
            "violations": len(wrong),
        }
        record(
            Finding(
                proof="sinks",
                promise="whatever a store does, the end state is that of a run without faults, the other sinks are not "
                "held up, and what was refused is kept with its reason and replayed",
                command=f"python -m tests.torture.sinks --for-s {told.for_s:g} --seed {told.seed} --record",
                passed=not wrong,
                figures=figures,
                seed=told.seed,
                took_s=time.monotonic() - began_s,
            )
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
