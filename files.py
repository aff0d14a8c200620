"""Files: written whole or not at all, never over what is not ours; cached in one place, downloaded once and checked.

A command replaces a file only if this project wrote it for the same purpose, see `check_output`.
"""
import codecs
import csv
import errno
import fcntl
import gzip
import hashlib
import http.client
import io
import os
import re
import secrets
import stat
import sys
import urllib.request
import warnings
import zipfile
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from cli import parent_of

TEMPORARY = ".diffusion-transformers.tmp"        # how names of files end that are being written: nobody else's do
ROOM, RIGHTS = "make room on the disk, or choose a place on another one", "choose a folder in which you may write"
REMEDIES = {errno.ENOSPC: ROOM, errno.EDQUOT: ROOM, errno.EFBIG: ROOM, errno.EACCES: RIGHTS, errno.EPERM: RIGHTS,
            errno.EROFS: RIGHTS, errno.ENOENT: "make its folder", errno.EEXIST: "choose another name",
            errno.ENOTDIR: "choose another folder", errno.EIO: "look at the disk"}       # of what a disk answers that takes no file
UNPACKED, RATIO = 2 ** 27, 64                    # bytes that a compressed file may become, or times its own


# What a command may read

def readable(path):
    """The path of a file to read.  OSError if there is none, or what may never end: a pipe, a socket, a device."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if not path.is_file():
        raise OSError(f"{path} is a {'folder' if path.is_dir() else 'pipe, a socket or a device'}: a regular file is needed")
    return path


def check_unpacked(path, size):
    """ValueError if a compressed file becomes more bytes than one of its size may; a hostile one becomes a thousandfold."""
    limit = max(UNPACKED, RATIO * os.path.getsize(path))
    if size > limit:
        raise ValueError(f"it becomes more than {limit:,} bytes, {RATIO} times its own or {UNPACKED:,}: where this is meant, leave "
                         "it uncompressed")


def open_npz(path):
    """An .npz, whose arrays NumPy reads when they are asked for.  ValueError or OSError if it is none, or as `check_unpacked`."""
    if not zipfile.is_zipfile(readable(path)):
        raise ValueError("it is no zip archive of arrays, or was cut off")
    with zipfile.ZipFile(path) as archive:
        check_unpacked(path, sum(entry.file_size for entry in archive.infolist()))       # of which no entry gives more
    return np.load(path, allow_pickle=False)


def unpacked(path):
    """The bytes in a .gz.  ValueError, OSError, EOFError or zlib.error if it is damaged, or as `check_unpacked`."""
    content = bytearray()
    with gzip.open(readable(path)) as file:
        while piece := file.read(2 ** 20):
            content += piece
            check_unpacked(path, len(content))
    return bytes(content)


MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
         codecs.BOM_UTF16_BE: "utf-16"}              # byte-order marks; UTF-16's is how UTF-32's begins
THOUSANDS = re.compile(r"[-+]?\d{1,3}(\.\d{3})+(,\d+)?")
DECIMAL_COMMA = re.compile(r"([-+]?\d+),(\d+(?:[eE][-+]?\d+)?)")


def decoded_text(raw, path, errors="strict"):
    """The text in the bytes of a file that a user brings, its lines ended by "\n": in UTF-8, or as a byte-order mark says.

    ValueError, naming the path, if it is in another encoding: Latin-1, Windows-1252 and their like cannot be told apart. With
    errors="replace" what cannot be read becomes U+FFFD.
    """
    encoding = next((encoding for mark, encoding in MARKS.items() if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(encoding, errors)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in {encoding.upper()}, which its byte {error.start + 1} is not: an editor, or "
                         "iconv, saves it as UTF-8") from None
    if "\0" in text and errors == "strict":              # every other byte of UTF-16
        raise ValueError(f"{path} is not a text in UTF-8, as it holds zero bytes: if it is UTF-16, save it as UTF-8")
    return text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")


def read_text(path, errors="strict"):
    """The text of a user's file, see `decoded_text`; OSError if it cannot be read."""
    return decoded_text(readable(path).read_bytes(), path, errors)


