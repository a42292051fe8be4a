"""What dates a held frame stays in the buffer as long as the frame does."""

from __future__ import annotations

from pathlib import Path

from agent.store import Group
from tests.fakes.buffer import ModelCloud, StillClock, bounds, drain, group, opened


def test_a_gap_keeps_the_clock_row_of_the_boot_whose_frames_it_reports(tmp_path: Path) -> None:
    """The gap stands behind frames of later boots; the row went with the last frame of its own boot, and the cloud
    could not say when the hole was."""
    unsynchronized = StillClock("boot-1")  # a row that was synchronized is kept longer, as a bound for others
    unsynchronized.synchronized = False
    store = opened(tmp_path, unsynchronized)
    store.commit(group(*range(5), boot=store.ledger.boot), (), 0)
    store.close()
    store = opened(tmp_path, StillClock("boot-2"))
    store.commit(group(*range(5, 10), boot=store.ledger.boot), (), 0)
    [batch] = store.claim(1, ())
    first, last = bounds(batch)
    while first < last:  # as after a permanent refusal: halved until one frame is left
        store.split(first, last)
        last = (first + last) // 2
    store.park(first, "malformed", "the cloud says so")  # its gap names boot 1, behind all of boot 2
    store.commit(Group([], []), [(2, 5)], 0)
    assert store.oldest is not None
    for number in range(10, 400):  # until the upkeep's turn comes
        store.commit(group(number, size=20_000, boot=store.ledger.boot), (), 0)
    cloud = ModelCloud()
    drain(store, cloud)  # it says of every frame whether its boot's row came with it
    [gap] = cloud.gaps()
    assert gap.boot == 1
    store.commit(Group([], []), (), 0)
    for number in range(400, 900):
        store.commit(group(number, size=20_000, boot=store.ledger.boot), [(1, store.ledger.next_seq)], 0)
    assert {row.boot for row, _ in store._marks} == {2}, "what nothing held names is forgotten"
    store.close()
