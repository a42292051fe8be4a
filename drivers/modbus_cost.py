"""What a request and a register cost on a line, as measured while it is used. Pure: durations are passed in.

The planner weighs a hole against another request with it. On a serial port a register's share is known from the baud,
and what is left of a round trip is the request's own. Behind a host it shows in how round trips grow with their size.
Of several round trips the shortest counts (the others waited for something else), and that is smoothed.
"""

from __future__ import annotations

from typing import Final

from drivers.modbus_address import Address, SerialPort
from drivers.modbus_plan import NETWORK, Cost, serial_cost

_WINDOW: Final = 16  #: round trips of which the shortest counts
_NEW: Final = 0.25  #: how much of a new figure goes into the smoothed one
_MOST_SIZES: Final = 16
_AGEING: Final = 1.02  #: per round trip of that size: a line that became slower is noticed
_LEAST_APART: Final = 16  #: registers between two sizes that are to tell the cost of one
_BLOCK: Final = (
    250.0  #: registers that cost as much as a request, where only one size was seen: no more is believed
)


class CostMeter:
    """The cost of one line. Before anything is measured: what its settings tell."""

    def __init__(self, address: Address) -> None:
        self._serial = isinstance(address, SerialPort)
        self._silence_s = 0.0
        self.cost = NETWORK
        if isinstance(address, SerialPort):
            ascii_ = address.framing == "ascii"
            self.cost = serial_cost(address.character_s, address.silence_s, ascii_=ascii_)
            self._silence_s = address.silence_s
        self._shortest_s: dict[float, float] = {}  #: by registers in the reply
        self._notes = 0
        self._measured = False

    def note(self, round_trip_s: float, reply_size: int) -> None:
        """A request was answered with a PDU of so many bytes, of which all but two are data."""
        registers = max(0, reply_size - 2) / 2
        shortest = self._shortest_s
        if registers in shortest:
            shortest[registers] = min(round_trip_s, shortest[registers] * _AGEING)
        elif len(shortest) < _MOST_SIZES:
            shortest[registers] = round_trip_s
        self._notes += 1
        if self._notes % _WINDOW:
            return
        register_s = self.cost.register_s if self._serial else self._grows_by_s()
        own_s = min(trip_s - n * register_s for n, trip_s in shortest.items()) + self._silence_s
        own_s = max(own_s, 0.0)
        before = self.cost
        if self._measured:
            own_s = before.request_s + _NEW * (own_s - before.request_s)
            register_s = before.register_s + _NEW * (register_s - before.register_s)
        self.cost = Cost(own_s, register_s)
        self._measured = True

    def _grows_by_s(self) -> float:
        """Per register."""
        least, most = min(self._shortest_s), max(self._shortest_s)
        if most - least < _LEAST_APART:
            return min(NETWORK.register_s, self._shortest_s[least] / _BLOCK)
        grown_s = self._shortest_s[most] - self._shortest_s[least]
        return max(grown_s / (most - least), NETWORK.register_s / 1000)
