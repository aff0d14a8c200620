"""Data sets: the embedded digits, CIFAR-10, a folder of images, an .npz file, points; and the order in which training reads them.

Report §4-5 (training data). Files and caches hold uint8 NHWC, the networks see float32 NCHW in [-1, 1]; every level survives
the round trip. A tenth of any data set without a test split of its own is held out, the same tenth for every command.
Folders are decoded once, centre-cropped as in ADM (Dhariwal & Nichol 2021), into a memory-mapped cache.
"""
import hashlib
import http.client
import json
import os
import tarfile
import tempfile
import urllib.request
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from points import POINTS, swiss_roll

ASSETS = Path(__file__).parent / "assets"
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MAPPED = 2 ** 30                 # bytes of an .npz's images above which they stay in the file
MAX_CLASSES = 100_000            # ImageNet-21k has 21,841: a label beyond is no class, and its table would fill the memory


def to_float(images):
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [-1, 1]. Points, which are floats in that layout, stay as they are."""
    if images.is_floating_point():
        return images
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """Pixels (N, C, H, W) -> uint8 (N, H, W, C), clamped and truncated: the inverse of `to_float` on every level."""
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def augment(x, flip=None, offset=None):
    """Mirror the images of x (N, C, H, W) where flip (N,) says so, and move them by offset (N, 2) pixels (down, right).

    What moves in repeats the border.
    """
    if flip is not None:
        x = torch.where(flip.reshape(-1, 1, 1, 1), x.flip(3), x)
    if offset is not None:
        N, _, H, W = x.shape
        rows = (torch.arange(H, device=x.device) - offset[:, :1]).clamp(0, H - 1)        # (N, H)
        columns = (torch.arange(W, device=x.device) - offset[:, 1:]).clamp(0, W - 1)     # (N, W)
        image = torch.arange(N, device=x.device).reshape(-1, 1, 1)
        x = x.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return x


class Dataset:
    """Images and labels, in memory or memory-mapped.

    images (M, H, W, C) uint8; labels (M,) integers, or None without classes; classes, their names; rows (N,), which of the
    images belong to this split. Attributes besides: channels, image_size (H, W), num_classes (None without labels), in_files.
    """

    def __init__(self, spec, images, labels=None, classes=None, rows=None):
        self.spec, self.images, self.labels = spec, images, labels
        self.rows = np.arange(len(images)) if rows is None else rows
        self.image_size, self.channels = tuple(images.shape[1:3]), images.shape[3]
        self.classes = None if labels is None else list(classes)
        self.num_classes = None if labels is None else len(self.classes)
        self.in_files = isinstance(images, np.memmap)

    def __len__(self):
        return len(self.rows)

    def batch(self, indices):
        """Images (n, H, W, C) uint8 and labels (n,) int64 (or None) as tensors, for indices in 0 .. len - 1."""
        rows = self.rows[indices]
        images = torch.from_numpy(np.ascontiguousarray(self.images[rows]))
        return images, None if self.labels is None else torch.from_numpy(self.labels[rows].astype(np.int64))


class Points(Dataset):
    """Points in the plane as images of one pixel, a channel a coordinate: images (M, 1, 1, 2) float32, without labels."""

    def batch(self, indices):
        """Points (n, 2, 1, 1) float32, as the networks see them, and no labels."""
        return torch.from_numpy(self.images[self.rows[indices]]).permute(0, 3, 1, 2), None


class Batches(torch.utils.data.Dataset):
    """The batch of every step: `Batches(dataset, batch_size, seed)[step]`.

    Each epoch reads the whole data set in the order permutation(seed, epoch); a batch goes on into the next epoch. So the
    order is a function of the step: nothing has to be saved to resume. part selects a process's rows of the batch.
    """

    def __init__(self, dataset, batch_size, seed, part=slice(None)):
        self.dataset, self.batch_size, self.seed, self.part = dataset, batch_size, seed, part
        self.order = (None, None)                # of the epoch read last

    def indices(self, step):
        """Positions (batch_size,) in the data set, before `part`."""
        positions = step * self.batch_size + np.arange(self.batch_size)
        pieces = []
        for epoch in range(positions[0] // len(self.dataset), positions[-1] // len(self.dataset) + 1):
            if self.order[0] != epoch:
                self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset))
            pieces.append(self.order[1][positions[positions // len(self.dataset) == epoch] % len(self.dataset)])
        return np.concatenate(pieces)

    def __getitem__(self, step):
        return self.dataset.batch(self.indices(step)[self.part])


def load(spec="mnist", image_size=None, split="train", cache=None, skip_bad=False, workers=None):
    """Load "mnist", "swissroll", "cifar10", "cifar10:DIR", a folder of images (class sub-folders, or flat and then without
    labels) or an .npz file ("arr_0" and "arr_1", or "images" and "labels"; NHWC or NHW).

    image_size: pixel side to crop and scale to; the data's own by default, but folders need it. split: "train", "test" or "all".
    cache: folder of caches and downloads. skip_bad: leave out files that cannot be read, instead of stopping at the first.
    ValueError or OSError, in one line, on anything that cannot be used.
    """
    name, _, argument = spec.partition(":")
    if spec == "mnist":
        dataset = _mnist(image_size)
    elif spec == "swissroll":
        if image_size is not None:
            raise ValueError("--image-size: swissroll holds points, which have none")
        dataset = Points(spec, swiss_roll(POINTS).reshape(-1, 1, 1, 2).numpy())
    elif name == "cifar10":
        return _resized(_cifar10(argument or None, split, cache), image_size)
    elif spec.endswith(".npz"):
        dataset = _resized(_npz(spec), image_size)
    elif Path(spec).is_dir():
        dataset = _folder(Path(spec), image_size, cache, skip_bad, workers)
    else:
        raise ValueError(f"no data set {spec!r}: it is neither mnist, swissroll, cifar10[:DIR], an existing folder, nor an "
                         ".npz file")
    if split == "all":
        return dataset
    order = np.random.default_rng(0).permutation(len(dataset))           # the same tenth is held out, whoever asks
    held_out = max(1, len(dataset) // 10)
    dataset.rows = np.sort(order[:held_out] if split == "test" else order[held_out:])
    if not len(dataset):
        raise ValueError(f"{spec} holds too few images: one is held out, and none is left to train on")
    return dataset


def cache_folder(cache=None):
    """The folder of caches and downloads, made if it does not exist: `cache`, or the user's."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion-transformers"
    folder = Path(cache) if cache else user
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def atomic_file(path):
    """A binary file to write: under a temporary name beside the target, flushed and renamed when all is well.

    A reader never sees half a file; an error, a full disk or a kill leaves the old one whole.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
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


def _mnist(image_size):
    """10,000 digits of MNIST's training set, 28 pixels padded to 32; 28 are given unpadded on demand."""
    with np.load(ASSETS / "mnist.npz") as archive:
        images, labels = archive["images"][..., None], archive["labels"]
    dataset = Dataset("mnist", images, labels, [str(digit) for digit in range(10)])
    if image_size != 28:
        dataset = Dataset("mnist", np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))), labels, dataset.classes)
    return _resized(dataset, image_size)


