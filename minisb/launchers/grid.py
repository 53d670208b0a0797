"""What launches share: shapes, types, grids.  All follow from shapes alone, so two runs give equal bits."""

from __future__ import annotations

from minisb.gpu import THREADS

MOST_BLOCKS = 4096  # of a kernel that walks its elements: enough for every GPU, and each thread takes several
WARPS = 4  # of a block, where a warp takes a row
SLICES = 256  # pieces of a long sum, at most
MULTIPROCESSORS = 132  # of an H100: blocks that a launch should not fall short of
LARGEST_HEAD = 256  # channels that the kernels of attention and linear attention hold


def wide_type(x) -> str:
    """The dtype that kernels compute in, and keep statistics and parameter gradients in."""
    return "float64" if x.dtype.itemsize == 8 else "float32"


def contiguous(be, *arrays):
    return [None if x is None else be.xp.ascontiguousarray(x) for x in arrays]


def flat(x):
    """(...,C) seen as a matrix of rows; a view."""
    return x.reshape(-1, x.shape[-1])


def blocks_for(count: int) -> int:
    """Blocks for `count` elements, one a thread and then the next."""
    return min(-(-count // THREADS), MOST_BLOCKS)


def warp_a_row(rows: int) -> tuple[int, int]:
    """Blocks and threads for a warp a row."""
    return -(-rows // WARPS), 32 * WARPS


def each(be, name: str, like, count: int, *args):
    be.launch(name, like, blocks_for(count), THREADS, *args)


def sliced_sum(be, name: str, like, arrays, rows: int, columns: int, total):
    """total (columns,) += column sums over `rows`, by a kernel that sums each slice of the rows."""
    tiles = -(-columns // 32)
    slices = max(1, min(SLICES, -(-rows // 64), MOST_BLOCKS // tiles))
    rows_a_slice = -(-rows // slices)
    slices = -(-rows // rows_a_slice)
    partial = be.xp.empty((slices, columns), wide_type(like))
    be.launch(name, like, (tiles, slices), (32, 8), *arrays(partial), rows_a_slice)
    each(be, "add_slices", like, columns, partial, total, slices, columns)


def int32(be, tokens):
    return be.xp.ascontiguousarray(be.xp.asarray(tokens), dtype="int32")
