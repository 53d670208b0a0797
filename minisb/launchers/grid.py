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


def has_tensor_cores(be, x) -> bool:
    """Whether the kernels of a NAME_fast.cu are compiled for arrays like x on this GPU: two bytes, sm_80 and later."""
    return x.dtype.itemsize == 2 and int(getattr(be.device, "target", "sm_0").strip("sm_a")) >= 80


def tensor_cores(be, q, shared: int) -> bool:
    """Whether they are for heads like q's (...,D) and this GPU: with `shared` bytes of shared memory a block."""
    return has_tensor_cores(be, q) and q.shape[-1] in (64, 128) and shared <= be.device.shared_bytes


def flat(x):
    """(...,C) seen as a matrix of rows; a view."""
    return x.reshape(-1, x.shape[-1])


def blocks_for(count: int) -> int:
    """Blocks for `count` elements, one a thread and then the next."""
    return min(-(-count // THREADS), MOST_BLOCKS)


def warp_a_row(rows: int) -> tuple[int, int]:
    """Blocks and threads for a warp a row."""
    return -(-rows // WARPS), 32 * WARPS


def shared_rows(rows: int) -> tuple[int, int]:
    """Blocks and threads where lanes of a warp share a row and then take another (Row in cuda/common.cuh)."""
    return min(-(-rows // WARPS), 8 * MULTIPROCESSORS), 32 * WARPS


def row_lanes(x, C: int) -> int:
    """How many lanes share a row of C elements of x, at least: with packs, which need the fewest."""
    lanes, pack = 1, 16 // x.itemsize
    while lanes < 32 and lanes * pack < C:
        lanes *= 2
    return lanes


def each(be, name: str, like, count: int, *args):
    be.launch(name, like, blocks_for(count), THREADS, *args)


def sliced_sum(be, name: str, like, arrays, rows: int, columns: int, total):
    """total (columns,) += column sums over `rows`, by a kernel that sums each slice of the rows."""
    tiles = -(-columns // (16 * 16 // like.dtype.itemsize))  # sixteen packs
    slices = max(1, min(SLICES, -(-rows // 64), MOST_BLOCKS // tiles))
    rows_a_slice = -(-rows // slices)
    slices = -(-rows // rows_a_slice)
    partial = be.xp.empty((slices, columns), wide_type(like))
    be.launch(name, like, (tiles, slices), (16, 16), *arrays(partial), rows_a_slice)
    add_slices(be, like, partial, total)


def add_slices(be, like, partial, total, second=None):
    """total and second, side by side (C,), += the sum of partial (slices,C) over its lines."""
    slices, C = partial.shape
    be.launch("add_slices", like, -(-C // 32), (32, 32), partial, total, second, slices, total.size, C)


def int32(be, tokens):
    return be.xp.ascontiguousarray(be.xp.asarray(tokens), dtype="int32")
