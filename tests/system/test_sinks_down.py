"""A store that is down, or hangs, delays its own sink only; when it is back, its sink catches up."""

from __future__ import annotations

import functools
import json
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.servers.process import wait_until
from tests.system.rig import Rig, whole_system

DOWN_S = 8.0
OTHERS_LAG_S = (
    6.0  #: of a sink whose store is well, on a busy machine; the archive waits 2 s by its configuration
)
CAUGHT_UP_LAG_S = 5.0  #: the promise is 60
SINK_OF = {"influxdb": "influxdb", "mariadb": "mysql", "s3": "archive"}


def lags(rig: Rig) -> dict[str, float]:
    """What `/readyz` says of each sink, in seconds."""
    trust = ssl.create_default_context(cafile=str(rig.folder / "ca.pem"))
    port = rig.cloud_port
    try:
        with urllib.request.urlopen(f"https://localhost:{port}/readyz", context=trust, timeout=10) as answer:
            told = json.load(answer)
    except urllib.error.HTTPError as err:  # not ready is 503, with the same document
        told = json.load(err)
    return {sink["name"]: float(sink["lag_s"]) for sink in told["sinks"]}


def caught_up(rig: Rig, sink: str) -> bool:
    return lags(rig)[sink] < CAUGHT_UP_LAG_S


@pytest.mark.timeout(300)
def test_a_store_that_is_down_or_hangs_delays_its_own_sink_only_and_catches_up(tmp_path: Path) -> None:
    with whole_system(tmp_path, "mqtt") as rig:
        for store, sink in SINK_OF.items():
            process = rig.servers[store]
            hang = (
                store == "mariadb"
            )  # the others are stopped; this one keeps its connections and answers nothing
            if hang:
                process.pause()
            else:
                process.stop()
            worst: dict[str, float] = {}
            last: dict[str, float] = {}
            until = time.monotonic() + DOWN_S
            while time.monotonic() < until:
                last = lags(rig)
                for name, lag_s in last.items():
                    worst[name] = max(worst.get(name, 0.0), lag_s)
                time.sleep(0.5)
            assert last[sink] >= DOWN_S * 0.6, f"{store} is down and its sink does not say so: {last}"
            others = {name: lag_s for name, lag_s in worst.items() if name != sink}
            assert max(others.values()) < OTHERS_LAG_S, f"while {store} was down: {others}"
            if hang:
                process.resume()
            else:
                process.start()
            wait_until(
                functools.partial(caught_up, rig, sink),
                timeout_s=60,
                what=f"{sink} to catch up with live readings",
            )
        account = rig.finish()
    print(account)
    for name, held in account.held.items():
        assert (held.rows, held.doubled) == (account.kept, 0), f"{name}: {account}"
