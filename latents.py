"""Latents once: a data set encoded by an autoencoder, kept in files, from which training draws.

Report §2-5, Fig. 2-4. Rombach et al. 2022: diffusion runs on latents, which an encoder that no longer changes makes of the images.
So each image is encoded once, and its mirror image too if training flips; the cache folder holds mean.npy and std.npy of q(z | x),
flipped_mean.npy and flipped_std.npy, labels.npy, and meta.json with the hashes of data and autoencoder and the rows done. A step
draws a fresh z = mean + std eps of them: a latent is never the same twice, and the encoder never runs in training.
"""
import hashlib
import json
import os

import numpy as np
import torch
import torch.distributed as dist

from cli import first_in_turn, progress_bar, share
from data import Dataset, atomic_file, cache_folder, to_float
from vae import in_pieces

BATCH = 64                             # images at once
FLUSH = 20                             # batches between records of how far it is


class Latents(Dataset):
    """A data set as an autoencoder sees it: `channels` and `image_size` are the latents', all else the images'.

    autoencoder, in eval mode, its .scale set; pixels, the data set that was encoded. A batch holds moments instead of images.
    """

    def __init__(self, pixels, moments, autoencoder):
        self.pixels, self.moments, self.autoencoder = pixels, moments, autoencoder
        self.spec, self.images, self.labels, self.rows = pixels.spec, pixels.images, pixels.labels, pixels.rows
        self.classes, self.num_classes, self.in_files = pixels.classes, pixels.num_classes, True
        self.channels, self.image_size = moments[0].shape[1], tuple(moments[0].shape[2:])

    def batch(self, indices):
        """Moments (n, F, 2, c, h, w): mean and standard deviation, of the image and, if F is 2, its mirror image; labels (n,)."""
        moments = np.stack([table[indices] for table in self.moments], axis=1)           # (n, 2 F, c, h, w)
        labels = None if self.labels is None else torch.from_numpy(self.labels[self.rows[indices]].astype(np.int64))
        return torch.from_numpy(moments).unflatten(1, (-1, 2)), labels


def fingerprint(dataset):
    """A hash of a data set: its rows, its labels, and up to 1,000 of its images."""
    images, labels = dataset.batch(np.linspace(0, len(dataset) - 1, min(1000, len(dataset)), dtype=int))
    digest = hashlib.sha256(json.dumps([dataset.spec, list(dataset.images.shape), len(dataset)]).encode())
    for array in (dataset.rows, images.numpy(), *([] if labels is None else [labels.numpy()])):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def reserve(path, shape):
    """An .npy of float32 zeros whose room on the disk is taken now, so that a full disk is an OSError and no crash later."""
    if not path.exists():
        table = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        size = table.nbytes + table.offset
        del table
        if hasattr(os, "posix_fallocate"):
            try:
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, size)
            except OSError:
                path.unlink()                            # the next call must not take it for reserved
                raise
    return np.load(path, mmap_mode="r+")


@torch.no_grad()
def encode(autoencoder, images):
    """Mean and standard deviation (n, c, h, w) of q(z | x), float32 on the CPU, of images uint8 (n, H, W, C)."""
    device = next(autoencoder.parameters()).device
    moments = in_pieces(lambda some: torch.cat(autoencoder.encode(to_float(some.to(device))), dim=1), images, BATCH)
    mean, log_variance = moments.float().cpu().chunk(2, dim=1)
    return mean.numpy(), (0.5 * log_variance).exp().numpy()


def latents(pixels, autoencoder, sha256, flip=False, cache=None):
    """The Latents of a data set, encoded now as far as no earlier call, perhaps killed, has done it; each process does its share.

    sha256: of the autoencoder's file. ValueError if the autoencoder takes other images.
    """
    if autoencoder.channels != pixels.channels:
        raise ValueError(f"--vae: the autoencoder takes images of {autoencoder.channels} channels, {pixels.spec} has "
                         f"{pixels.channels}")
    about = dict(data=fingerprint(pixels), autoencoder=sha256, rows=len(pixels), flipped=flip)
    folder = cache_folder(cache) / f"latents-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}"
    names = ["mean.npy", "std.npy", *(["flipped_mean.npy", "flipped_std.npy"] if flip else [])]
    example, _ = pixels.batch(np.arange(1))
    shape = (len(pixels), *encode(autoencoder, example)[0].shape[1:])
    with first_in_turn():
        folder.mkdir(exist_ok=True)
        if not all((folder / name).exists() for name in names):
            for record in folder.glob("meta*.json"):     # of files that were deleted
                record.unlink()
        moments = [reserve(folder / name, shape) for name in names]
        if pixels.labels is not None and not (folder / "labels.npy").exists():
            with atomic_file(folder / "labels.npy") as file:
                np.save(file, pixels.labels[pixels.rows])
    mine, parts = share(len(pixels)), dist.get_world_size() if dist.is_initialized() else 1
    record = folder / ("meta.json" if parts == 1 else f"meta-{mine.start}-{mine.stop}.json")
    done = rows_done(folder / "meta.json", about, len(pixels)) and len(mine) or rows_done(record, about, 0)
    with progress_bar("encoding", len(pixels)) as bar:
        bar.update(done)
        for i, start in enumerate(range(mine.start + done, mine.stop, BATCH), 1):
            stop = min(start + BATCH, mine.stop)
            images, _ = pixels.batch(np.arange(start, stop))
            found = encode(autoencoder, images) + (encode(autoencoder, images.flip(2)) if flip else ())
            for table, values in zip(moments, found):
                table[start:stop] = values
            bar.update(stop - start)
            if i % FLUSH == 0 or stop == mine.stop:
                for table in moments:
                    table.flush()
                write_record(record, about, stop - mine.start)
    if parts > 1:
        dist.barrier()
        if mine.start == 0:
            write_record(folder / "meta.json", about, len(pixels))
        dist.barrier()
        if not rows_done(folder / "meta.json", about, len(pixels)):
            raise ValueError(f"{folder} is not complete: all processes need one cache, --cache DIR")
    return Latents(pixels, [np.load(folder / name, mmap_mode="r") for name in names], autoencoder)


def write_record(path, about, done):
    """Note, atomically, that so many rows of what `about` says are on the disk."""
    with atomic_file(path) as file:
        file.write(json.dumps({**about, "done": done}).encode())


def rows_done(path, about, wanted):
    """How many rows a record says are done, 0 if fewer than wanted; 0 without a record, or with one of something else."""
    try:
        found = json.loads(path.read_text())
        done = found.pop("done")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return 0
    return done if found == about and isinstance(done, int) and done >= wanted else 0
