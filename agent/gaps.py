"""Gap records made one: how few of them can say truly what was dropped. Pure.

Rules:
1. `scans`, `readings` and the number of seqs that are gone are sums: nothing is counted twice or forgotten.
2. A gap of whole runs stays one of whole runs where its runs touch. Where they do not, the sum is *sparse*
   (`sync.wire.GapFrame`), which is only true of frames that were never sent: `SPARSE` has the reasons for which so.
3. Gaps of several boots are never one: their times could not be told.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from msgspec.structs import replace

from sync.wire import GapFrame

SPARSE: Final = frozenset({"evicted", "thinned", "expired", "merged"})
"""Reasons for dropping what is in no recorded batch, so was never sent. `merged`: gap records whose counts are in
another one now; their own seqs are gone, and no scan with them."""
SPAN_NS: Final = (
    3600 * 10**9
)  #: a gap is told anew after so long, so that its times say when readings are missing


class Key(NamedTuple):
    """Gaps of one key may become one."""

    epoch: int
    boot: int
    reason: str
    priority: str
    device: str  #: of a gap in front of the buffer; "" where seqs are told


def key_of(gap: GapFrame) -> Key:
    return Key(gap.epoch, gap.boot, gap.reason, gap.priority, "" if gap.first else gap.device)


def gone(gap: GapFrame) -> int:
    """How many seqs it reports."""
    if not gap.first:
        return 0
    return gap.frames or gap.last - gap.first + 1


def mergeable(a: GapFrame, b: GapFrame, *, torn: bool = False) -> bool:
    """Whether their sum is as exact as they are; with `torn`, whether it is true."""
    if key_of(a) != key_of(b):
        return False
    if not a.first or a.last + 1 == b.first or b.last + 1 == a.first:
        return True
    return a.reason in SPARSE and (torn or (a.sparse and b.sparse))


def merged(a: GapFrame, b: GapFrame) -> GapFrame:
    """Two mergeable gaps as one."""
    return replace(
        a,
        first=min(a.first, b.first),
        last=max(a.last, b.last),
        scans=a.scans + b.scans,
        readings=a.readings + b.readings,
        device=a.device if a.device == b.device else "",
        from_boot_ns=min(a.from_boot_ns, b.from_boot_ns),
        to_boot_ns=max(a.to_boot_ns, b.to_boot_ns),
        frames=gone(a) + gone(b),
    )


def summed(gaps: list[GapFrame], *, torn: bool = False) -> list[GapFrame]:
    """The fewest gaps that say the same, in order of the first of each."""
    out: list[GapFrame] = []
    newest: dict[Key, int] = {}
    for gap in gaps:
        at = newest.get(key_of(gap))
        if at is not None and mergeable(out[at], gap, torn=torn):
            out[at] = merged(out[at], gap)
        else:
            newest[key_of(gap)] = len(out)
            out.append(gap)
    return out
