"""Data sets: digits, drawn shapes, points, CIFAR-10, MS-COCO, a folder of images, an .npz; and the order in which training reads.

Report §4-5 (training data). Files and caches hold uint8 NHWC, the networks see float32 NCHW in [-1, 1]; every level survives
the round trip. A tenth of any data set without a test split of its own is held out, the same tenth for every command.
Folders of images are folders.py's.
"""
import hashlib
import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import shapes
from arrays import read_npz
from files import cache_folder, download, readable, unpacked
from folders import coco, image_folder
from image_files import center_crop, decoded
from points import POINTS, swiss_roll

ASSETS = Path(__file__).parent / "assets"
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR10_FOLDER = "cifar-10-batches-bin"                                  # in the archive
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPES = 10_000                        # images of `shapes`, half of which show one object
SCENES = {                             # of how many scenes, and which of them, by index and what they show
    "shapes": (SHAPES, lambda i, scenes: scenes.number > 0),
    "shapes:one": (2 * SHAPES, lambda i, scenes: scenes.number == 1),
    "shapes:many": (3 * SHAPES, lambda i, scenes: (scenes.number > 1) | (i % 5 == 0)),   # a sixth with one object
    "shapes:uneven": (6 * SHAPES, lambda i, scenes: i % np.select(       # half relations, of these four fifths above or left of
        [scenes.number == 1, scenes.relation < 0, scenes.relation % 2 == 0], [10, 3, 1], 4) == 0),
}
OWN_SETS = ("mnist", *SCENES, "swissroll", "cifar10")    # never a file or folder: ./mnist is one


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


def shortened(texts):
    """The first five of a list of texts, none of them long, in words."""
    texts = [f'"{text}"' if "," in text else text for text in texts]
    return ", ".join(text if len(text) <= 50 else f"{text[:49]}…" for text in texts[:5]) + ", …" * (len(texts) > 5)


class Dataset:
    """Images and labels, in memory or memory-mapped.

    images (M, H, W, C) uint8; labels (M,) integers, or None without classes; classes, their names; rows (N,), which of the
    images belong to this split; captions, a list of texts for each of the M, or None. Attributes besides: channels, image_size
    (H, W), num_classes (None without labels).
    """

    autoencoder = None                                   # of a data set of latents, see latents.Latents
    checksums = None                                     # (M,) of images that were decoded from files
    pixel_range = "uint8"                                # what the pixels were before, in words
    held_out, left_out = "nothing", ()                   # in words: what of the data the test split is; what was not read

    def __init__(self, spec, images, labels=None, classes=None, rows=None, captions=None):
        self.spec, self.images, self.labels, self.captions = spec, images, labels, captions
        self.contexts = None                             # see `encode_captions`
        self.rows = np.arange(len(images)) if rows is None else rows
        self.image_size, self.channels = tuple(images.shape[1:3]), images.shape[3]
        self.classes = None if labels is None else list(classes)
        self.num_classes = None if labels is None else len(self.classes)

    def __len__(self):
        return len(self.rows)

    @cached_property
    def summary(self):
        """What the data was read as, in a line: images, size, channels, range, classes, captions, split, and what is left out."""
        part = self.images if type(self.images) is np.ndarray else self.images[self.spread(256)]
        height, width = self.image_size
        colour = {1: "grey", 3: "colour"}[self.channels]
        levels = f"levels {part.min()} to {part.max()}" + f" ({self.pixel_range})" * (self.pixel_range != "uint8")
        classes, captions = "no classes", "no captions"
        if self.classes:
            classes = f"{self.num_classes:,} class{'es' * (self.num_classes > 1)}: {shortened(self.classes)}"
        if self.captions:
            captions = f"captions, such as {shortened(self.captions[self.rows[0]][:1])}"
        line = (f"{self.spec}: {len(self):,} image{'s' * (len(self) != 1)}, {width}x{height} pixels, {colour}, {levels}; {classes}; "
                f"{captions}; held out: {self.held_out}; left out: {'; '.join(self.left_out) or 'nothing'}")
        return "".join(letter if letter.isprintable() else "?" for letter in line)

    def spread(self, n):
        """The rows of up to n images of this split, evenly spread."""
        return self.rows[np.linspace(0, len(self) - 1, min(n, len(self)), dtype=int)]

    def batch(self, indices, epochs=0):
        """Images (n, H, W, C) uint8, and conditions as `condition` says, as tensors, for indices (n,) in 0 .. len - 1."""
        return torch.from_numpy(np.ascontiguousarray(self.images[self.rows[indices]])), self.condition(indices, epochs)

    def condition(self, indices, epochs=0):
        """Labels (n,) int64, or None without; or where captions were encoded, their contexts (n, ...).

        An image of several captions shows another one at each reading: epochs, one number or (n,), says how many there were.
        """
        if self.contexts is not None:
            first, count = self.first[indices], self.first[indices + 1] - self.first[indices]
            return torch.from_numpy(self.contexts[self.context_rows[first + epochs % count]])
        return None if self.labels is None else torch.from_numpy(self.labels[self.rows[indices]].astype(np.int64))

    def encode_captions(self, encode):
        """From now on a batch has contexts instead of labels: rows of the array encode(captions), each caption encoded once."""
        captions = [self.captions[row] for row in self.rows]
        self.first = np.cumsum([0, *map(len, captions)])                 # (N + 1,): image i's are first[i] .. first[i + 1]
        self.distinct = sorted({text for texts in captions for text in texts})
        places = {text: i for i, text in enumerate(self.distinct)}
        self.context_rows = np.array([places[text] for texts in captions for text in texts])
        self.contexts = encode(self.distinct)

    def contexts_of(self, n):
        """Contexts (n, …) of n captions of this split, the same at each call, drawn at random where there are more."""
        order = np.random.default_rng(0).permutation(len(self.context_rows))
        return np.asarray(self.contexts[self.context_rows[np.resize(order, n)]])


