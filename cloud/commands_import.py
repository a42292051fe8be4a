"""`headgate-cloud import`: what a gateway exported to a file is taken in as if it had come by network."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

import click

from cloud.api.models import Taken
from cloud.commands_common import Place, Source, asks, print_json
from sync.wire import ExportHead, WireError, read_export

_PART_BYTES: Final = 4 * 1024 * 1024  #: of batches in one request
_PATIENCE_S: Final = 600.0  #: how long a full journal is waited for, before the command gives up


@click.command(name="import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--gateway", help="Take it from this gateway, tenant/name, though it was never seen here.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@asks
async def import_(place: Place, file: Path, gateway: str | None, as_json: bool) -> int:
    """Take in FILE, which a gateway wrote with `headgate buffer export`.

    Each batch is checked and deduped as if it had come by network, so FILE may be taken in twice, and may overlap with
    what the gateway sends. Ends with 1 where something in it was not taken.
    """
    counts: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    head: ExportHead | None = None
    trouble = ""
    async with place.open(journal=True) as source:
        with file.open("rb") as opened:
            try:
                head, parts = _parts(opened)
                for part in parts:
                    for taken in await _given(source, part, gateway):
                        counts[taken.outcome] += 1
                        counts[f"{taken.outcome}_readings"] += taken.readings
                        if taken.outcome in ("refused", "later"):
                            refused[taken.text] += 1
            except WireError as err:
                trouble = f"{file}: {err}; what came before it is taken; export it again and import that"
    missing = counts["refused"] + counts["later"]
    if as_json:
        print_json(
            {
                "file": str(file), "gateway": head.gateway if head else None, "made_ns": head.made_ns if head else None,
                "new": counts["new"], "duplicate": counts["duplicate"], "later": counts["later"],
                "refused": counts["refused"], "readings_new": counts["new_readings"], "reasons": dict(refused),
                "trouble": trouble,
            }
        )  # fmt: skip
    else:
        if head is not None:
            made = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(head.made_ns / 1e9))
            click.echo(f"{head.gateway}, exported at {made} by its clock")
            click.echo(
                f"{counts['new']} batches taken with up to {counts['new_readings']:,} readings, "
                f"{counts['duplicate']} were here already"
            )
        for text, times in refused.most_common():
            click.echo(f"{times} not taken: {text}", err=True)
        if trouble:
            click.echo(trouble, err=True)
    return 1 if missing or trouble else 0


def _parts(file: BinaryIO) -> tuple[ExportHead, Iterator[list[bytes]]]:
    """The head, and the batches in portions. A file that ends early gives what is whole, then raises `WireError`."""
    head, batches = read_export(file.read)

    def parts() -> Iterator[list[bytes]]:
        part: list[bytes] = []
        size = 0
        try:
            for payload in batches:
                part.append(payload)
                size += len(payload)
                if size >= _PART_BYTES:
                    yield part
                    part, size = [], 0
        except WireError:
            if part:
                yield part
            raise
        if part:
            yield part

    return head, parts()


async def _given(source: Source, part: Sequence[bytes], gateway: str | None) -> list[Taken]:
    """Hand over, and wait where the cloud asks to."""
    until_s = time.monotonic() + _PATIENCE_S
    left = list(part)
    done: list[Taken] = []
    while True:
        answers = await source.take(left, gateway=gateway)
        later = [i for i, taken in enumerate(answers) if taken.outcome == "later"]
        done += [taken for taken in answers if taken.outcome != "later"]
        if not later:
            return done
        wait_s = max(1.0, *(answers[i].retry_after_s or 1.0 for i in later))
        if time.monotonic() + wait_s > until_s:
            return done + [answers[i] for i in later]
        click.echo(f"the cloud asks to wait {wait_s:.0f} s: {answers[later[0]].text}", err=True)
        await asyncio.sleep(wait_s)
        left = [left[i] for i in later]
