"""Latents and texts once: a data set encoded by an autoencoder, its captions by CLIP, kept in files from which training draws.

Report §2-5, Fig. 2-4. Rombach et al. 2022: diffusion runs on latents, which an encoder that no longer changes makes of the images.
So each image is encoded once, and its mirror image too if training flips; the cache folder holds mean.npy and std.npy of q(z | x),
flipped_mean.npy and flipped_std.npy, labels.npy, and meta.json with the hashes of data and autoencoder and the rows done. A step
draws a fresh z = mean + std eps of them: a latent is never the same twice, and the encoder never runs in training.
Captions likewise (§4-1): a frozen encoder makes a context of each, once.
"""
import hashlib
import json
import math
import os

import numpy as np
import torch
import torch.distributed as dist

from cli import first_in_turn, progress_bar, share
from data import Dataset, to_float
from files import atomic_file, cache_folder
from vae import in_pieces, sample_latent

BATCH = 64                             # images at once
FLUSH = 20                             # batches between records of how far it is


class Latents(Dataset):
    """A data set as an autoencoder sees it: `channels` and `image_size` are the latents', all else the images'.

    autoencoder, in eval mode, its .scale set; pixels, the data set that was encoded. A batch holds moments instead of images.
    """

    def __init__(self, pixels, moments, autoencoder):
        vars(self).update(vars(pixels))
        self.pixels, self.moments, self.autoencoder, self.in_files = pixels, moments, autoencoder, True
        self.channels, self.image_size = moments[0].shape[1], tuple(moments[0].shape[2:])

    def batch(self, indices, epochs=0):
        """Moments (n, F, 2, c, h, w): mean and standard deviation, of the image and, if F is 2, its mirror image; conditions."""
        moments = np.stack([table[indices] for table in self.moments], axis=1)           # (n, 2 F, c, h, w)
        return torch.from_numpy(moments).unflatten(1, (-1, 2)), self.condition(indices, epochs)


def fingerprint(dataset):
    """A hash of a data set: its rows, its labels, and up to 1,000 of its images."""
    images, labels = dataset.batch(np.linspace(0, len(dataset) - 1, min(1000, len(dataset)), dtype=int))
    digest = hashlib.sha256(json.dumps([dataset.spec, list(dataset.images.shape), len(dataset)]).encode())
    for array in (dataset.rows, images.numpy(), *([] if labels is None else [labels.numpy()])):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def reserve(path, shape, dtype):
    """An .npy of zeros whose room on the disk is taken now, so that a full disk is an OSError and no crash later."""
    if not path.exists():
        with atomic_file(path) as file:
            np.lib.format.write_array_header_1_0(file, dict(descr=np.dtype(dtype).str, fortran_order=False, shape=shape))
            size = file.tell() + math.prod(shape) * np.dtype(dtype).itemsize
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):           # macOS has none
                os.posix_fallocate(file.fileno(), 0, size)
    return np.load(path, mmap_mode="r+")


@torch.no_grad()
def encode(autoencoder, images):
    """Mean and standard deviation (n, c, h, w) of q(z | x), float32 on the CPU, of images uint8 (n, H, W, C)."""
    device = next(autoencoder.parameters()).device
    moments = in_pieces(lambda some: torch.cat(autoencoder.encode(to_float(some.to(device))), dim=1), images, BATCH)
    mean, log_variance = moments.float().cpu().chunk(2, dim=1)
    return mean.numpy(), (0.5 * log_variance).exp().numpy()


