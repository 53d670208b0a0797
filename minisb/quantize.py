"""`python -m minisb quantize RUN --out DIR`: a trained run as W8ASpike (report, section 3.3 and appendix A.8).

Weights become int8, activations spike counts.  Both choices that rounding leaves open are made by looking
at what the projections really read, on texts of the training set:

- where to cut off a row's largest weights, from a small grid, by the error of the row's output;
- k of each input, the fineness of its spikes, from a small grid: the smallest whose output is no further from the
  float output than is usual in this model at the k it was trained with.  So the error, not the
  threshold, is the same everywhere.  It is kept if it lowers the loss on those texts.

Experts are fitted one by one, each to the tokens that the router sends to it.  One that gets few, or none, is fitted
to the layer's tokens as well: see Inputs.product.  k is the same for all experts of a layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minisb import checkpoint
from minisb.backend import on_host
from minisb.data import batch, eval_batches, load_tokens
from minisb.errors import MinisbError
from minisb.model import SpikingBrain
from minisb.ops.moe import grouped_forward
from minisb.ops.w8aspike import (
    GROUP,
    dequantize_weight,
    quantize_weight,
    w8aspike_grouped,
    w8aspike_linear,
)
from minisb.quantized import (
    GATE,
    INT8,
    ROUTER,
    SCALES,
    empty_tensors,
    float_routers,
    gate_pairs,
    input_names,
    matrix_shapes,
    store_of,
)

HELP = "a trained run with int8 weights and spike counts (W8ASpike), for sample.py --quantized"
K_GRID = (2.0, 2.5, 3.0, 3.5, 4.0)
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8)  # shares of a row's largest weights; 1 first, so that it wins ties
KEPT_ROWS = 2048  # tokens on which outputs are compared
#: An expert is fitted to its own tokens and, with the weight of this many, to all of its layer: few say little.
COMMON_ROWS = 64
CALIBRATION_TOKENS = 1 << 15  # of the training text, unless --texts says how many
LOSS_TOKENS = 1 << 14  # of the validation text
TRIAL_TEXTS = 16  # of the calibration texts, to choose between the two sets of k


def add_arguments(parser):
    add = parser.add_argument
    add("run", metavar="RUN", help="a run folder that train_small.py wrote")
    add("--out", required=True, metavar="DIR", help="folder of the quantised run, which sample.py reads")
    add("--group", choices=("128", "row"), default="128", help="inputs that share a scale (default: %(default)s)")
    add("--quantize-embedding", action="store_true", help="embedding and head as int8 too, one scale a row")
    add("--texts", type=int, metavar="N", help=f"training texts to look at (default: {CALIBRATION_TOKENS:,} tokens)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="threads to compute with (default: every core)")


def main(args) -> int:
    if args.texts is not None and args.texts < 1:
        raise MinisbError(f"--texts must be at least 1, got {args.texts}.")
    settings = checkpoint.load_config(args.run)
    if "quantized" in settings:
        raise MinisbError(f"{args.run} is quantised already.")
    if checkpoint.is_run(args.out):
        raise MinisbError(f"{args.out} already holds a run: give another --out.")
    model = checkpoint.load_model(args.run, args.device, threads=args.threads)
    data = load_tokens(settings["training"].get("data", "stdlib"), model.tokenizer)
    group = GROUP if args.group == "128" else None
    count = args.texts or max(TRIAL_TEXTS, CALIBRATION_TOKENS // model.config.seq_len)
    texts = list(sequences(data.train, model.config, count, settings["training"].get("seed", 0)))
    tensors, section, notes = quantize(model, texts, group, args.quantize_embedding)
    section["group"] = args.group if group is None else group

    out = Path(args.out)
    model.tokenizer.save(out / checkpoint.TOKENIZER)
    checkpoint.save_quantized(out, tensors)
    checkpoint.save_config(
        out, model.config, settings["training"], model.tokenizer, settings.get("data"), quantized=section
    )
    small = checkpoint.load_model(out, args.device, threads=args.threads)  # what was written, not what was meant
    found = report(model, small, data.val) | notes | {"out": str(out)}
    print(text(found))
    print(json.dumps(found))
    return 0


def sequences(tokens, c, texts: int, seed: int) -> Iterator:
    """`texts` sequences of T tokens of the training text, one by one: inputs and targets (1,T)."""
    for i in range(texts):
        yield batch(tokens, 1, c.seq_len, seed, i)


def quantize(model: SpikingBrain, texts: list, group: int | None, embedding: bool = False):
    """-> tensors of the quantised file, the section of config.json without its group, notes for people."""
    inputs = Inputs(model, texts)
    tensors = empty_tensors(model.specs, group, embedding, float_routers(model.config))
    weights = float_matrices(model, embedding)
    for name, w in shown(weights.items(), "round weights"):
        w8, scales = tensors[name + INT8], tensors[name + SCALES]
        if w.ndim == 3:
            for e in range(len(w)):
                w8[e], scales[e] = _quantize_rows(model.be, w[e], group, inputs.product(name, e))
        else:
            w8[...], scales[...] = _quantize_rows(model.be, w, _row_group(name, group), inputs.product(name))
    for name in (n for n in tensors if not n.endswith((INT8, SCALES))):
        tensors[name][...] = on_host(model.store.p[name])
    same = dict.fromkeys(input_names(model.config), model.config.spike_k)
    fitted = _fit_k(model, inputs, weights, tensors)
    trial, be = texts[:TRIAL_TEXTS], model.be
    losses = [
        mean_loss(SpikingBrain(model.config, be, store_of(dict(tensors), k, be.xp)), trial, False, f"loss, k {which}")
        for which, k in (("of training", same), ("fitted", fitted))
    ]
    notes = {"loss_texts_same_k": losses[0], "loss_texts_fitted_k": losses[1], "k_fitted": losses[1] < losses[0]}
    return tensors, {"embedding": embedding, "k": fitted if notes["k_fitted"] else same}, notes


def shown(items, what: str):
    """The items, with a bar on a terminal."""
    return tqdm(items, what, leave=False, disable=None, dynamic_ncols=True)


def float_matrices(model: SpikingBrain, embedding: bool) -> dict[str, np.ndarray]:
    """Name -> fp32 matrix, on the host, of everything that becomes int8; the gate's pair multiplied out."""
    p, pairs, found = model.store.p, gate_pairs(model.specs), {}
    for name in matrix_shapes(model.specs, embedding, float_routers(model.config)):
        pair = pairs.get(name)
        found[name] = on_host(model.be.gemm(p[pair[1].name], p[pair[0].name]) if pair else p[name])
    return found


