"""NumPy's own BLAS, found once: its matrix product for the natives and its thread count."""

from __future__ import annotations

import ctypes
import functools
import sys

import numpy as np


@functools.cache
def _library():
    """The shared library that NumPy computes with, or None.  Symbols of the libraries it links
    are visible through it, so the BLAS need not be named."""
    try:
        return ctypes.CDLL(np._core._multiarray_umath.__file__)
    except (AttributeError, OSError):
        return None


def _symbol(*names: str):
    library = _library()
    for name in names:
        found = getattr(library, name, None) if library else None
        if found is not None:
            return found, name
    return None, ""


@functools.cache
def gemm_addresses() -> tuple[int, int, bool]:
    """Addresses of cblas_sgemm and cblas_dgemm and whether their integers are 64 bits wide;
    (0, 0, False) where NumPy was built with something that hides them."""
    for prefix, suffix, wide in (("scipy_", "64_", True), ("", "64_", True), ("scipy_", "", False), ("", "", False)):
        single, _ = _symbol(f"{prefix}cblas_sgemm{suffix}")
        double, _ = _symbol(f"{prefix}cblas_dgemm{suffix}")
        if single and double:
            address = [ctypes.cast(f, ctypes.c_void_p).value for f in (single, double)]
            return address[0], address[1], wide
    return 0, 0, False


def set_threads(count: int) -> bool:
    """Set the size of OpenBLAS's pool; False if NumPy's BLAS is another."""
    names = [f"{p}openblas_set_num_threads{s}" for p in ("scipy_", "") for s in ("64_", "")]
    function, _ = _symbol(*names)
    if function is None:
        return False
    function(ctypes.c_int(count))
    return True


def name() -> str:
    """For people: which BLAS NumPy was built with."""
    try:
        found = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return f"{found['name']} {found['version']}"
    except (KeyError, TypeError):
        return "unknown BLAS"


def keep_freed_memory():
    """Ask glibc to reuse freed arrays instead of handing them back to the system.

    A training step allocates the same arrays again and again; fresh pages from the kernel cost
    more than the arithmetic on them.  Elsewhere than glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt(m_mmap_threshold, 32 << 20)  # the most that glibc takes; it refuses more
    mallopt(m_trim_threshold, 1 << 30)