def fill(name, about, shapes, compute, cache=None, dtype=np.float32):
    """Arrays in the cache, computed now as far as no earlier call, perhaps killed, has done it; each process does its share.

    about: plain values that tell these arrays from others, with their number of rows; shapes {file name: shape};
    compute(start, stop) -> these rows of each. Returns the folder, and the arrays, memory-mapped.
    """
    folder, rows = cache_folder(cache) / f"{name}-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}", about["rows"]
    with first_in_turn():
        folder.mkdir(exist_ok=True)
        if not all((folder / file).exists() for file in shapes):
            for record in folder.glob("meta*.json"):     # of files that were deleted
                record.unlink()
        tables = [reserve(folder / file, shape, dtype) for file, shape in shapes.items()]
    mine, parts = share(rows), dist.get_world_size() if dist.is_initialized() else 1
    whole = folder / "meta.json"
    record = whole if parts == 1 else folder / f"meta-{mine.start}-{mine.stop}.json"
    done = len(mine) if rows_done(whole, about) == rows else rows_done(record, about)
    with progress_bar("encoding", rows) as bar:
        bar.update(done)
        for i, start in enumerate(range(mine.start + done, mine.stop, BATCH), 1):
            stop = min(start + BATCH, mine.stop)
            for table, values in zip(tables, compute(start, stop)):
                table[start:stop] = values
            bar.update(stop - start)
            if i % FLUSH == 0 or stop == mine.stop:
                for table in tables:
                    table.flush()
                write_record(record, about, stop - mine.start)
    if parts > 1:
        dist.barrier()
        if dist.get_rank() == 0:
            write_record(whole, about, rows)
        dist.barrier()
        if rows_done(whole, about) != rows:
            raise ValueError(f"{folder} is not complete: all processes need one cache, --cache DIR")
    return folder, [np.load(folder / file, mmap_mode="r") for file in shapes]


def latents(pixels, autoencoder, sha256, flip=False, cache=None):
    """The Latents of a data set, encoded once.

    sha256: of the autoencoder's file. ValueError if the autoencoder takes other images.
    """
    if autoencoder.channels != pixels.channels:
        raise ValueError(f"--vae: the autoencoder takes images of {autoencoder.channels} channels, {pixels.spec} has "
                         f"{pixels.channels}")
    example, _ = pixels.batch(np.arange(1))
    shape = (len(pixels), *encode(autoencoder, example)[0].shape[1:])
    files = ["mean.npy", "std.npy", *(["flipped_mean.npy", "flipped_std.npy"] if flip else [])]

    def compute(start, stop):
        images, _ = pixels.batch(np.arange(start, stop))
        return encode(autoencoder, images) + (encode(autoencoder, images.flip(2)) if flip else ())

    about = dict(data=fingerprint(pixels), autoencoder=sha256, rows=len(pixels), flipped=flip)
    folder, moments = fill("latents", about, dict.fromkeys(files, shape), compute, cache)
    with first_in_turn():
        if pixels.labels is not None and not (folder / "labels.npy").exists():
            with atomic_file(folder / "labels.npy") as file:
                np.save(file, pixels.labels[pixels.rows])
    return Latents(pixels, moments, autoencoder)


@torch.no_grad()
def embeddings(captions, encoder, tokenizer, cache=None):
    """The context (N, L, D) float16 of each of N captions, encoded once by CLIP's encoder as `checkpoint.load_clip` gives it.

    Half precision: MS-COCO's 414,113 captions take 49 GB of it.
    """
    device = next(encoder.parameters()).device
    words = hashlib.sha256(json.dumps(captions).encode()).hexdigest()

    def compute(start, stop):
        ids = tokenizer.tokenize(captions[start:stop])                                   # (n, L)
        return [encoder(ids.to(device)).half().cpu().numpy()]                            # (n, L, D)

    about = dict(captions=words, encoder=encoder.origin["sha256"], rows=len(captions))
    shape = (len(captions), tokenizer.length, encoder.dim)
    return fill("contexts", about, {"context.npy": shape}, compute, cache, np.float16)[1][0]


def write_record(path, about, done):
    """Note, atomically, that so many rows of what `about` says are on the disk."""
    with atomic_file(path) as file:
        file.write(json.dumps({**about, "done": done}).encode())


def rows_done(path, about):
    """How many rows a record says are done; 0 without a record, or with one of something else."""
    try:
        found = json.loads(path.read_text())
        done = found.pop("done")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return 0
    return done if found == about and isinstance(done, int) and done > 0 else 0


@torch.no_grad()
def measured_scale(autoencoder, dataset, device):
    """The scale that gives a data set's latents a standard deviation of 1, from at most 1,024 of them (§2-5)."""
    images, _ = dataset.batch(np.linspace(0, len(dataset) - 1, min(1024, len(dataset)), dtype=int))
    generator = torch.Generator().manual_seed(0)

    def encoded(batch):
        mean, log_variance = autoencoder.encode(to_float(batch.to(device)))
        return sample_latent(mean, log_variance, torch.randn(mean.shape, generator=generator).to(device))
    return 1 / in_pieces(encoded, images, BATCH).std().item()
