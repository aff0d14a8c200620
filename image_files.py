"""Image files: one, a folder of them with class sub-folders or a .txt of captions beside each, or MS-COCO.

They are decoded once, centre-cropped as in ADM (Dhariwal & Nichol 2021), into a table of uint8, and have three channels unless all
are grey. Captions are read each time.
"""
import hashlib
import json
import os
import shutil
import signal
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from glob import escape
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from files import read_text
from tables import Table, fill

FOR_A_WORKER = 256               # image files that are worth another process, which takes a second to start
BAD = 255                        # in place of the number of channels


def center_crop(image, size):
    """A Pillow image as a size x size one: halve by boxes while twice too large, scale bicubically, crop the centre (ADM)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def open_image(path):
    """Open an image file as Pillow "L" (grey) or "RGB": upright by its EXIF tag, transparency over white, 16 bits as 8.

    ValueError, naming the file, if it cannot be decoded or has more pixels than Pillow deems safe.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.init()
            opened = Image.open(path, formats=sorted(set(Image.OPEN) - {"EPS"}))     # EPS would run Ghostscript on it
        with opened:                                     # an animation would stay open
            image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):                                   # 16-bit grey, which Pillow would clip, not scale
            return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers, whose range is not known")
        if image.has_transparency_data:
            grey = image.mode in ("LA", "La", "L", "1")
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image).convert("L" if grey else "RGB")
        return image.convert("L" if image.mode in ("1", "L") else "RGB")
    except FileNotFoundError:
        raise
    except Exception as error:                           # decoders raise anything at all on a damaged file
        raise ValueError(f"cannot read the image {path}: {error}") from None


def _decode(path, size):
    """A file as (size, size, 1 or 3) uint8; or, if it is bad, the message, which crosses processes better than errors do."""
    try:
        image = open_image(path)
    except (ValueError, OSError) as error:
        return str(error)
    if size ** 2 * max(image.size) > Image.MAX_IMAGE_PIXELS * min(image.size):       # as many before the crop
        return f"the image {path} is too elongated, {image.width}x{image.height}, to be scaled to {size}"
    return np.asarray(center_crop(image, size)).reshape(size, size, -1)


def _image_files(folder):
    known = set(Image.registered_extensions()) - {".pdf", ".palm", ".eps", ".ps"}       # written only, or refused
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in known and path.is_file()
                   and not any(part.startswith(".") for part in path.relative_to(folder).parts))
    if not files:
        raise ValueError(f"{folder} holds no image")
    return files


def side_of(folder):
    """The pixel side of a folder's images.  ValueError if they are not squares of one size."""
    found = {}                                           # each size, and the first image that has it
    for path in _image_files(Path(folder)):
        try:
            with Image.open(path) as image:              # reads no further than its header
                width, height = image.size
        except Exception as error:                       # decoders raise anything at all on a damaged file
            raise ValueError(f"cannot read the image {path}: {error}") from None
        found.setdefault((width, height), path.name)
        if len(found) > 1 or width != height:
            raise ValueError(f"the images of {folder} are not squares of one size: "
                             + ", ".join(f"{name} has {width}x{height} pixels" for (width, height), name in found.items())
                             + "; --image-size crops and scales them to one")
    return width


def captions_beside(files, skip_bad):
    """Captions of image files, the lines of the .txt beside each -> files, captions; None where there is no such .txt at all.

    ValueError if some images have none, or some .txt no image; with skip_bad they are left out.
    """
    beside = {text.with_suffix(""): text for folder in {path.parent for path in files} for text in folder.iterdir()
              if text.suffix.lower() == ".txt" and text.is_file()}
    texts = {path: beside.get(path.with_suffix("")) for path in files}
    kept = [path for path in files if texts[path]]
    if not kept:
        return files, None
    lone = sorted({*beside.values()} - {*texts.values()})
    missing = sorted({*files} - {*kept})
    if missing or lone:
        message = (f"{len(missing)} of {len(files)} images have no caption: the first, {missing[0]}, needs {missing[0].stem}.txt"
                   if missing else f"{len(lone)} caption files have no image, the first is {lone[0]}")
        if not skip_bad:
            raise ValueError(f"{message} (--skip-bad goes on without)")
        tqdm.write(f"left out: {message}")
    return kept, [[line.strip() for line in read_text(texts[path]).split("\n") if line.strip()] or [""] for path in kept]


