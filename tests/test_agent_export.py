"""What waits is carried by hand: exported on the gateway, imported in the cloud, nothing lost and nothing doubled."""

from __future__ import annotations

import io
import json
import random
import sqlite3
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.cli import main as headgate
from agent.export import ExportError, export
from cloud.cli import main as headgate_cloud
from sync.wire import ScanFrame, WireError, decode_frame, open_body, read_export
from tests.fakes.buffer import GATEWAY, READINGS, group, number_of, opened
from tests.test_cloud_api import Running

MADE_NS = 1_700_000_123 * 10**9


def filled(folder: Path, numbers: range) -> Path:
    folder.mkdir()
    store = opened(folder)
    for at in range(numbers.start, numbers.stop, 100):
        store.commit(group(*range(at, min(at + 100, numbers.stop))), (), 0)
    store.close()
    return folder


def numbers_in(file: Path) -> list[int]:
    with file.open("rb") as opened_file:
        head, batches = read_export(opened_file.read)
        assert head.gateway == str(GATEWAY)
        return [
            number
            for payload in batches
            for raw in open_body(payload)[1].frames
            if (number := number_of(raw)) is not None
        ]


def test_every_frame_that_waits_is_in_the_file_once_and_still_in_the_buffer(tmp_path: Path) -> None:
    folder = filled(tmp_path / "state", range(1, 2501))
    done = export(folder, tmp_path / "out.headgate", str(GATEWAY), "1.0", MADE_NS)
    assert numbers_in(tmp_path / "out.headgate") == list(range(1, 2501))
    assert (done.frames, done.readings, done.damaged_rows) == (2500, 2500 * READINGS, 0)
    assert done.bytes == (tmp_path / "out.headgate").stat().st_size
    store = opened(folder)
    assert store.ledger.held_frames == 2500
    store.close()


def test_batches_of_the_file_carry_their_layouts_and_their_clock(tmp_path: Path) -> None:
    folder = filled(tmp_path / "state", range(1, 11))
    export(folder, tmp_path / "out", str(GATEWAY), "1.0", MADE_NS)
    with (tmp_path / "out").open("rb") as file:
        for payload in read_export(file.read)[1]:
            _, body = open_body(payload)
            named = {frame.layout for raw in body.frames if isinstance(frame := decode_frame(raw), ScanFrame)}
            assert len(body.layouts) == len(named) == 1
            assert [row.boot for row in body.clocks] == [1]


def test_a_rotten_row_is_left_out_and_counted(tmp_path: Path) -> None:
    folder = filled(tmp_path / "state", range(1, 101))
    conn = sqlite3.connect(folder / "buffer.db")
    data = bytearray(conn.execute("SELECT data FROM frames WHERE seq = 40").fetchone()[0])
    data[-3] ^= 4
    conn.execute("UPDATE frames SET data = ? WHERE seq = 40", (bytes(data),))
    conn.commit()
    conn.close()
    done = export(folder, tmp_path / "out", str(GATEWAY), "1.0", MADE_NS)
    assert done.damaged_rows == 1
    assert len(numbers_in(tmp_path / "out")) == 99


def test_a_name_that_is_taken_is_not_overwritten_and_a_bad_place_is_named(tmp_path: Path) -> None:
    folder = filled(tmp_path / "state", range(1, 11))
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ExportError, match="exists already"):
        export(folder, tmp_path / "out", str(GATEWAY), "1.0", MADE_NS)
    assert (tmp_path / "out").read_text() == "mine"
    with pytest.raises(ExportError, match="No such file"):
        export(folder, tmp_path / "no" / "such", str(GATEWAY), "1.0", MADE_NS)
    with pytest.raises(ExportError, match="there is no buffer"):
        export(tmp_path, tmp_path / "other", str(GATEWAY), "1.0", MADE_NS)


def test_a_medium_that_fills_up_leaves_no_file_and_says_so(tmp_path: Path) -> None:
    folder = filled(tmp_path / "state", range(1, 101))
    (tmp_path / "out.part").symlink_to("/dev/full")  # every write to it fails with ENOSPC
    with pytest.raises(ExportError, match="No space left"):
        export(folder, tmp_path / "out", str(GATEWAY), "1.0", MADE_NS)
    assert list(tmp_path.glob("out*")) == []


