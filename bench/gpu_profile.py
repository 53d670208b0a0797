"""Where a step's time on a GPU goes: every kernel launch and every matrix product between two events.

    with Profile(be) as profile:
        step()
    print(profile.table(copy_gb_s, tflop_s))

Python's own time does not show as long as it runs ahead of the GPU, so let a step go before without waiting for it.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace

from minisb import kernels
from minisb.gpu import Rows

#: Kernel -> its parameters that are read and written over.  The loss in a step: it writes its gradient.
IN_PLACE = {
    "adamw": ("p", "m", "v"),
    "add_bias": ("y",),
    "add_slices": ("total", "second"),
    "cross_entropy": ("logits",),
    "gla_fast_scan": ("S",),
    "grouped_backward_w": ("dw",),
    "grouped_fast_backward_w": ("dw",),
}
PHASES = {"_forward": "forward", "_head_loss": "head", "_backward": "backward"}  # methods of the model


@dataclass
class Record:
    """One launch.  bytes: of all its arrays, those IN_PLACE twice: never more than what is moved, but for an embedding,
    whose table is counted whole although only the rows of tokens that occur are touched."""

    phase: str
    op: str
    name: str
    bytes: int
    flops: int
    start: object
    end: object


class Group(SimpleNamespace):
    """Launches that have something in common: calls, ms, bytes, flops."""

    def __init__(self, **named):
        super().__init__(calls=0, ms=0.0, bytes=0, flops=0, **named)

    def add(self, record: Record, ms: float):
        self.calls, self.ms = self.calls + 1, self.ms + ms
        self.bytes, self.flops = self.bytes + record.bytes, self.flops + record.flops


class Profile:
    """Inside, be's launches, products and operations are recorded; model: tells forward from backward.

    cuda: what has Event and get_elapsed_time (cupy.cuda).
    """

    def __init__(self, be, model=None, cuda=None):
        self.be, self.model, self.cuda = be, model, cuda or be.xp.cuda
        self.phase, self.op, self.records = "optimiser", "", []

    def __enter__(self):
        self.natives, self.gemm, self.launch = self.be.natives, self.be.gemm, self.be.launch
        self.gemm_with = self.be.gemm_with
        self.be.natives = {name: self._named("op", name, twin) for name, twin in self.natives.items()}
        self.be.gemm, self.be.gemm_with, self.be.launch = self._gemm, self._gemm_with, self._launch
        for method, phase in PHASES.items() if self.model else ():
            setattr(self.model, method, self._named("phase", phase, getattr(self.model, method)))
        return self

    def __exit__(self, *_):
        self.be.natives, self.be.gemm, self.be.gemm_with = self.natives, self.gemm, self.gemm_with
        del self.be.launch  # the class's own shows again
        for method in PHASES if self.model else ():
            delattr(self.model, method)

    def _named(self, level: str, name: str, function):
        """function, during which self.op or self.phase is `name`."""

        @functools.wraps(function)
        def run(*args, **kwargs):
            before = getattr(self, level)
            setattr(self, level, name)
            try:
                return function(*args, **kwargs)
            finally:
                setattr(self, level, before)

        return run

    def _record(self, name: str, bytes: int, flops: int, function, *args, **kwargs):
        start, end = self.cuda.Event(), self.cuda.Event()
        start.record()
        found = function(*args, **kwargs)
        end.record()
        self.records.append(Record(self.phase, self.op, name, bytes, flops, start, end))
        return found

    def _launch(self, kernel: str, like, blocks, threads, *args, **options):
        _, parameters = kernels.signatures()[kernel]
        size = 0
        for parameter, arg in zip(parameters, args, strict=True):
            array = arg.matrix if isinstance(arg, Rows) else arg
            if parameter.array and array is not None and array.ndim:
                size += array.size * array.itemsize * (1 + (parameter.name in IN_PLACE.get(kernel, ())))
        self._record(kernel, size, 0, self.launch, kernel, like, blocks, threads, *args, **options)

    def _gemm(self, *args, **how):
        return self._product(self.gemm, "", *args, **how)

    def _gemm_with(self, *args, **how) -> bool:
        if self.be.device.fused is None:
            return False
        done = self._product(self.gemm_with, " with bias", *args, **how)
        if not done:  # what takes its place is recorded next
            self.records.pop()
        return done

    def _product(self, function, more: str, a, b, out=None, ta=False, tb=False, accumulate=False, **bias):
        m, k = a.shape[::-1] if ta else a.shape
        n = b.shape[0] if tb else b.shape[1]
        written = a.dtype if out is None else out.dtype
        size = (a.size + b.size) * a.itemsize + m * n * written.itemsize * (1 + accumulate)
        letters = f"{'T' if ta else 'N'}{'T' if tb else 'N'}"
        name = f"gemm {m} x {n} x {k} {letters} -> {written.name}{' +=' * accumulate}{more}"
        how = {"out": out, "ta": ta, "tb": tb, "accumulate": accumulate, **bias}
        return self._record(name, size, 2 * m * n * k, function, a, b, **how)

    # --- afterwards

    def groups(self, key) -> list[Group]:
        """Launches with one key(record), a dictionary, in groups; the longest first."""
        found = {}
        for record in self.records:
            named = key(record)
            ms = self.cuda.get_elapsed_time(record.start, record.end)
            found.setdefault(tuple(named.values()), Group(**named)).add(record, ms)
        return sorted(found.values(), key=lambda group: -group.ms)

    def gaps(self) -> list[tuple[float, int, str]]:
        """(ms, times, "A .. B"): from the end of launch A to the start of B there was something else, CuPy's own
        kernels, copies, or nothing.  An event costs a microsecond or two of it."""
        found = defaultdict(lambda: [0.0, 0])
        for one, next in zip(self.records, self.records[1:], strict=False):
            entry = found[f"{one.op or one.phase}: {one.name} .. {next.op or next.phase}: {next.name}"]
            entry[0] += self.cuda.get_elapsed_time(one.end, next.start)
            entry[1] += 1
        return sorted(((ms, times, where) for where, (ms, times) in found.items()), reverse=True)

    def total(self) -> float:
        """ms from the first launch's start to the last one's end."""
        return self.cuda.get_elapsed_time(self.records[0].start, self.records[-1].end)

    def table(self, copy_gb_s: float, tflop_s: float, gaps: int = 12) -> str:
        """floor: the time for these bytes at the copy's rate or these operations at the large product's, whichever is
        longer; above: ms - floor, what is to be won at most (operations of kernels are not known and not in it)."""
        total = self.total()
        lines = [f"{'ms':>9} {'share':>6} {'calls':>5} {'floor':>8} {'above':>8} {'GB/s':>6} {'TFLOP/s':>7}  what"]

        def line(group, what):
            floor = max(group.bytes / copy_gb_s / 1e6, group.flops / tflop_s / 1e9)
            rate = f"{group.flops / group.ms / 1e9:7.0f}" if group.flops and group.ms else " " * 7
            lines.append(
                f"{group.ms:9.3f} {group.ms / total:6.1%} {group.calls:5d} {floor:8.3f} {group.ms - floor:8.3f} "
                f"{group.bytes / max(group.ms, 1e-9) / 1e6:6.0f} {rate}  {what}"
            )

        for title, key in (
            ("by kernel, all products as one", lambda r: {"what": r.name.split()[0]}),
            ("products by shape (rows x columns x sum, transposed or not -> written)",
             lambda r: {"what": f"{r.name}  [{r.op or r.phase}]"} if r.flops else {"what": ""}),
            ("by operation", lambda r: {"what": r.op or f"(in {r.phase})"}),
            ("by part of the step", lambda r: {"what": r.phase}),
        ):  # fmt: skip
            lines.append(f"-- {title}")
            for group in self.groups(key):
                if group.what:
                    line(group, group.what)
        found = self.gaps()
        between = sum(ms for ms, _, _ in found)
        lines.append(f"-- between launches: {between:.3f} ms ({between / total:.1%}) of {total:.3f} ms; the longest:")
        lines += [f"{ms:9.3f} {ms / total:6.1%} {times:5d}{'':33}{where}" for ms, times, where in found[:gaps]]
        return "\n".join(lines)

    def rows(self) -> list[dict]:
        """By kernel and shape, for JSON."""
        found = self.groups(lambda r: {"name": r.name, "op": r.op or r.phase})
        return [{**vars(group), "ms": round(group.ms, 4)} for group in found]
