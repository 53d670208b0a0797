"""Lesson 00 has nothing to write: `check 00` asks the doctor, `show 00` measures a first fact."""

import time

import numpy as np

from lessons._lib.language import say
from lessons._lib.pictures import REFERENCE, STUDENT

REFUSED = ()
CONVENTIONS = ()

SIZE = 1024  # a matrix product of this size is limited by arithmetic
FLOATS = 1 << 24  # 64 MB in float32: too much for a cache


def run() -> int:
    from lessons._lib.commands import doctor

    return doctor(None)


def measure() -> tuple[float, float]:
    """-> multiply-adds a second in a matrix product, float32 numbers fetched a second from memory."""
    a, b = np.ones((2, SIZE, SIZE), np.float32)
    long = np.ones(FLOATS, np.float32)
    return SIZE**3 / _best(lambda: a @ b), FLOATS / _best(long.max)


def _best(call, tries: int = 7) -> float:
    call()
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def uses(D: int = 128, context: int = 4096) -> dict[str, float]:
    """Multiply-adds for each number fetched from memory, of three things that models do (counted, not timed)."""
    return {
        f"matrix product {SIZE}^3": SIZE**3 / (3 * SIZE**2),
        f"softmax, one token, {context} keys": 2 * context * D / (2 * context * D),
        "linear attention, one token": 3 * D * D / (2 * D * D),
    }


def show(student, plt):
    """Prints the two speeds and what models need.  -> the picture, or nothing more in text.  (No student's code.)"""
    multiplied, fetched = measure()
    balance = multiplied / fetched
    print(
        say(
            f"multiply-adds:    {multiplied / 1e9:8.1f} billion a second, in a matrix product\n"
            f"numbers fetched:  {fetched / 1e9:8.1f} billion a second, from memory (float32)\n"
            f"so this machine can do {balance:.0f} multiply-adds while it fetches one number.",
            f"乘加：      {multiplied / 1e9:8.1f} 十亿次/秒（矩阵乘法中）\n"
            f"读取数值：  {fetched / 1e9:8.1f} 十亿个/秒（从内存读 float32）\n"
            f"也就是说，这台机器每读取一个数，可以做 {balance:.0f} 次乘加。",
        )
    )
    for name, count in uses().items():
        print(f"  {name:<32}{count:8.1f}")
    if plt is None:
        return ""
    figure, ax = plt.subplots(figsize=(7, 2.4), layout="constrained")
    ax.barh(list(uses()), list(uses().values()), color=REFERENCE)
    ax.axvline(balance, color=STUDENT)
    ax.text(balance * 1.08, 2.2, f"this machine: {balance:.0f}", color=STUDENT)
    ax.set_xscale("log")
    ax.set_xlabel("multiply-adds for each number fetched")
    ax.invert_yaxis()
    return figure
