"""What training with spikes is worth: one float phase, then a branch for each threshold, from the same weights.

    python bench/spike_sweep.py --out sweep                    # nano: a quarter of an hour or more on 2 cores
    python bench/spike_sweep.py --out sweep                    # again: finished branches are skipped
    python bench/spike_sweep.py --seeds 0 1 2 --k 0.5 --out sweep3       # one threshold, the mean of three seeds

All branches read the same batches at the same learning rates.  "untrained" switches spikes on in the float
twin, "trained" has trained the last fifth of the steps with them.  Two broken backwards show what the
straight-through gradient is for: one lets no gradient through the spikes, one takes dW with x, not with x_hat.

share recovered = (untrained - trained) / (untrained - float).  Sparsity by two readings: empty slots of the
3-step window over all channels, and over those that fire (minisb/meter.py).  The last line is JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minisb import checkpoint, cli  # noqa: E402
from minisb.backend import choose  # noqa: E402
from minisb.config import preset  # noqa: E402
from minisb.data import default_tokenizer, load_tokens  # noqa: E402
from minisb.errors import MinisbError  # noqa: E402
from minisb.evaluate import whole_windows  # noqa: E402
from minisb.meter import mean_loss, measure  # noqa: E402
from minisb.model import SpikingBrain, specs  # noqa: E402
from minisb.ops.linear import linear_backward  # noqa: E402
from minisb.ops.spike import spike_forward  # noqa: E402
from minisb.optim import update  # noqa: E402
from minisb.params import ParamStore  # noqa: E402
from minisb.train import Trainer, TrainSettings, describe_data  # noqa: E402

KS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
BROKEN_K, BROKEN = 0.5, ("zero gradient", "dW with x")
REPORT_SPARSITY = 0.6915
SPIKE_FROM = 0.8
LOSS_TOKENS, METER_TOKENS = 1 << 17, 1 << 13  # validation tokens for losses, the same for all, and for sparsity


def break_backward(be, kind: str) -> dict:
    """Swap a wrong backward into `be`; the dictionary it remembers a pass in wants clearing after each."""
    spike, backward = (be.natives.get(op.__name__, op.reference) for op in (spike_forward, linear_backward))
    coded = {}  # id of an x_hat -> the array itself, so that the id stays its own, and the x behind it

    def remember(be, x, k):
        x_hat, vth = spike(be, x, k)
        coded[id(x_hat)] = x_hat, x
        return x_hat, vth

    def zero_gradient(be, dy, x, w, dw, db=None, dx=None):
        got = backward(be, dy, x, w, dw, db, None if id(x) in coded else dx)
        if id(x) not in coded:
            return got
        return be.xp.zeros_like(got) if dx is None else dx

    def weights_see_x(be, dy, x, w, dw, db=None, dx=None):
        return backward(be, dy, coded.get(id(x), (x, x))[1], w, dw, db, dx)

    be.use("spike_forward", remember)
    be.use("linear_backward", {"zero gradient": zero_gradient, "dW with x": weights_see_x}[kind])
    return coded


class Sweep:
    """The experiment in a folder: float_phase/ and float_twin/ are runs, NAME.json is a finished branch."""

    def __init__(self, folder: Path, config, settings: TrainSettings, tokenizer, data, ks, device, threads):
        self.folder, self.config, self.settings, self.ks = folder, config, settings, ks
        self.machine = device, "all", threads
        self.tokenizer, self.data = tokenizer, data
        self.branch_at = round(SPIKE_FROM * config.steps)
        self.val = whole_windows(data.val, config, LOSS_TOKENS)
        self.sample = whole_windows(data.val, config, METER_TOKENS)
        self._claim()

    def _claim(self):
        """The folder belongs to one experiment: other settings would mix their branches into it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        described = json.loads(json.dumps({"model": self.config.to_dict(), "training": asdict(self.settings)}))
        path = self.folder / "sweep.json"
        if not path.exists():
            path.write_text(json.dumps(described, indent=1))
        elif json.loads(path.read_text()) != described:
            raise MinisbError(f"{self.folder} holds a sweep with other settings: give another --out.")

    def run(self) -> dict:
        """Every branch that is not there yet -> the result."""
        steps = self.config.steps - self.branch_at
        names = ["float", *map(_name, self.ks), *BROKEN]
        missing = sum(not self._path(name).exists() for name in names)
        total = missing * steps + (not (self.folder / "float_phase").exists()) * self.branch_at
        with tqdm(total=total, unit="step", disable=None, dynamic_ncols=True) as self.bar:
            self._float_phase()
            float_loss = self._branch("float", None)["loss"]
            rows = [self._branch(_name(k), k) for k in self.ks]
            broken = [self._branch(kind, BROKEN_K, kind) for kind in BROKEN]
            k = _crossing([r["sparsity"] for r in rows], self.ks, REPORT_SPARSITY)
            if k is not None:
                self.bar.total += steps * (not self._path(_name(k)).exists())
            target = self._branch(_name(k), k) if k is not None else None
        for row in [*rows, *broken, *([target] if target else [])]:
            gap = row["untrained"] - float_loss
            row["cost"] = row["loss"] / float_loss - 1
            row["cost_untrained"] = row["untrained"] / float_loss - 1
            row["recovered"] = (row["untrained"] - row["loss"]) / gap if gap else None
        return {
            "preset": self.config.preset,
            "steps": self.config.steps,
            "branch_at": self.branch_at,
            "seeds": [self.settings.seed],
            "val_tokens": len(self.val) - 1,
            "float": float_loss,
            "by_k": rows,
            "broken": broken,
            "at_report_sparsity": target,
        }

    def _float_phase(self):
        if (self.folder / "float_phase").exists():
            return
        be, _ = choose(*self.machine)
        model = SpikingBrain(self.config, be, ParamStore(specs(self.config), be.xp, optimizer=True))
        model.store.initialise(self.settings.seed)
        self._train(model, 0, self.branch_at, spiking=False)
        self._save("float_phase", model, self.branch_at)

    def _branch(self, name: str, k: float | None, broken: str | None = None) -> dict:
        """Train the last steps from the float phase's weights, spiking at k (None: float) -> its measurements."""
        path = self._path(name)
        if path.exists():
            return json.loads(path.read_text())
        be, _ = choose(*self.machine)
        config = self.config if k is None else replace(self.config, spike_k=k)
        model = SpikingBrain(config, be, ParamStore(specs(config), be.xp, optimizer=True))
        checkpoint.load_state(self.folder / "float_phase", model.store)
        self.bar.set_description(name)
        self._train(model, self.branch_at, config.steps, k is not None, broken)
        found = {"name": name, "k": k, "loss": mean_loss(model, self.val, spike=k is not None)}
        if k is None:
            self._save("float_twin", model, config.steps)
        else:
            found |= self._spikes(model, "")
            found |= self._untrained(model)
        path.write_text(json.dumps(found))
        return found

    def _train(self, model, first: int, last: int, spiking: bool, broken: str | None = None):
        """Steps first..last of the one schedule: batches and learning rates are functions of the step."""
        settings = replace(self.settings, spike_from=0.0 if spiking else 1.0)
        trainer = Trainer(self.folder, model, settings, self.data, first)
        natives = dict(model.be.natives)
        coded = break_backward(model.be, broken) if broken else {}
        while trainer.step < last:
            loss, norm = trainer.gradients()
            update(model.be, model.store, trainer.step + 1, trainer._learning_rate(), norm, settings)
            trainer.step += 1
            coded.clear()
            if trainer.step % 10 == 0:  # on a GPU looking at a number means waiting for it
                self.bar.set_postfix_str(f"loss {float(loss):.3f}", refresh=False)
            self.bar.update()
        model.be.natives = natives

    def _spikes(self, model, suffix: str) -> dict:
        total = measure(model, self.sample)[0]["total"]
        keys = ("sparsity", "sparsity_firing", "silent", "spikes_per_channel")
        return {key + suffix: total[key] for key in keys}

    def _untrained(self, model) -> dict:
        """The float twin's weights with spikes switched on; once for each k, `model` is overwritten."""
        path = self._path(f"untrained {_name(model.config.spike_k)}")
        if not path.exists():
            checkpoint.load_weights(self.folder / "float_twin", model.store)
            found = {"untrained": mean_loss(model, self.val, spike=True), **self._spikes(model, "_untrained")}
            path.write_text(json.dumps(found))
        return json.loads(path.read_text())

    def _save(self, name: str, model, step: int):
        """Complete or not there: a folder counts once it has its name."""
        partial = self.folder / f"{name}.partial"
        partial.mkdir(exist_ok=True)
        self.tokenizer.save(partial / checkpoint.TOKENIZER)
        checkpoint.save_state(partial, model.store, step)
        checkpoint.save_config(partial, self.config, asdict(self.settings), self.tokenizer, describe_data(self.data))
        partial.rename(self.folder / name)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '_')}.json"


