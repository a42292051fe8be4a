"""`headgate-cloud status`: what is wrong with the running cloud, and what to do about it."""

from __future__ import annotations

import click
import msgspec

from cloud.commands_common import Place, asks, print_json, print_table

TIMEOUT_S = 20.0


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@asks
async def status(place: Place, as_json: bool) -> int:
    """What is wrong, as codes with their remedies; the sinks. Ends with 1 where something is wrong."""
    from cloud.server import Ready

    ready = msgspec.json.decode(await _asked(place), type=Ready)
    if as_json:
        print_json(ready)
        return 1 if ready.problems else 0
    rows = [(s.name, s.state, f"{s.lag_s:.0f} s", s.error) for s in ready.sinks]
    print_table(("SINK", "STATE", "BEHIND", ""), rows, empty="no sink")
    for problem in ready.problems:
        click.echo(f"{problem.code}: {problem.text}; {problem.remedy}")
    if not ready.problems:
        click.echo("nothing is wrong")
    return 1 if ready.problems else 0


async def _asked(place: Place) -> bytes:
    """The server's /readyz, which needs no token. Raises `OperatorError`."""
    import ssl

    import httpx

    from cloud.api.local import address
    from cloud.api.operator import OperatorError
    from cloud.preflight import load_config
    from config.load import ConfigFileError

    url = place.url
    if url is None:
        if place.config_file is None:
            raise OperatorError("which server? give --config FILE on its machine, or --url")
        try:
            url = address(load_config(place.config_file))
        except ConfigFileError as err:
            raise OperatorError(str(err)) from err
    try:
        verify = ssl.create_default_context(cafile=str(place.ca_file) if place.ca_file else None)
        async with httpx.AsyncClient(verify=verify, timeout=TIMEOUT_S, trust_env=False) as client:
            answer = await client.get(f"{url.rstrip('/')}/readyz")
    except (OSError, ssl.SSLError, httpx.HTTPError) as err:
        raise OperatorError(
            f"{url} does not answer: {str(err) or type(err).__name__}; is the server running?"
        ) from err
    if answer.status_code not in (200, 503):
        raise OperatorError(f"{url} answers {answer.status_code}; is it headgate-cloud?")
    return answer.content
