"""Spike codes: exact round trips, additions instead of products, and the report's numbers of steps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from minisb.errors import MinisbError
from minisb.ops.codes import (
    CODES,
    SIGNED,
    code_table,
    decode,
    encode,
    event_linear,
    spikes_emitted,
    step_values,
    steps_needed,
)

every_code = pytest.mark.parametrize("code", CODES)


def counts_of(code, shape, most=20):
    low = -most if code in SIGNED else 0
    return arrays.arrays(np.int64, shape, elements=st.integers(low, most))


@every_code
def test_every_whole_number_comes_back(code):
    counts = np.arange(-4096 if code in SIGNED else 0, 4097)
    spikes = encode(counts, code)
    assert spikes.dtype == np.int8 and spikes.shape == (steps_needed(counts, code), len(counts))
    back = decode(spikes, code)
    assert back.dtype == np.int64 and np.array_equal(back, counts)
    emitted = spikes_emitted(counts, code)
    assert emitted.dtype == np.int64 and np.array_equal(emitted, np.count_nonzero(spikes, axis=0))


@every_code
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_round_trip_of_any_shape(code, data):
    counts = data.draw(counts_of(code, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)))
    extra = data.draw(st.integers(0, 3))
    steps = steps_needed(counts, code) + extra
    spikes = encode(counts.astype(data.draw(st.sampled_from([np.int16, np.int64, np.float32]))), code, steps)
    assert spikes.shape == (steps, *counts.shape)
    assert np.array_equal(decode(spikes, code), counts)
    assert np.array_equal(spikes_emitted(counts, code, steps), np.count_nonzero(spikes, axis=0))


@every_code
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_no_train_is_longer_than_it_must_be(code, data):
    counts = data.draw(counts_of(code, st.integers(1, 5), most=300))
    steps = steps_needed(counts, code)
    if steps > 1:
        with pytest.raises(MinisbError, match=f"need {steps} steps"):
            encode(counts, code, steps - 1)


@every_code
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_additions_alone_give_the_integer_product(code, data):
    N, I, O = (data.draw(st.integers(1, 5)) for _ in range(3))
    counts = data.draw(counts_of(code, (N, I), most=40))
    w = data.draw(arrays.arrays(np.int8, (O, I), elements=st.integers(-127, 127)))
    spikes = encode(counts, code)
    y, additions = event_linear(spikes, w, code)
    assert y.dtype == np.int64 and np.array_equal(y, counts @ w.T.astype(np.int64))
    assert additions == spikes_emitted(counts, code).sum()


def test_additions_are_exact_beyond_what_a_float_holds():
    counts, w = np.array([[(1 << 30) + 1, -3]]), np.array([[(1 << 30) - 1, 7]])
    y, additions = event_linear(encode(counts, "bidirectional"), w, "bidirectional")
    assert y.tolist() == [[(1 << 60) - 1 - 21]] and additions == 4


def test_trains_are_stored_lowest_bit_first():
    assert encode(6, "bitwise").tolist() == [0, 1, 1]
    assert encode(-6, "bidirectional").tolist() == [0, -1, -1]
    assert encode(-6, "twos_complement").tolist() == [0, 1, 0, 1]
    assert encode(-2, "ternary", 3).tolist() == [-1, -1, 0]
    assert encode([1, 3], "binary").T.tolist() == [[1, 0, 0], [1, 1, 1]]


def test_the_value_of_a_step():
    assert step_values("binary", 3).tolist() == step_values("ternary", 3).tolist() == [1, 1, 1]
    assert step_values("bitwise", 4).tolist() == step_values("bidirectional", 4).tolist() == [1, 2, 4, 8]
    assert step_values("twos_complement", 4).tolist() == [1, 2, 4, -8]


def test_a_negative_count_fills_longer_twos_complement_trains():
    assert spikes_emitted([-1, 1], "twos_complement").tolist() == [2, 1]
    assert spikes_emitted([-1, 1], "twos_complement", 8).tolist() == [8, 1]
    assert spikes_emitted([-1, 1], "bidirectional", 8).tolist() == [1, 1]


def test_the_reports_steps_for_256():
    """256, 128, 8 and 7 of section 3.3.2: exactly where they hold, and where they do not."""
    assert steps_needed(256, "binary") == 256
    assert steps_needed(256, "ternary") == 256 and steps_needed([-128, 128], "ternary") == 128
    assert steps_needed(256, "bitwise") == 9 and steps_needed([0, 255], "bitwise") == 8
    assert steps_needed([-127, 127], "bidirectional") == 7
    assert steps_needed(128, "bidirectional") == steps_needed(-128, "bidirectional") == 8
    assert steps_needed(256, "bidirectional") == 9
    assert steps_needed([-128, 127], "twos_complement") == 8 and steps_needed(128, "twos_complement") == 9
    assert steps_needed(256, "twos_complement") == 10
    rows = {line.split()[0]: line.split()[1:] for line in code_table(256).splitlines()[1:]}
    assert rows == {
        "binary": ["256", "255", "-", "-", "256"],
        "ternary": ["256", "255", "128", "127", "256"],
        "bitwise": ["9", "8", "-", "-", "1"],
        "bidirectional": ["9", "8", "8", "7", "1"],
        "twos_complement": ["10", "9", "9", "8", "1"],
    }


@pytest.mark.parametrize("code", ["binary", "bitwise"])
@pytest.mark.parametrize("function", [encode, steps_needed, spikes_emitted])
def test_a_code_without_a_sign_refuses_one(code, function):
    with pytest.raises(MinisbError, match=f"{code} code has no sign and got -3"):
        function([2, -3], code)


@pytest.mark.parametrize("bad", [[0.5], [np.nan], [np.inf], [1e300], ["3"], [1j]])
def test_counts_are_whole_numbers(bad):
    with pytest.raises(MinisbError):
        encode(np.array(bad), "ternary")


def test_other_bad_input():
    with pytest.raises(MinisbError, match="unknown spike code 'morse'"):
        encode(1, "morse")
    with pytest.raises(MinisbError, match="0..1, got -1..1"):
        decode(np.array([1, -1]), "bitwise")
    with pytest.raises(MinisbError, match="at most 62"):
        encode(1, "bitwise", 63)
    with pytest.raises(MinisbError, match="whole-numbered weights"):
        event_linear(np.zeros((1, 2, 3), int), np.zeros((4, 3)), "bitwise")
    with pytest.raises(MinisbError, match="do not fit"):
        event_linear(np.zeros((1, 2, 3), int), np.zeros((4, 2), int), "bitwise")
