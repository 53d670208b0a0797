"""Half a layer in one operation: bits, states and caches are those of the operations it is made of."""

import numpy as np
import pytest
from conftest import backend_of

from minisb.backend import Backend, CpuBackend
from minisb.config import Config
from minisb.gradcheck import relative_rms
from minisb.model import SpikingBrain
from minisb.ops import decode as ops
from minisb.ops.rope import rope_table
from minisb.ops.w8aspike import quantize_weight
from minisb.quantize import _row_group, float_matrices
from minisb.quantized import INT8, SCALES, Int8Matrix, QuantizedStore, empty_tensors, input_names, store_of
from minisb.state import Int8KeyValueCache

EPS = 1e-6
#: width, heads, key/value heads, head size, hidden width
SHAPES = [(24, 4, 2, 8, 140), (132, 6, 2, 20, 257), (192, 3, 3, 64, 512), (12, 2, 1, 6, 9)]


def normal(seed, *shape, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def matrix(seed, O, I, group=128, k=3.0):
    return Int8Matrix(*quantize_weight(normal(seed, O, I, scale=I**-0.5), group), k)


def stream(C, B=1, first=False):
    """x, delta of a token whose channels differ in size, so that some counts leave int8."""
    x = normal(1, B, 1, C) * np.logspace(-1, 2.5, C, dtype=np.float32)
    return x, None if first else normal(2, B, 1, C), 1 + 0.3 * normal(3, C)


def assert_same_bits(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8))


def cache_of(shape, window, seen, B=1):
    C, H, G, D, F = shape
    config = Config(width=C, heads=H, kv_heads=G, head_dim=D, ffn=F, window=window or 8)
    cache, rng = Int8KeyValueCache(Backend(2), config, B, np.float32, window), np.random.default_rng(seen)
    for _ in range(seen):
        k, v = rng.integers(-127, 128, (2, B, 1, G, D)).astype(np.int8)
        cache.append(k, *rng.random((1, B, 1, G), np.float32), v, *rng.random((1, B, 1, G), np.float32))
    return cache


def run_ffn(be, op, shape, group, bias, first, B=1):
    C, _, _, _, F = shape
    return op(be, *stream(C, B, first), EPS, matrix(4, 2 * F, C, group), matrix(5, C, F, group, 2.5))


def run_gla(be, op, shape, group, bias, first, B=1):
    C, H, G, D, _ = shape
    O = (H + 3 * G) * D
    state = normal(6, B, G, D, D)
    inputs, output = matrix(4, O, C, group), matrix(5, C, H * D, group, 2.5)
    b = normal(7, O) if bias else None
    found = op(be, *stream(C, B, first), EPS, inputs, b, H, G, 16.0, 1 + 0.3 * normal(8, D), state, output)
    return *found, state


def run_attention(be, op, shape, group, bias, first, B=1, window=7, seen=11):
    C, H, G, D, _ = shape
    cache = cache_of(shape, window, seen, B)
    O = (H + 2 * G) * D
    inputs, output = matrix(4, O, C, group), matrix(5, C, H * D, group, 2.5)
    cos, sin = (x.astype(np.float32) for x in rope_table(seen, 1, D, 1e4))
    b = normal(7, O) if bias else None
    found = op(be, *stream(C, B, first), EPS, inputs, b, cos, sin, H, G, 3.0, cache, output)
    assert cache.seen == seen + 1
    return *found, cache.k, cache.ku, cache.v, cache.vu


CASES = [(ops.decode_ffn, run_ffn), (ops.decode_gla, run_gla), (ops.decode_attention, run_attention)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op, run", CASES, ids=[op.__name__ for op, _ in CASES])
def test_one_call_has_the_bits_of_many(op, run, shape):
    backend_of("cpu", op.__name__)
    for threads in (1, 2, 4):
        be = CpuBackend(threads)
        for group, bias, first in ((128, False, False), (None, True, False), (128, True, True)):
            apart = run(be, op.reference, shape, group, bias, first)
            assert_same_bits(run(be, op, shape, group, bias, first), apart)
            assert np.isfinite(apart[1]).all() and relative_rms(apart[0], apart[1]) > 0.1


@pytest.mark.parametrize("window, seen", [(7, 0), (7, 6), (7, 7), (None, 63), (None, 64), (300, 299)])
def test_a_token_enters_the_cache_where_append_would_put_it(window, seen):
    be = backend_of("cpu", "decode_attention")
    arguments = (SHAPES[2], 128, False, False, 1, window, seen)
    one, many = (run_attention(be, op, *arguments) for op in (ops.decode_attention, ops.decode_attention.reference))
    assert_same_bits(one, many)


def test_a_matrix_with_other_weights_is_seen_as_such():
    be = backend_of("cpu", "decode_ffn")
    x, delta, norm = stream(24)
    gate_up, down, other = matrix(4, 280, 24), matrix(5, 24, 140), matrix(9, 24, 140)
    ops.decode_ffn(be, x, delta, norm, EPS, gate_up, down)
    down.w8, down.scales = other.w8, other.scales
    expected = ops.decode_ffn(be, x, delta, norm, EPS, gate_up, other)
    assert_same_bits(ops.decode_ffn(be, x, delta, norm, EPS, gate_up, down), expected)
    gate_up.k = 2.0
    assert relative_rms(ops.decode_ffn(be, x, delta, norm, EPS, gate_up, down)[1], expected[1]) > 1e-3


def quantized(be):
    config = Config(
        vocab=61, width=40, layers=3, heads=4, kv_heads=2, head_dim=8, ffn=140, window=6,
        mixers=("gla", "window", "full"), gate_rank=4,
    )  # fmt: skip
    model = SpikingBrain(config, be)
    model.store.initialise(1)
    model.store.flat_p += normal(2, model.store.size, scale=0.1)
    tensors = empty_tensors(model.specs, 128, False)
    for name, w in float_matrices(model, False).items():
        tensors[name + INT8], tensors[name + SCALES] = quantize_weight(w, _row_group(name, 128))
    for name in (n for n in tensors if not n.endswith((INT8, SCALES))):
        tensors[name][...] = model.store.p[name]
    return SpikingBrain(config, be, store_of(tensors, dict.fromkeys(input_names(config), 3.0)))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_is_the_same_layer_by_layer_and_operation_by_operation(be, batch):
    """A tap wants to see what lies between, so a layer's forward runs one operation at a time."""
    model = quantized(be)
    assert isinstance(model.store, QuantizedStore) and all(block.decodes for block in model.blocks)
    joined, apart = model.new_state(batch), model.new_state(batch)
    tokens, seen = np.random.default_rng(0).integers(0, 61, (20, batch, 1)), []
    for token in tokens:
        logits = model.step(token[:, 0], joined)
        h, _ = model._forward(token, False, lambda name, x: seen.append(name), apart)
        assert_same_bits([logits], [model._logits(h[:, -1])])
    assert len(seen) == 20 * (8 + 7 + 7)
    for a, b in zip(joined.layers, apart.layers, strict=True):
        assert_same_bits(*([s.k, s.ku, s.v, s.vu] if hasattr(s, "k") else [s.matrix] for s in (a, b)))