def fingerprint(dataset):
    """A hash of what a data set holds, wherever it lies: its rows, classes, labels, captions and images.

    Of images in memory all bytes count, of decoded files their checksums. Of others, as of an .npz of gigabytes, up to 1,000.
    """
    images = dataset.images if type(dataset.images) is np.ndarray else dataset.checksums
    if images is None:
        images = dataset.images[dataset.spread(1000)]
    digest = hashlib.sha256(json.dumps([list(dataset.images.shape), dataset.classes, dataset.captions]).encode())
    for array in (dataset.rows, images, *([] if dataset.labels is None else [dataset.labels[dataset.rows]])):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


class Points(Dataset):
    """Points in the plane as images of one pixel, a channel a coordinate: images (M, 1, 1, 2) float32, without labels."""

    @property
    def summary(self):
        """What the data is, in a line."""
        return f"{self.spec}: {len(self):,} points in the plane; held out: {self.held_out}"

    def batch(self, indices, epochs=0):
        """Points (n, 2, 1, 1) float32, as the networks see them, and no labels."""
        return torch.from_numpy(self.images[self.rows[indices]]).permute(0, 3, 1, 2), None


class Batches:
    """The batch of every step: `Batches(dataset, batch_size, seed)[step]`.

    Each epoch reads the whole data set in the order permutation(seed, epoch); a batch goes on into the next epoch. So the
    order is a function of the step: nothing has to be saved to resume. part selects a process's rows of the batch.
    """

    def __init__(self, dataset, batch_size, seed, part=slice(None)):
        self.dataset, self.batch_size, self.seed, self.part = dataset, batch_size, seed, part
        self.order = (None, None)                # of the epoch read last

    def indices(self, step):
        """Which images (batch_size,) of the data set a step reads, before `part`."""
        epochs, positions = np.divmod(step * self.batch_size + np.arange(self.batch_size), len(self.dataset))
        pieces = []
        for epoch in range(epochs[0], epochs[-1] + 1):
            if self.order[0] != epoch:
                self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset))
            pieces.append(self.order[1][positions[epochs == epoch]])
        return np.concatenate(pieces)

    def __getitem__(self, step):
        epochs = (step * self.batch_size + np.arange(self.batch_size)) // len(self.dataset)
        return self.dataset.batch(self.indices(step)[self.part], epochs[self.part])


def ahead(read, items, device):
    """read(item), a tuple of tensors or None, of each item in order: a thread reads the next while the caller uses the last.

    For a GPU they are pinned: copied without waiting. An error of `read` reaches the caller, and the thread ends with the loop.
    """
    def pinned(item):
        if device.type != "cuda":
            return read(item)
        with torch.cuda.device(device):                  # a thread of its own begins on the first GPU
            return tuple(part if part is None else part.pin_memory() for part in read(item))

    with ThreadPoolExecutor(1) as thread:
        reads = (thread.submit(pinned, item) for item in items)
        coming = next(reads, None)
        while coming:
            ready, coming = coming.result(), next(reads, None)
            yield ready


