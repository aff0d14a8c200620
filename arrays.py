"""Arrays of a user: the images and labels of an .npz, read by their types and by what they hold.

Pixels become bytes: floats of [-1, 1], [0, 1] or 0 … 255, integers of 8 or 16 bits, black and white. Labels become the numbers of
the classes that occur, and what they were their names. What fits several meanings is refused.
"""
import zipfile

import numpy as np

from files import open_npz, readable

MAPPED = 2 ** 30                 # bytes of an .npz's images above which they stay in the file
MAX_CLASSES = 100_000            # ImageNet-21k has 21,841: more are no classes, and their table would fill the memory
STATISTICS = {"mu", "sigma", "mu_s", "sigma_s"}          # of the images, in ADM's files, see `features.read_tables`
FLOATS = [                       # bounds of the least and of the largest pixel; name; factor and summand, before truncation
    ((-1, -0.75), (-1, 1), "[-1, 1]", 127.5, 128),       # from -0.5 it may be [-0.5, 0.5]
    ((0, 1), (0, 1), "[0, 1]", 255, 0.5),
    ((0, 255), (16, 255), "0 to 255", 1, 0.5),           # up to 16 it may be [0, 1] and what a filter added
]
INTEGERS = [
    ((0, 1), (1, 1), "0 and 1", 255, 0),
    ((0, 255), (0, 255), "0 to 255", 1, 0),
    ((0, 65535), (16384, 65535), "0 to 65535", 1 / 256, 0),              # below it may be 10, 12 or 14 bits
]


def read_npz(path):
    """The images of an .npz, (M, H, W, C) uint8; labels (M,) and class names, or None and None; what the pixels were, in words;
    and which arrays are left out, their names.

    ValueError or OSError, naming the path, if it is damaged or holds something else.
    """
    readable(path)
    try:
        with open_npz(path) as archive:
            keys = [[key for key in names if key in archive] for names in (("arr_0", "images"), ("arr_1", "labels"))]
            if len(keys[0]) != 1 or len(keys[1]) > 1:
                raise ValueError("the images must be its arr_0 or images, and their labels, if any, its arr_1 or labels, as "
                                 "np.savez(FILE, images=…, labels=…) writes: it holds "
                                 + (", ".join(archive.files)[:200] or "nothing"))
            image_key, label_key = keys[0][0], next(iter(keys[1]), None)
            entry = archive.zip.getinfo(f"{image_key}.npy")
            large = entry.file_size > MAPPED and entry.compress_type == zipfile.ZIP_STORED
            images = _mapped(path, entry) if large else archive[image_key]
            labels = archive[label_key] if label_key else None
            left_out = tuple(sorted({*archive.files} - {image_key, label_key} - STATISTICS))
        images, found = as_bytes(channels_last(images))
        labels, classes = (None, None) if labels is None else as_classes(labels, len(images))
        return images, labels, classes, found, left_out
    except Exception as error:                           # zipfile and numpy raise anything at all on a damaged file
        reason = "an array holds Python objects, which could run code: save it as numbers, or as text by astype(str)"
        raise ValueError(f"cannot use {path}: {reason if 'Object arrays' in str(error) else error}") from None


def _mapped(path, entry):
    """An uncompressed array of an .npz, mapped from where it lies in the file: 50,000 images of 256 pixels are 10 GB."""
    with zipfile.ZipFile(path) as archive, archive.open(entry) as member, open(path, "rb") as file:
        version = np.lib.format.read_magic(member)
        shape, column_order, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0)
                                      else np.lib.format.read_array_header_2_0)(member)
        if dtype.hasobject or column_order:
            raise ValueError(f"its {entry.filename} is no plain array of rows")
        file.seek(entry.header_offset + 26)              # the lengths of name and extra field end the 30 bytes before them
        start = entry.header_offset + 30 + sum(int.from_bytes(file.read(2), "little") for _ in range(2))
        return np.memmap(path, dtype, "r", start + member.tell(), shape)


