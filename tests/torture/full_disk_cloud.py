"""The cloud as a process on a sick disk: an ext4 of its own as the data folder, with the journal, the embedded sink and
the archive on it; the real agent sends to it. Run by `python -m tests.torture.full_disk --cloud`, in a mount namespace.

    https            the disk fills up under the running cloud, and is given room again; over the HTTPS door
    mqtt             the same over the MQTT door
    sinks            only the disk under the embedded sink and the archive fills up, not that of the journal
    full-start       the disk is full as the cloud starts: it says so and ends, and is started again when there is room
    running          ext4 turns read-only under the running cloud; it is checked, mounted again, the cloud restarted
    readonly-start   the same with a data folder that is read-only

Rules: while the disk takes no writes a batch of somebody else's is answered "later" (HTTPS: 503 or 429 with
Retry-After; MQTT: a nack with a time), and never with an ack, and the journal does not grow; the process lives;
`headgate-cloud status` and the metrics show a code within 30 s, and not any more when the disk heals; in the end all
that the agent kept is in both sinks once.
"""

from __future__ import annotations

import json
import shutil
import signal
import ssl
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Final

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion

from sync.identity import TOPIC_ROOT
from sync.wire import Ack, Nack, Reply, decode_reply
from tests.fakes.batches import batch
from tests.servers.process import wait_until
from tests.system.child import BIN, Child
from tests.system.codes import Watch
from tests.system.rig import Rig, whole_system
from tests.torture.full_disk import Disk, FullDiskError, must
from tests.torture.full_disk_agent import account, remount

WHAT: Final = ("https", "mqtt", "sinks", "full-start", "running", "readonly-start")
SHOWN_S: Final = 30.0
SLACK: Final = 3.0  #: of a machine that does other things too
CLOUD_DISK_MB: Final = 288  #: above what the journal leaves free by default
SINKS_DISK_MB: Final = 64
GATEWAY: Final = "chaos/plant-1"
OTHER_EPOCH: Final = 77  #: of the batches that must not be taken
ASKED: Final = 5  #: such batches, a second apart
_FULL: Final = "journal_disk|journal_full"
_OFFSET: Final = "headgate_journal_last_offset "
_READ_ONLY: Final = "journal_broken"


