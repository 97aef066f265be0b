"""What PyTorch's CUDA caching allocator needs for a stream of allocations and frees.

A replay with default settings and one stream (c10/cuda/CUDACachingAllocator): requests up to 1 MiB
come from 2 MiB segments; requests below 10 MiB from 20 MiB segments; larger ones get a segment of
their own size, rounded up to 2 MiB. A free block is reused best fit first, split where the rest is
worth keeping, and merged with free neighbours when freed. Where the device has no room for a
segment, all segments without a block in use are given back first.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

MIB = 2**20
SMALL_REQUEST, SMALL_SEGMENT = MIB, 2 * MIB
MEDIUM_REQUEST, MEDIUM_SEGMENT = 10 * MIB, 20 * MIB
LARGE_GRANULE = 2 * MIB
SMALLEST_SMALL_REST, SMALLEST_LARGE_REST = 512, MIB
"""A rest is split off from this size on in the small pool, above it in the large pool."""


@dataclass(eq=False, slots=True)
class _Block:
    size: int
    number: int
    """Breaks ties between free blocks of one size: older first."""
    small: bool
    free: bool = True
    before: _Block | None = None
    after: _Block | None = None


Changes = Sequence[tuple[int, int]]
"""(storage number, bytes), in the order of time; negative when freed."""


class NoRoomError(MemoryError):
    """The stream does not fit below the limit."""


class _CachingAllocator:
    def __init__(self, limit_bytes: int | None) -> None:
        self.reserved = 0
        self.highest = 0
        self._limit_bytes = limit_bytes
        self._num_blocks = 0
        self._free: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}

    def allocate(self, size: int) -> _Block:
        small = size <= SMALL_REQUEST
        pool = self._free[small]
        place = bisect.bisect_left(pool, (size, 0))
        block = pool.pop(place)[2] if place < len(pool) else self._new_segment(size, small)
        block.free = False
        rest = block.size - size
        if rest >= SMALLEST_SMALL_REST if small else rest > SMALLEST_LARGE_REST:
            self._split(block, size)
        return block

    def release(self, block: _Block) -> None:
        block.free = True
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                self._take(neighbour)
                self._absorb(block, neighbour)
        self._offer(block)

    def _new_segment(self, size: int, small: bool) -> _Block:
        if small:
            segment = SMALL_SEGMENT
        elif size < MEDIUM_REQUEST:
            segment = MEDIUM_SEGMENT
        else:
            segment = -(-size // LARGE_GRANULE) * LARGE_GRANULE
        if self._limit_bytes is not None and self.reserved + segment > self._limit_bytes:
            self._give_back_unused()
            if self.reserved + segment > self._limit_bytes:
                raise NoRoomError
        self.reserved += segment
        self.highest = max(self.highest, self.reserved)
        return self._block(segment, small)

    def _give_back_unused(self) -> None:
        for small, pool in self._free.items():
            split = [entry for entry in pool if entry[2].before or entry[2].after]
            self.reserved -= sum(size for size, *_ in pool) - sum(size for size, *_ in split)
            self._free[small] = split

    def _block(self, size: int, small: bool) -> _Block:
        self._num_blocks += 1
        return _Block(size=size, number=self._num_blocks, small=small)

    def _split(self, block: _Block, size: int) -> None:
        rest = self._block(block.size - size, block.small)
        rest.before, rest.after = block, block.after
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        self._offer(rest)

    def _absorb(self, block: _Block, neighbour: _Block) -> None:
        block.size += neighbour.size
        if neighbour is block.before:
            block.before = neighbour.before
            if block.before is not None:
                block.before.after = block
        else:
            block.after = neighbour.after
            if block.after is not None:
                block.after.before = block

    def _offer(self, block: _Block) -> None:
        bisect.insort(self._free[block.small], (block.size, block.number, block))

    def _take(self, block: _Block) -> None:
        pool = self._free[block.small]
        del pool[bisect.bisect_left(pool, (block.size, block.number))]


def reserved_bytes(changes: Changes, limit_bytes: int | None = None) -> int:
    """The most that is reserved at a time. Raises NoRoomError where that exceeds the limit."""
    allocator = _CachingAllocator(limit_bytes)
    blocks: dict[int, _Block] = {}
    for storage, num_bytes in changes:
        if num_bytes > 0:
            blocks[storage] = allocator.allocate(num_bytes)
        elif num_bytes < 0:
            allocator.release(blocks.pop(storage))
    return allocator.highest


def runs_within(changes: Changes, limit_bytes: int) -> bool:
    """Whether the allocator gets through without reserving more than the limit."""
    try:
        reserved_bytes(changes, limit_bytes)
    except NoRoomError:
        return False
    return True


def tolerance_bytes(limit_bytes: int) -> int:
    """How far above the least that works `smallest_limit_bytes` may be."""
    return max(LARGE_GRANULE, limit_bytes // 256)


def smallest_limit_bytes(changes: Changes, peak_bytes: int) -> int:
    """The least that the allocator may reserve without running out of memory, to 0.4 %.

    `peak_bytes` is the most in use at a time, below which there is no need to look.
    """
    works, fails = reserved_bytes(changes), peak_bytes - 1
    while works - fails > tolerance_bytes(works):
        middle = (works + fails) // 2
        try:
            works = min(middle, reserved_bytes(changes, middle))
        except NoRoomError:
            fails = middle
    return works