def channels_last(images):
    """Images (N, H, W) or (N, H, W, C) as (N, H, W, C), C 1 or 3. ValueError, with the likely reason, on another shape."""
    if images.ndim == 3 and not (images.shape[2] in (3, 4) and images.shape[1] > 4):
        images = images[..., None]                                       # grey
    shape = images.shape
    if images.ndim == 4 and shape[3] in (1, 3) and 0 not in shape:
        return images
    likely = {2: "flat rows of unknown layout: reshape them", 3: "one image: stack several"}.get(images.ndim)
    if images.ndim == 4 and shape[3] == 4 and shape[1] not in (1, 3):
        likely = "RGBA: lay them over a background"
    elif images.ndim == 4 and shape[1] in (1, 2, 3, 4):
        likely = "NCHW, channels first: images.transpose(0, 2, 3, 1) puts them last"
    raise ValueError(f"images must be NHW or NHWC with 1 or 3 channels, not of the shape {shape}"
                     + f", which is likely {likely}" * bool(likely))


def as_bytes(images):
    """Pixels (M, H, W, C) as uint8, and what they were taken for, in words. ValueError if that is not clear."""
    kind = images.dtype.kind
    if kind == "u" and images.itemsize == 1 and images[:100].max() > 1:  # at once: mapped ones may be many gigabytes
        return images, "uint8"
    if kind == "b":
        return images.astype(np.uint8) * 255, "bool"
    if kind not in "iuf":
        raise ValueError(f"pixels must be numbers or bool, not {images.dtype}")
    low, high = images.min(), images.max()
    found = f"{images.dtype} of {low:.6g} to {high:.6g}"
    if not np.isfinite([low, high]).all():
        raise ValueError(f"{sum((~np.isfinite(image)).sum() for image in images)} pixels are NaN or infinite")
    meanings, exact = FLOATS if kind == "f" else INTEGERS, np.promote_types(images.dtype, np.float32)
    for least, largest, name, factor, summand in meanings:
        if least[0] <= low <= least[1] and largest[0] <= high <= largest[1]:
            as_byte = [(factor * image.astype(exact) + summand).astype(np.uint8) for image in images]
            return np.stack(as_byte), f"{found}, read as {name}"
    raise ValueError(f"pixels, {found}, are not clearly of {' or '.join(row[2] for row in meanings)}: scale and clip them to one, "
                     "or save them as uint8")


def as_classes(labels, n):
    """Labels of n images as class numbers (n,), and the K classes' names: the labels that occur, in order.

    labels: whole numbers, bool or texts, (n,) or a column (n, 1), or one-hot rows (n, columns). ValueError on anything else.
    """
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    elif labels.ndim == 2 and labels.dtype.kind in "biuf" and all((labels == 1).sum(axis=1) == 1) and (labels != 0).sum() == n:
        labels = labels.argmax(axis=1)
    if labels.shape != (n,):
        raise ValueError(f"{n} images but labels of shape {labels.shape}" + ", which are not one-hot" * (labels.ndim == 2))
    if labels.dtype.kind == "f" and (abs(labels) < 2 ** 53).all() and (labels % 1 == 0).all():
        labels = labels.astype(np.int64)
    if labels.dtype.kind not in "biuU":
        raise ValueError(f"labels must be whole numbers or texts, not {labels.dtype}")
    names, numbers = np.unique(labels, return_inverse=True)
    if str(names[0]) == "" or labels.dtype.kind == "i" and names[0] < 0:
        raise ValueError(f"{(labels == names[0]).sum()} labels are {str(names[0]) or 'empty'}, as of images without a class: leave "
                         "these out")
    if len(names) > MAX_CLASSES:
        raise ValueError(f"labels must be of at most {MAX_CLASSES} classes, and are of {len(names)}")
    counted = labels.dtype.kind in "iu" and names[-1] == len(names) - 1              # from 0 on without a gap
    return labels if counted else numbers, [str(name) for name in names]
