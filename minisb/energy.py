"""Energy of a multiply-accumulate and of what spikes make of it (report, eq. 24): a model, not a measurement.

The report counts arithmetic alone: E = spikes a channel * E(INT8 addition).  Fetching a weight costs far
more than adding it, so the same account is given here with the traffic of weights and activations.
"""

from __future__ import annotations

NOTE = "a model, not a measurement"
HOROWITZ = "Horowitz, ISSCC 2014, 45 nm"  # Computing's Energy Problem (and what we can do about it)
#: pJ of one operation or of one byte, and where the figure is from.
PICOJOULES = {
    "fp16 multiply": (1.1, HOROWITZ),
    "fp16 add": (0.4, HOROWITZ),
    "int8 multiply": (0.2, HOROWITZ),
    "int8 add": (0.03, HOROWITZ),
    "int32 add": (0.1, HOROWITZ),
    "byte from 1 MB SRAM": (100 / 8, HOROWITZ + ": 100 pJ for 64 bits"),
    "byte from DRAM": (1300 / 8, HOROWITZ + ": 1.3 nJ for 64 bits, the low end of its range"),
}
#: Where weights and activations come from, in the order of the columns; None is the report's account.
MEMORIES = {"arithmetic": None, "with SRAM": "byte from 1 MB SRAM", "with DRAM": "byte from DRAM"}
#: The report's figures: spikes per channel, and its claims against FP16 and INT8.
REPORT_SPIKES, REPORT_SILENT = 1.13, 0.184


def picojoules(name: str) -> float:
    return PICOJOULES[name][0]


def mac(kind: str) -> float:
    """One multiply-accumulate of "fp16" (1.5 pJ) or "int8" (0.23 pJ)."""
    return picojoules(f"{kind} multiply") + picojoules(f"{kind} add")


def spikes(additions: float, add: str = "int8 add") -> float:
    """Eq. 24: what takes the place of one multiply-accumulate, `additions` spikes a channel."""
    return additions * picojoules(add)


def account(operations: dict) -> dict:
    """operations: of meter.measure -> name -> {memory: pJ per multiply-accumulate of the dense model}.

    Memory: decoding one sequence, where each weight is fetched once a token and not used again.  FP16
    weights and activations are 2 bytes, INT8 and counts 1.  Spikes fetch the weights of firing channels only.
    """
    per_mac = operations["activations"]
    ours = operations["additions"], operations["weights_reached"]
    rows = {
        "FP16 multiply-accumulate": (mac("fp16"), 2 + 2 * per_mac),
        "INT8 multiply-accumulate": (mac("int8"), 1 + per_mac),
        "spikes, the report's 1.13": (spikes(REPORT_SPIKES), 1 - REPORT_SILENT + per_mac),
        "spikes, as counted here": (spikes(ours[0]), ours[1] + per_mac),
        "the same, INT32 additions": (spikes(ours[0], "int32 add"), ours[1] + per_mac),
    }
    return {
        name: {memory: pj + (size * picojoules(byte) if byte else 0) for memory, byte in MEMORIES.items()}
        for name, (pj, size) in rows.items()
    }


def report_claims() -> dict:
    """The report's own numbers, step by step, from the table above."""
    energy = round(spikes(REPORT_SPIKES), 3)
    saved_fp16 = round(1 - energy / mac("fp16"), 3)
    return {
        "energy_pj": energy,  # 1.13 * 0.03
        "saved_fp16": saved_fp16,  # 1 - 0.034 / 1.5
        "saved_int8": round(1 - energy / mac("int8"), 3),  # 1 - 0.034 / 0.23
        "factor_from_rounded": round(1 / (1 - saved_fp16), 2),  # 43.48x: 1 / 0.023
        "factor": round(mac("fp16") / energy, 1),  # 44.1x: 1.5 / 0.034
    }