def load(spec="mnist", image_size=None, split="train", cache=None, skip_bad=False):
    """Load "mnist", "shapes" (10,000 images), "shapes:one" (one object each), "shapes:many" (mostly several), "shapes:uneven" (of
    relations mostly "above" and "left of"), "swissroll", "cifar10", "cifar10:DIR", "coco:DIR", a folder of images, see
    folders.py, or an .npz file ("arr_0" and "arr_1", or "images" and "labels"; NHWC or NHW).

    image_size: pixel side to crop and scale to; the data's own by default, but folders need it. split: "train", "test" or "all".
    cache: folder of caches and downloads. skip_bad: leave out files that cannot be read, instead of stopping at the first.
    ValueError or OSError, in one line, on anything that cannot be used.
    """
    name, _, argument = spec.partition(":")
    own_split = None                                     # in words, where the data has one
    if spec == "mnist":
        dataset = _mnist(image_size)
    elif spec in SCENES:
        count, chosen = SCENES[spec]
        rows = np.flatnonzero(chosen(np.arange(count), shapes.scenes(np.arange(count))))
        dataset = Dataset(spec, shapes.Drawn(count, image_size or 32), shapes.labels(count), shapes.CLASSES, rows,
                          [[text] for text in shapes.captions(count)])
    elif spec == "swissroll":
        if image_size is not None:
            raise ValueError("--image-size: swissroll holds points, which have none")
        dataset = Points(spec, swiss_roll(POINTS).reshape(-1, 1, 1, 2).numpy())
    elif name == "cifar10":
        dataset, own_split = _resized(_cifar10(argument or None, split, cache), image_size), "its test batch"
    elif spec.endswith(".npz"):
        images, labels, classes, pixel_range, left_out = read_npz(spec)
        dataset = _resized(Dataset(spec, images, labels, classes), image_size)
        dataset.pixel_range, dataset.left_out = pixel_range, left_out
    elif name == "coco" and argument and Path(argument).is_dir():
        dataset, own_split = _of_files(spec, coco(Path(argument), split, skip_bad), image_size, cache, skip_bad)
    elif Path(spec).is_dir():
        dataset, own_split = _of_files(spec, image_folder(Path(spec), split, skip_bad), image_size, cache, skip_bad)
    else:
        what = f"{spec} is a file of another kind" if Path(spec).exists() else f"no data set {spec!r}"
        raise ValueError(f"{what}: data is mnist, shapes[:one|:many|:uneven], swissroll, cifar10[:DIR], coco:DIR, a folder of "
                         "images, or an .npz as np.savez(FILE, images=…, labels=…) writes")
    if split != "all" and not own_split:
        order = np.random.default_rng(0).permutation(len(dataset))       # the same tenth is held out, whoever asks
        count = max(1, len(dataset) // 10)
        dataset.rows = dataset.rows[np.sort(order[:count] if split == "test" else order[count:])]
        own_split = f"a tenth, {count:,}"
        if not len(dataset):
            raise ValueError(f"{spec} holds too few images: one is held out, and none is left to train on")
    dataset.held_out = {"train": own_split, "test": "these", "all": "nothing"}[split]
    return dataset


def _of_files(spec, files, image_size, cache, skip_bad):
    """The Dataset of image files, `folders.Files`, and their own split."""
    images, rows, checksums, bad = decoded(files.name, files.folder, files.paths, image_size, cache, skip_bad)
    dataset = Dataset(spec, images, files.labels, files.classes, rows, files.captions)
    dataset.checksums, dataset.left_out = checksums, files.left_out + bad
    return dataset, files.own_split


def _mnist(image_size):
    """10,000 digits of MNIST's training set, 28 pixels padded to 32; 28 are given unpadded on demand."""
    with np.load(ASSETS / "mnist.npz") as archive:
        images, labels = archive["images"][..., None], archive["labels"]
    if image_size != 28:
        images = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    return _resized(Dataset("mnist", images, labels, [str(digit) for digit in range(10)]), image_size)


def _cifar10(folder, split, cache):
    """CIFAR-10 in its binary version: records of one label byte and 3 x 32 x 32 pixels, channels first."""
    train, test = [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]
    names = {"train": train, "test": test, "all": train + test}[split]
    if folder is None:
        folder = cache_folder(cache)
        download(CIFAR10_URL, CIFAR10_SHA256, folder, "CIFAR-10")
    archive = Path(folder, CIFAR10_URL.rsplit("/", 1)[-1])
    places = [place for place in (Path(folder), Path(folder, CIFAR10_FOLDER)) if all((place / name).exists() for name in names)]
    try:
        if places:
            parts = [readable(places[0] / name).read_bytes() for name in names]
        elif archive.exists():
            content = unpacked(archive)
            with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:            # members are read, never extracted to disk
                members = [tar.getmember(f"{CIFAR10_FOLDER}/{name}") for name in names]
                if sum(member.size for member in members) > len(content):                # sparse ones
                    raise ValueError(f"its {archive.name} says that it holds more bytes than it does")
                parts = [tar.extractfile(member).read() for member in members]
        else:
            raise ValueError(f"it has neither {names[0]} nor {archive.name}")
        records = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, 3073)
        if not len(records) or records[:, 0].max() >= len(CIFAR10_CLASSES):
            raise ValueError("its records are not CIFAR-10's")
    except Exception as error:                           # tarfile and zlib raise anything at all on a damaged file
        raise ValueError(f"cannot read CIFAR-10 in {folder}: {error}") from None
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)             # (N, 32, 32, 3)
    return Dataset("cifar10", np.ascontiguousarray(images), records[:, 0], CIFAR10_CLASSES)


def _resized(dataset, image_size):
    if image_size is None or dataset.image_size == (image_size, image_size):
        return dataset
    images = np.stack([np.asarray(center_crop(Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image), image_size))
                       for image in dataset.images])
    return Dataset(dataset.spec, images.reshape(*images.shape[:3], -1), dataset.labels, dataset.classes)
