"""Tables: arrays in the cache whose rows are computed once, by one process or several, and outlive a kill.

A table keeps what took long: decoded folders, drawn samples, latents, contexts of captions. A kill loses the last seconds of work.
"""
import hashlib
import io
import json
import math
import os
import secrets
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from cli import place, share
from files import atomic_file, cache_folder, locked, writing

SECONDS = 10                           # of work between two records of which rows of a table are there
BLOCK = 2 ** 20                        # bytes of a table that are checked at once, at least a row
CHECKED = 2 ** 32                      # bytes of a table that are checked when it is opened: of a larger one evenly spread blocks


class Column:
    """The .npy of one array of a Table, made if it is not there, whose rows are of one shape; it may grow."""

    def __init__(self, path, shape, dtype):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        mode = "r+b" if os.access(path.parent, os.W_OK) else "rb"        # a whole table may lie where it cannot be changed
        self.file = open(path, mode, opener=lambda path, flags: os.open(path, flags | os.O_CREAT | os.O_NONBLOCK, 0o666))
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
            with writing(self.file.name):
                raise OSError(error.errno, f"{error.strerror}, where {wanted - size:,} bytes are needed") from None

    def read(self, start, stop):
        """The bytes of the rows from start to stop."""
        return os.pread(self.file.fileno(), (stop - start) * self.row_size, self.start + start * self.row_size)

    def write(self, row, content):
        """Put the bytes of a row into the file; `flush` brings them to the disk."""
        self.file.seek(self.start + row * self.row_size)
        self.file.write(content)

    def flush(self):
        """Wait until what was written is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())


def checksum(parts):
    """A CRC-32 of a row's bytes, in parts; 1 in place of 0, which says in a record that there is no such row."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value or 1


class Table:
    """Arrays whose rows are computed once: a folder of the cache, which has a record of the rows that are there.

    name and about, plain values, tell tables apart; rows: how many are wanted, and a later call may want more; columns: {name:
    (shape of a row, dtype)}. The folder holds an .npy a column; crc32.npy, for each row the checksum over all columns once it is on
    the disk, and 0 before; meta.json, which says what it is. A row that was deleted, cut off or does not have its checksum is no
    longer there. All are compared when a table is opened, at about a second a gigabyte; of more than CHECKED bytes evenly spread
    blocks, each time others.

    Several starts may open and fill one table at once: a file is made if it is not there, and only ever grows, and they write
    equal bytes. OSError if the disk is full.
    """

    def __init__(self, name, about, rows, columns, cache=None):
        kinds = {key: (shape, np.dtype(dtype).str) for key, (shape, dtype) in columns.items()}
        meta = json.dumps(dict(about=about, columns=kinds)).encode()
        self.folder = cache_folder(cache) / f"{name}-{hashlib.sha256(meta).hexdigest()[:16]}"
        self.folder.mkdir(exist_ok=True)
        described = self.folder / "meta.json"
        self.rows, self.written, self.flushed_at = rows, {}, time.monotonic()
        self.record, *self.columns = (Column(self.folder / f"{key}.npy", *kind)
                                      for key, kind in {"crc32": ((), np.uint32), **columns}.items())
        with locked(self.record.file):
            known = described.is_file() and described.read_bytes() == meta
            whole = min(column.whole_rows() for column in self.columns) if known else 0
            self.forget(whole + np.flatnonzero(self.recorded(0, self.record.whole_rows())[whole:]))
            if not known:
                with atomic_file(described) as file:
                    file.write(meta)
            for column in (*self.columns, self.record):  # no file grows before the record is right
                column.reserve(rows)
        if os.environ.get("LOCAL_RANK", "0") == "0":     # one process of a machine is enough, see `fill`
            self.check()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.flush()                                     # what was computed before an error or Ctrl-C is kept
        for column in (*self.columns, self.record):
            column.file.close()

    def recorded(self, start, stop):
        """The checksums (stop - start,) of rows, 0 of one that is not there."""
        return np.frombuffer(self.record.read(start, stop), np.uint32)

    def forget(self, rows):
        """Record that rows (n,) are not there."""
        for row in rows:
            self.record.write(row, bytes(4))
        if len(rows):
            self.record.flush()

    def differing(self, start, stop):
        """The numbers of the rows from start to stop that are there, and are not what their checksums say."""
        known = self.recorded(start, stop)
        contents = [(column.row_size, memoryview(column.read(start, stop))) for column in self.columns] if known.any() else []
        return [start + i for i in np.flatnonzero(known)
                if checksum(content[i * size:(i + 1) * size] for size, content in contents) != known[i]]

    def check(self):
        """Have damaged rows no longer be there; of a large table only some are looked at, see CHECKED."""
        size = sum(column.row_size for column in self.columns)
        rows = max(1, BLOCK // size)                     # of a block
        every = max(1, math.ceil(self.rows * size / CHECKED))
        starts = range(secrets.randbelow(every) * rows, self.rows, every * rows)
        with ThreadPoolExecutor() as threads:
            found = threads.map(lambda start: self.differing(start, min(start + rows, self.rows)), starts)
            damaged = [row for part in found for row in part]
        if not damaged:
            return
        if not self.record.file.writable():
            raise OSError(f"{len(damaged)} rows of {self.folder} are damaged, and it may not be written: choose another --cache")
        with locked(self.record.file):                   # another start may have mended them by now
            self.forget([row for row in damaged if self.differing(row, row + 1)])

    def write(self, rows, values):
        """Put values into rows (n,): for each column an array (n, …), or what broadcasts to it. They count from `flush` on."""
        contents = [np.broadcast_to(value, (len(rows), *column.shape)).astype(column.dtype)
                    for column, value in zip(self.columns, values, strict=True)]
        for row, *parts in zip(rows, *contents):
            parts = [part.tobytes() for part in parts]
            for column, part in zip(self.columns, parts):
                column.write(row, part)
            self.written[row] = checksum(parts)
        if time.monotonic() - self.flushed_at >= SECONDS:
            self.flush()

    def flush(self):
        """Record what was written, after it has come to the disk."""
        if not self.written:
            return
        for column in self.columns:
            column.flush()
        for row, value in self.written.items():
            self.record.write(row, np.uint32(value).tobytes())
        self.record.flush()
        self.written, self.flushed_at = {}, time.monotonic()

    def missing(self):
        """The numbers (n,) of the rows that are not there."""
        return np.flatnonzero(self.recorded(0, self.rows) == 0)

    def arrays(self):
        """The columns (rows, …), memory-mapped, not writable."""
        return [np.memmap(column.file, column.dtype, "r", column.start, (self.rows, *column.shape))
                for column in self.columns]


def fill(table, compute, what, shared=True):
    """Have the missing rows of a table computed, by each process its share of them, or else by this one alone.

    compute(rows) yields, batch by batch, some of these rows and their values as `Table.write` takes them; what: names the work on
    the progress bar. ValueError if another process has not done its share in this table.
    """
    together = shared and dist.is_initialized()
    if together:
        dist.barrier()                                   # the rows of all machines are checked
    rows = table.missing()
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
