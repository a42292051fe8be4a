"""The tables of docs/reliability.md and of the README, made from what the proofs have written.

`python -m tests.torture.page` rewrites what stands between the markers; `--check` says whether that would change a
byte, and is part of the tests: no figure on these pages is typed by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.torture.report import FOLDER, Finding, findings

ROOT: Final = Path(__file__).resolve().parents[2]
BEGIN: Final = "<!-- figures: written by python -m tests.torture.page -->"
END: Final = "<!-- end of figures -->"

#: The five that the README carries, in its order.
HEADLINES: Final = ("kills", "power_cuts", "simulation", "rot", "soak")


def number(value: float | str) -> str:
    """As a person reads it."""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}"


def figures(finding: Finding) -> str:
    seed = "" if finding.seed is None else f"; seed {finding.seed}"
    return "; ".join(f"{name}: {number(value)}" for name, value in finding.figures.items()) + seed


def table(found: Sequence[Finding]) -> str:
    """One row for each proof."""
    rows = ["| promise | shown by | the last run |", "|---|---|---|"]
    for finding in found:
        verdict = "" if finding.passed else "**FAILED** "
        took = f"{finding.took_s / 60:.0f} min" if finding.took_s >= 120 else f"{finding.took_s:.0f} s"
        rows.append(
            f"| {finding.promise} | `{finding.command}` | {verdict}{figures(finding)} ({finding.at[:10]}, {took}) |"
        )
    return "\n".join(rows)


def filled(text: str, rows: str) -> str:
    """`text` with what stands between its markers replaced. Raises `ValueError` where there are none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{rows}\n\n{END}{after}"


def pages(found: Sequence[Finding]) -> dict[Path, str]:
    """Every page with its tables as they should be."""
    by_name = {finding.proof: finding for finding in found}
    few = [by_name[name] for name in HEADLINES if name in by_name]
    machines = sorted({finding.machine for finding in found})
    whole = table(found) + "\n\n" + "\n".join(f"Machine: {machine}." for machine in machines)
    return {
        path: filled(path.read_text(encoding="utf-8"), rows)
        for path, rows in ((ROOT / "docs" / "reliability.md", whole), (ROOT / "README.md", table(few)))
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where a page is out of date")
    told = parser.parse_args(argv)
    stale = 0
    for path, text in pages(findings(FOLDER)).items():
        if path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if told.check:
            print(f"{path.relative_to(ROOT)} is out of date: python -m tests.torture.page")
        else:
            path.write_text(text, encoding="utf-8")
            print(f"{path.relative_to(ROOT)} written")
    return stale if told.check else 0


if __name__ == "__main__":
    sys.exit(main())
