"""Image files: one as a viewer shows it, and lists of them, decoded once into a table of uint8.

They are centre-cropped as in ADM (Dhariwal & Nichol 2021), and have three channels unless all are grey. Which files of a folder
count, and what belongs to them, is folders.py's.
"""
import hashlib
import io
import json
import os
import shutil
import signal
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import cache, lru_cache, partial
from glob import escape
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait

import numpy as np
from PIL import Image, ImageCms, ImageFile

from files import readable
from tables import Table, fill

MAX_PIXELS = 10 ** 8             # of a file, unless --max-pixels allows more: they take 1.1 GB while they are converted
UNREAD = {"EPS", "PDF", "PALM", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}   # EPS would run Ghostscript, others Pillow cannot read
MAX_PIXELS_HELP = f"refuse image files of more pixels (default: {MAX_PIXELS:,})"
STRIP = 2 ** 22                  # pixels that are converted at once
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}                 # by EXIF's orientation
FOR_A_WORKER = 256               # image files that are worth another process, which takes a second to start
BAD = 255                        # in place of the number of channels
VERSION = 2                      # of the pixels that a file becomes: tables of another one are decoded anew


def center_crop(image, size):
    """A Pillow image as a size x size one: halve by boxes while twice too large, scale bicubically, crop the centre (ADM)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


# One file

def allow_pixels(count):
    """From now on take image files of up to so many pixels, or MAX_PIXELS."""
    Image.MAX_IMAGE_PIXELS = count or MAX_PIXELS


allow_pixels(MAX_PIXELS)


@cache
def endings():
    """The endings of the image files that can be read."""
    return {ending for ending, kind in Image.registered_extensions().items() if kind not in UNREAD}


@cache
def formats():
    """Their names in Pillow."""
    Image.init()
    return sorted({*Image.OPEN} - UNREAD)


@contextmanager
def opened(path):
    """A Pillow image of a file, of which the header is read.  ValueError, naming the file, if that or what is done with it fails.

    What is broken beside the pixels, as a text or a checksum of one, does not count.
    """
    try:
        with open(readable(path), "rb") as file, warnings.catch_warnings():        # by a name, Pillow maps a TIFF and turns it wrongly
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            ImageFile.LOAD_TRUNCATED_IMAGES = True
            try:
                image = Image.open(file, formats=formats())
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = False  # of pixels none may lack
            yield image
    except FileNotFoundError:
        raise
    except Exception as error:                           # decoders raise anything at all on a damaged file
        reason = str(error).partition(" <_io")[0] or type(error).__name__                # Pillow names the open file as Python does
        if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
            reason = f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels; --max-pixels allows more"
        raise ValueError(f"cannot read the image {path}: {reason}") from None


@contextmanager
def silent():
    """Keep libraries in C from writing on stderr, as libtiff does of a damaged file: what is wrong with it our line says."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def open_image(path, background="white"):
    """Open an image file as a viewer shows it, as Pillow "L" (grey) or "RGB": upright, in sRGB, transparency over a background,
    of an animation the first picture.

    ValueError, naming the file, if it cannot be decoded, has more pixels than are allowed, or pixels of an unknown range.
    """
    with opened(path) as image:
        scale_transparent_colour(image)
        after = image.load_end

        def load_end():                                  # reads what comes after the pixels
            with suppress(Exception):
                after()
        image.load_end = load_end
        with silent():
            image.load()
        rows, shown = max(1, STRIP // image.width), None
        for top in range(0, image.height, rows):
            part = image.crop((0, top, image.width, min(top + rows, image.height)))
            part = as_shown(part, image, background)
            shown = shown or Image.new(part.mode, image.size)
            shown.paste(part, (0, top))
        try:
            turn = UPRIGHT.get(image.getexif().get(0x0112))
        except Exception:                                # a broken EXIF
            turn = None
        return shown if turn is None else shown.transpose(turn)


def scale_transparent_colour(image):
    """Give the transparent colour of a PNG, which counts in the file's depth, in that of Pillow's pixels; before they are read.

    ValueError on one of 16 bits a channel, of which Pillow's pixels keep eight.
    """
    colour, raw = image.info.get("transparency"), image.tile[0][3] if image.format == "PNG" and image.tile else None
    if colour is not None and raw in ("L;2", "L;4"):
        image.info["transparency"] = colour * {"L;2": 85, "L;4": 17}[raw]
    if colour is not None and raw == "RGB;16B":
        raise ValueError("it has 16 bits and a transparent colour: save it with an alpha channel")


def as_shown(image, file, background):
    """A Pillow image, a part of a file's, as "L" or "RGB": see `open_image`."""
    signed = 2 in getattr(file, "tag_v2", {}).get(339, ())               # the kind of numbers in a TIFF
    if signed or image.mode == "I" and file.format not in ("PNG", "PPM"):
        raise ValueError("its pixels are whole numbers of 32 bits or with a sign, whose range is not known")
    if image.mode.startswith("I") or image.mode == "F":
        image = eight_bits(image, file)
    mode, alpha = "L" if image.mode in ("1", "L", "LA", "La") else "RGB", None
    if image.has_transparency_data:
        image = image.convert(f"{mode}A")
        alpha = image.getchannel("A")
    if image.mode != "CMYK":
        image = image.convert(mode)
    transform = to_srgb(file.info.get("icc_profile"), image.mode)
    if transform:
        image = ImageCms.applyTransform(image, transform)
    image = image.convert(mode)
    return Image.composite(image, Image.new(mode, image.size, background), alpha) if alpha else image


def eight_bits(image, file):
    """A grey image of more than 8 bits, a part of a file's, as "L" or "LA".  ValueError on floats beyond black and white."""
    pixels, tags = np.asarray(image), getattr(file, "tag_v2", {})        # of a TIFF
    if image.mode == "F":
        if not 0 <= pixels.min() <= pixels.max() <= 1:
            raise ValueError(f"its pixels are floating-point numbers from {pixels.min():g} to {pixels.max():g}: black must be 0 "
                             "and white 1")
        levels = np.rint(255 * pixels)
    else:
        levels = pixels >> tags.get(258, (16,))[0] - 8   # bits of a sample: 12 or 16
    levels = 255 - levels if tags.get(262) == 0 else levels              # white is zero
    grey, transparent = Image.fromarray(levels.astype(np.uint8)), image.info.get("transparency")
    if transparent is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(255 * (pixels != transparent).astype(np.uint8))))