def test_a_file_cut_or_changed_anywhere_is_noticed_and_never_gives_another_batch(tmp_path: Path) -> None:
    folder = filled(tmp_path / "state", range(1, 301))
    export(folder, tmp_path / "out", str(GATEWAY), "1.0", MADE_NS)
    whole = (tmp_path / "out").read_bytes()
    sent = set(read_export(io.BytesIO(whole).read)[1])
    rng = random.Random(5)
    for at in range(0, len(whole), max(1, len(whole) // 100)):
        with pytest.raises(WireError):
            list(read_export(io.BytesIO(whole[:at]).read)[1])
    for _ in range(200):
        bad = bytearray(whole)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        taken: list[bytes] = []
        with pytest.raises(WireError):
            taken.extend(read_export(io.BytesIO(bytes(bad)).read)[1])
        for payload in taken:
            if payload not in sent:
                with pytest.raises(WireError):
                    open_body(payload)


# --- the whole way ---


@pytest.fixture
def cloud(tmp_path: Path) -> Running:
    (tmp_path / "cloud").mkdir()
    return Running(tmp_path / "cloud")


def ran(command: object, *words: str) -> tuple[int, str]:
    done = CliRunner().invoke(command, words, catch_exceptions=False)  # type: ignore[arg-type]  # either program
    return done.exit_code, done.output


def imported(cloud: Running, file: Path, *more: str) -> tuple[int, dict[str, object]]:
    status, told = ran(headgate_cloud, "import", str(file), "--config", str(cloud.file), "--json", *more)
    return status, json.loads(told[told.index("{") :])


def test_an_export_is_imported_once_however_often_it_is_brought(tmp_path: Path, cloud: Running) -> None:
    folder = filled(tmp_path / "state", range(1, 2001))
    status, told = ran(
        headgate, "buffer", "--state-dir", str(folder), "--config", "none.toml", "export", str(tmp_path)
    )
    assert status == 2, told  # nobody said whose buffer it is
    assert "whose buffer" in told
    config = tmp_path / "agent.toml"
    config.write_text(
        f'[gateway]\ntenant = "acme"\nname = "plant-1"\nstate_dir = "{folder}"\n[uplink]\nkind = "none"\n'
    )
    target = tmp_path / "stick"
    target.mkdir()
    status, told = ran(headgate, "buffer", "--config", str(config), "export", str(target))
    assert status == 0, told
    assert "4,000 readings" in told
    (file,) = target.iterdir()
    cloud.start()
    try:
        assert imported(cloud, file)[1]["new"] > 0  # type: ignore[operator]  # a number
        status, again = imported(cloud, file)
        assert (status, again["new"], again["refused"], again["later"]) == (0, 0, 0, 0)
        cloud.settled()
        verdict = cloud.json("/v1/verify")
        assert isinstance(verdict, dict)
        assert verdict["ok"], verdict
        stored = {row["sink"]: row["stored"] + row["dead"] + row["expired"] for row in verdict["sinks"]}
        assert stored == {"embedded": 4000, "archive": 4000}
    finally:
        cloud.stop()
    # and where no server runs, the files are opened themselves
    status, offline = imported(cloud, file)
    assert (status, offline["new"], offline["refused"]) == (0, 0, 0), offline


def test_what_the_gateway_sends_later_is_not_doubled(tmp_path: Path, cloud: Running) -> None:
    folder = filled(tmp_path / "state", range(1, 501))
    export(folder, tmp_path / "out", str(GATEWAY), "1.0", MADE_NS)
    cloud.start()
    try:
        assert imported(cloud, tmp_path / "out")[0] == 0
        store = opened(folder)
        batches = store.claim(100, ())
        store.close()
        for batch in batches:
            cloud.ingest(batch.sealed.payload)
        cloud.settled()
        verdict = cloud.json("/v1/verify")
        assert isinstance(verdict, dict)
        assert verdict["ok"], verdict
        assert {row["stored"] + row["dead"] + row["expired"] for row in verdict["sinks"]} == {500 * READINGS}
    finally:
        cloud.stop()


def test_a_gateway_that_was_never_seen_is_taken_only_when_it_is_named(tmp_path: Path, cloud: Running) -> None:
    folder = filled(tmp_path / "state", range(1, 11))
    export(folder, tmp_path / "out", "other/box-9", "1.0", MADE_NS)
    cloud.start()
    try:
        status, told = imported(cloud, tmp_path / "out")
        assert (status, told["new"]) == (1, 0)
        assert "--gateway other/box-9" in str(told["reasons"])
        status, told = imported(cloud, tmp_path / "out", "--gateway", "other/box-9")
        assert (status, told["new"]) == (0, 1)
    finally:
        cloud.stop()


def test_a_file_that_was_cut_gives_what_is_whole_and_says_so(tmp_path: Path, cloud: Running) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    store = opened(folder)
    for at in range(0, 3000, 100):
        store.commit(group(*range(at, at + 100), size=400), (), 0)
    store.close()
    export(folder, tmp_path / "out", str(GATEWAY), "1.0", MADE_NS)
    whole = (tmp_path / "out").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "junk").write_bytes(b"\0" * 100)
    cloud.start()
    try:
        status, told = imported(cloud, tmp_path / "cut")
        assert status == 1
        assert "export it again" in str(told["trouble"])
        assert told["new"]
        status, told = imported(cloud, tmp_path / "junk")
        assert (status, told["new"]) == (1, 0)
        assert "no export" in str(told["trouble"])
        assert imported(cloud, tmp_path / "out")[0] == 0
        status, text = cloud.ask("/v1/import", {"not": "batches"})
        assert status == 400, text
    finally:
        cloud.stop()


def test_nobody_imports_without_the_operators_token(cloud: Running) -> None:
    cloud.start()
    try:
        assert cloud.ask("/v1/import", [], token=None)[0] == 401
    finally:
        cloud.stop()
