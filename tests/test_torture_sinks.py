"""A store that is slow, is locked or refuses, in a real run; each for long by `python -m tests.torture.sinks`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.rig import whole_system
from tests.torture.sinks import torture
from tests.torture.soak import balance


@pytest.mark.timeout(300)
def test_slow_locked_and_refusing_stores_end_as_if_nothing_had_been(tmp_path: Path) -> None:
    with whole_system(tmp_path, "mqtt", links=True, period_ms=100) as rig:
        at_work, counts = torture(rig, 3.0, ["influxdb:slow", "mariadb:locked", "both:refusing"])
        account = rig.finish(timeout_s=120.0)
    assert at_work.wrong + balance(account) == []
    assert counts["letters replayed"] > 0
