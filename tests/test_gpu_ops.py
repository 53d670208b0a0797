"""The CUDA kernels against the reference: on a GPU, and on the CPU in emulation (tests/emulator.py).

In emulation the logic of every kernel is tested on every machine.  On a GPU the same tests see real
warps, real memory and cuBLAS.
"""

from types import SimpleNamespace

import numpy as np
import op_checks
import pytest
from conftest import backends
from emulator import here, there
from op_cases import CASES, attend, linear_attend

from minisb.gpu import Rows
from minisb.gradcheck import relative_rms
from minisb.launchers import dense, grid
from minisb.launchers.grid import add_slices
from minisb.ops.adamw import adamw, grad_norm
from minisb.ops.attention import attention_forward, attention_step
from minisb.ops.cross_entropy import IGNORE, counted, cross_entropy, total_loss
from minisb.ops.embedding import embedding_backward, embedding_forward
from minisb.ops.gate import log_gate_backward, log_gate_forward
from minisb.ops.gla import gla_backward, gla_forward, gla_step
from minisb.ops.linear import linear_backward, linear_forward
from minisb.ops.rope import rope_forward, rope_table
from minisb.ops.spike import VTH_MAX, VTH_MIN, spike_count, spike_forward
from minisb.optim import clip_scale

#: Shapes that fill several lanes, warps and slices; small ones are in CASES.
LARGE = [
    linear_attend(2, 1, 40), linear_attend(3, 1, 64), linear_attend(1, 1, 130), linear_attend(1, 1, 256),
    attend(2, 1, 40, 20), attend(3, 1, 64, 100), attend(2, 2, 130, 33, past=70), attend(1, 1, 256, 1000),
]  # fmt: skip
EVERY = CASES + LARGE

every_case = pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)


def slow_here(cuda, case, T: int) -> bool:
    """The emulator takes seconds where a GPU takes microseconds: it does large heads on a short text only, and of the
    lengths around 64 one."""
    return cuda.xp is np and (T == 63 or (case in LARGE and T > 9))


def dtype_of(element: str):
    """The dtype of that name; ml_dtypes has the bfloat16."""
    if element == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(element)


@every_case
@pytest.mark.parametrize("T", [1, 9, 63, 65])
@pytest.mark.parametrize("dtype, limit", [(np.float32, 1e-5), (np.float64, 1e-12)], ids=["float32", "float64"])
def test_kernels_equal_the_reference(case, T, dtype, limit, cuda):
    if not slow_here(cuda, case, T):
        op_checks.equals_the_reference(case, T, dtype, limit, cuda)


@every_case
@pytest.mark.parametrize("forward_by_kernels", [True, False], ids=["kernels-reference", "reference-kernels"])
def test_what_is_saved_belongs_to_the_operation(case, forward_by_kernels, cuda):
    if not slow_here(cuda, case, 65):
        op_checks.what_is_saved_belongs_to_the_operation(case, 65, cuda, forward_by_kernels)


@every_case
@pytest.mark.parametrize("T", [1, 65])
def test_gradient_along_a_random_direction(case, T, cuda):
    if not slow_here(cuda, case, T):
        op_checks.gradient_along_a_random_direction(case, T, cuda)


@every_case
def test_all_memory_is_written_and_bits_repeat(case, cuda, monkeypatch):
    if not slow_here(cuda, case, 65):
        op_checks.all_memory_is_written_and_bits_repeat(case, 65, cuda, monkeypatch, others=0)


def test_every_operation_has_a_kernel(cuda):
    made_of_others = {"linear", "ffn_forward", "ffn_backward"}
    used = {name for case in EVERY for name in case.natives} - made_of_others
    assert used <= set(cuda.natives)
    assert {"linear_forward", "spike_forward", "adamw", "grad_norm", "gla_step"} <= set(cuda.natives)