@lru_cache(8)
def to_srgb(profile, mode):
    """The transform from the pixels of a mode to sRGB, by their colour profile, bytes or None.

    None where there is nothing to do: without a profile, with a broken one, one of other pixels, or sRGB's own.
    """
    if profile is None:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except Exception:                                    # the pixels are sound
        return None
    if mode in ("L", "RGB"):                             # sRGB's own would move some by a level, for rounding
        levels = np.arange(0, 256, 17, dtype=np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
        sent = Image.fromarray(colours if mode == "RGB" else levels[None])
        moved = np.asarray(ImageCms.applyTransform(sent, transform).convert(mode)).astype(int) - np.asarray(sent)
        return transform if abs(moved).max() > 2 else None
    return transform


def is_grey(pixels):
    """Whether pixels (..., C) uint8 have equal channels, but for the level by which lossy formats part them."""
    first, *others = np.moveaxis(pixels, -1, 0)
    return all((np.maximum(first, other) - np.minimum(first, other) <= 1).all() for other in others)


# Lists of files

def _decode(path, size):
    """A file as (size, size, 1 or 3) uint8; or, if it is bad, the message, which crosses processes better than errors do."""
    try:
        image = open_image(path)
    except (ValueError, OSError) as error:
        return str(error)
    if size ** 2 * max(image.size) > Image.MAX_IMAGE_PIXELS * min(image.size):       # as many before the crop
        return f"the image {path} is too elongated, {image.width}x{image.height}, to be scaled to {size}"
    return np.asarray(center_crop(image, size)).reshape(size, size, -1)


def decoded(name, folder, files, size, cache, skip_bad):
    """Image files, decoded and cropped once -> uint8 (M, size, size, 1 or 3); the rows (N,) of the good ones, with skip_bad;
    checksums (M,); and a list that says in words what is left out.

    name: a path that tells this list of files of the folder from others. What a killed call decoded is there already; a list
    whose files changed is decoded anew. ValueError at a bad file, or if all are.
    """
    if size is None:
        raise ValueError(f"{folder} is a folder, whose images may differ in size: give --image-size")
    state = [(os.path.relpath(path, folder), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    about = dict(files=hashlib.sha256(json.dumps(state).encode()).hexdigest(), version=VERSION,
                 max_pixels=Image.MAX_IMAGE_PIXELS)
    key = hashlib.sha256(os.fsencode(f"{name} {size}")).hexdigest()[:16]
    prefix = f"{name.name[:50]}-{size}-{key}"            # a name may have 255 bytes
    columns = dict(images=((size, size, 3), np.uint8), channels=((), np.uint8))
    with Table(prefix, about, len(files), columns, cache) as table:
        for old in table.folder.parent.glob(f"{escape(prefix)}-*"):
            if old != table.folder:                      # of the files as they were
                shutil.rmtree(old, ignore_errors=True)
        fill(table, partial(_decode_rows, files, size, skip_bad), f"decoding {prefix}", shared=False)
        (images, channels), checksums = table.arrays(), table.recorded(0, len(files))
    good, bad = np.flatnonzero(channels != BAD), np.flatnonzero(channels == BAD)
    left_out = []
    if len(bad):
        message = _decode(files[bad[0]], size)
        if not isinstance(message, str):
            message = f"{files[bad[0]]} could not be read, and now can be: delete {table.folder}"
        if not skip_bad:
            raise ValueError(f"{message} (--skip-bad goes on without it)")
        if not len(good):
            raise ValueError(f"none of {len(files)} files could be read; the first: {message}")
        left_out = [f"{len(bad)} of {len(files)} image files, the first: {message}"]
    in_colour = channels[good].max() == 3 and not all(is_grey(images[i:i + 256]) for i in range(0, len(images), 256))
    return images[..., :3 if in_colour else 1], good, checksums, left_out


@contextmanager
def _without_ctrl_c():
    """Processes that are started meanwhile never see Ctrl-C; this one does afterwards."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _prepare_worker(max_pixels):
    """In a worker: end with the main process, however it ends."""
    allow_pixels(max_pixels)

    def end_with_parent():
        wait([parent_process().sentinel])
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def _decode_rows(files, size, skip_bad, rows):
    """Decode files number `rows` for `tables.fill`: grey as colour, and how many channels the file has."""
    workers = min(os.cpu_count() or 1, len(rows) // FOR_A_WORKER)
    prepare = partial(_prepare_worker, Image.MAX_IMAGE_PIXELS)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), prepare) if workers > 1 else None
    decode, paths = partial(_decode, size=size), [files[row] for row in rows]
    try:
        with _without_ctrl_c():                          # workers would end with a traceback, while they start, too
            images = pool.map(decode, paths, chunksize=32) if pool else map(decode, paths)
        for row, image in zip(rows, images):
            if not isinstance(image, str):
                yield [row], [image, image.shape[2]]
            elif skip_bad:
                yield [row], [0, BAD]
            else:
                raise ValueError(f"{image} (--skip-bad goes on without it)")
    except BrokenProcessPool:
        raise ValueError("a process that decodes images was killed, perhaps for want of memory: the same command goes on") from None
    finally:
        if pool:
            for worker in active_children():             # at once: what they decode now is not wanted
                worker.terminate()
            pool.shutdown(cancel_futures=True)