class Process:
    """The cloud, and where its trouble shows."""

    def __init__(self, rig: Rig, disk: Disk) -> None:
        self.rig, self.disk = rig, disk
        self.cloud: Child = rig.children["cloud"]
        self.watch = Watch(rig)
        self._next = 1

    def until(self, holds: Callable[[], bool], within_s: float, what: str) -> float:
        began_s = time.monotonic()

        def looked() -> bool:
            for child in self.rig.children.values():
                child.check()
            return holds()

        wait_until(looked, timeout_s=within_s * SLACK, what=what)
        return time.monotonic() - began_s

    def status(self) -> set[str]:
        """What `headgate-cloud status` shows, without whom it concerns."""
        return {code.partition(":")[0] for code in self.problems()}

    def problems(self) -> set[str]:
        done = subprocess.run(
            [str(BIN / "headgate-cloud"), "status", "--json", "--config", str(self.rig.folder / "cloud.toml"),
             "--url", f"https://localhost:{self.rig.cloud_port}", "--ca-file", str(self.rig.folder / "ca.pem")],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        must(done.stdout, f"headgate-cloud status says nothing: {done.stderr}")
        return {str(problem["code"]) for problem in json.loads(done.stdout)["problems"]}

    def down(self) -> set[str]:
        """The sinks that it says take nothing now."""
        return {code.partition(":")[2] for code in self.problems() if code.startswith("sink_down:")}

    def shows(self, code: str) -> str:
        codes = set(code.split("|"))
        here = self.until(lambda: bool(self.status() & codes), SHOWN_S, f"headgate-cloud status shows {code}")
        must(here < SHOWN_S, f"{code} in status after {here:.1f} s")
        self.until(lambda: bool(self.watch.cloud_metrics() & codes), SHOWN_S, f"the metrics show {code}")
        shown = "|".join(sorted(self.status() & codes))
        return f"{shown or code} in status after {here:.1f} s, in the metrics too"

    def well(self) -> str:
        """No code is left, and new readings are taken and stored."""
        took_s = self.until(lambda: not self.sick(), SHOWN_S, "the codes to clear")
        must(took_s < SHOWN_S, f"the codes cleared after {took_s:.1f} s")
        mark = self.rig.settled()
        self.until(lambda: self.rig.settled() > mark + 100, 30, "readings to be acknowledged again")
        stored = self.rig.count_embedded()
        self.until(lambda: self.rig.count_embedded() > stored + 100, 30, "readings to be stored again")
        return f"codes gone after {took_s:.1f} s"

    def sick(self) -> set[str]:
        try:
            found = self.status() | self.watch.cloud_metrics()
        except (OSError, FullDiskError):  # it is starting
            return {"down"}
        return {code for code in found if code.startswith(("journal_", "sink_", "missed"))}

    def _batch(self) -> bytes:
        self._next += 10
        return batch(self._next, 3, gateway=GATEWAY, epoch=OTHER_EPOCH)

    def refuses(self) -> str:
        """Nothing of another sender is acknowledged, and it is told when to come again."""
        return self._refuses_mqtt() if self.rig.transport == "mqtt" else self._refuses_https()

    def _refuses_https(self) -> str:
        said = set()
        context = ssl.create_default_context(cafile=str(self.rig.folder / "ca.pem"))
        token = self.rig.secret("gateway.token").read_text()
        for _ in range(ASKED):
            request = urllib.request.Request(
                f"https://localhost:{self.rig.cloud_port}/v1/ingest",
                data=self._batch(),
                headers={"Headgate-Gateway": GATEWAY, "Authorization": f"Bearer {token}"},
            )
            try:
                with urllib.request.urlopen(request, timeout=30, context=context) as answer:
                    raise FullDiskError(f"a sick disk, and the door says {answer.status}")
            except urllib.error.HTTPError as err:
                must(err.code in (429, 503), f"a sick disk, and the door says {err.code}")
                must(int(err.headers.get("Retry-After", "0")) > 0, f"{err.code} without Retry-After")
                said.add(f"{err.code}, Retry-After {err.headers['Retry-After']}")
            self.cloud.check()
            time.sleep(1)
        return "the door says " + " and ".join(sorted(said))

    def _refuses_mqtt(self) -> str:
        replies: list[Reply] = []
        ready = threading.Event()
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id="somebody-else")
        client.username_pw_set(GATEWAY, self.rig.secret("gateway.token").read_text())
        client.on_message = lambda _c, _u, message: replies.append(decode_reply(bytes(message.payload)))
        client.on_subscribe = lambda *_: ready.set()
        text = (self.rig.folder / "cloud.toml").read_text().split("[mqtt]", 1)[1]
        port = int(text.split("port = ", 1)[1].split("\n", 1)[0])
        client.connect("127.0.0.1", port)
        client.loop_start()
        try:
            client.subscribe(f"{TOPIC_ROOT}/{GATEWAY}/ack")
            must(ready.wait(10), "the broker lets nobody subscribe")
            for _ in range(ASKED):
                client.publish(f"{TOPIC_ROOT}/{GATEWAY}/up", self._batch())
                self.cloud.check()
                time.sleep(1)
            mine = [reply for reply in replies if reply.epoch == OTHER_EPOCH]
            nacks = [reply for reply in mine if isinstance(reply, Nack)]
            must(
                not [reply for reply in mine if isinstance(reply, Ack)],
                "a sick disk, and the door sends an ack",
            )
            must(nacks, "a sick disk, and the door says nothing")
            must(all(reply.retry_after_s for reply in nacks), "a nack that does not say when to come again")
        finally:
            client.disconnect()
            client.loop_stop()
        said = sorted({f"{reply.code}, after {reply.retry_after_s:g} s" for reply in nacks})
        return f"{len(nacks)} nacks ({' and '.join(said)}) to {ASKED} batches, no ack"

    def stands_still(self) -> str:
        """Whoever asks, nothing goes into the journal."""
        before = self._offset()
        held = self.refuses()
        must(self._offset() == before, "a journal on a sick disk took something")
        return held

    def _offset(self) -> int:
        lines = self.watch.asked("/metrics").splitlines()
        return int(float(next(line.split()[1] for line in lines if line.startswith(_OFFSET))))


def _full(one: Process) -> str:
    one.disk.fill()
    shown = one.shows(_FULL)
    refused = one.stands_still()
    one.disk.free()
    return f"{shown}; {refused}; with room: {one.well()}"