def _npz(path):
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no zip archive of arrays, or was cut off")
        with np.load(path, allow_pickle=False) as archive:
            image_key, label_key = ("arr_0", "arr_1") if "arr_0" in archive else ("images", "labels")
            if image_key not in archive:
                raise ValueError(f"it has neither arr_0 nor images, but {', '.join(archive.files) or 'nothing'}")
            entry = archive.zip.getinfo(f"{image_key}.npy")
            large = entry.file_size > MAPPED and entry.compress_type == zipfile.ZIP_STORED
            images = _mapped(path, entry) if large else archive[image_key]
            labels = archive[label_key] if label_key in archive else None
        return Dataset(path, *_checked(images, labels))
    except Exception as error:                           # zipfile and numpy raise anything at all on a damaged file
        raise ValueError(f"cannot use {path}: {error}") from None


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


def _checked(images, labels):
    """Arrays of a file as (images uint8 NHWC, labels, class names). ValueError if they are something else."""
    if images.ndim == 3:
        images = images[..., None]                                       # NHW: grey
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images of shape {images.shape} are neither NHW nor NHWC with 1 or 3 channels")
    if np.issubdtype(images.dtype, np.floating):
        if not np.isfinite(images).all():
            raise ValueError(f"{(~np.isfinite(images)).sum()} pixels are NaN or infinite")
        if abs(images).max() > 1:
            raise ValueError(f"float pixels must lie in [-1, 1], these reach from {images.min():g} to {images.max():g}")
        images = (127.5 * images + 128).clip(0, 255).astype(np.uint8)
    if images.dtype != np.uint8:
        raise ValueError(f"pixels must be uint8, or floats in [-1, 1], not {images.dtype}")
    if labels is None:
        return images, None, None
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{len(images)} images but labels of shape {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer) or not 0 <= labels.min() <= labels.max() < MAX_CLASSES:
        raise ValueError(f"labels must be whole numbers from 0 to at most {MAX_CLASSES - 1}")
    return images, labels, [str(label) for label in range(int(labels.max()) + 1)]


def _cifar10(folder, split, cache):
    """CIFAR-10 in its binary version: records of one label byte and 3 x 32 x 32 pixels, channels first."""
    train, test = [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]
    names = {"train": train, "test": test, "all": train + test}[split]
    if folder is None:
        folder = cache_folder(cache)
        download(CIFAR10_URL, CIFAR10_SHA256, folder, "CIFAR-10")
    folder = Path(folder)
    places = [folder, folder / "cifar-10-batches-bin"]
    extracted = next((place for place in places if all((place / name).exists() for name in names)), None)
    archive = folder / CIFAR10_URL.rsplit("/", 1)[-1]
    try:
        if extracted is not None:
            parts = [(extracted / name).read_bytes() for name in names]
        elif archive.exists():
            with tarfile.open(archive, "r:gz") as tar:                   # members are read, never extracted to disk
                parts = [tar.extractfile(f"cifar-10-batches-bin/{name}").read() for name in names]
        else:
            raise ValueError(f"it has neither {names[0]} nor {archive.name}")
        records = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, 3073)
        if not len(records) or records[:, 0].max() >= len(CIFAR10_CLASSES):
            raise ValueError("its records are not CIFAR-10's")
    except Exception as error:                           # tarfile and zlib raise anything at all on a damaged file
        raise ValueError(f"cannot read CIFAR-10 in {folder}: {error}") from None
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)             # (N, 32, 32, 3)
    return Dataset("cifar10", np.ascontiguousarray(images), records[:, 0], CIFAR10_CLASSES)


