"""Training: batches, gradients, clipping, AdamW, log, checkpoints, and going on later.

Everything that a step reads is the weights, the two moments, and the step's number: batches and
learning rates are functions of (seed, step).  A resumed run is therefore bit-equal to one that
was never stopped, on the same machine and build.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minisb import checkpoint
from minisb.best import Best
from minisb.config import Config
from minisb.data import TokenData, batch, bigram_loss
from minisb.errors import MinisbError
from minisb.evaluate import FINAL_TOKENS, GLANCE_TOKENS, evaluate, whole_windows
from minisb.experts import Loads
from minisb.kernels import element
from minisb.model import SpikingBrain, specs
from minisb.ops.adamw import grad_norm
from minisb.optim import LossScale, lr_at, update
from minisb.params import ParamStore, count


@dataclass(frozen=True)
class TrainSettings:
    """How a run trains, beside what its Config says (steps, batch size, sequence length, lr)."""

    data: str = "stdlib"  # a corpus by name, or the path of a file or folder
    seed: int = 0  # of the initial weights and of the order of batches
    accumulate: int = 1  # batches whose gradients are averaged in one step
    spike_from: float = 0.8  # spikes are on from this share of the steps: at first, floats learn faster
    warmup: float = 0.05  # share of the steps with a rising learning rate
    lr_floor: float = 0.0  # of the peak, at the last step: the last steps only settle
    beta1: float = 0.9
    beta2: float = 0.99  # shorter than Adam's 0.999, and longer than big models' 0.95: our batches are small
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices only, times the learning rate
    clip: float = 1.0  # largest norm of the whole gradient
    log_every: int = 10  # steps between two lines of log.jsonl
    eval_every: int = 250
    checkpoint_every: int = 500
    device: str = "auto"
    dtype: str = "float32"  # of activations and of the weights that products read; masters are float32
    native: str = "all"  # another choice sums in another order, so resume keeps to it

    def __post_init__(self):
        for name in ("accumulate", "log_every", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise MinisbError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("spike_from", "warmup", "lr_floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise MinisbError(f"{name} is a share between 0 and 1, got {getattr(self, name)}.")
        if self.seed < 0:
            raise MinisbError(f"the seed must be at least 0, got {self.seed}.")

    @staticmethod
    def from_dict(values: dict) -> TrainSettings:
        """The settings in a run's config.json.  Raises MinisbError for one it does not know."""
        unknown = sorted(set(values) - {f.name for f in fields(TrainSettings)})
        if unknown:
            raise MinisbError(f"the run has a training setting this version does not know: {unknown[0]}.")
        return TrainSettings(**values)


