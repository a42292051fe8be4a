"""`headgate-cloud gaps`: what gateways told as lost, record by record."""

from __future__ import annotations

import time

import click

from cloud.commands_common import Place, asks, print_json, print_table


@click.command()
@click.option("--gateway", help="Only this one: tenant/gateway.")
@click.option("--since", help="Told here not before: 2026-11-23, 2026-11-23T10:00:00Z, -15m (s, m, h, d, w).")
@click.option(
    "--limit", default=100, show_default=True, type=click.IntRange(1, 10_000), help="At most, the newest."
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@asks
async def gaps(place: Place, gateway: str | None, since: str | None, limit: int, as_json: bool) -> None:
    """The gaps that gateways told, the newest first. LOST is less what arrived after all."""
    from cloud.api import times

    since_ns = times.parse(since, time.time_ns()) if since else 0
    async with place.open() as source:
        # One more than is shown: whether there are more is seen so.
        found = await source.gaps(gateway, min(limit + 1, 10_000), since_ns=since_ns)
    shown = found[:limit]
    if as_json:
        print_json(shown)
    else:
        rows = [
            (
                g.received_at[:19] + "Z", g.gateway, g.device, g.reason, g.priority or "-", str(g.lost_readings),
                str(g.lost_scans), f"{g.first}..{g.last}" if g.first else "-", str(g.epoch), g.from_time[:19] + "Z",
                g.to_time[:19] + "Z",
            )
            for g in shown
        ]  # fmt: skip
        heads = (
            "TOLD", "GATEWAY", "DEVICE", "REASON", "PRIORITY", "LOST READINGS", "SCANS", "SEQS", "EPOCH", "FROM", "TO",
        )  # fmt: skip
        print_table(heads, rows, empty="no gap was told")
    if len(found) > limit:
        click.echo(f"there are more than these {limit}: give --since, or a higher --limit", err=True)
