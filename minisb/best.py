"""The weights that did best on unseen text, kept while a run goes on: with little text, loss there turns upwards."""

from __future__ import annotations

from pathlib import Path

from minisb import checkpoint

#: Validation has turned if the last loss is this much above the best one: less may be chance.
TURN = 1.005


class Best:
    """loss, step: of the best evaluation so far (None before the first).  name: of the loss that counts."""

    def __init__(self, folder, name: str):
        self.folder, self.name = Path(folder), name
        self.loss = self.step = self.last = None

    def judge(self, found: dict, store, step: int, is_last: bool):
        """After an evaluation: its weights go to disk if none was better.  (The last ones are saved anyway.)"""
        self.last = found[self.name]
        if self.loss is None or self.last < self.loss:
            self.loss, self.step = self.last, step
            if not is_last:
                checkpoint.save_weights(self.folder, store, step, checkpoint.BEST)

    def recall(self):
        """What was known when the run was stopped: from its log, if the weights are still there."""
        if (self.folder / checkpoint.BEST).exists():
            seen = [(r[self.name], r["step"]) for r in checkpoint.read_log(self.folder) if self.name in r]
            self.loss, self.step = min(seen, default=(None, None))
            self.last = seen[-1][0] if seen else None

    def settle(self, store) -> int | None:
        """At the end -> None, or if validation has turned the step whose weights `store` and model.safetensors get.

        The state to resume from stays the last one.
        """
        if self.loss is None or self.last <= TURN * self.loss:
            (self.folder / checkpoint.BEST).unlink(missing_ok=True)
            return None
        turned = checkpoint.load_weights(self.folder, store, checkpoint.BEST)
        checkpoint.save_weights(self.folder, store, turned)
        return turned