def csv_rows(text, path, restval=None):
    """The columns of a table and its rows, dicts of text, as a program or a spreadsheet wrote it.

    Cells stand between commas, semicolons or tabs; beside semicolons or tabs numbers may have decimal commas. Rows of empty cells
    are left out. A row that is short has restval in the cells that it lacks, one that is long has the key None. ValueError if it
    is no CSV file.
    """
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text), restval=restval, delimiter=delimiter, skipinitialspace=True)
    try:
        rows = [row for row in reader if any(row.values())]
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}") from None
    cells = [cell for row in rows for cell in row.values() if isinstance(cell, str)] if delimiter != "," else []
    if any(map(DECIMAL_COMMA.fullmatch, cells)):
        if thousands := next(filter(THOUSANDS.fullmatch, cells), None):
            raise ValueError(f"{path} writes {thousands} for a number, with a point between thousands: save it without")
        rows = [{name: DECIMAL_COMMA.sub(r"\1.\2", cell) if isinstance(cell, str) and DECIMAL_COMMA.fullmatch(cell) else cell
                 for name, cell in row.items()} for row in rows]
    return tuple(reader.fieldnames or ()), rows


# What is written, and where

def cache_folder(cache=None):
    """The folder of caches and downloads, made if it does not exist: `cache`, or the user's.  OSError if it cannot be had."""
    try:
        folder = Path(cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "diffusion-transformers"))
    except RuntimeError:                                 # of a user whom the machine does not know, as in a container
        raise OSError("there is no home for the cache: --cache DIR names a folder for it") from None
    with writing(f"the cache {folder}, in whose place --cache DIR names another"):
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
    """Remove what killed writers left in a folder, once a process. Who still writes holds a lock, or begins again."""
    for left in folder.glob(f".*.{'[0-9a-f]' * 8}{TEMPORARY}"):
        with suppress(OSError), open(left, "r+b", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW)) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


@contextmanager
def writing(path):
    """Have an error of the disk, also one behind others, name the file that was to be written and say what to do."""
    try:
        yield
    except Exception as error:
        remedy = REMEDIES.get(getattr(error, "errno", None))
        while remedy is None and error.__context__:      # torch and zipfile hide a full disk behind errors of their own
            error = error.__context__
            remedy = ROOM if REMEDIES.get(getattr(error, "errno", None)) == ROOM else None
        if remedy is None:
            raise
        raise OSError(f"cannot write {path}: {error.strerror}: {remedy}") from None


@contextmanager
def atomic_file(path, check=lambda: None):
    """A binary file to write: under a temporary name beside the target, flushed and renamed when all is well.

    A reader never sees half a file; an error, a full disk or a kill leaves the old one whole. Two may write the same file at once:
    each has a temporary name of its own, and the last one's content stays. The mode is the old file's, or a new file's. A link
    stays, and the file that it names is written. check: called at last, may refuse to put the file in place by an error.
    """
    target = Path(os.path.realpath(path))
    remove_leftovers(target.parent)
    with writing(path):
        try:
            while True:
                temporary = target.with_name(f".{target.name[:48]}.{secrets.token_hex(4)}{TEMPORARY}")      # 255 bytes at most
                with open(temporary, "x+b") as file, locked(file):
                    if not temporary.exists():           # another start took it for a leftover, before it had the lock
                        continue
                    with suppress(FileNotFoundError):
                        os.fchmod(file.fileno(), target.stat().st_mode & 0o777)
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                    check()
                    os.replace(temporary, target)
                    return
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def sole_writer(path):
    """Keep a second process from writing the same run, by a lock on an empty file beside it, which is removed at the end.

    ValueError if one does already, or if something else has the lock's name.
    """
    run = Path(os.path.realpath(path))
    lock = run.with_name(f".{run.name}.lock")
    with writing(lock):
        file = os.fdopen(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666), "rb")
    with file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size:
            raise ValueError(f"{lock} is not empty, and no lock of train.py: move it away")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)             # the kernel lets go of it however the process ends
            sole = os.path.samestat(found, os.stat(lock))                # and nobody removed it meanwhile
        except (BlockingIOError, FileNotFoundError):
            sole = False
        except OSError as error:                         # the disk has no locks
            print(f"warning: the disk of {path} has no locks ({error.strerror}): nothing keeps a second run from writing it, too",
                  file=sys.stderr)
            sole = True
        if not sole:
            raise ValueError(f"{path} is being written by another run: choose another --out") from None
        try:
            yield
        finally:
            if not os.fstat(file.fileno()).st_size:
                lock.unlink(missing_ok=True)


