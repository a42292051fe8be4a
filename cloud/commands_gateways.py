"""`headgate-cloud gateways`: who sends, since when, and how much."""

from __future__ import annotations

import time

import click

from cloud.commands_common import Place, asks, print_json, print_table


@click.command()
@click.option("--json", "as_json", is_flag=True, help="All that is known, as JSON.")
@asks
async def gateways(place: Place, as_json: bool) -> None:
    """The gateways: when last seen, what they sent, how they are."""
    async with place.open(journal=True) as source:
        found = await source.gateways()
    if as_json:
        print_json(found)
        return
    now_ns = time.time_ns()
    rows = [
        (
            g.gateway, _ago(now_ns - g.last_seen_ns) if g.last_seen_ns else "never", str(g.batches), str(g.readings),
            str(g.frames_duplicate), _skew(g.heartbeat.state if g.heartbeat else {}),
            "yes" if g.admitted else "not here",
        )
        for g in found
    ]  # fmt: skip
    heads = ("GATEWAY", "LAST SEEN", "BATCHES", "READINGS", "DUPLICATE FRAMES", "CLOCK", "HTTP TOKEN")
    print_table(heads, rows, empty="no gateway is admitted, and none was ever seen")


def _skew(heartbeat: dict[str, object]) -> str:
    from cloud.skew import skew_in

    seconds = skew_in(heartbeat)
    return "" if seconds is None else f"{seconds:+.1f} s"


def _ago(ns: int) -> str:
    seconds = ns // 1_000_000_000
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{max(seconds, 0)} s ago"
