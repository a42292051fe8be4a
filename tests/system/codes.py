"""Each fault in turn on a running system: its code must show within 30 s wherever an operator looks, and go when the
fault does. Run in a mount namespace of its own by tests/test_system_codes.py; prints `ok` at the end, or fails.

Where an operator looks: `headgate status`, the agent's metrics file, and, as long as there is a way, the cloud's word
on the gateway, its status and its metrics. (A disk that turns read-only is in tests/torture/full_disk.py: it takes a
block device.)
"""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.servers.process import free_port, wait_until
from tests.system.child import BIN, Child
from tests.system.rig import Rig, whole_system

SHOWN_WITHIN_S = 30.0
SLACK = 2.0  #: of a machine that does other things too


class Watch:
    """The three places."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._config = str(rig.folder / "agent.toml")

    def status(self) -> set[str]:
        done = subprocess.run(
            [str(BIN / "headgate"), "status", "--config", self._config, "--json"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        told: dict[str, Any] = json.loads(done.stdout)
        return {problem["code"] for problem in told["problems"]}

    def metrics(self) -> set[str]:
        text = (self._rig.folder / "gateway/metrics.prom").read_text()
        return {
            line.split('code="')[1].split('"')[0]
            for line in text.splitlines()
            if line.startswith("headgate_problem{")
        }

    def cloud(self) -> set[str]:
        request = urllib.request.Request(
            f"https://127.0.0.1:{self._rig.cloud_port}/v1/gateways",
            headers={"Authorization": f"Bearer {self._rig.secret('operator.token').read_text()}"},
        )
        context = ssl.create_default_context(cafile=str(self._rig.folder / "ca.pem"))
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:
            (gateway,) = json.loads(answer.read())
        return {problem["code"] for problem in gateway["heartbeat"]["state"].get("problems", [])}

    def asked(self, path: str) -> str:
        context = ssl.create_default_context(cafile=str(self._rig.folder / "ca.pem"))
        url = f"https://127.0.0.1:{self._rig.cloud_port}{path}"
        with urllib.request.urlopen(url, timeout=30, context=context) as answer:
            return str(answer.read().decode())

    def cloud_status(self) -> set[str]:
        """What `headgate-cloud status` shows: the cloud's own codes, and each agent's with the gateway's name."""
        return {
            problem["code"].partition(":")[0] for problem in json.loads(self.asked("/readyz"))["problems"]
        }

    def cloud_metrics(self) -> set[str]:
        return {
            line.split('code="')[1].split('"')[0].partition(":")[0]
            for line in self.asked("/metrics").splitlines()
            if line.startswith("headgate_problem{")
        }

    def see(self, code: str, there: bool, places: str) -> str:
        """Wait until the code is (not) in each place; how long each took."""
        began_s = time.monotonic()
        took = []
        for place in places.split():
            look: Callable[[], set[str]] = getattr(self, place)

            def agreed(look: Callable[[], set[str]] = look) -> bool:
                return bool(look() & set(code.split("|"))) is there

            word = "shows" if there else "clears"
            wait_until(agreed, timeout_s=SHOWN_WITHIN_S * SLACK, what=f"{place} {word} {code}")
            took.append(f"{place} {time.monotonic() - began_s:.1f} s")
        return ", ".join(took)


def main(folder: Path) -> None:
    state = folder / "gateway"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m,mode=0700", "tmpfs", str(state)], check=True)
    meter_port = free_port()
    meter = Child(
        "meter",
        [str(BIN / "headgate"), "simulate", "eastron-sdm630", "--port", str(meter_port)],
        folder,
        dict(os.environ),
    )
    with whole_system(folder, "https", stores=False, links=True, devices=2, period_ms=200) as rig:
        watch, agent, config = Watch(rig), rig.children["agent"], folder / "agent.toml"
        plain = config.read_text()
        with_meter = plain + (
            '[[device]]\nname = "meter"\nprofile = "eastron-sdm630"\nonly = ["power"]\nperiod_ms = 500\n'
            f'[device.options]\nhost = "127.0.0.1"\nport = {meter_port}\nunit = 1\n'
        )

        def reload(text: str) -> None:
            config.write_text(text)
            assert agent.process is not None
            agent.process.send_signal(signal.SIGHUP)

        def fill(free_mb: int) -> None:
            disk = os.statvfs(state)
            room = disk.f_bavail * disk.f_frsize - free_mb * 1024**2
            (state / "foreign").write_bytes(bytes(max(0, room)))

        line = rig.links["uplink"]
        everywhere, here = "status metrics cloud cloud_status cloud_metrics", "status metrics"
        steps: list[tuple[str, Callable[[], object], Callable[[], object], str]] = [
            (
                "config_bad",
                lambda: reload(plain + "[[device]]\nname = 5\n"),
                lambda: reload(plain),
                everywhere,
            ),
            ("device_disconnected", lambda: reload(with_meter), meter.start, everywhere),
            ("disk_low", lambda: fill(20), (state / "foreign").unlink, everywhere),
            ("link_refused", lambda: (line.set(refuse=True), line.cut()), line.heal, here),
            ("link_silent|link_timeout", lambda: line.set(blackhole=True), line.heal, here),
        ]
        try:
            for code, break_it, mend_it, places in steps:
                break_it()
                shown = watch.see(code, True, places)
                mend_it()
                print(f"{code}: shown: {shown}; cleared: {watch.see(code, False, everywhere)}", flush=True)
                for child in rig.children.values():
                    child.check()
        finally:
            meter.stop_hard()
            print((folder / "agent.log").read_text()[-3000:], file=sys.stderr)
    print("ok")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
