"""The run folder: what is in it, how it gets there whole, and how it is read back.

    config.json                 the model's and the training's settings; written last when a run
                                starts, so a folder is a run if and only if this file is there
    train_state.safetensors     weights, both AdamW moments, the step: all that resume reads
    model.safetensors           the weights alone, derived from the above, for everyone else; of a
                                quantised run the only weights, NAME.int8 with NAME.scales
    tokenizer.tiktoken          ranks; their pattern and special tokens stand in config.json
    log.jsonl                   one object a logged step

Files are written under a temporary name, flushed to disk and renamed, so a run killed at any
moment keeps its last complete checkpoint.  The log alone grows in place: whatever a kill leaves
in it beyond the checkpoint's step is cut off on resume.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

import minisb
from minisb.backend import choose, on_host
from minisb.cache import atomic_write
from minisb.config import Config
from minisb.errors import MinisbError
from minisb.model import SpikingBrain, specs
from minisb.ops.w8aspike import GROUP
from minisb.quantized import QuantizedStore, empty_tensors, float_routers, input_names, store_of
from minisb.tokenizer import Tokenizer

FORMAT = 1  # raise it when the files of a run change their meaning
QUANTIZED_FORMAT = 1  # the same for what quantised runs have besides
CONFIG, STATE, WEIGHTS = "config.json", "train_state.safetensors", "model.safetensors"
TOKENIZER, LOG = "tokenizer.tiktoken", "log.jsonl"
BEST = "best.safetensors"  # while a run goes on: the weights that did best on unseen text


def is_run(folder) -> bool:
    return (Path(folder) / CONFIG).exists()


def remove_stale(folder):
    """Delete temporary files of a process that was killed while it wrote."""
    for path in Path(folder).glob(".*.tmp"):
        path.unlink(missing_ok=True)


# --- settings


def save_config(folder, config: Config, training: dict, tokenizer: Tokenizer, data: dict, quantized=None):
    """data: what the run was trained on, as `describe_data` in train.py has it.

    quantized: of a quantised run, "group" (128 or "row"), "embedding" (is it int8 too?), and "k", that of
    the spikes of each input.
    """
    values = {
        "format": FORMAT,
        "minisb": minisb.__version__,
        "model": config.to_dict(),
        "training": training,
        "data": data,
        "tokenizer": tokenizer.settings,
    }
    if quantized is not None:
        values["quantized"] = {"format": QUANTIZED_FORMAT, **quantized}
    _write(Path(folder) / CONFIG, lambda path: path.write_text(json.dumps(values, indent=1) + "\n", "utf-8"))


def load_config(folder) -> dict:
    """config.json, with "model" as a Config.  MinisbError if there is no run or no sense in it."""
    path = Path(folder) / CONFIG
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise MinisbError(f"there is no run in {folder}: {CONFIG} is missing.") from None
    except (OSError, ValueError) as error:
        raise MinisbError(f"{path} is damaged: it is no JSON text.") from error
    if not isinstance(values, dict) or not all(isinstance(values.get(k), dict) for k in ("model", "training")):
        raise MinisbError(f"{path} is damaged: the model's or the training's settings are missing.")
    if values.get("format") != FORMAT:
        raise MinisbError(f"{path} has format {values.get('format')}; this version reads format {FORMAT}.")
    try:
        values["model"] = Config.from_dict(values["model"])
    except (MinisbError, TypeError, ValueError) as error:
        raise MinisbError(f"{path} is damaged: {error}") from error
    return values


def load_tokenizer(folder, settings: dict | None = None) -> Tokenizer:
    """settings: "tokenizer" of config.json, which the file must fit."""
    return Tokenizer.load(Path(folder) / TOKENIZER, settings)


# --- tensors


def save_state(folder, store, step: int):
    """A checkpoint: the state of training after `step` steps, then the weights alone."""
    folder = Path(folder)
    _sync(folder / LOG)  # first, so that a checkpoint on disk has its records on disk
    flats = {"p": store.flat_p, "m": store.flat_m, "v": store.flat_v}
    state = {f"{part}.{name}": view for part, flat in flats.items() for name, view in store.named(flat).items()}
    _save_tensors(folder / STATE, state, step)
    save_weights(folder, store, step)


def save_weights(folder, store, step: int, name: str = WEIGHTS):
    _save_tensors(Path(folder) / name, store.p, step)


def save_quantized(folder, tensors: dict):
    """tensors: every one of quantized.empty_tensors, filled."""
    _save_tensors(Path(folder) / WEIGHTS, tensors, 0)


def load_state(folder, store) -> int:
    """Weights and moments into `store` (made with optimizer=True) -> the step that they follow."""
    if not (Path(folder) / STATE).exists() and is_run(folder) and "quantized" in load_config(folder):
        raise MinisbError(f"{folder} is quantised and cannot be trained: go on with the run it was made from.")
    targets = {}
    for part, flat in (("p", store.flat_p), ("m", store.flat_m), ("v", store.flat_v)):
        targets |= {f"{part}.{name}": view for name, view in store.named(flat).items()}
    step = _load_tensors(Path(folder) / STATE, targets, store.xp)
    store.round()
    return step


def load_weights(folder, store, name: str = WEIGHTS) -> int:
    """Weights into `store` -> the step that they follow."""
    step = _load_tensors(Path(folder) / name, store.p, store.xp)
    store.round()
    return step


def load_model(folder, device: str = "auto", native: str = "all", threads: int | None = None) -> SpikingBrain:
    """The model of a run, ready for forward, prefill and step, with its `tokenizer` beside it."""
    settings = load_config(folder)
    be = choose(device, native, threads)[0]
    if "quantized" in settings:
        model = SpikingBrain(settings["model"], be, _load_quantized(folder, settings, be.xp))
    else:
        model = SpikingBrain(settings["model"], be)
        load_weights(folder, model.store)
    model.tokenizer = load_tokenizer(folder, settings.get("tokenizer"))
    return model


def _load_quantized(folder, settings: dict, xp) -> QuantizedStore:
    """The int8 weights of a run.  MinisbError if they are damaged, or of a later version."""
    found, path = settings["quantized"], Path(folder) / CONFIG
    version = found.get("format") if isinstance(found, dict) else None
    if version != QUANTIZED_FORMAT:
        raise MinisbError(f"{path} has quantised format {version}; this version reads format {QUANTIZED_FORMAT}.")
    group, everything, k = found.get("group"), specs(settings["model"]), found.get("k")
    inputs = input_names(settings["model"])
    fits = isinstance(k, dict) and all(isinstance(k.get(n), int | float) and k[n] > 0 for n in inputs)
    if group not in (GROUP, "row") or not fits:
        raise MinisbError(f"{path} is damaged: its quantised section gives no group of {GROUP} or row, or no k.")
    size, left = GROUP if group == GROUP else None, float_routers(settings["model"])
    tensors = empty_tensors(everything, size, bool(found.get("embedding")), left)
    _load_tensors(Path(folder) / WEIGHTS, tensors, np, exact=True)
    return store_of(tensors, k, xp)


def _save_tensors(path: Path, tensors: dict, step: int):
    tensors = {name: on_host(x) for name, x in tensors.items()}
    metadata = {"step": str(step), "crc32": str(_checksum(tensors, step))}
    # Not save_file: it writes under a temporary name of its own, which a kill would leave behind.
    _write(path, lambda temporary: temporary.write_bytes(save(tensors, metadata)))


def _load_tensors(path: Path, targets: dict, xp, exact: bool = False) -> int:
    """Every tensor of `targets` is filled from the file -> the step in its metadata.

    exact: types must agree too.
    """
    if not path.exists():
        raise MinisbError(f"{path} is missing: there is no checkpoint to read.")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            step, crc = int(metadata["step"]), metadata["crc32"]
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise MinisbError(f"{path} is damaged: {' '.join(str(error).split())}.") from error
    for name, target in targets.items():
        if name not in found or found[name].shape != target.shape:
            shape = found[name].shape if name in found else "missing"
            raise MinisbError(f"{path} does not fit {CONFIG}: {name} should be {target.shape} and is {shape}.")
        if exact and found[name].dtype != target.dtype:
            raise MinisbError(
                f"{path} does not fit {CONFIG}: {name} should be {target.dtype} and is {found[name].dtype}."
            )
    if crc != str(_checksum(found, step)):
        raise MinisbError(f"{path} is damaged: its checksum differs.")
    for name, target in targets.items():
        target[...] = xp.asarray(found[name])
    return step


def _checksum(tensors: dict, step: int) -> int:
    """safetensors notices a short file, not a flipped bit inside a tensor."""
    crc = zlib.crc32(str(step).encode())
    for name in sorted(tensors):
        crc = zlib.crc32(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8), crc)
    return crc


# --- the log


def append_log(folder, record: dict):
    with open(Path(folder) / LOG, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_log(folder) -> list[dict]:
    """The records, in order; a line that a kill or a full disk left half written is not one."""
    try:
        lines = (Path(folder) / LOG).read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [record for record in map(_parse_record, lines) if record]


def trim_log(folder, step: int):
    """Drop the records of steps after `step`, which are about to be done again."""
    kept = "".join(json.dumps(record) + "\n" for record in read_log(folder) if record["step"] <= step)
    _write(Path(folder) / LOG, lambda path: path.write_text(kept, "utf-8"))


def _parse_record(line: str) -> dict | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


# --- disk


def _write(path: Path, write):
    """write(temporary path), then rename; the rename itself reaches the disk before this returns."""
    try:
        with atomic_write(path) as temporary:
            write(temporary)
        _sync(path.parent)
    except (SafetensorError, OSError) as error:
        raise MinisbError(f"cannot write {path}: {' '.join(str(error).split())}.") from error


def _sync(path: Path):
    """Flush a file or a folder's list of names to disk, where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # not there yet, or Windows, which opens no folder
        return
    try:
        os.fsync(handle)
    except OSError:  # Windows wants write access; some network disks refuse folders
        pass
    finally:
        os.close(handle)
