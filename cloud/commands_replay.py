"""`headgate-cloud replay`: a sink gets again what the cloud has received, with the best times known by now."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from cloud.commands_common import Place, asks, print_json

if TYPE_CHECKING:
    from cloud.api.models import SinkReplay


@click.command()
@click.option("--sink", required=True, help="Which: embedded, archive, influxdb, mysql.")
@click.option("--from", "from_", required=True, help="Received since: ISO 8601, -15m, or nanoseconds.")
@click.option("--to", help="Received before: the same. Unset: until now.")
@click.option("--gateway", help="Correct only the times of this gateway (tenant/gateway).")
@click.option("--dry-run", is_flag=True, help="Say what there is to do, and do nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@asks
async def replay(
    place: Place,
    sink: str,
    from_: str,
    to: str | None,
    gateway: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> int:
    """Give a sink again what was received since a time: after it was lost, restored, or emptied.

    What the journal still holds comes from there, what came before that from the archive; the archive itself is filled
    from the journal only. What the sink has already is not doubled, so a replay may be repeated. Readings that were
    sent before their gateway's clock was set are moved to their right time where it is known by now. The running server
    does it, and the sink falls behind for as long as it takes. Ends with 1 where the sink is not through in time.
    """
    from cloud.api.models import SinkReplayRequest
    from cloud.api.times import parse

    now_ns = time.time_ns()
    asked = SinkReplayRequest(
        sink, parse(from_, now_ns), parse(to, now_ns) if to else 0, gateway, dry_run=True
    )
    async with place.open(server=True) as source:
        done = await source.replay_sink(asked)
        if not dry_run:
            if not as_json:
                click.echo(_told(done, "to be given:"))
            if not yes:
                click.confirm(f"give this to {sink}?", abort=True, err=True)
            done = await source.replay_sink(SinkReplayRequest(sink, asked.from_ns, asked.to_ns, gateway))
    if as_json:
        print_json(done)
    else:
        click.echo(_told(done, "to be given:" if dry_run else "given:"))
        if done.left:
            click.echo(f"{sink} is {done.left} batches behind, and goes on by itself", err=True)
    return 1 if done.left and not dry_run else 0


def _told(done: SinkReplay, what: str) -> str:
    text = (
        f"{what} {done.journal_readings} readings in {done.journal_batches} batches of the journal, "
        f"{done.archive_readings} of the archive; {done.corrected_readings} of them get a better time"
    )
    return f"{text}\n{done.note}" if done.note else text