def _name(k: float) -> str:
    return f"k{k:g}"


def _crossing(sparsity: list[float], ks, wanted: float) -> float | None:
    """The k between two of `ks` whose sparsity is `wanted`, on a straight line; it falls as k grows."""
    for (k0, s0), (k1, s1) in zip(zip(ks, sparsity, strict=True), [*zip(ks, sparsity, strict=True)][1:], strict=False):
        if s0 >= wanted > s1:
            return round(float(np.interp(-wanted, [-s0, -s1], [k0, k1])), 3)
    return None


def mean(results: list):
    """One result from those of several seeds: every number its mean, and beside each share recovered those of all."""
    first = results[0]
    if any(r is None for r in results):
        return None
    if isinstance(first, dict):
        found = {key: mean([r[key] for r in results]) for key in first}
        if "recovered" in first:
            found["recovered_by_seed"] = [r["recovered"] for r in results]
        return found
    if isinstance(first, list):
        return [mean(list(parts)) for parts in zip(*results, strict=True)]
    return float(np.mean(results)) if isinstance(first, float) else first


def table(result: dict) -> str:
    """The result as a page to read."""
    seeds = ("seed " if len(result["seeds"]) == 1 else "mean of seeds ") + ", ".join(map(str, result["seeds"]))
    lines = [
        f"{result['preset']}, {result['steps']:,} steps, spikes from step {result['branch_at']:,}, {seeds}; "
        f"loss in nats a token over {result['val_tokens']:,} unseen tokens",
        "cost: against the float twin; sparsity: 3-step window, after training",
        f"{'':<16}{'untrained':>10}{'cost':>9}{'trained':>10}{'cost':>9}{'recovered':>11}"
        f"{'sparsity':>10}{'among firing':>14}",
        f"{'float':<16}{'':>19}{result['float']:>10.4f}",
    ]
    extra = [result["at_report_sparsity"]] if result["at_report_sparsity"] else []
    for row in [*result["by_k"], *extra, *result["broken"]]:
        name = f"k = {row['k']:.4g}" if row["name"].startswith("k") else row["name"]
        recovered = "" if row["recovered"] is None else f"{row['recovered']:.1%}"
        lines.append(
            f"{name:<16}{row['untrained']:>10.4f}{row['cost_untrained']:>+9.2%}{row['loss']:>10.4f}{row['cost']:>+9.2%}"
            f"{recovered:>11}{row['sparsity']:>10.2%}{row['sparsity_firing']:>14.2%}"
        )
    lines.append(f"broken backwards at k = {BROKEN_K:g}: {', '.join(BROKEN)}")
    if len(result["seeds"]) > 1:
        for row in [result["by_k"][0], *result["broken"]]:
            shares = ", ".join(f"{share:.1%}" for share in row["recovered_by_seed"])
            lines.append(f"recovered seed by seed, {row['name']}: {shares}")
    if extra:
        row = extra[0]
        lines.append(
            f"the report's sparsity of {REPORT_SPARSITY:.2%}: k = {row['k']:.4g} has {row['sparsity']:.2%} "
            f"and costs {row['cost']:+.2%}"
        )
    else:
        lines.append(f"no k here has the report's sparsity of {REPORT_SPARSITY:.2%}")
    return "\n".join(lines)


def main(argv) -> int:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("sweep"), metavar="DIR", help="what is kept (default: sweep)")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--data", default="stdlib", help="stdlib, or a text file or folder (default: stdlib)")
    parser.add_argument("--steps", type=int, help="default: the preset's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="several: a sweep each, and their mean")
    parser.add_argument("--k", type=float, nargs="+", default=KS, help="thresholds to try (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(argv)
    config = preset(args.preset, **({"steps": args.steps} if args.steps else {}))
    tokenizer = default_tokenizer(args.data, config.vocab)
    config = replace(config, vocab=tokenizer.vocab_size)
    data, results = load_tokens(args.data, tokenizer), []
    for seed in args.seeds:
        settings = TrainSettings(data=args.data, seed=seed, spike_from=SPIKE_FROM)
        folder = args.out if len(args.seeds) == 1 else args.out / f"seed-{seed}"
        sweep = Sweep(folder, config, settings, tokenizer, data, args.k, args.device, args.threads)
        results.append(sweep.run())
    result = {**mean(results), "seeds": args.seeds}
    print(table(result))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