def _sinks(one: Process) -> str:
    must(one.cloud.end(signal.SIGTERM) == 0, "the cloud must leave in order")
    for name in ("readings.sqlite", "archive"):
        place = one.rig.folder / "cloud" / name
        shutil.move(place, one.disk.path / name)
        place.symlink_to(one.disk.path / name)
    one.cloud.start()
    one.until(lambda: not one.sick(), 30, "the cloud to be well with its sinks elsewhere")
    one.disk.fill()
    took_s = one.until(
        lambda: one.down() == {"embedded", "archive"}, SHOWN_S, "both sinks to be told as down"
    )
    must(took_s < SHOWN_S, f"both sinks told as down after {took_s:.1f} s")
    one.until(lambda: "sink_down" in one.watch.cloud_metrics(), SHOWN_S, "the metrics show sink_down")
    mark = one.rig.settled()
    one.until(lambda: one.rig.settled() > mark + 1000, 30, "readings to be acknowledged, sinks or no sinks")
    one.disk.free()
    return f"sink_down of both after {took_s:.1f} s, and the door goes on; with room: {one.well()}"


def _full_start(one: Process) -> str:
    must(one.cloud.end(signal.SIGTERM) == 0, "the cloud must leave in order")
    one.disk.fill()
    said = _ends(one)
    must("the disk is full" in said, said)
    one.disk.free()
    one.cloud.start()
    return f"{said}; with room: {one.well()}"


def _running(one: Process) -> str:
    one.disk.give_up()
    shown = one.shows(_READ_ONLY)
    refused = one.stands_still()
    status = one.cloud.end(signal.SIGTERM)
    must(status == 0, f"on a read-only disk it must leave in order: {status}")
    one.disk.repair()
    one.cloud.start()
    return f"{shown}; {refused}; after a check and a restart: {one.well()}"


def _readonly_start(one: Process) -> str:
    must(one.cloud.end(signal.SIGTERM) == 0, "the cloud must leave in order")
    remount(one.disk, "ro")
    said = _ends(one)
    must("Read-only" in said, said)
    remount(one.disk, "rw")
    one.cloud.start()
    return f"{said}; when it is writable: {one.well()}"


def _ends(one: Process) -> str:
    """It cannot hold anything here, and opens no door: the agents keep what they have, and systemd starts it again."""
    one.cloud.start()
    assert one.cloud.process is not None
    status = one.cloud.process.wait(60)
    said = one.cloud.log.read_text().splitlines()[-1]
    must(status == 1 and said.startswith("Error: "), f"{status}: {said}")
    must("salvage" not in said, said)
    return f'ends with 1 and says "{said.rpartition("/cloud/")[2]}"'


def one(what: str, *, ext4: bool) -> str:
    with tempfile.TemporaryDirectory(prefix="headgate-sick-") as name:
        folder = Path(name)
        if what == "sinks":
            disk = Disk(folder, "sinks", ext4=ext4, size_mb=SINKS_DISK_MB)
        else:
            disk = Disk(folder, "cloud", ext4=ext4, size_mb=CLOUD_DISK_MB)
        transport = "mqtt" if what == "mqtt" else "https"
        try:
            with whole_system(folder, transport, stores=False, devices=4, period_ms=100) as rig:
                process = Process(rig, disk)
                try:
                    shown = {
                        "https": _full,
                        "mqtt": _full,
                        "sinks": _sinks,
                        "full-start": _full_start,
                        "running": _running,
                        "readonly-start": _readonly_start,
                    }[what](process)
                    return f"{shown}; {account(rig)}"
                except (TimeoutError, AssertionError, RuntimeError, OSError) as err:
                    log = (folder / "cloud.log").read_text()[-3000:]
                    raise FullDiskError(f"{what}: {type(err).__name__}: {err}\n{log}") from err
        finally:
            subprocess.run(["umount", "-l", disk.path], capture_output=True, check=False, timeout=60)


def every(what: tuple[str, ...], *, ext4: bool) -> dict[str, str]:
    """What each has shown."""
    shown = {}
    for name in what:
        if name == "running" and not ext4:
            print("running: no ext4 on a loop device here: NOT tried", flush=True)
            continue
        shown[name] = one(name, ext4=ext4)
        print(f"{name}: {shown[name]}", flush=True)
    return shown