# --- what is particular to each -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_spikes(cuda, dtype):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2, 65, 33)) * 10 ** rng.uniform(-1, 1, (2, 65, 1))).astype(dtype)
    x[0, 0], x[0, 1], x[0, 2] = 0, 1e-9, 1e9
    x_hat, vth = (here(a) for a in spike_forward(cuda, there(cuda, x), 2.5))
    exact = np.clip(np.abs(x.astype(np.float64)).mean(-1, keepdims=True) / 2.5, VTH_MIN, VTH_MAX)
    np.testing.assert_allclose(vth, exact, rtol=1e-6)
    ratio = x / exact
    tie = np.abs(np.abs(ratio) % 1 - 0.5) < 1e-4
    small = np.abs(ratio) < 1e4
    count = spike_count(backends()["numpy"], x_hat, vth)
    assert np.array_equal(count[~tie & small], np.rint(ratio)[~tie & small]) and (tie & small).mean() < 0.01
    halves = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5, 3.5]], dtype)  # mean |x| is 2: ties go to even
    np.testing.assert_array_equal(here(spike_forward(cuda, there(cuda, halves), 2)[0])[0], [0, 2, 2, 0, -2, -2, 4, 4])
    x[1, 7, 5] = np.nan
    x_hat, vth = (here(a) for a in spike_forward(cuda, there(cuda, x), 2.5))
    assert np.isnan(vth).sum() == 1 and np.isnan(x_hat[1, 7]).all() and np.isnan(x_hat).sum() == 33


