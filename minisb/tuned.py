"""Which of cuBLASLt's algorithms multiplies fastest here: measured once for each form of product, kept on disk.

On with MINISB_TUNE=1.  Algorithms differ in the order of their sums, so in last bits: two runs are equal as long as
they read the same choices, which a folder of the cache holds for each GPU and version of the library.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics

from minisb.cache import atomic_write, cache_folder
from minisb.errors import MinisbError

CANDIDATES = 16  # algorithms tried
ROUNDS = 5  # timed launches of each, after one more
WORTH = 0.98  # of the first one's time is what another must beat: less is noise


def asked_for() -> bool:
    return os.environ.get("MINISB_TUNE", "0") not in ("", "0")


class Tuned:
    """known: form of a product, as text -> its algorithm's eight numbers."""

    def __init__(self, cupy, gpu: str, version: int):
        self.cupy = cupy
        self.path = cache_folder() / "products" / f"{gpu.replace(' ', '-')}-cublaslt-{version}.json"
        self.known = self._read()

    def _read(self) -> dict:
        try:
            return json.loads(self.path.read_text("utf-8"))
        except (OSError, ValueError):  # not there yet, or damaged: measured anew
            return {}

    def choose(self, plan, addresses):
        """Set the plan's algorithm.  addresses: of A, B, D and the bias, as Plan.launch takes them."""
        name, first = str(plan.form), list(plan.algorithm)
        if name not in self.known:
            self.known = {name: self._fastest(plan, addresses)} | self._read()  # what another process wrote counts
            try:
                with atomic_write(self.path) as temporary:
                    temporary.write_text(json.dumps(self.known, indent=0), "utf-8")
            except MinisbError:  # the next run could not follow
                self.known[name] = first
        plan.algorithm = (ctypes.c_uint64 * 8)(*self.known[name])

    def _fastest(self, plan, addresses) -> list[int]:
        a, b, _, bias = addresses
        answers = plan.ask(bias, CANDIDATES)
        code, rows, _, apart, *_ = plan.form[3]
        try:  # products are written to a place of their own, which no pool keeps
            place = self.cupy.cuda.Memory(rows * apart * (4 if code == 0 else 2))
        except self.cupy.cuda.memory.OutOfMemoryError:
            return list(answers[0].algorithm)
        times = [self.milliseconds(plan, answer, (a, b, place.ptr, bias)) for answer in answers]
        best = min(range(len(times)), key=times.__getitem__)
        return list(answers[best if times[best] < WORTH * times[0] else 0].algorithm)

    def milliseconds(self, plan, answer, addresses) -> float:
        """Of one algorithm, infinite if it does not run."""
        cuda, times = self.cupy.cuda, []
        plan.algorithm = answer.algorithm
        for _ in range(ROUNDS + 1):
            start, end = cuda.Event(), cuda.Event()
            start.record()
            status = plan.launch(addresses)
            end.record()
            end.synchronize()
            if status:
                return float("inf")
            times.append(cuda.get_elapsed_time(start, end))
        return statistics.median(times[1:])
