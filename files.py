"""Files: written whole or not at all, cached in one place, downloaded once and checked; and tables that are filled once.

A table keeps what took long: decoded folders, drawn samples, latents, contexts of captions. A kill loses the last seconds of work.
"""
import fcntl
import hashlib
import http.client
import io
import json
import math
import os
import secrets
import sys
import time
import urllib.request
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from cli import place, share

SECONDS = 10                           # of work between two records of which rows of a table are there


def cache_folder(cache=None):
    """The folder of caches and downloads, made if it does not exist: `cache`, or the user's."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion-transformers"
    folder = Path(cache) if cache else user
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def locked(file):
    """Keep others from an open file who lock it, too, until the end or a kill; without effect where the disk has no locks."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)


@cache
def remove_leftovers(folder):
    """Remove what killed writers left in a folder, once a process. Who still writes holds a lock, or has written nothing yet."""
    for left in folder.glob(f".*.{'[0-9a-f]' * 8}.tmp"):
        with suppress(OSError), open(left, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if left.stat().st_size:
                left.unlink()


@contextmanager
def atomic_file(path):
    """A binary file to write: under a temporary name beside the target, flushed and renamed when all is well.

    A reader never sees half a file; an error, a full disk or a kill leaves the old one whole. Two may write the same file at once:
    each has a temporary name of its own, and the last one's content stays. The mode is the old file's, or a new file's.
    """
    path = Path(path)
    remove_leftovers(path.absolute().parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x+b") as file, locked(file):
            with suppress(FileNotFoundError):
                os.fchmod(file.fileno(), path.stat().st_mode & 0o777)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sha256_of(path):
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url, sha256, folder, what):
    """Fetch a file once into a folder -> its path. OSError if it cannot be had, or its SHA-256 differs (it is not kept)."""
    path = Path(folder) / url.rsplit("/", 1)[-1]
    if path.exists():
        found = sha256_of(path)
        if found != sha256:
            raise OSError(f"{path} is not {what}: its SHA-256 is {found}, not {sha256}; delete it")
        return path
    digest = hashlib.sha256()
    try:
        with atomic_file(path) as file, urllib.request.urlopen(url, timeout=30) as response:
            size = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
            if digest.hexdigest() != sha256:
                raise OSError(f"its SHA-256 is {digest.hexdigest()}, not {sha256}")
    except (OSError, http.client.HTTPException) as error:                # urllib's own errors are OSErrors
        raise OSError(f"cannot download {what} ({str(error).strip()}): fetch {url} yourself and put it at {path}") from None
    return path


class Column:
    """The .npy of one array of a Table, made if it is not there, whose rows are of one shape; it may grow."""

    def __init__(self, path, shape, dtype):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        mode = "r+b" if os.access(path.parent, os.W_OK) else "rb"        # a whole table may lie where it cannot be changed
        self.file = open(path, mode, opener=lambda path, flags: os.open(path, flags | os.O_CREAT, 0o666))
        self.start, self.row_size = len(self.header(0)), math.prod(self.shape) * self.dtype.itemsize         # in bytes

    def header(self, rows):
        """The bytes before the rows, as many whatever their number: NumPy leaves it room to grow."""
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, dict(descr=self.dtype.str, fortran_order=False, shape=(rows, *self.shape)))
        return file.getvalue()

    def whole_rows(self):
        """The number of rows for which the file is long enough."""
        return max(0, os.fstat(self.file.fileno()).st_size - self.start) // self.row_size

    def reserve(self, rows):
        """Take the disk's room for so many rows now, if the file has fewer: OSError if it is full, before the work, not in it."""
        file, wanted = self.file.fileno(), self.start + rows * self.row_size
        size = os.fstat(file).st_size
        if size >= wanted:
            return
        try:
            os.pwrite(file, self.header(rows), 0)
            if hasattr(os, "posix_fallocate"):           # macOS has none
                os.posix_fallocate(file, size, wanted - size)
            else:
                os.truncate(file, wanted)
        except OSError as error:
            os.truncate(file, size)
            if size:
                os.pwrite(file, self.header(self.whole_rows()), 0)
            raise OSError(error.errno, f"{error.strerror}, where {wanted - size:,} bytes are needed", str(self.file.name)) from None

    def write(self, row, content):
        """Put the bytes of a row, or of several that follow each other, into the file; `flush` brings them to the disk."""
        self.file.seek(self.start + row * self.row_size)
        self.file.write(content)

    def flush(self):
        """Wait until what was written is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())


class Table:
    """Arrays whose rows are computed once: a folder of the cache, which has a record of the rows that are there.

    name and about, plain values, tell tables apart; rows: how many are wanted, and a later call may want more; columns: {name:
    (shape of a row, dtype)}. The folder holds an .npy a column; done.npy, a byte a row, 1 once the row is on the disk; meta.json,
    which says what it is. Rows that were deleted or cut off are no longer there.

    Several starts may open and fill one table at once: a file is made if it is not there, and only ever grows, and they write
    equal bytes. OSError if the disk is full.
    """

    def __init__(self, name, about, rows, columns, cache=None):
        kinds = {key: (shape, np.dtype(dtype).str) for key, (shape, dtype) in columns.items()}
        meta = json.dumps(dict(about=about, columns=kinds)).encode()
        self.folder = cache_folder(cache) / f"{name}-{hashlib.sha256(meta).hexdigest()[:16]}"
        self.folder.mkdir(exist_ok=True)
        described = self.folder / "meta.json"
        self.rows, self.written, self.flushed_at = rows, [], time.monotonic()
        self.done, *self.columns = (Column(self.folder / f"{key}.npy", *kind)
                                    for key, kind in {"done": ((), np.uint8), **columns}.items())
        with locked(self.done.file):
            known = described.exists() and described.read_bytes() == meta
            claimed = self.record(self.done.whole_rows())
            whole = min(column.whole_rows() for column in self.columns) if known else 0
            if claimed[whole:].any():
                self.done.write(whole, bytes(len(claimed) - whole))
                self.done.flush()
            if not known:
                with atomic_file(described) as file:
                    file.write(meta)
            for column in (*self.columns, self.done):    # no file grows before the record is right
                column.reserve(rows)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.flush()                                     # what was computed before an error or Ctrl-C is kept
        for column in (*self.columns, self.done):
            column.file.close()

    def record(self, rows):
        """Whether each of the first rows (rows,) is there."""
        return np.frombuffer(os.pread(self.done.file.fileno(), rows, self.done.start), np.uint8) == 1

    def write(self, rows, values):
        """Put values into rows (n,): for each column an array (n, …), or what broadcasts to it. They count from `flush` on."""
        for column, value in zip(self.columns, values, strict=True):
            for row, content in zip(rows, np.broadcast_to(value, (len(rows), *column.shape)).astype(column.dtype)):
                column.write(row, content.tobytes())
        self.written.extend(rows)
        if time.monotonic() - self.flushed_at >= SECONDS:
            self.flush()

    def flush(self):
        """Record what was written, after it has come to the disk."""
        if not self.written:
            return
        for column in self.columns:
            column.flush()
        for row in self.written:
            self.done.write(row, b"\1")
        self.done.flush()
        self.written, self.flushed_at = [], time.monotonic()

    def missing(self):
        """The numbers (n,) of the rows that are not there."""
        return np.flatnonzero(~self.record(self.rows))

    def arrays(self):
        """The columns (rows, …), memory-mapped, not writable."""
        return [np.memmap(column.file, column.dtype, "r", column.start, (self.rows, *column.shape))
                for column in self.columns]


def fill(table, compute, what, shared=True):
    """Have the missing rows of a table computed, by each process its share of them, or else by this one alone.

    compute(rows) yields, batch by batch, some of these rows and their values as `Table.write` takes them; what: names the work on
    the progress bar. ValueError if another process has not done its share in this table.
    """
    rows, together = table.missing(), shared and dist.is_initialized()
    if together:
        dist.barrier()                                   # all have looked before the first one writes
        rows = rows[share(len(rows))]
    hidden = place()[0] > 0 or not sys.stderr.isatty()
    with tqdm(total=len(rows), desc=what, unit="image", disable=hidden) as bar, closing(compute(rows)) as batches:
        for batch, values in batches:
            table.write(batch, values)
            bar.update(len(batch))
    table.flush()
    if together:
        dist.barrier()
    if len(table.missing()):
        raise ValueError(f"{table.folder} is not complete: all processes need one cache, --cache DIR")
