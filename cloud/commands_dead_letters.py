"""`headgate-cloud dead-letters`: what a sink refused for what it is, and what becomes of it."""

from __future__ import annotations

import click

from cloud.commands_common import Place, asks, print_json, print_table

IDS = click.argument("ids", nargs=-1, type=click.IntRange(min=1))


@click.group(name="dead-letters")
def dead_letters() -> None:
    """What a sink refused: list, show, replay, drop."""


@dead_letters.command(name="list")
@click.option("--sink", help="Only of this sink.")
@click.option("--gateway", help="Only of this gateway (tenant/gateway).")
@click.option("--after", default=0, type=click.IntRange(min=0), help="Go on after this id.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 10_000), help="At most.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@asks
async def list_(
    place: Place, sink: str | None, gateway: str | None, after: int, limit: int, as_json: bool
) -> None:
    """The letters, the oldest first, each with its reason."""
    async with place.open() as source:
        page = await source.dead_letters(sink=sink, gateway=gateway, after=after, limit=limit)
    if as_json:
        print_json(page)
        return
    rows = [
        (
            str(one.id),
            one.sink,
            one.gateway,
            f"{one.first}-{one.last}",
            str(one.readings),
            str(one.tries),
            one.reason,
        )
        for one in page.letters
    ]
    print_table(
        ("ID", "SINK", "GATEWAY", "FRAMES", "READINGS", "TRIES", "REASON"), rows, empty="no dead letters"
    )
    if page.next is not None:
        click.echo(f"there are more: --after {page.next}", err=True)


@dead_letters.command()
@click.argument("letter", type=click.IntRange(min=1))
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@asks
async def show(place: Place, letter: int, as_json: bool) -> None:
    """One letter and what is in it."""
    async with place.open() as source:
        content = await source.dead_letter(letter)
    if as_json:
        print_json(content)
        return
    one = content.letter
    click.echo(
        f"{one.id}: refused by {one.sink} ({one.tries} times): {one.reason}\n"
        f"from {one.gateway}, epoch {one.epoch}, frames {one.first} to {one.last}, received {one.received_at}"
    )
    rows = [
        (r.taken_at, r.device, r.point, "" if r.value is None else str(r.value), r.unit,
         f"{r.quality} ({r.reason})" if r.reason else r.quality)
        for r in content.readings
    ]  # fmt: skip
    if rows:
        print_table(("TAKEN AT", "DEVICE", "POINT", "VALUE", "UNIT", "QUALITY"), rows, empty="")
    for line in content.other:
        print_table((line,), [("",)], empty="")


@dead_letters.command()
@IDS
@click.option("--sink", help="All letters of this sink.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@asks
async def replay(place: Place, ids: tuple[int, ...], sink: str | None, as_json: bool) -> int:
    """Give letters to their sinks once more, by the running server. The refused stay, with their new reason."""
    from cloud.api.models import Refusal, Replay, Selection

    _chosen(ids, sink)
    delivered: list[int] = []
    refused: dict[int, str] = {}
    unknown: list[int] = []
    async with place.open(server=True) as source:
        selections = [Selection(ids=list(ids))] if ids else []
        after = 0
        while selections or sink is not None:
            if selections:
                done = await source.replay(selections.pop())
            else:
                # By id, page by page: what is refused again stays, and must not come up for ever.
                page = await source.dead_letters(sink=sink, after=after, limit=500)
                if not page.letters:
                    break
                after = page.letters[-1].id
                done = await source.replay(Selection(ids=[letter.id for letter in page.letters]))
            delivered += done.delivered
            refused.update((one.id, one.reason) for one in done.refused)
            unknown += done.unknown
    if as_json:
        print_json(Replay(delivered, [Refusal(*one) for one in refused.items()], unknown))
    else:
        click.echo(f"{len(delivered)} delivered, {len(refused)} refused again, {len(unknown)} unknown")
        for letter, reason in refused.items():
            click.echo(f"  {letter}: {reason}", err=True)
    return 1 if refused or unknown else 0


@dead_letters.command()
@IDS
@click.option("--sink", help="All letters of this sink.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@asks
async def drop(place: Place, ids: tuple[int, ...], sink: str | None, yes: bool, as_json: bool) -> None:
    """Remove letters for good: the sink will never hold what is in them."""
    from cloud.api.models import Dropped, Selection

    _chosen(ids, sink)
    what = f"{len(ids)} letters" if ids else f"all letters of {sink}"
    if not yes:
        click.confirm(f"drop {what} for good?", abort=True, err=True)
    dropped = 0
    async with place.open() as source:
        while True:
            done = await source.drop(Selection(ids=list(ids)) if ids else Selection(sink=sink))
            dropped += done
            if ids or not done:
                break
    if as_json:
        print_json(Dropped(dropped))
    else:
        click.echo(f"{dropped} dropped")


def _chosen(ids: tuple[int, ...], sink: str | None) -> None:
    if bool(ids) == (sink is not None):
        raise click.UsageError("which? give IDs, or --sink SINK for all of its letters")