def append(path, rows):
    """Add rows, a text, to a table: after an error of the disk or a signal none of them is in it."""
    with writing(path), open(path, "ab+", buffering=0) as file:
        size, left = file.tell(), rows.encode("utf-8", "surrogateescape")
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":       # an editor left out the last one
            left = b"\n" + left
        try:
            while left:                                  # a disk that becomes full takes a part
                left = left[file.write(left):]
        except BaseException:
            file.truncate(size)
            raise


# What a command may write

class Purpose(NamedTuple):
    """What a file is written for."""

    what: str                          # it is, in words
    ending: str                        # of its name
    ours: object = None                # (path, purpose) -> whether this project wrote a file for this; None: not replaced unasked


def mark(purpose):
    """What a picture, or an .npz, says of itself."""
    return f"diffusion-transformers: {purpose}"


def own_png(path, purpose):
    """Whether a PNG is marked; earlier versions' have no text at all, and are known by the grid's frame, or a chart's colours."""
    with Image.open(path, formats=["PNG"]) as image:
        if image.info or image.mode not in ("L", "RGB"):
            return image.info.get("Software") == mark(purpose)
        pixels = np.asarray(image)
    edge = np.ones(pixels.shape[:2], bool)
    edge[2:-2, 2:-2] = False
    if (pixels[edge] == 128).all():    # pictures.grid's gap, and within it tiles of more than 32 pixels a side
        return min(pixels.shape[:2]) > 36 and bool((pixels[[2, -3]] != 128).any())
    lines = [(pixels == grey).all(axis=-1).sum() > 500 for grey in (51, 225)]            # pictures.INK and GRID
    return pixels.ndim == 3 and bool((pixels[edge] == 255).all()) and all(lines)


def own_gif(path, purpose):
    """Whether a GIF is marked; earlier versions' have no comment, and the times for which pictures.write_gif shows each frame."""
    with Image.open(path, formats=["GIF"]) as image:
        if "comment" in image.info:
            return image.info["comment"] == mark(purpose).encode()
        first = image.info.get("duration", 0)
        image.seek(image.n_frames - 1)
        return image.info.get("loop") == 0 and image.n_frames > 1 and first % 100 == 0 < first and image.info["duration"] >= 2000


def own_samples(path, purpose):
    """Whether an .npz is marked; earlier versions' hold images whose labels take turns, and nothing else."""
    with open_npz(path) as archive:
        if archive.zip.comment or set(archive.files) != {"arr_0", "arr_1"}:
            return archive.zip.comment == mark(purpose).encode()
        labels = archive["arr_1"]
    turn = len(set(labels.tolist()))
    return labels.dtype == np.int64 and 1 < turn < len(labels) and np.array_equal(labels, np.resize(labels[:turn], len(labels)))


def own_reference(path, purpose):
    """Whether an .npz holds what features.save_statistics writes, of evaluate.py and not of the cache."""
    with open_npz(path) as archive:
        return {"mu", "sigma", "features", "features_sha256"} <= set(archive.files) and "rows" not in archive


def header_of(path):
    """The column names of a table, [] of an empty file."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        return next(csv.reader([file.readline(10_000)]), [])


def own_empty_log(path, purpose):
    """Whether a log of train.py has no rows: that of a start that ended before its first save."""
    return header_of(path)[:3] == ["step", "images", "loss"] and path.read_bytes().count(b"\n") < 2


def own_scores(path, purpose):
    """Whether a table has the columns of evaluate.py; an empty file is as good as none."""
    columns = ["samples", "step", "n", "reference", "reference_n", "features", "features_sha256"]
    return not path.stat().st_size or header_of(path)[:len(columns)] == columns


def own_page(path, purpose):
    """Whether a page begins as companion.py's do."""
    with open(path, "rb") as file:
        return b'</title>\n<link rel="icon" href="data:,"/>\n<style>\n' in file.read(2000)


