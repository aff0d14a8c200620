"""Tensors of files that anyone may have made: .pt, of which only plain values and tensors are read, and .safetensors.

Nothing that runs code is unpickled, checksums are compared, and what would take more memory than the file has bytes is refused
before it does. What the tensors mean is checkpoint.py's and models.py's.
"""
import argparse
import io
import json
import math
import mmap
import os
import pickletools
import re
import warnings
import zipfile
from pathlib import Path

import torch

from files import readable

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
HEADER = 2 ** 24                                 # bytes of a .safetensors's header at most: that of 10,000 tensors has a million
MOST_NESTED = 10 ** 7                            # parts of tuples in tuples, which a second follows; a run has thousands
MOST_PARTS = 10 ** 6                             # of a .pt, of which a name, a number or a tensor is one; a run has thousands


def damaged(path):
    """The name of a record in a zip archive whose checksum is wrong, or None: torch writes checksums and does not read them.

    A compressed record is damaged, too: torch writes none, and would map its bytes as they are.
    """
    with zipfile.ZipFile(path) as archive:
        return next((entry.filename for entry in archive.infolist() if entry.compress_type), None) or archive.testzip()


def tensors_in(content):
    """The tensors of nested dicts and lists.  ValueError where parts lie in themselves, or in one another millions of times, which
    takes a file few bytes."""
    left, tensors, count = [content], [], 0
    while left:
        part, count = left.pop(), count + 1
        if count > MOST_PARTS:
            raise ValueError(f"it is nested, and has more than {MOST_PARTS:,} parts")
        tensors += [part] if torch.is_tensor(part) else []
        left += part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else ()
    return tensors


def check_tensors(path, content):
    """ValueError unless the tensors in the content of a file are plain and fit into it, where two may share bytes."""
    tensors = tensors_in(content)
    if any(tensor.is_complex() or tensor.layout != torch.strided for tensor in tensors):
        raise ValueError("a tensor is sparse or of complex numbers")
    count = sum(tensor.numel() for tensor in tensors)
    if count > 2 * path.stat().st_size:
        raise ValueError(f"its tensors have {count:,} numbers, for which it is too small")


def read(path):
    """The content of a .pt or .safetensors file, mapped. ValueError or OSError if it is missing, damaged, or would run code.

    Checksums are compared where there are some: by the first process of a machine alone. The others only map the file, and
    wait for it where processes join.
    """
    path = readable(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                  # of what is then refused
        try:
            archive = zipfile.is_zipfile(path)           # older files of torch are none, and cannot be mapped
            record = damaged(path) if archive and os.environ.get("LOCAL_RANK", "0") == "0" else None
            if record:
                raise ValueError(f"the checksum of its record {record} is wrong")
            for pickle in pickles(path, archive):
                check_pickle(pickle)
            with torch.serialization.safe_globals([argparse.Namespace]):             # training code's flags, which run nothing
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
            check_tensors(path, content)
            if not archive and not all(tensor.isfinite().all() for tensor in tensors_in(content)):       # without checksums
                raise ValueError("it holds numbers that are NaN or infinite")
            return content
        except (MemoryError, PermissionError):
            raise
        except Exception as error:                       # torch raises anything at all on a damaged file
            if found := re.search(r"Unsupported global: GLOBAL ([\w.]{1,100})", str(error)):
                raise ValueError(f"{path} holds Python objects, as {found[1]}, which could run code and are not loaded: save the "
                                 "network's state_dict(), or of released weights use the .safetensors file") from None
            reason = f" ({error})" if isinstance(error, ValueError) else ""
            raise ValueError(f"{path} is not a checkpoint of plain tensors: it is damaged or cut off{reason}, or holds Python "
                             "objects, which could run code and are not loaded (of released weights, use the .safetensors file)") from None


def pickles(path, archive):
    """The pickles in a .pt, open to read: of a zip archive its .pkl records, of an older file five that follow one another."""
    if not archive:
        with open(path, "rb") as file:
            yield from 5 * [file]
        return
    with zipfile.ZipFile(path) as records:
        for name in records.namelist():
            if name.endswith(".pkl"):
                yield io.BytesIO(records.read(name))


def check_pickle(file):
    """ValueError on a pickle that would take memory or time without end where torch sees no harm.

    One makes a bytearray of any length. Another makes tuples of tuples: as a key they are followed 2^n times. A tuple has at most
    as many parts as all the tuples have that were referred to before it.
    """
    parts, referred, before = {}, 1, ""
    for code, value, _ in pickletools.genops(file):
        if code.name == "GLOBAL" and value.endswith(" bytearray"):
            raise ValueError("it asks for memory that no tensor is in")
        if code.name in ("BINPUT", "LONG_BINPUT") and before.startswith("TUPLE"):
            parts[value] = referred
        referred += parts.get(value, 0) if code.name in ("BINGET", "LONG_BINGET") else 0
        if referred > MOST_NESTED:
            raise ValueError("its tuples lie in one another millions of times")
        before = code.name


def unique(pairs):
    """A JSON object's pairs as a dict.  ValueError on a name that stands twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name appears twice")
    return dict(pairs)


def read_safetensors(path):
    """Tensors by name, mapped from the file.  Layout: 8 bytes of header length, a JSON header, the raw tensors.

    ValueError unless the tensors follow one another without a gap to the end of the file, each as long as its shape says.
    """
    size = Path(path).stat().st_size
    try:
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            if not 8 <= start <= size:
                raise ValueError("it ends before its header does")
            if start > HEADER:
                raise ValueError(f"its header has {start:,} bytes, where {HEADER:,} hold any network's")
            header = json.loads(file.read(start - 8), object_pairs_hook=unique)
            header.pop("__metadata__", None)
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)           # read when touched, writable without the file
        tensors, place = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name} is of {str(entry['dtype'])[:20]}, and such numbers, as of quantised weights, are not "
                                 "read: take a file of F32, F16 or BF16")
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if len(shape) > 64 or any(type(number) is not int or not 0 <= number <= size for number in (*shape, begin, end)):
                raise ValueError(f"{name} has an impossible shape or place")         # before the sides are multiplied
            count = math.prod(shape)
            if begin != place or end - begin != count * dtype.itemsize or start + end > size:
                raise ValueError(f"{name}, bytes {begin} to {end}, leaves a gap, overlaps, or is not of its shape {shape}")
            flat = torch.frombuffer(content, dtype=dtype, count=count, offset=start + begin) if count else torch.empty(0)
            if not flat.isfinite().all():                # there is no checksum
                raise ValueError(f"{name} holds numbers that are NaN or infinite")
            tensors[name], place = flat.to(dtype).reshape(shape), end
        return tensors
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError, RuntimeError) as error:
        raise ValueError(f"cannot read the safetensors file {path}: {error}") from None
