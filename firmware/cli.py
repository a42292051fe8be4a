"""`headgate-release`: build, sign and publish images.

Rules: it works offline; it never asks for a key on the command line. The commands themselves come with the
updates release; until then the program says so plainly and does nothing else.
"""

from __future__ import annotations

import click

COMING = (
    ("build", "pack an agent, config, driver, firmware or os image with its manifest"),
    ("sign", "sign a manifest with an offline key"),
    ("publish", "put a signed image where gateways find it"),
)


class _Release(click.Group):
    """A group that names what is not there yet, rather than answering `no such command` to a good guess."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] in {name for name, _ in COMING}:
            ctx.fail(f"{args[0]!r} comes with the updates release; this version cannot {args[0]} images yet")
        return super().resolve_command(ctx, args)


EPILOG = "\b\nComing with the updates release:\n" + "\n".join(f"  {name:<8} {what}" for name, what in COMING)


@click.group(cls=_Release, epilog=EPILOG)
@click.version_option(package_name="headgate", prog_name="headgate-release")
def main() -> None:
    """Build, sign and publish Headgate images. This version has no commands yet."""