class Trainer:
    """One run.  What counts is `model.store` (weights, moments) and `step`, the updates done."""

    def __init__(
        self, folder, model: SpikingBrain, settings: TrainSettings, data: TokenData, step: int = 0, graph: bool = False
    ):
        """graph: on a GPU, record the work of a step and replay it."""
        self.folder, self.model, self.settings, self.data, self.step = Path(folder), model, settings, data, step
        self.first = self.saved = step  # where this process began, and what is on disk
        self.clock = Clock()
        self.logged = (step, 0.0)  # step and clock at the last record
        self.loss_scale = LossScale(model.be.xp, settings.dtype == "float16")
        self.recorded = model.be.recorded(self._gradients) if graph else self._gradients
        self.loads = None  # of the experts in this step, where it is logged
        with_spikes = model.config.spike and settings.spike_from < 1  # what the run is to end with
        self.best, self.turned = Best(folder, "val_loss_spike" if with_spikes else "val_loss"), None
        c = model.config
        for name, tokens in (("training", data.train), ("validation", data.val)):
            if len(tokens) <= c.seq_len:
                raise MinisbError(
                    f"the {name} text has {len(tokens)} tokens, too few for a sequence length of "
                    f"{c.seq_len}: use more text or a smaller --seq-len."
                )
        if not math.isfinite(c.lr):
            raise MinisbError(f"the learning rate must be a finite number, got {c.lr}.")

    @property
    def tokens_per_step(self) -> int:
        c = self.model.config
        return self.settings.accumulate * c.batch_size * c.seq_len

    @property
    def spiking(self) -> bool:
        return self.step >= round(self.settings.spike_from * self.model.config.steps)

    @property
    def tokens_per_second(self) -> float | None:
        """Over the steps done by this process, without evaluations and checkpoints."""
        done = self.step - self.first
        return round(done * self.tokens_per_step / self.clock.seconds, 1) if self.clock.seconds else None

    def run(self) -> bool:
        """Train to the last step (True) or to a Ctrl-C (False); either way the state is on disk.

        Raises MinisbError when the loss or a gradient stops being finite, or memory runs out;
        the folder then keeps the last good checkpoint.
        """
        steps = self.model.config.steps
        bar = tqdm(total=steps, initial=self.step, unit="step", disable=None, dynamic_ncols=True)
        # Overflow shows in the loss, which is checked; NumPy's warnings would only repeat it.
        with bar, Interrupt() as interrupt, np.errstate(all="ignore"), self.model.be.stream():
            try:
                finished = self._loop(steps, bar, interrupt)
            except MemoryError as error:
                raise MinisbError(
                    "out of memory: a smaller --batch-size or --seq-len needs less (with --accumulate "
                    f"for the same step); {self.folder} keeps its checkpoint of step {self.saved}."
                ) from error
        return finished

    def _loop(self, steps: int, bar, interrupt: Interrupt) -> bool:
        while self.step < steps:
            due = self.step % self.settings.checkpoint_every == 0 and self.step > self.first
            with self.clock:
                loss, norm = self.gradients()
                stop = interrupt.asked
                if due or stop or self._looks():
                    loss, norm = float(loss), float(norm)
                    self._check_finite(loss=loss, **({} if self.loss_scale.needed else {"gradient": norm}))
            # Saved here and not right after the update, because by now these weights have been
            # used once: what is saved is known to give a finite loss and a finite gradient.
            if due or stop:
                self.save()
            if stop:
                return False
            lr = self._learning_rate()
            with self.clock:
                scale = self.loss_scale.value
                update(self.model.be, self.model.store, self.step + 1, lr, norm, self.settings, scale)
                self.loss_scale.follow(norm)
            self.step += 1
            self._record(loss, lr, norm)
            if isinstance(loss, float):
                bar.set_postfix_str(f"loss {loss:.3f}, {self.tokens_per_second:,.0f} tokens/s", refresh=False)
            bar.update()
        self.save()
        self._settle()
        return True

    def _settle(self):
        """At the end of the last step: the best weights, if validation has turned since."""
        self.turned = self.best.settle(self.model.store)
        if self.turned is not None:
            tqdm.write(
                f"validation turned after step {self.turned} ({self.best.loss:.3f}, at the end {self.best.last:.3f}): "
                f"the weights of that step are kept"
            )

    def gradients(self):
        """Mean loss of this step's batches and the norm of its gradient, which is left in store.g.

        Both may still be on a GPU that is at work on them: float() waits.
        """
        c, s = self.model.config, self.settings
        # One large batch in slices, so that accumulating N is the same step as a batch N times larger.
        x, y = batch(self.data.train, c.batch_size * s.accumulate, c.seq_len, s.seed, self.step)
        x, y = (self.model.be.xp.asarray(tokens) for tokens in (x, y))
        self.loads = Loads() if c.has_experts and self._logged(self.step + 1) else None
        compute = self._gradients if self.loads else self.recorded  # what the tap sees is not recorded
        return compute(x, y, spiking=self.spiking)

    def _gradients(self, x, y, spiking: bool):
        size, accumulate, scale = self.model.config.batch_size, self.settings.accumulate, self.loss_scale.value
        self.model.store.zero_grad()
        loss = 0.0
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            part = self.model.loss_and_backward(x[rows], y[rows], spiking, scale / accumulate, self.loads)
            loss += part / accumulate
        return loss, grad_norm(self.model.be, self.model.store.flat_g) / scale

    def save(self):
        checkpoint.save_state(self.folder, self.model.store, self.step)
        self.saved = self.step

    def _learning_rate(self) -> float:
        c, s = self.model.config, self.settings
        return lr_at(self.step, c.lr, c.steps, round(s.warmup * c.steps), s.lr_floor)

    def _record(self, loss: float, lr: float, norm: float):
        """A line of the log, if this step has one, with an evaluation if it has that."""
        if not self._logged(self.step):
            return
        (step, seconds), self.logged = self.logged, (self.step, self.clock.seconds)
        rate = (self.step - step) * self.tokens_per_step / (self.clock.seconds - seconds)
        record = {"step": self.step, "tokens": self.step * self.tokens_per_step, "loss": loss, "lr": lr}
        record |= {"grad_norm": norm, "tok_per_s": round(rate, 1)}
        if self.loads:
            record |= self.loads.record()
        if self._evaluated(self.step):
            found = evaluate(self.model, whole_windows(self.data.val, self.model.config, GLANCE_TOKENS))
            self._check_finite(validation_loss=found["val_loss"])
            record |= found
            self.best.judge(found, self.model.store, self.step, self.step == self.model.config.steps)
            tqdm.write(_progress(record))
        checkpoint.append_log(self.folder, record)

    def _evaluated(self, step: int) -> bool:
        return step == self.model.config.steps or step % self.settings.eval_every == 0

    def _logged(self, step: int) -> bool:
        return self._evaluated(step) or step == 1 or step % self.settings.log_every == 0

    def _looks(self) -> bool:
        """Whether this step's loss and norm are read at once: on a CPU always; on a GPU, which would have to
        be waited for, only where they go into the log.  (What is not finite changes no weight there.)"""
        return self.model.be.name != "cuda" or self._logged(self.step + 1)

    def _check_finite(self, **values: float):
        for name, value in values.items():
            if not math.isfinite(value):
                raise MinisbError(
                    f"the {name.replace('_', ' ')} became {value} after step {self.step}, so training stopped: try a "
                    f"lower --lr; {self.folder} keeps its last good checkpoint, of step {self.saved}."
                )

    def summary(self) -> dict:
        """The run's last word, for a finished run: losses on much of the validation text."""
        c, data = self.model.config, self.data
        read = self.step * self.tokens_per_step
        val = whole_windows(data.val, c, min(FINAL_TOKENS, max(GLANCE_TOKENS, read)))
        found = evaluate(self.model, val)
        found["bigram_loss"] = bigram_loss(data.train, val, c.vocab)  # on the very same tokens
        to_bits = len(data.val) / data.val_bytes / math.log(2)
        per_byte = {f"{name}_bits_per_byte": found[name] * to_bits for name in found if "loss" in name}
        last = [r["loss"] for r in checkpoint.read_log(self.folder) if r["step"] > 0.95 * c.steps and "loss" in r]
        return {
            "params": count(self.model.specs),
            "steps": self.step,
            "tokens": read,
            "val_tokens": len(val) - 1,
            "turned": self.turned,  # the step whose weights were kept, if validation got worse after it
            "train_loss": float(np.mean(last)) if last else None,  # over the last 5 % of the steps
            **found,
            **per_byte,
            "tok_per_s": self.tokens_per_second,
        }


