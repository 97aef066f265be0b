"""What PyTorch's CUDA caching allocator reserves for a stream of allocations and frees.

A replay with default settings, one stream and no memory pressure (c10/cuda/CUDACachingAllocator):
requests up to 1 MiB come from 2 MiB segments; requests below 10 MiB from 20 MiB segments; larger
ones get a segment of their own size, rounded up to 2 MiB. A free block is reused best fit first,
split where the rest is worth keeping, and merged with free neighbours when freed.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
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


class _CachingAllocator:
    def __init__(self) -> None:
        self.reserved = 0
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
        self.reserved += segment
        return self._block(segment, small)

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


def reserved_bytes(changes: Iterable[tuple[int, int]]) -> int:
    """Bytes reserved at the end of a stream of (storage number, bytes; negative when freed).

    Nothing is given back without memory pressure, so the end is also the highest point.
    """
    allocator = _CachingAllocator()
    blocks: dict[int, _Block] = {}
    for storage, num_bytes in changes:
        if num_bytes > 0:
            blocks[storage] = allocator.allocate(num_bytes)
        elif num_bytes < 0:
            allocator.release(blocks.pop(storage))
    return allocator.reserved
