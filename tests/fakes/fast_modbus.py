"""A Modbus TCP server that answers as fast as a loop can: for benchmarks, where the peer must not be the limit.

`python -m tests.fakes.fast_modbus` prints its port and serves until it is killed. Every read of holding registers is
answered with a slowly moving pattern of the asked length (Modbus application protocol V1.1b3, 6.3).
"""

from __future__ import annotations

import asyncio
import random
import struct
from typing import Final

_PATTERNS: Final = 64
_LIMIT: Final = 125  #: registers in one answer (6.3: quantity of registers 1 to 125)


def _patterns() -> list[bytes]:
    """Registers as meters give them: most values nearly as they were, a few counting up."""
    rng = random.Random(7)
    values = [rng.randrange(1000, 5000) for _ in range(_LIMIT)]
    patterns = []
    for _ in range(_PATTERNS):
        values = [max(0, min(65535, value + rng.randrange(-3, 4))) for value in values]
        patterns.append(struct.pack(f">{_LIMIT}H", *values))
    return patterns


class _Server(asyncio.Protocol):
    patterns = _patterns()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._held = b""
        self._turn = 0

    def data_received(self, data: bytes) -> None:
        data = self._held + data
        answers = []
        at = 0
        while len(data) - at >= 12:
            transaction, _, _, unit, function, _, count = struct.unpack_from(">HHHBBHH", data, at)
            at += 12
            self._turn = (self._turn + 1) % _PATTERNS
            if function not in (3, 4) or not 0 < count <= _LIMIT:
                answers.append(struct.pack(">HHHBBB", transaction, 0, 3, unit, function | 0x80, 3))
                continue
            size = 2 * count
            answers.append(struct.pack(">HHHBBB", transaction, 0, 3 + size, unit, function, size))
            answers.append(self.patterns[self._turn][:size])
        self._held = data[at:]
        self._transport.write(b"".join(answers))


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(_Server, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