def intervals(steps: int) -> dict:
    """How often a run of so many steps looks at its validation text and saves itself, unless told."""
    return {"eval_every": max(10, steps // 8), "checkpoint_every": max(10, steps // 5)}


def start(
    folder, config: Config, settings: TrainSettings, be, tokenizer, data: TokenData, graph: bool = False
) -> Trainer:
    """A new run in `folder`, which then holds a checkpoint of step 0."""
    store = _store(config, settings, be)
    store.initialise(settings.seed)
    trainer = Trainer(folder, SpikingBrain(config, be, store), settings, data, graph=graph)
    checkpoint.remove_stale(folder)
    tokenizer.save(Path(folder) / checkpoint.TOKENIZER)
    checkpoint.trim_log(folder, -1)
    trainer.save()
    checkpoint.save_config(folder, config, asdict(settings), tokenizer, describe_data(data))
    return trainer


def resume(folder, config: Config, settings: TrainSettings, be, data: TokenData, graph: bool = False) -> Trainer:
    """The run in `folder`, as its last checkpoint left it.  Raises MinisbError if that is damaged."""
    store = _store(config, settings, be)
    step = checkpoint.load_state(folder, store)
    trainer = Trainer(folder, SpikingBrain(config, be, store), settings, data, step, graph)
    checkpoint.remove_stale(folder)
    checkpoint.trim_log(folder, step)
    trainer.best.recall()
    return trainer


def _store(config: Config, settings: TrainSettings, be) -> ParamStore:
    return ParamStore(specs(config), be.xp, optimizer=True, activations=element(settings.dtype))


def describe_data(data: TokenData) -> dict:
    """What config.json keeps to tell, on resume, whether the text is still the same."""
    digest = hashlib.blake2b(np.ascontiguousarray(data.train), digest_size=16).hexdigest()
    return {"train_tokens": len(data.train), "val_tokens": len(data.val), "digest": digest}


def check_memory(config: Config, be=None):
    """Raises MinisbError if weights, gradients and moments alone are more than this machine (or GPU) has."""
    on_gpu = be is not None and be.name == "cuda"
    need, have = 16 * count(specs(config)), be.device.memory()["total"] if on_gpu else memory()
    if have is not None and need > have:
        raise MinisbError(
            f"out of memory: training {config.preset} takes {need / 1e9:.1f} GB for weights, gradients and optimiser "
            f"state alone, and this {'GPU' if on_gpu else 'machine'} has {have / 1e9:.1f} GB; choose a smaller preset."
        )


def memory() -> int | None:
    """Bytes of main memory that this process may use, None where nobody says."""
    try:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    try:  # a container's limit, often below the machine's
        return min(have, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return have


class Clock:
    """`with clock:` adds up seconds."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self):
        self.started = time.perf_counter()

    def __exit__(self, *_):
        self.seconds += time.perf_counter() - self.started


class Interrupt:
    """Inside, the first Ctrl-C only sets `asked`: the loop stops where its state is whole.

    A second one raises KeyboardInterrupt as usual, and what was not saved is lost.
    """

    asked = False

    def __enter__(self):
        try:
            self.before = signal.signal(signal.SIGINT, self._ask)
        except ValueError:  # not the main thread: signals are someone else's
            self.before = None
        return self

    def __exit__(self, *_):
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        # Not print: a handler may run in the middle of one.  2 is stderr.
        os.write(2, b"\nsaving after this step (Ctrl-C again quits at once)\n")


def _progress(record: dict) -> str:
    return (
        f"step {record['step']:6d}   loss {record['loss']:.3f}   val {record['val_loss']:.3f}   "
        f"val with spikes {record['val_loss_spike']:.3f}   {record['tok_per_s']:,.0f} tokens/s"
    )
