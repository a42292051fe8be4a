"""What waits at a door, gateway by gateway, so that no one's flood stands in another's way. Pure.

Rules:
1. Deficit round robin over the gateways that have something waiting: in each round everybody may take `QUANTUM_BYTES`
   more, so a gateway with large batches gets no more than one with small ones.
2. A group holds at most `SHARE` batches and `SHARE_BYTES` of one gateway: who comes next waits for a short commit.
3. Bounded in batches and bytes as a whole. Above that the newest of the longest queue gives way, not who came last: a
   newcomer with an empty queue always finds room beside a flood.
4. The order within one gateway is kept.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Final, Generic, Protocol, TypeVar

QUANTUM_BYTES: Final = 64 * 1024
SHARE: Final = 512  #: of one gateway in a group; the commit of so many takes some 15 ms
SHARE_BYTES: Final = 2 * 1024 * 1024


class Waiting(Protocol):
    @property
    def gateway(self) -> str: ...
    @property
    def payload(self) -> bytes: ...


W = TypeVar("W", bound=Waiting)


class _Queue(Generic[W]):
    __slots__ = ("deficit", "items", "size_bytes")

    def __init__(self) -> None:
        self.items: deque[W] = deque()
        self.size_bytes = 0
        self.deficit = 0


class FairQueue(Generic[W]):
    def __init__(self, *, most: int, most_bytes: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._queues: OrderedDict[str, _Queue[W]] = OrderedDict()
        self._count = 0
        self.size_bytes = 0

    def __len__(self) -> int:
        return self._count

    def put(self, item: W) -> Iterator[W]:
        """Queue it. Yields whoever must give way for want of room, which may be itself."""
        size = len(item.payload)
        queue = self._queues.get(item.gateway)
        while self._count >= self._most or self.size_bytes + size > self._most_bytes:
            mine = queue.size_bytes if queue is not None else 0
            # Who has more than an even share is not let in at the expense of others; that is told without a search.
            if self._count == 0 or (mine + size) * max(1, len(self._queues)) > self._most_bytes or (
                queue is not None and len(queue.items) * len(self._queues) >= self._most
            ):  # fmt: skip
                yield item
                return
            longest = max(self._queues, key=lambda name: self._queues[name].size_bytes)
            if longest == item.gateway:
                yield item
                return
            yield self._pop_newest(longest)
            queue = self._queues.get(item.gateway)
        if queue is None:
            queue = self._queues[item.gateway] = _Queue()
        queue.items.append(item)
        queue.size_bytes += size
        self._count += 1
        self.size_bytes += size

    def take(self, most: int) -> list[W]:
        """The next group."""
        group: list[W] = []
        taken: dict[str, list[int]] = {}
        done: list[str] = []  # have had their share of this group
        while self._queues and len(group) < most:
            name, queue = next(iter(self._queues.items()))
            counts = taken.setdefault(name, [0, 0])
            queue.deficit += QUANTUM_BYTES
            while queue.items and len(group) < most and counts[0] < SHARE and counts[1] < SHARE_BYTES:
                size = len(queue.items[0].payload)
                if size > queue.deficit:
                    break
                group.append(queue.items.popleft())
                queue.deficit -= size
                queue.size_bytes -= size
                self._count -= 1
                self.size_bytes -= size
                counts[0] += 1
                counts[1] += size
            if not queue.items:
                del self._queues[name]
            else:
                self._queues.move_to_end(name)
                if counts[0] >= SHARE or counts[1] >= SHARE_BYTES:
                    queue.deficit = 0
                    done.append(name)
                    if len(done) >= len(self._queues) and set(done) >= set(self._queues):
                        break
        return group

    def _pop_newest(self, name: str) -> W:
        queue = self._queues[name]
        item = queue.items.pop()
        queue.size_bytes -= len(item.payload)
        self._count -= 1
        self.size_bytes -= len(item.payload)
        if not queue.items:
            del self._queues[name]
        return item