@pytest.mark.parametrize("N, V", [(1, 11), (20, 4099), (3, 1)])
def test_loss_of_large_masked_and_strided_logits(cuda, N, V):
    rng = np.random.default_rng(0)
    wide = (5 * rng.standard_normal((N, V + 9)) + 300).astype(np.float32)
    wide[:, 4 : 4 + V // 3] = -np.inf
    targets = rng.integers(V // 3, V, N)
    targets[2::3] = IGNORE
    dloss, z = rng.standard_normal(N).astype(np.float32), wide[:, 4 : 4 + V].astype(np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    counted = targets != IGNORE
    losses = np.where(counted, -np.log(p[np.arange(N), targets]), 0)
    p[np.arange(N), targets] -= 1

    on_device = there(cuda, wide)
    logits = on_device[:, 4 : 4 + V]
    np.testing.assert_allclose(here(cross_entropy(cuda, logits, targets)), losses, rtol=1e-5, atol=1e-5)
    assert np.array_equal(here(on_device), wide)
    for factor in (dloss, 0.25, cuda.xp.asarray(0.25)):
        on_device = there(cuda, wide)
        logits = on_device[:, 4 : 4 + V]
        factor = there(cuda, factor) if factor is dloss else factor
        np.testing.assert_allclose(here(cross_entropy(cuda, logits, targets, factor)), losses, rtol=1e-5, atol=1e-5)
        want = p * (counted * here(factor))[:, None]
        np.testing.assert_allclose(here(logits), want, rtol=1e-4, atol=1e-6)
        assert np.array_equal(here(on_device)[:, :4], wide[:, :4])
        assert np.array_equal(here(on_device)[:, 4 + V :], wide[:, 4 + V :])


@pytest.mark.parametrize("kept", [0, 512, None])
@pytest.mark.parametrize("V", [1, 7, 1000, 4104])
@pytest.mark.parametrize("element", ["bfloat16", "float16", "float64"])
def test_a_row_of_logits_is_kept_or_read_again(cuda, monkeypatch, element, V, kept):
    """Whole rows in shared memory, parts, none; rows of whole packs or not, side by side or apart."""
    if kept is not None:
        monkeypatch.setattr(dense, "loss_block", lambda *_: (96, kept))  # rows need several rounds
    rng = np.random.default_rng(V)
    for gap in (0, 8, 3):
        wide = (4 * rng.standard_normal((4, V + gap))).astype(dtype_of(element))
        z, targets = wide[:, :V].astype(np.float64), np.array([0, V - 1, IGNORE, V // 2])
        p = np.exp(z - z.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        counted = targets != IGNORE
        losses = np.where(counted, -np.log(p[np.arange(4), targets]), 0)
        p[np.arange(4), targets] -= 1
        on_device = there(cuda, wide)
        got = here(cross_entropy(cuda, on_device[:, :V], targets, 0.5))
        exact = element == "float64"
        np.testing.assert_allclose(got, losses, rtol=1e-12 if exact else 1e-5, atol=1e-12 if exact else 1e-5)
        want = (0.5 * p * counted[:, None]).astype(dtype_of(element)).astype(np.float64)
        rounding = {"bfloat16": 2**-7, "float16": 2**-10, "float64": 1e-12}[element]  # a last bit
        np.testing.assert_allclose(here(on_device)[:, :V].astype(np.float64), want, rtol=rounding, atol=1e-6)
        assert np.array_equal(here(on_device)[:, V:], wide[:, V:])


@pytest.mark.parametrize(
    "V, element, threads, kept",
    [
        (1, "bfloat16", 32, 8), (8192, "bfloat16", 128, 8192), (32768, "bfloat16", 512, 32768),
        (50257, "bfloat16", 768, 50264), (151_936, "bfloat16", 1024, 115_200), (32768, "float32", 1024, 32768),
        (32768, "float64", 768, 28_800),
    ],
)  # fmt: skip
def test_how_much_of_a_row_of_logits_is_kept_on_an_h100(V, element, threads, kept):
    be = SimpleNamespace(device=SimpleNamespace(shared_bytes=227 << 10))
    assert dense.loss_block(be, np.broadcast_to(np.zeros(1, dtype_of(element)), (1, V))) == (threads, kept)


@pytest.mark.parametrize("N", [1, 1023, 40_000])
def test_losses_are_summed_and_targets_counted(cuda, N):
    rng = np.random.default_rng(N)
    losses, targets = rng.random(N).astype(np.float32), rng.integers(-1, 3, N).astype(np.int32)
    assert float(total_loss(cuda, there(cuda, losses))) == pytest.approx(losses.sum(dtype=np.float64), rel=1e-13)
    assert float(counted(cuda, there(cuda, targets))) == max((targets != IGNORE).sum(), 1)
    assert float(counted(cuda, there(cuda, np.full(N, IGNORE)))) == 1


@pytest.mark.parametrize("slices, C", [(1, 1), (31, 33), (700, 70)])
def test_slices_are_added(cuda, slices, C):
    rng = np.random.default_rng(0)
    partial, total = rng.standard_normal((slices, C)), rng.standard_normal(C)
    found = there(cuda, total)
    add_slices(cuda, partial, there(cuda, partial), found)
    assert relative_rms(here(found), total + partial.sum(0)) < 1e-13
    two = there(cuda, [total[: C // 2], total[C // 2 :]])
    add_slices(cuda, partial, there(cuda, partial), *two)
    assert np.array_equal(np.concatenate(here(two)), here(found))


@pytest.mark.parametrize("element", ["bfloat16", "float32"])
@pytest.mark.parametrize("rows, J, before, after", [(300, 136, 0, 8), (300, 24, 8, 0), (70, 40, 3, 0), (1, 5, 0, 0)])
def test_columns_are_summed(cuda, monkeypatch, element, rows, J, before, after):
    """In packs and one by one, two slices, each longer than what a thread asks for at once."""
    monkeypatch.setattr(grid, "SLICES", 2)
    rng = np.random.default_rng(J)
    wide = rng.standard_normal((rows, before + J + after)).astype(dtype_of(element))
    first, exact = rng.standard_normal(J).astype(np.float32), wide.astype(np.float64)[:, before : before + J].sum(0)
    found = there(cuda, [first, first])
    for total in found:
        x = Rows(there(cuda, wide)[:, before : before + J])
        arrays = lambda partial, x=x: (x, partial, rows, J, x.stride)  # noqa: E731
        grid.sliced_sum(cuda, "column_sums", x.matrix, arrays, rows, J, total)
    assert relative_rms(here(found[0]), first + exact) < 1e-6
    assert here(found[0]).tobytes() == here(found[1]).tobytes()


@pytest.mark.parametrize("element", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("size", [7, 2000])
def test_the_gate_in_packs(cuda, element, size):
    rng = np.random.default_rng(0)
    z = np.concatenate([[-100.0, 0.0, 20.0, 100.0], 5 * rng.standard_normal(size - 4)]).astype(dtype_of(element))
    dlog_g, exact = rng.standard_normal(size).astype(np.float32), z.astype(np.float64)
    log_g, saved = log_gate_forward(cuda, there(cuda, z), 16.0)
    np.testing.assert_allclose(here(log_g), -np.logaddexp(0, -exact) / 16, rtol=1e-5, atol=1e-30)
    dz = here(log_gate_backward(cuda, there(cuda, dlog_g), saved)).astype(np.float64)
    assert relative_rms(dz, dlog_g / (1 + np.exp(exact)) / 16) < {"bfloat16": 4e-3, "float16": 5e-4}.get(element, 1e-6)


def test_what_lies_outside_the_vocabulary_shows_as_nan(cuda):
    losses = cross_entropy(cuda, cuda.xp.zeros((3, 5)), np.array([0, 5, IGNORE]))
    assert np.isnan(here(losses)).tolist() == [False, True, False]
    x = embedding_forward(cuda, np.array([[0, 5]]), cuda.xp.zeros((5, 3)))
    assert np.isnan(here(x)).all(-1).tolist() == [[False, True]]


def embedding_sums(tokens, dx, before):
    """In the order of the text, from what the gradient holds already."""
    want = before.copy()
    for token, row in zip(tokens.ravel(), dx.reshape(-1, dx.shape[-1]), strict=True):
        want[token] += row
    return want


@pytest.mark.parametrize("element", ["float32", "bfloat16"])
@pytest.mark.parametrize("C", [7, 72, 320])
def test_a_rare_token_gets_every_contribution_in_order(cuda, C, element):
    rng = np.random.default_rng(0)
    tokens = np.concatenate([np.repeat(np.arange(1, 33), np.arange(1, 33)), rng.integers(40, 90, 32)])  # up to 32 times
    tokens = rng.permutation(tokens).astype(np.int32)[None]
    dx = rng.standard_normal((1, tokens.size, C)).astype(dtype_of(element))
    before = rng.standard_normal((90, C)).astype(np.float32)
    found = there(cuda, before)
    embedding_backward(cuda, there(cuda, dx), there(cuda, tokens), found)
    assert np.array_equal(here(found), embedding_sums(tokens, dx.astype(np.float32), before))


@pytest.mark.parametrize("C, N, element", [(7, 600, "float32"), (24, 4500, "bfloat16"), (320, 70, "bfloat16")])
def test_a_frequent_token_gets_every_contribution_and_the_same_bits_again(cuda, C, N, element):
    """33 places are too many for a warp, 32 are not; there is a token for each, one everywhere else, some alone."""
    rng = np.random.default_rng(0)
    tokens = rng.permutation(np.repeat([0, 1, 2, 3, 4], [33, 32, 1, 0, 2 * N - 66])).astype(np.int32).reshape(2, N)
    dx = rng.standard_normal((2, N, C)).astype(dtype_of(element))
    before = rng.standard_normal((6, C)).astype(np.float32)
    results = []
    for _ in range(2):  # in emulation threads come in the other order
        results.append(there(cuda, before))
        embedding_backward(cuda, there(cuda, dx), there(cuda, tokens), results[-1])
    want = embedding_sums(tokens, dx.astype(np.float64), before.astype(np.float64))
    assert relative_rms(here(results[0]), want) < 1e-6
    assert here(results[0]).tobytes() == here(results[1]).tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size, decayed", [(1, 0), (7, 7), (20_000, 9_001)])
def test_adamw_and_the_norm(cuda, dtype, size, decayed):
    rng = np.random.default_rng(0)
    host = [rng.standard_normal(size).astype(dtype) for _ in range(3)] + [rng.random(size).astype(dtype)]
    p, g, m, v = there(cuda, host)
    norm = grad_norm(cuda, g)
    assert norm.shape == () and float(norm) == pytest.approx(np.linalg.norm(host[1].astype(np.float64)), rel=1e-12)
    scale = clip_scale(norm, 0.5, cuda.xp)
    numbers = decayed, 0.01, 0.9, 0.95, 1e-8, 0.1, 3
    adamw(cuda, p, g, m, v, *numbers, scale)
    P, G, M, V = (x.astype(np.float64) for x in host)
    adamw.reference(backends()["numpy"], P, G, M, V, *numbers, clip_scale(float(norm), 0.5))
    for got, exact in ((p, P), (m, M), (v, V)):
        assert relative_rms(here(got), exact) < (1e-6 if dtype == np.float32 else 1e-13)
    before = here([p, m, v])
    g[size // 2] = np.inf if size > 1 else np.nan
    norm = grad_norm(cuda, g)
    assert not np.isfinite(float(norm))
    adamw(cuda, p, g, m, v, *numbers, clip_scale(norm, 0.5, cuda.xp))  # a step that must change nothing
    assert all(np.array_equal(a, b) for a, b in zip(here([p, m, v]), before, strict=True))


@pytest.mark.parametrize("window", [1, 7, 64, 200])
def test_one_decoding_step_of_attention(cuda, window):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, h, 6)) for n, h in ((1, 6), (131, 2), (131, 2)))
    want = attention_forward(backends()["numpy"], q, k, v, window)[0]
    count = min(window, 131)
    order = rng.permutation(count)
    cache = [np.full((2, count + 4, 2, 6), np.nan) for _ in range(2)]  # what lies beyond `count` must not matter
    for kept, x in zip(cache, (k, v), strict=True):
        kept[:, :count] = x[:, -count:][:, order]
    got = attention_step(cuda, there(cuda, q), *there(cuda, cache), count)
    assert relative_rms(here(got), want) < 1e-12


@pytest.mark.parametrize("H, G, D", [(6, 2, 6), (2, 1, 40)])
def test_linear_attention_step_by_step(cuda, H, G, D):
    case = linear_attend(H, G, D)
    x = case.inputs(np.random.default_rng(0), 5)
    want = case.forward(backends()["numpy"], x)[0]
    q, k, v, log_g, state = there(cuda, list(x.values()))
    outputs = [gla_step(cuda, *(a[:, t : t + 1] for a in (q, k, v, log_g)), state) for t in range(5)]
    assert relative_rms(np.concatenate(here(outputs), axis=1), want["o"]) < 1e-12
    assert relative_rms(here(state), want["final"]) < 1e-12


@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
def test_linear_attention_in_chunks_of_any_size_and_with_strong_gates(cuda, chunk):
    rng = np.random.default_rng(0)
    case = linear_attend(6, 2, 6)
    x = case.inputs(rng, 65)
    x["log_g"] = np.where(rng.random(x["log_g"].shape) < 0.5, -20.0, 0.0)
    do, dstate = rng.standard_normal(x["q"].shape), rng.standard_normal(x["state"].shape)
    results = []
    for be in (backends()["numpy"], cuda):
        arrays = there(be, list(x.values()))
        o, final, saved = gla_forward(be, *arrays, scale=0.7, chunk=chunk)
        results.append(here([o, final, *gla_backward(be, *there(be, [do, dstate]), saved)]))
        without = gla_forward(be, *arrays[:4])
        results[-1] += here([without[0], *gla_backward(be, there(be, do), None, without[2])])
    for want, got in zip(*results, strict=True):
        assert relative_rms(got, want) < 1e-9


def test_projections_into_columns_and_onto_a_gradient(cuda):
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(s) for s in ((2, 63, 7), (11, 7), (4,)))
    wide = there(cuda, np.full((2, 63, 20), 5.0))
    y = wide[..., 3:14]
    linear_forward(cuda, *there(cuda, [x, w, b]), out=y)
    want = np.einsum("bti,oi->bto", x, w)
    want[..., :4] += b
    assert relative_rms(here(y), want) < 1e-13
    assert (here(wide)[..., :3] == 5).all() and (here(wide)[..., 14:] == 5).all()
    dy, dx, dw, db = (rng.standard_normal(s) for s in (want.shape, x.shape, w.shape, b.shape))
    wide[..., 3:14] = there(cuda, dy)
    on_device = there(cuda, [dx, dw, db])
    assert linear_backward(cuda, y, *there(cuda, [x, w]), *on_device[1:], dx=on_device[0]) is on_device[0]
    assert relative_rms(here(on_device[0]), dx + np.einsum("bto,oi->bti", dy, w)) < 1e-13
    assert relative_rms(here(on_device[1]), dw + np.einsum("bto,bti->oi", dy, x)) < 1e-13
    assert relative_rms(here(on_device[2]), db + dy[..., :4].sum((0, 1))) < 1e-13


def test_views_are_taken_as_they_are_meant(cuda):
    """Slices of something larger, as a fused projection hands them out."""
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((2, 9, 40))
    qkv = there(cuda, wide)[..., 7:37]
    tables = rope_table(3, 9, 6, 50.0)
    got = rope_forward(cuda, qkv, *there(cuda, tables), 3, 1, 6)
    for a, b in zip(got, rope_forward(backends()["numpy"], wide[..., 7:37], *tables, 3, 1, 6), strict=True):
        assert relative_rms(here(a), b) < 1e-13
