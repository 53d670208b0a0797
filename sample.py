"""Continue a text with a trained model:  python sample.py runs/nano --prompt "def read("

The text goes to stdout as it is decoded; one line about speed and memory goes to stderr.
"""

from __future__ import annotations

import sys
import time

import minisb
from minisb.checkpoint import load_config
from minisb.cli import INTERRUPTED, Parser, run
from minisb.errors import MinisbError
from minisb.generate import check_sampling, generate


def arguments(argv):
    parser = Parser(prog="sample.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("run", metavar="RUN_DIR", help="a run folder that train_small.py wrote")
    add("--prompt", default="", metavar="TEXT", help="text to continue; without one a new document begins")
    add("--tokens", type=int, default=256, metavar="N", help="tokens to write at most (default %(default)s)")
    add("--temperature", type=float, default=0.8, metavar="X", help="0: always the likeliest (default %(default)s)")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only (default: all)")
    add("--top-p", type=float, default=0.95, metavar="P", help="and from this share of probability (%(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="same seed, same text (default %(default)s)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default %(default)s)")
    add("--threads", type=int, metavar="N", help="threads to compute with (default: every core)")
    add("--native", default="all", metavar="LIST", help="compiled modules: all, none, or names (default %(default)s)")
    add("--spike", action="store_true", help="spiking activations: projections read spike counts")
    add("--quantized", action="store_true", help="INT8 weights and spikes; needs a run that was quantised")
    args = parser.parse_args(argv)
    if args.seed < 0:
        raise MinisbError(f"--seed must be at least 0, got {args.seed}.")
    check_sampling(args.temperature, args.top_k, args.top_p)
    return args


def main(argv):
    args = arguments(argv)
    if args.quantized and "quantized" not in load_config(args.run):
        raise MinisbError(
            f"{args.run} is not quantised: python -m minisb quantize {args.run} --out {args.run}-int8 and sample that."
        )
    model = minisb.load(args.run, device=args.device, native=args.native, threads=args.threads)
    tokenizer, state = model.tokenizer, model.new_state()
    prompt = tokenizer.encode(args.prompt)
    ids = generate(
        model, prompt, args.tokens, args.temperature, args.top_k, args.top_p,
        args.seed, args.spike, stop=tokenizer.eot, state=state,
    )  # fmt: skip
    timed = Timed(ids)
    code = 0
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?", and goes on
    try:
        print(args.prompt, end="", flush=True)
        for piece in tokenizer.stream(timed):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        code = INTERRUPTED
    print(flush=True)
    print(f"{timed.summary()}, decode state {state.nbytes:,} bytes{growth(model)}", file=sys.stderr)
    if timed.count == 0 < args.tokens and code == 0:
        print("the model ended the text at once: give a --prompt, or another --seed.", file=sys.stderr)
    return code


class Timed:
    """The same tokens, counted; the clock starts when the prompt has been read."""

    def __init__(self, ids):
        self.ids, self.count, self.first, self.last = ids, 0, 0.0, 0.0

    def __iter__(self):
        for token in self.ids:
            self.last = time.perf_counter()
            self.first = self.first or self.last
            self.count += 1
            yield token

    def summary(self) -> str:
        seconds = self.last - self.first
        speed = f", {(self.count - 1) / seconds:,.0f} tokens/s" if self.count > 1 and seconds else ""
        return f"{self.count} token{'s' * (self.count != 1)}{speed}"


def growth(model) -> str:
    """What the size of the decode state depends on."""
    kinds = {model.config.mixer(i) for i in range(model.config.layers)}
    full = any(kind.endswith("full") for kind in kinds)
    return " (grows: full attention keeps every token)" if full else " (constant)"


if __name__ == "__main__":
    sys.exit(run(main))