def coco_captions(annotations, skip_bad):
    """Image files and their captions, of a captions_*.json of MS-COCO.

    The images lie beside the json or its folder, or there in a folder of its name, as train2014, in "images", or in both, one in
    the other. ValueError, with their number, if some are missing; with skip_bad they are left out.
    """
    try:
        content = json.loads(read_text(annotations))
        names = {image["id"]: Path(image["file_name"]).name for image in content["images"]}
        captions = {key: [] for key in names}
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(" ".join(annotation["caption"].split()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{annotations} holds no captions of MS-COCO: {reason}") from None
    root, part = annotations.parent, annotations.stem.partition("_")[2]
    root = root.parent if root.name == "annotations" else root
    folders = [folder for folder in (root / part, root / "images" / part, root / "images", root) if folder.is_dir()]
    found = {key: next((folder / name for folder in folders if (folder / name).is_file()), None) for key, name in names.items()}
    missing = [names[key] for key, path in found.items() if path is None]
    if missing:
        message = f"{len(missing)} of {len(names)} images of {annotations.name} are missing, the first is {part}/{missing[0]}"
        if not skip_bad or len(missing) == len(names):
            raise ValueError(f"{message}, in {root}" + (" (--skip-bad goes on without)" if len(missing) < len(names) else ""))
        tqdm.write(f"left out: {message}")
    kept = sorted((path, captions[key]) for key, path in found.items() if path is not None and captions[key])
    if not kept:
        raise ValueError(f"{annotations} has no captioned image")
    return [path for path, _ in kept], [texts for _, texts in kept]


def coco(folder, split, size, cache, skip_bad):
    """Images of MS-COCO in a folder, which of them are good, their checksums, captions, and whether it has a test split of its
    own, captions_val*.json beside a captions_train*.json. ValueError if there is no captions_*.json."""
    found = sorted(path for place in (folder, folder / "annotations") for path in place.glob("captions_*.json"))
    train, val = ([path for path in found if path.stem.startswith(f"captions_{part}")] for part in ("train", "val"))
    if not found or len(train) > 1 or len(val) > 1 or len(found) > 1 and not (train and val):
        raise ValueError(f"coco:{folder} needs one captions_train*.json and one captions_val*.json, or one captions_*.json: it has "
                         f"{', '.join(path.name for path in found) or 'none'}")
    own = bool(train and val)
    chosen = {"train": train, "test": val, "all": found}[split] if own else found
    files, captions = (sum(parts, []) for parts in zip(*(coco_captions(path, skip_bad) for path in chosen)))
    where = folder.resolve() / "+".join(path.stem for path in chosen)
    return *decoded(where, folder, files, size, cache, skip_bad), captions, own


def image_folder(folder, size, cache, skip_bad):
    """Images of a folder, which of them are good, their checksums, labels, class names and captions; labels and names are None
    without class sub-folders, captions without .txt files."""
    files, captions = captions_beside(_image_files(folder), skip_bad)
    tops = [path.relative_to(folder).parts[0] if path.parent != folder else None for path in files]
    if None in tops and len(set(tops)) > 1:
        raise ValueError(f"{folder} holds images beside class sub-folders: move {files[tops.index(None)].name} into one")
    classes = None if tops[0] is None else sorted(set(tops))
    labels = None if classes is None else np.array([classes.index(top) for top in tops])
    return *decoded(folder.resolve(), folder, files, size, cache, skip_bad), labels, classes, captions


def decoded(name, folder, files, size, cache, skip_bad):
    """Image files, decoded and cropped once -> uint8 (M, size, size, 1 or 3); the rows (N,) of the good ones, with skip_bad; and
    checksums (M,).

    name: a path that tells this list of files of the folder from others. What a killed call decoded is there already; a list
    whose files changed is decoded anew. ValueError at a bad file, or if all are.
    """
    if size is None:
        raise ValueError(f"{folder} is a folder, whose images may differ in size: give --image-size")
    state = [(os.path.relpath(path, folder), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    about = dict(files=hashlib.sha256(json.dumps(state).encode()).hexdigest())
    prefix = f"{name.name}-{size}-{hashlib.sha256(f'{name} {size}'.encode()).hexdigest()[:16]}"
    columns = dict(images=((size, size, 3), np.uint8), channels=((), np.uint8))
    with Table(prefix, about, len(files), columns, cache) as table:
        for old in table.folder.parent.glob(f"{escape(prefix)}-*"):
            if old != table.folder:                      # of the files as they were
                shutil.rmtree(old, ignore_errors=True)
        unseen = len(table.missing())
        fill(table, partial(_decode_rows, files, size, skip_bad), f"decoding {prefix}", shared=False)
        (images, channels), checksums = table.arrays(), table.recorded(0, len(files))
    good, bad = np.flatnonzero(channels != BAD), np.flatnonzero(channels == BAD)
    if len(bad):
        message = _decode(files[bad[0]], size)
        if not isinstance(message, str):
            message = f"{files[bad[0]]} could not be read, and now can be: delete {table.folder}"
        if not skip_bad:
            raise ValueError(f"{message} (--skip-bad goes on without it)")
        if not len(good):
            raise ValueError(f"none of {len(files)} files could be read; the first: {message}")
        if unseen:
            tqdm.write(f"left out {len(bad)} of {len(files)} files; the first: {message}")
    return images[..., :channels[good].max()], good, checksums


@contextmanager
def _without_ctrl_c():
    """Processes that are started meanwhile never see Ctrl-C; this one does afterwards."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _prepare_worker():
    """In a worker: end with the main process, however it ends."""
    def end_with_parent():
        wait([parent_process().sentinel])
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def _decode_rows(files, size, skip_bad, rows):
    """Decode files number `rows` for `tables.fill`: grey as colour, and how many channels there were."""
    workers = min(os.cpu_count() or 1, len(rows) // FOR_A_WORKER)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _prepare_worker) if workers > 1 else None
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