def center_crop(image, size):
    """A Pillow image as a size x size one: halve by boxes while twice too large, scale bicubically, crop the centre (ADM)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _resized(dataset, image_size):
    if image_size is None or dataset.image_size == (image_size, image_size):
        return dataset
    images = np.stack([np.asarray(center_crop(Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image), image_size))
                       for image in dataset.images])
    return Dataset(dataset.spec, images.reshape(*images.shape[:3], -1), dataset.labels, dataset.classes)


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
    side, first = None, None
    for path in _image_files(Path(folder)):
        try:
            with Image.open(path) as image:              # reads no further than its header
                size = image.size
        except Exception as error:                       # decoders raise anything at all on a damaged file
            raise ValueError(f"cannot read the image {path}: {error}") from None
        side, first = side or size, first or path
        if size != side or size[0] != size[1]:
            raise ValueError(f"the images of {folder} are not squares of one size: {path.name} has {size[0]}x{size[1]} pixels"
                             + (f", {first.name} {side[0]}x{side[1]}" if size != side else "")
                             + "; --image-size crops and scales them to one")
    return side[0]


def _folder(folder, size, cache, skip_bad, workers):
    if size is None:
        raise ValueError(f"{folder} is a folder, whose images may differ in size: give --image-size")
    files = _image_files(folder)
    tops = [path.relative_to(folder).parts[0] if path.parent != folder else None for path in files]
    if None in tops and len(set(tops)) > 1:
        raise ValueError(f"{folder} holds images beside class sub-folders: move {files[tops.index(None)].name} into one")
    classes = None if tops[0] is None else sorted(set(tops))
    state = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    fingerprint = hashlib.sha256(json.dumps([state, skip_bad]).encode()).hexdigest()
    key = hashlib.sha256(f"{folder.resolve()} {size}".encode()).hexdigest()[:16]
    pixels = cache_folder(cache) / f"{folder.resolve().name}-{size}-{key}.uint8"
    meta_file = pixels.with_suffix(".json")
    try:
        meta = json.loads(meta_file.read_text())
        usable = meta["fingerprint"] == fingerprint and pixels.stat().st_size == np.prod(meta["shape"])
    except (OSError, ValueError, KeyError, TypeError):
        usable = False
    if not usable:
        meta_file.unlink(missing_ok=True)                # a cut-off rebuild leaves no claim behind
        meta = {"fingerprint": fingerprint, **_decode_all(files, size, pixels, skip_bad, workers)}
        with atomic_file(meta_file) as file:
            file.write(json.dumps(meta).encode())
    images = np.memmap(pixels, np.uint8, "r", shape=tuple(meta["shape"]))
    labels = None if classes is None else np.array([classes.index(tops[i]) for i in meta["kept"]])
    return Dataset(str(folder), images, labels, classes)


def _decode_all(files, size, target, skip_bad, workers):
    """Decode files into one raw uint8 file -> {"shape", "kept": their indices}. Three channels unless all are grey."""
    workers = min(os.cpu_count() or 1, len(files) // 256) if workers is None else workers    # a process costs a second to start
    kept, bad, all_grey = [], [], True
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        raw = Path(scratch) / "pixels"
        with open(raw, "wb") as out, tqdm(total=len(files), desc=f"decoding {target.stem}", unit="image", disable=None) as bar:
            pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else None
            try:
                decode = partial(_decode, size=size)
                for i, image in enumerate(pool.map(decode, files, chunksize=32) if pool else map(decode, files)):
                    bar.update()
                    if isinstance(image, str):
                        if not skip_bad:
                            raise ValueError(f"{image} (--skip-bad goes on without it)")
                        bad.append(image)
                        continue
                    all_grey &= image.shape[2] == 1
                    out.write(np.broadcast_to(image, (size, size, 3)).tobytes())
                    kept.append(i)
            finally:
                if pool:
                    pool.shutdown(cancel_futures=True)
        if bad:
            tqdm.write(f"left out {len(bad)} of {len(files)} files; the first: {bad[0]}")
        if not kept:
            raise ValueError(f"none of {len(files)} files could be read; the first: {bad[0]}")
        if all_grey:
            colour, raw = np.memmap(raw, np.uint8, "r", shape=(len(kept), size, size, 3)), Path(scratch) / "grey"
            with open(raw, "wb") as out:
                for image in colour:
                    out.write(image[..., 0].tobytes())
        os.replace(raw, target)
    return {"shape": [len(kept), size, size, 1 if all_grey else 3], "kept": kept}
