"""Where downloads and encoded tokens live, and how a file gets there whole or not at all."""

import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from minisb.errors import MinisbError

CHUNK = 1 << 18  # bytes read from the network at a time
TIMEOUT = 30  # seconds without a byte before the network counts as gone


def cache_folder():
    """The folder for everything that can be made again: $MINISB_CACHE, or the platform's own."""
    if os.environ.get("MINISB_CACHE"):
        return Path(os.environ["MINISB_CACHE"])
    home = Path.home()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "minisb"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "minisb"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "minisb"


@contextmanager
def atomic_write(path):
    """Yields a temporary Path beside `path`; it becomes `path` on success and goes on any error.

    Readers therefore see the old file or the whole new one, never a half. The name holds the
    process id, so that two runs filling one cache do not write into each other's file.
    MinisbError if the folder cannot be made or written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _make_folder(path.parent)
    try:
        yield temporary
        _flush_to_disk(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise MinisbError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # after the rename there is nothing to remove
            temporary.unlink()


def _make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MinisbError(f"cannot make the folder {folder}: {error.strerror or error}") from error


def _flush_to_disk(path):
    """Without this a power cut can leave the new name on an empty file."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def fetch(url, path, sha256=None):
    """Makes sure that `path` holds the file at `url` and returns it; a second call downloads nothing.

    A broken download stays in `path`.part and the next call asks only for the rest (HTTP Range).
    `sha256` is the expected checksum in hex. Where it is None, nobody has published one: the
    checksum of the first download is kept in `path`.sha256 and every later use is held to that,
    which finds damage on this disk but not a wrong first download.
    MinisbError: no network, a wrong checksum, or a disk that cannot be written.
    """
    path = Path(path)
    if not path.exists():
        part = path.with_name(path.name + ".part")
        _make_folder(path.parent)
        try:
            _download(url, part)
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a URL that is none
            raise MinisbError(_by_hand(url, path, error)) from error
        _verify(part, sha256)
        os.replace(part, path)
    _verify(path, sha256 or _recorded_checksum(path))
    return path


def _by_hand(url, path, error):
    reason = " ".join(str(getattr(error, "reason", "") or error or type(error).__name__).split())
    return (
        f"cannot download {url} ({reason}): run again to go on, or, without a network, "
        f"download it elsewhere and put it at {path}"
    )


def _download(url, part):
    """Appends to `part` what is missing of `url`. OSError if the connection fails or ends early."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if not have or error.code != 416:
            raise
        if error.headers.get("Content-Range", "").endswith(f"/{have}"):  # all was here already
            return
        part.unlink()  # longer than the whole file, so no part of it
        return _download(url, part)
    with response:
        if response.status != 206:  # this server knows no Range: it sends all of it again
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with open(part, "ab" if have else "wb") as file:
            _copy_with_bar(response, file, have, total)
    got = part.stat().st_size
    if total is not None and got != total:
        raise OSError(f"the connection ended after {got} of {total} bytes")


def _copy_with_bar(response, file, have, total):
    bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc="download", disable=None)
    with bar:
        while chunk := response.read(CHUNK):
            file.write(chunk)
            bar.update(len(chunk))


def _verify(path, sha256):
    """MinisbError if the file's checksum is another; a bad .part is deleted, so that a rerun starts fresh."""
    if sha256 is None:
        return
    found = _file_sha256(path)
    if found == sha256:
        return
    if path.suffix == ".part":
        path.unlink()
        raise MinisbError(f"the download of {path.stem} has sha256 {found}, not {sha256}: run again to fetch it anew")
    raise MinisbError(f"{path} has sha256 {found}, not {sha256}: delete it and run again")


def _recorded_checksum(path):
    """The checksum of the file's first use, written down now if this is it."""
    record = path.with_name(path.name + ".sha256")
    if not record.exists():
        with atomic_write(record) as temporary:
            temporary.write_text(_file_sha256(path) + "\n", encoding="ascii")
    return record.read_text(encoding="ascii").strip()


def _file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
