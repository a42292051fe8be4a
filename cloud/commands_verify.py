"""`headgate-cloud verify`: the accounting identity, counted in every sink."""

from __future__ import annotations

import click

from cloud.commands_common import Place, asks, print_json, print_table


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@asks
async def verify(place: Place, as_json: bool) -> int:
    """Check that what was received is in every sink. Ends with 1 where something is missing or doubled."""
    async with place.open(journal=True) as source:
        verdict = await source.verify()
    if as_json:
        print_json(verdict)
        return 0 if verdict.ok else 1
    rows = [
        (a.gateway, a.sink, str(a.journaled), str(a.stored), str(a.dead), str(a.pending), str(a.expired),
         str(a.missed), str(a.missing), str(a.doubled), "ok" if a.ok else "WRONG")
        for a in verdict.sinks
    ]  # fmt: skip
    heads = (
        "GATEWAY",
        "SINK",
        "JOURNALED",
        "STORED",
        "DEAD",
        "PENDING",
        "EXPIRED",
        "MISSED",
        "MISSING",
        "DOUBLED",
        "",
    )
    print_table(heads, rows, empty="nothing was received yet")
    for frames in verdict.frames:
        if frames.absent:
            ranges = ", ".join(f"{h.first} to {h.last} of epoch {h.epoch}" for h in frames.holes[:5])
            word = "MISSING" if frames.missing else "not here yet, or gone"
            click.echo(f"{frames.gateway}: {frames.absent} frames {word}: {ranges}", err=True)
    for line in verdict.trouble:
        click.echo(f"could not be asked: {line}", err=True)
    return 0 if verdict.ok else 1
