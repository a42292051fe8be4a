"""What is in the buffer outlives every change of the configuration: each key of [buffer], devices and drivers, by
reload and by restart. One agent as a process, the cloud behind a line that is down until all the changes are made.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from config.agent import Buffer as BufferSettings
from tests.servers.process import wait_until
from tests.system.rig import Rig, whole_system

#: Another value of each key, in the file's words.
CHANGES = {
    "max_mb": "8",
    "free_disk_mb": "1",
    "ballast_kb": "0",
    "commit_interval_s": "0.2",
    "commit_max_kb": "16",
    "low_latency": "true",
    "quick_check_s": "0",
    "keep_damaged_mb": "0",
    "max_age_days": "30",
    "clock_hold_s": "0",
    "when_full": '"thin"',
    "thin_keep": "2",
}
DEVICE = (
    '[[device]]\nname = "{name}"\ndriver = "{driver}"\nperiod_ms = 100\nmeasurement = "simulated"\n{more}'
    '[[device.point]]\nname = "{point}"\n{points}'
)
SIMULATED = DEVICE.format(name="new", driver="simulator", more="", point="p0", points='wave = "walk"\n')
#: What takes the place of the first device's table, or comes beside it; "" takes it away.
DEVICES: dict[str, Callable[[str], str]] = {
    "a point less": lambda table: table.rsplit("[[device.point]]", 1)[0],
    "another period": lambda table: table.replace("period_ms = 100", "period_ms = 70"),
    "another priority": lambda table: table.replace('wave = "walk"', 'wave = "walk"\npriority = "alarm"', 1),
    "another driver": lambda table: DEVICE.format(
        name="d0", driver="modbus", more='[device.options]\nhost = "127.0.0.1"\nport = 9\n',
        point="p0", points="register = 0\n",
    ),
    "one more": lambda table: table + SIMULATED,
    "gone": lambda table: "",
    "back": lambda table: table,
}  # fmt: skip


@dataclass
class Plant:
    rig: Rig
    settings: dict[str, str]
    first: str  #: the table of device d0, as it is now
    epoch: int = 0
    kept: int = 0
    gapped: int = 0

    def write(self) -> None:
        file = self.rig.folder / "agent.toml"
        head, _, plant = file.read_text().partition("[buffer]\n")
        others = plant[plant.index('[[device]]\nname = "d1"') :]
        keys = "".join(f"{key} = {value}\n" for key, value in self.settings.items())
        file.write_text(f"{head}[buffer]\n{keys}{self.first}{others}")

    def reload(self) -> None:
        before = self.rig.status()["config"]["reloaded_ns"]
        agent = self.rig.children["agent"]
        assert agent.process is not None
        agent.process.send_signal(signal.SIGHUP)

        def taken() -> bool:
            config = self.rig.status()["config"]
            assert not config["errors"], config
            return bool(config["reloaded_ns"] != before)

        self._until(taken, "the reload")
        self.look()

    def restart(self) -> None:
        agent = self.rig.children["agent"]
        assert agent.end(signal.SIGTERM) == 0
        started_ns = self.rig.status()["started_ns"]
        agent.start()
        self._until(lambda: self.rig.status()["started_ns"] != started_ns, "the agent to be back")
        assert not self.rig.status()["config"]["errors"], self.rig.status()["config"]
        self.look()

    def look(self) -> None:
        """The same buffer as before, with all that was in it."""
        held = self.rig.status()["buffer"]
        self.epoch = self.epoch or held["epoch"]
        assert held["epoch"] == self.epoch
        assert held["kept_readings"] >= self.kept
        assert held["gapped_readings"] == 0
        self.kept = held["kept_readings"]

    def _until(self, holds: Callable[[], bool], what: str) -> None:
        def looked() -> bool:
            self.rig.children["agent"].check()
            return holds()

        wait_until(looked, timeout_s=30, what=what)


def test_every_key_of_the_buffer_is_in_the_matrix() -> None:
    assert set(CHANGES) == {field.name for field in msgspec.structs.fields(BufferSettings)}
    defaults = {f.name: f.default for f in msgspec.structs.fields(BufferSettings)}
    for key, value in CHANGES.items():
        assert str(defaults[key]).lower() != value.strip('"'), f"{key} = {value} is no change"


@pytest.mark.timeout(240)
def test_no_change_of_the_configuration_costs_or_doubles_what_was_buffered(tmp_path: Path) -> None:
    with whole_system(
        tmp_path, "https", stores=False, links=True, devices=3, period_ms=100, commit_interval_s=0.05
    ) as rig:
        rig.links["uplink"].set(refuse=True)
        rig.links["uplink"].cut()
        plant = (rig.folder / "agent.toml").read_text()
        tables = re.split(r"(?=\[\[device\]\]\n)", plant)
        one = Plant(rig, {"commit_interval_s": "0.05"}, tables[1])
        wait_until(lambda: (rig.buffered() or 0) > 300, timeout_s=30, what="a backlog")
        one.look()
        for change in DEVICES.values():
            one.first = change(tables[1])
            one.write()
            one.reload()
        for name in ("another driver", "gone", "back"):
            one.first = DEVICES[name](tables[1])
            one.write()
            one.restart()
        for number, (key, value) in enumerate(CHANGES.items()):
            one.settings[key] = value
            one.write()
            one.reload()  # named, and waits for the restart
            assert "buffer" in " ".join(rig.status()["config"]["notes"]), key
            if number % 2:  # two of them at once
                one.restart()
        one.settings = {"commit_interval_s": "0.05"}  # all of it back at once
        one.write()
        one.restart()
        rig.links["uplink"].heal()
        account = rig.finish()
        assert account.kept > one.kept > 0
        assert account.gapped == 0, account
        for held in account.held.values():
            assert (held.rows, held.doubled) == (account.kept, 0), account
        assert account.holes == 0, account
        assert rig.status()["buffer"]["epoch"] == one.epoch
