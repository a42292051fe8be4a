"""`make servers`: brings every server that the tests need, and says where each came from.

Where MinIO cannot be had, versitygw is brought in its stead, which is said and is no failure. Names as arguments
bring only those: `python -m tests.servers nats mosquitto`; a server that is named is brought itself, and nothing in
its stead. The exit status is 1 if one could not be had; the others are brought all the same.
"""

from __future__ import annotations

import sys

from tests.servers.catalogue import ALL, KNOWN
from tests.servers.install import InstallError, ensure, explain, say
from tests.servers.locate import ServerMissing


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in KNOWN]
    if unknown:
        say(f"no server is called {', '.join(unknown)}; known: {', '.join(KNOWN)}")
        return 2
    missing = 0
    for server in [KNOWN[name] for name in names] or ALL:
        try:
            ensure(server, insist=bool(names))
        except (InstallError, ServerMissing) as failed:
            missing += 1
            say(f"{server.name:<10} CANNOT BE HAD\n{explain(server, failed)}")
    if missing:
        say(f"{missing} missing: the tests that need them will fail, and say so")
        return 1
    say("all here")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
