"""`headgate-cloud readings`: what was measured, as a table, JSON, CSV or Arrow."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, cast

import click

from cloud.commands_common import Place, asks, print_table

if TYPE_CHECKING:
    from cloud.api.models import Reading, Store
    from cloud.api.operator import Operator, Pages, Query


@click.command()
@click.argument("gateway")
@click.option("--device", help="Only this device.")
@click.option("--point", help="Only this point.")
@click.option("--from", "from_", help="Not before: 2026-11-23, 2026-11-23T10:00:00Z, -15m (s, m, h, d, w).")
@click.option("--to", help="Before; as --from.")
@click.option("--limit", default=1000, show_default=True, type=click.IntRange(1, 10_000_000), help="At most.")
@click.option("--store", type=click.Choice(["embedded", "mysql", "archive"]), help="Which store to ask.")
@click.option(
    "--format", "form", default="table", show_default=True,
    type=click.Choice(["table", "json", "csv", "arrow"]), help="How to print.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@asks
async def readings(
    place: Place,
    gateway: str,
    device: str | None,
    point: str | None,
    from_: str | None,
    to: str | None,
    limit: int,
    store: str | None,
    form: str,
    as_json: bool,
) -> None:
    """Readings of GATEWAY (tenant/gateway), point by point, in order of time."""
    from cloud.api import times
    from cloud.api.operator import Query
    from cloud.api.remote import Remote

    form = "json" if as_json else form
    if form == "arrow" and sys.stdout.isatty():
        raise click.UsageError("Arrow is not for a terminal: write it to a file with > readings.arrows")
    now_ns = time.time_ns()
    from_ns = times.parse(from_, now_ns) if from_ else 0
    to_ns = times.parse(to, now_ns) if to else times.MAX_NS
    async with place.open() as source:
        if isinstance(source, Remote):
            asked: Mapping[str, str | int | None] = {
                "gateway": gateway, "device": device, "point": point, "from": from_ns if from_ else None,
                "to": to_ns if to else None, "limit": limit, "store": store,
                "format": "json" if form == "table" else form,
            }  # fmt: skip
            if form == "table":
                _print((await source.page(asked)).readings, limit)
                return
            async with source.stream(asked) as parts:
                await _pipe(parts)
            return
        query = Query(gateway, device, point, from_ns, to_ns, limit, None, cast("Store | None", store))
        await _local(source, query, form)


async def _local(operator: Operator, query: Query, form: str) -> None:
    from cloud.api import formats

    pages: Pages = await operator.readings(query)
    if form == "table":
        _print([reading async for page in pages for reading in page], query.limit)
    elif form == "json":
        await _pipe(formats.as_json(aiter(pages), pages))
    elif form == "csv":
        await _pipe(formats.as_csv(aiter(pages)))
    else:
        await _pipe(formats.as_arrow(aiter(pages)))


async def _pipe(parts: AsyncIterator[bytes]) -> None:
    out = sys.stdout.buffer
    async for part in parts:
        out.write(part)
    out.flush()


def _print(found: list[Reading], limit: int) -> None:
    rows = [
        (
            r.taken_at, r.device, r.point, "" if r.value is None else str(r.value), r.unit,
            f"{r.quality} ({r.reason})" if r.reason else r.quality,
        )
        for r in found
    ]  # fmt: skip
    print_table(("TAKEN AT", "DEVICE", "POINT", "VALUE", "UNIT", "QUALITY"), rows, empty="no readings there")
    if len(found) >= limit:
        click.echo(
            f"these are the first {limit:,} by device, point and time; there may be more: choose by --device, --point "
            "and --from -15m, or raise --limit",
            err=True,
        )