PURPOSES = {
    "run": Purpose("a run", ".pt"),
    "slim run": Purpose("a slim run", ".pt"),            # perhaps the only copy of days of training
    "new log": Purpose("the empty log of a new run", ".csv", own_empty_log),
    "log": Purpose("the log of a run that is resumed", ".csv", lambda path, purpose: True),       # reports.Log keeps other files
    "picture": Purpose("a picture of train.py", ".png", own_png),
    "samples": Purpose("a picture of samples", ".png", own_png),
    "sample": Purpose("one sample", ".png"),             # of a folder, in which those of two calls are not mixed
    "trajectory": Purpose("a way from noise to images", ".gif", own_gif),
    "images": Purpose("an .npz of sample.py", ".npz", own_samples),
    "reference": Purpose("a measured reference of evaluate.py", ".npz", own_reference),
    "scores": Purpose("a table of evaluate.py", ".csv", own_scores),
    **{f"figure {name}": Purpose(f"the figure of plot.py {name}", ".png", own_png)
       for name in ("curves", "schedules", "noising", "guidance", "swissroll")},
    "way": Purpose("a way from noise to the roll", ".gif", own_gif),
    "study": Purpose("the chart of a study", ".png", own_png),
    "page": Purpose("a page of companion.py", ".html", own_page),
}


def check_output(path, purpose, inputs=(), overwrite=None):
    """ValueError or OSError, in one line, where a command may not write a file for a purpose, a key of PURPOSES.

    It may if there is none, or one that this project wrote for the same purpose, or with overwrite any regular file but a run of
    train.py. It never may replace one of its inputs, paths that it reads, nor what is no regular file. A link stands for the file
    that it names. Commands ask before the work, and `output_file` once more when it puts the file in place.
    """
    what, ending, ours = PURPOSES[purpose]
    target = Path(os.path.realpath(path))
    if Path(path).suffix.lower() != ending:
        raise ValueError(f"{path}: the name of {what} must end in {ending}")
    parent_of(path)
    check_access(path, target.parent)
    if not os.path.lexists(target):
        return
    if not target.is_file():
        raise ValueError(f"{path} is no regular file, and stays as it is: choose another name")
    if any(os.path.exists(given) and os.path.samefile(given, target) for given in inputs):
        raise ValueError(f"{path} is read by this command, which would replace it: choose another name")
    check_access(path, target)
    if overwrite and not holds_run(target):
        return
    if overwrite or not known(target, purpose):
        remedy = ", or --overwrite replaces it" if overwrite is False else ""
        what = "replaced by no other command, as it holds a run of train.py" if overwrite else f"not {what}"
        raise ValueError(f"{path} exists, and is {what}: choose another name, or move it away{remedy}")


def check_access(path, place):
    """OSError if a file, or a folder for it, does not exist or cannot be written."""
    if not place.exists():
        raise OSError(f"{path}: the folder {place} does not exist")
    if not os.access(place, os.W_OK):
        raise OSError(f"cannot write {path}: {place} may not be written: {RIGHTS}")


def known(path, purpose):
    """Whether this project wrote a file for a purpose: what cannot be read it did not."""
    ours = PURPOSES[purpose].ours
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")              # of images that are too large, which then are not ours
            return bool(ours and ours(path, purpose))
    except Exception:                                    # Pillow, zipfile and NumPy raise anything at all on a damaged file
        return False


def holds_run(path):
    """Whether a file, whatever its name, is a checkpoint with AdamW's moments, which can be trained on."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(entry.filename.endswith("/data.pkl") and not entry.compress_type and b"exp_avg" in archive.read(entry)
                       for entry in archive.infolist())
    except Exception:                                    # see above
        return False


@contextmanager
def output_file(path, purpose, inputs=(), overwrite=None):
    """An `atomic_file` to write for a purpose, see `check_output`."""
    with atomic_file(path, lambda: check_output(path, purpose, inputs, overwrite)) as file:
        yield file


def sha256_of(path):
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(readable(path), "rb") as file:
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
