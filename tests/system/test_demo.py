"""The demo, run as a person runs it; and that its audit is able to say no."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

import drivers.bthome
from tests.demo.__main__ import Demo, check_decoder

SECONDS = 14


def _demo(*words: str) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.demo", *words], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.stdout, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return done.returncode, result, done.stderr


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of the demo, its folder left behind."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    status, result, said = _demo("--seconds", str(SECONDS), "--keep", str(folder))
    assert (status, result["ok"]) == (0, True), f"{result}\n{said[-3000:]}"
    assert result["kills"] == result["cuts"] == 1
    assert result["offered"] == result["kept"] + result["uncommitted_lost"] + result["overruns"]
    assert result["kept"] == result["stored"] + result["gaps"] > 0
    assert result["doubled"] == 0
    return folder


@pytest.mark.timeout(300)
def test_the_demo_survives_its_kill_and_its_cut_and_accounts_for_every_reading(kept: Path) -> None:
    status, result, _ = _demo("--again", str(kept))
    assert (status, result["ok"]) == (0, True)


def test_one_row_deleted_from_the_embedded_sink_fails_the_audit(kept: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(kept, folder)
    with sqlite3.connect(folder / "cloud/readings.sqlite") as db:
        key = db.execute("SELECT point_id, taken_at_ns, epoch, seq FROM readings LIMIT 1").fetchone()
        gone = db.execute(
            "DELETE FROM readings WHERE (point_id, taken_at_ns, epoch, seq) = (?, ?, ?, ?)", key
        )
        assert gone.rowcount == 1
    status, result, said = _demo("--again", str(folder))
    assert (status, result["ok"]) == (1, False)
    assert "wrong: embedded" in said


def test_one_row_deleted_from_the_archive_fails_the_audit(kept: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(kept, folder)
    table = DeltaTable(str(folder / "cloud/archive/readings"))
    row = table.to_pyarrow_table(columns=["device", "point", "seq"]).slice(0, 1).to_pylist()[0]
    gone = table.delete(f"device = '{row['device']}' AND point = '{row['point']}' AND seq = {row['seq']}")
    assert gone["num_deleted_rows"] == 1
    status, result, said = _demo("--again", str(folder))
    assert (status, result["ok"]) == (1, False)
    assert "wrong: archive" in said


def test_without_a_dbus_daemon_the_real_decoder_is_shown_and_said_to_be_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    demo = Demo(tmp_path, 1.0)
    with demo.bluetooth():
        assert demo.ble == "decoder"
        assert "DBUS_SYSTEM_BUS_ADDRESS" not in demo.env.keys() - os.environ.keys()
    assert "100 advertisements go through the real decoder only (ble: decoder)" in capsys.readouterr().err


def test_the_decoders_check_is_able_to_say_no(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_decoder() == 100
    decode = drivers.bthome.decode
    monkeypatch.setattr(drivers.bthome, "decode", lambda data: decode(data[:1]))
    with pytest.raises(AssertionError):
        check_decoder()