class Inputs:
    """What each input of projections holds on the texts, in float mode, where the model computes.

    rows: input -> some of its rows (n,I); of experts sorted by expert.  offsets: of experts, where each one's begin
    and the last one's end (E+1,).  matrices: input -> what reads it; read_by: the other way round.
    """

    def __init__(self, model: SpikingBrain, texts: list):
        self.be, self.rows, self.offsets = model.be, {}, {}
        self._products, self._parts, self._load = {}, {}, {}
        special = {"gk": GATE, "router": ROUTER}
        self.matrices = {}
        for name in input_names(model.config):
            prefix, _, readers = name.rpartition(".")
            names = [special.get(reader, f"{reader}_proj.weight") for reader in readers.split("+")]
            self.matrices[name] = [f"{prefix}.{matrix}" for matrix in names]
        self.read_by = {matrix: name for name, matrices in self.matrices.items() for matrix in matrices}
        self.every = max(1, sum(x.size for x, _ in texts) // KEPT_ROWS)
        xp = model.be.xp
        for x, _ in shown(texts, "read texts"):
            model.hidden(xp.asarray(x), tap=self._tap)
        for name, texts_of in self._parts.items():  # of each expert the rows of one text after the other
            sizes = [sum(map(len, parts)) for parts in texts_of]
            self.rows[name] = xp.concatenate([rows for parts in texts_of for rows in parts])
            if len(sizes) > 1:
                self.offsets[name] = np.concatenate([[0], np.cumsum(sizes)])

    def product(self, matrix: str, expert: int | None = None):
        """X^T X (I,I) of what a matrix reads, with which the error of a row d of weight errors is d X^T X d^T.

        None for embedding and head, of which nothing is cut off.  Of one expert: of its own tokens, and of the whole
        layer's as if they were COMMON_ROWS, so that one that hardly any token reached is fitted too.
        """
        name = self.read_by.get(matrix)
        if expert is None:
            return self._products.get(name)
        every, (start, end) = self.rows[name], self.offsets[name][expert : expert + 2]
        own = every[start:end]
        if name not in self._products:
            self._products[name] = self._square(every)
        return self._square(own) + COMMON_ROWS / max(1, len(every)) * self._products[name]

    def _square(self, x):
        """X^T X of x (n,I): products of float32, their sums over texts in float64."""
        square = self.be.gemm(x, x, ta=True) if len(x) else self.be.xp.zeros((x.shape[1],) * 2, x.dtype)
        return square.astype(np.float64)

    def _tap(self, name, array):
        layer, _, kind = name.partition(".moe.")
        if kind == "load":
            self._load[layer] = on_host(array)
        if not name.endswith(".input"):
            return
        name, x = name.removesuffix(".input"), array.reshape(-1, array.shape[-1])
        layer, _, experts = name.partition(".mlp.experts.")
        if experts:
            ends = np.cumsum(self._load[layer])
            parts = [x[end - n : end : self.every].copy() for end, n in zip(ends, self._load[layer], strict=True)]
        else:
            self._products[name] = self._products.get(name, 0) + self._square(x)
            parts = [x[:: self.every].copy()]
        for kept, part in zip(self._parts.setdefault(name, [[] for _ in parts]), parts, strict=True):
            kept.append(part)


def _row_group(name: str, group: int | None) -> int | None:
    return group if name.startswith("layers.") else None


def _quantize_rows(be, w, group, product):
    """quantize_weight with the best of CLIPS for each row, by its output's error d X^T X d^T."""
    if product is None:
        return quantize_weight(w, group)
    errors = []
    for clip in CLIPS:
        off = (dequantize_weight(*quantize_weight(w, group, clip), group) - w).astype(np.float64)
        off = be.xp.asarray(off)
        errors.append(on_host((be.gemm(off, product) * off).sum(1)))
    best = np.take(np.float32(CLIPS), np.argmin(errors, axis=0))
    return quantize_weight(w, group, best[:, None])


def _fit_k(model: SpikingBrain, inputs: Inputs, weights: dict, tensors: dict) -> dict[str, float]:
    """Input -> k: the smallest of the grid that keeps its output as near as is usual at config.spike_k."""
    grid, be = sorted({*K_GRID, model.config.spike_k}), model.be
    errors, xp = {}, be.xp
    for name, x in shown(inputs.rows.items(), "fit spikes"):
        if name not in inputs.matrices:  # a router that stays fp32
            continue
        at = inputs.offsets.get(name)

        def exactly(m, x=x, at=at):
            w = xp.asarray(weights[m])
            return be.gemm(x, w, tb=True) if at is None else grouped_forward(be, x, w, at)

        def with_spikes(m, k, x=x, at=at):
            w = xp.asarray(tensors[m + INT8]), xp.asarray(tensors[m + SCALES])
            return w8aspike_linear(be, x, *w, k) if at is None else w8aspike_grouped(be, x, *w, k, at)

        exact = xp.concatenate([exactly(m) for m in inputs.matrices[name]], axis=1)
        errors[name] = []
        for k in grid:
            off = xp.concatenate([with_spikes(m, k) for m in inputs.matrices[name]], axis=1) - exact
            errors[name].append(float((off * off).mean() / max(float((exact * exact).mean()), 1e-30)) ** 0.5)
    usual = np.median([e[grid.index(model.config.spike_k)] for e in errors.values()])
    return {
        name: next((k for k, e in zip(grid, es, strict=True) if e <= usual), grid[-1]) for name, es in errors.items()
    }


# --- what came of it


def mean_loss(model: SpikingBrain, batches: list, spike, what: str) -> float:
    """Nats a token over (inputs, targets) pairs."""
    total, read, xp = 0, 0, model.be.xp
    for x, y in shown(batches, what):
        total += y.size * float(model.loss(xp.asarray(x), xp.asarray(y), spike))
        read += y.size
    return total / read


def report(model: SpikingBrain, small: SpikingBrain, val) -> dict:
    """Losses on the validation text, bytes, and the counts that int8 did not hold."""
    c = model.config
    limit = max(1, LOSS_TOKENS // (c.batch_size * c.seq_len))
    batches, beyond = list(eval_batches(val, c.batch_size, c.seq_len, limit)), Beyond()
    small.hidden(small.be.xp.asarray(batches[0][0]), tap=beyond)
    return {
        "loss_float": mean_loss(model, batches, False, "loss, float"),
        "loss_spike": mean_loss(model, batches, True, "loss, spikes"),
        "loss_w8aspike": mean_loss(small, batches, False, "loss, W8ASpike"),
        "bytes_float": sum(x.nbytes for x in model.store.p.values()),
        "bytes_w8aspike": small.store.nbytes,
        "counts": beyond.seen,
        "counts_beyond_int8": beyond.outside,
    }


class Beyond:
    """A tap that counts the counts, and those beyond int8."""

    seen = outside = 0

    def __call__(self, name, count):
        if name.endswith((".q.count", ".o.count", ".gate.count", ".down.count", ".router.count")):  # once an input
            self.seen += count.size
            self.outside += int((abs(count) > 127).sum())


def text(found: dict) -> str:
    spike, small = found["loss_spike"], found["loss_w8aspike"]
    before, after = found["bytes_float"], found["bytes_w8aspike"]
    chosen = "one a projection" if found["k_fitted"] else "the one of training: others did not lower the loss"
    return "\n".join((
        f"weights        {before:,} bytes in fp32, {after:,} now: {after / before:.1%}",
        f"loss           {found['loss_float']:.4f} float, {spike:.4f} with spikes, {small:.4f} W8ASpike: "
        f"{small / spike - 1:+.2%} over spikes (nats a token of unseen text)",
        f"k              {chosen} (on training texts {found['loss_texts_same_k']:.4f} before, "
        f"{found['loss_texts_fitted_k']:.4f} after)",
        f"beyond int8    {found['counts_beyond_int8']:,} of {found['counts']:,} spike counts, kept exactly in a list",
        f"read it with   python sample.py {found['out']} --quantized",
    ))  # fmt: skip
