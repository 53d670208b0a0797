"""SpikingBrain-1.0 rebuilt small enough to read: NumPy and Cython, backprop by hand."""

# The function, not the module of the same name: bound after the module's import, so it stays.
from minisb.generate import generate

__all__ = ["__version__", "generate", "load"]
__version__ = "0.1.0"


def load(run, device: str = "auto", native: str = "all", threads: int | None = None):
    """The trained model in the folder `run` -> SpikingBrain, with its tokenizer as `.tokenizer`.

    Raises MinisbError if the folder holds no run or a damaged one.
    """
    from minisb.checkpoint import load_model  # here: importing minisb must not need a tokenizer

    return load_model(run, device, native, threads)
