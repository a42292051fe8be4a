"""`make demo`: the main job on embedded defaults, with a kill and a cut on the way, and the account at the end.

A broker, the cloud (SQLite journal, embedded sinks) and an agent that reads the plant (`tests.demo.plant`, a process
of its own) over real protocols. Half-way the uplink is cut (the broker dies by SIGKILL) and the agent is killed by
SIGKILL; both come back. At the end everything is asked to finish, and `tests.demo.auditor` compares what the plant
offered with what each sink holds. The last line of stdout is one JSON object; the exit status is 0 only if `ok` is
true.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.demo import auditor, screen
from tests.demo.plant import ADVERT_POINTS, BOILER_REGISTERS, METER_REGISTERS, THERMOMETERS, advert
from tests.servers import run
from tests.servers.process import ServerProcess, free_port
from tests.system.child import BIN, Child

COMMIT_INTERVAL_S = 1.0  #: the published loss window of the agent's default configuration
SLACK_S = 1.0  #: a commit takes time of its own, and this machine does other things too
TENANT, GATEWAY = "demo", "plant-1"


def boot_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass
class Demo:
    folder: Path
    seconds: float
    ble: str = "decoder"
    env: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    ends: list[tuple[int, int]] = field(default_factory=list)
    kills: int = 0
    cuts: int = 0

    def child(self, name: str, *command: str) -> Child:
        return Child(name, list(command), self.folder, self.env)

    # --- what is written down before anything starts ---

    def configure(
        self, plant: dict[str, object], mqtt_port: int, cloud_port: int, token: Path, cloud_word: Path
    ) -> None:
        """The two configurations, on defaults but for names and addresses."""
        words = ['[[device]]\nname = "boiler"\ndriver = "modbus"\nperiod_ms = 200\n']
        words += [f'[device.options]\nhost = "127.0.0.1"\nport = {plant["boiler_port"]}\nunit = 1\n']
        words += ['[[device.point]]\nname = "n"\nregister = 0\ntype = "u32"\n']
        for k in range(BOILER_REGISTERS - 2):
            words += [f'[[device.point]]\nname = "t{k + 1}"\nregister = {k + 2}\ntype = "u16"\n']
            words += ['scale = 0.1\nunit = "Cel"\nvalid_min = 0.0\nvalid_max = 120.0\n']
        words += ['[[device]]\nname = "meter"\ndriver = "modbus"\nperiod_ms = 500\n']
        words += [
            f'[device.options]\nserial = "{plant["meter_tty"]}"\nbaud = 115200\nparity = "none"\nunit = 1\n'
        ]
        words += ['[[device.point]]\nname = "n"\nregister = 0\ntype = "u32"\n']
        for k in range((METER_REGISTERS - 2) // 2):
            words += [
                f'[[device.point]]\nname = "u{k + 1}"\nregister = {2 + 2 * k}\ntype = "f32"\nunit = "V"\n'
            ]
        words += ['[[device]]\nname = "scale"\ndriver = "serial_line"\n']
        words += [f'[device.options]\nport = "{plant["scale_tty"]}"\nbaud = 9600\nseparator = ";"\n']
        for k, (name, unit) in enumerate((("n", ""), ("flow", "l/min"), ("level", "m"))):
            words += [f'[[device.point]]\nname = "{name}"\ncolumn = {k + 1}\nunit = "{unit}"\n']
        if self.ble == "bluez":
            for k, address in enumerate(THERMOMETERS):
                words += [f'[[device]]\nname = "thermometer-{k + 1}"\ndriver = "ble"\n']
                words += [f'[device.options]\naddress = "{address}"\n']
                for name, thing in (
                    ("n", "count"),
                    ("temperature", "temperature"),
                    ("humidity", "humidity"),
                    ("battery", "battery"),
                ):
                    words += [f'[[device.point]]\nname = "{name}"\nobject = "{thing}"\n']
        (self.folder / "agent.toml").write_text(
            f'[gateway]\ntenant = "{TENANT}"\nname = "{GATEWAY}"\nstate_dir = "{self.folder}/gateway"\n'
            f'[uplink]\nkind = "mqtt"\nhost = "127.0.0.1"\nport = {mqtt_port}\ntls = false\n'
            f'token_file = "{token}"\n[buffer]\ncommit_interval_s = {COMMIT_INTERVAL_S}\n' + "".join(words)
        )
        (self.folder / "drain.toml").write_text(
            (self.folder / "agent.toml").read_text().split("[[device]]", 1)[0]
        )
        (self.folder / "cloud.toml").write_text(
            f'[server]\ndata_dir = "{self.folder}/cloud"\nport = {cloud_port}\n'
            f'operator_token_file = "{self.secret("operator.token")}"\n'
            f'[mqtt]\nhost = "127.0.0.1"\nport = {mqtt_port}\ntls = false\npassword_file = "{cloud_word}"\n'
            f"[archive]\ncommit_interval_s = 5.0\n"
        )

    def secret(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            path.touch(0o600)
            path.write_text(secrets.token_urlsafe(24))
        return path

    # --- the run ---

    @contextlib.contextmanager
    def bluetooth(self) -> Iterator[None]:
        """A private D-Bus for the simulated BlueZ, where `dbus-daemon` exists; else only the decoder is shown."""
        if shutil.which("dbus-daemon") is None:
            checked = check_decoder()
            say(
                f"no dbus-daemon here: {checked} advertisements go through the real decoder only (ble: decoder)"
            )
            yield
            return
        from tests.fakes.bluez import private_bus

        with private_bus() as bus:
            self.ble = "bluez"
            self.env["DBUS_SYSTEM_BUS_ADDRESS"] = bus.address
            yield

    def go(self) -> None:
        token, cloud_word = self.secret("gateway.token"), self.secret("cloud.password")
        users = {f"{TENANT}/{GATEWAY}": token.read_text(), "headgate-cloud": cloud_word.read_text()}
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.bluetooth())
            broker = stack.enter_context(run.nats(users=users, sync_always=False))
            plant = subprocess.Popen(
                [sys.executable, "-m", "tests.demo.plant", str(self.folder / "plant.log"), self.ble],
                stdout=subprocess.PIPE,
                env=self.env,
            )
            stack.callback(plant.kill)
            assert plant.stdout is not None
            told = plant.stdout.readline()
            if not told:
                raise SystemExit("demo: the plant did not start")
            cloud_port = free_port()
            self.configure(json.loads(told), broker.mqtt_port, cloud_port, token, cloud_word)
            cloud = self.child(
                "cloud", str(BIN / "headgate-cloud"), "serve", "--config", f"{self.folder}/cloud.toml"
            )
            agent = self.child("agent", str(BIN / "headgate"), "run", "--config", f"{self.folder}/agent.toml")
            for child in (cloud, agent):
                child.start()
                stack.callback(child.stop_hard)
            view = screen.Screen(self.folder, cloud_port, self.secret("operator.token"))
            started = time.monotonic()
            half, wanted = self.seconds * 0.45, [cloud, agent]
            steps = [
                (half, lambda: self.cut(broker.process, view)),
                (half + min(3.0, self.seconds * 0.05), lambda: self.kill(agent, view)),
                (half + min(5.0, self.seconds * 0.1), lambda: self.back(agent, view)),
                (half + min(8.0, self.seconds * 0.15), lambda: self.rejoin(broker.process, view)),
            ]
            with view:
                while time.monotonic() - started < self.seconds:
                    while steps and time.monotonic() - started >= steps[0][0]:
                        steps.pop(0)[1]()
                    for child in wanted:
                        if child.process is not None and not view.killed(child.name):
                            child.check()
                    view.show(time.monotonic() - started, self.seconds)
                    time.sleep(0.25)
            say("stopping: the agent commits and leaves, then empties its buffer; the cloud drains its sinks")
            at = boot_ns()
            agent.end(signal.SIGTERM)
            self.ends.append((at - int((COMMIT_INTERVAL_S + SLACK_S) * 1e9), boot_ns()))
            plant.terminate()
            plant.wait()
            self.drain(stack)
            cloud.end(signal.SIGTERM)
        facts = {"ends": self.ends, "kills": self.kills, "cuts": self.cuts, "ble": self.ble}
        (self.folder / "run.json").write_text(json.dumps(facts))

    def remember(self) -> None:
        """What an earlier run in this folder did to its parts."""
        facts = json.loads((self.folder / "run.json").read_text())
        self.ends = [(a, b) for a, b in facts["ends"]]
        self.kills, self.cuts, self.ble = facts["kills"], facts["cuts"], facts["ble"]

    def cut(self, broker: ServerProcess, view: screen.Screen) -> None:
        view.note("the uplink is cut: the broker is killed (SIGKILL)")
        broker.kill()
        self.cuts += 1

    def rejoin(self, broker: ServerProcess, view: screen.Screen) -> None:
        broker.start()
        view.note("the broker is back: what was buffered is sent, live readings first")

    def kill(self, agent: Child, view: screen.Screen) -> None:
        view.note("the agent is killed (SIGKILL)", killed=agent.name)
        self.killed_ns = boot_ns()
        agent.end(signal.SIGKILL)
        self.kills += 1

    def back(self, agent: Child, view: screen.Screen) -> None:
        agent.start()
        self.ends.append((self.killed_ns - int((COMMIT_INTERVAL_S + SLACK_S) * 1e9), boot_ns()))
        view.note("the agent is back, with what it had committed", alive=agent.name)

    def drain(self, stack: contextlib.ExitStack, timeout_s: float = 60.0) -> None:
        """The same agent and buffer with no devices, until the cloud has acked everything."""
        drainer = self.child("drain", str(BIN / "headgate"), "run", "--config", f"{self.folder}/drain.toml")
        drainer.start()
        stack.callback(drainer.stop_hard)
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            drainer.check()
            state = screen.buffer_state(self.folder / "gateway")
            if state is not None and state.readings == 0:
                break
            time.sleep(0.2)
        drainer.end(signal.SIGTERM)

    def audit(self) -> auditor.Verdict:
        state = screen.buffer_state(self.folder / "gateway")
        assert state is not None
        data = self.folder / "cloud"
        return auditor.audit(
            auditor.read_log(self.folder / "plant.log"),
            state.kept,
            {
                "embedded": auditor.held_by_embedded(data / "readings.sqlite"),
                "archive": auditor.held_by_archive(data / "archive"),
            },
            self.ends,
        )


def check_decoder() -> int:
    """Runs advertisements of the plant's making through the shipped decoder."""
    from drivers.bthome import decode

    for n in range(1, 101):
        decoded = decode(advert(n, n, 21.5, 40.0, 90))
        assert len(decoded.values) >= ADVERT_POINTS
    return 100


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("DEMO_S") or 60))
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in this new folder and leave it there")
    parser.add_argument(
        "--again", type=Path, metavar="DIR", help="only audit again what an earlier run kept there"
    )
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if options.again:
            demo = Demo(options.again.resolve(), 0.0)
            demo.remember()
        else:
            if options.keep:
                folder = options.keep
                folder.mkdir(parents=True)
            else:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headgate-demo-")))
            demo = Demo(folder.resolve(), options.seconds)
            demo.go()
        verdict = demo.audit()
    for line in verdict.wrong:
        say(f"wrong: {line}")
    result = {
        "offered": verdict.offered,
        "kept": verdict.kept,
        "uncommitted_lost": verdict.uncommitted_lost,
        "overruns": verdict.overruns,
        "stored": verdict.stored,
        "gaps": verdict.gaps,
        "doubled": verdict.doubled,
        "kills": demo.kills,
        "cuts": demo.cuts,
        "ble": demo.ble,
        "ok": verdict.ok,
    }
    print(json.dumps(result), flush=True)
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    sys.exit(main())
