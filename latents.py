"""Latents and texts once: a data set encoded by an autoencoder, its captions by CLIP, kept in files from which training draws.

Report §2-5, Fig. 2-4. Rombach et al. 2022: diffusion runs on latents, which an encoder that no longer changes makes of the images.
So each image is encoded once, and its mirror image too if training flips; a table in the cache holds mean.npy and std.npy of
q(z | x), flipped_mean.npy and flipped_std.npy, and labels.npy. A step draws a fresh z = mean + std eps of them: a latent is never
the same twice, and the encoder never runs in training. Captions likewise (§4-1): a frozen encoder makes a context of each, once.
"""
import hashlib
import json

import numpy as np
import torch

from data import Dataset, fingerprint, to_float
from tables import Table, fill
from text import normalise
from vae import in_pieces, sample_latent

BATCH = 64                             # images at once


class Latents(Dataset):
    """A data set as an autoencoder sees it: `channels` and `image_size` are the latents', all else the images'.

    autoencoder, in eval mode, its .scale set; pixels, the data set that was encoded. A batch holds moments instead of images.
    """

    def __init__(self, pixels, moments, autoencoder):
        super().__init__(pixels.spec, pixels.images, pixels.labels, pixels.classes, pixels.rows, pixels.captions)
        self.pixels, self.moments, self.autoencoder = pixels, moments, autoencoder
        self.channels, self.image_size = moments[0].shape[1], tuple(moments[0].shape[2:])

    @property
    def summary(self):
        """What the images were read as, in a line."""
        return self.pixels.summary

    def batch(self, indices, epochs=0):
        """Moments (n, F, 2, c, h, w): mean and standard deviation, of the image and, if F is 2, its mirror image; conditions."""
        moments = np.stack([table[indices] for table in self.moments], axis=1)           # (n, 2 F, c, h, w)
        return torch.from_numpy(moments).unflatten(1, (-1, 2)), self.condition(indices, epochs)


@torch.no_grad()
def encode(autoencoder, images):
    """Mean and standard deviation (n, c, h, w) of q(z | x), float32 on the CPU, of images uint8 (n, H, W, C)."""
    device = next(autoencoder.parameters()).device
    moments = in_pieces(lambda batch: torch.cat(autoencoder.encode(to_float(batch.to(device))), dim=1), images, BATCH)
    mean, log_variance = moments.float().cpu().chunk(2, dim=1)
    return mean.numpy(), (0.5 * log_variance).exp().numpy()


def latents(pixels, autoencoder, sha256, flip=False, cache=None):
    """The Latents of a data set, encoded once.

    sha256: of the autoencoder's file. ValueError if the autoencoder takes other images.
    """
    if autoencoder.channels != pixels.channels:
        raise ValueError(f"--vae: the autoencoder takes images of {autoencoder.channels} channels, {pixels.spec} has "
                         f"{pixels.channels}")
    example, _ = pixels.batch(np.arange(1))
    moment = (encode(autoencoder, example)[0].shape[1:], np.float32)
    columns = dict.fromkeys(["mean", "std", *(["flipped_mean", "flipped_std"] if flip else [])], moment)
    labels = {} if pixels.labels is None else {"labels": ((), np.int64)}

    def compute(rows):
        for start in range(0, len(rows), BATCH):
            batch = rows[start:start + BATCH]
            images, _ = pixels.batch(batch)
            moments = encode(autoencoder, images) + (encode(autoencoder, images.flip(2)) if flip else ())
            yield batch, [*moments, *([pixels.labels[pixels.rows[batch]]] if labels else [])]

    about = dict(data=fingerprint(pixels), autoencoder=sha256, rows=len(pixels), flipped=flip)
    if torch.is_autocast_enabled(next(autoencoder.parameters()).device.type):
        about["precision"] = "bf16"                      # those of float32 are others
    with Table("latents", about, len(pixels), columns | labels, cache) as table:
        fill(table, compute, "encoding")
        return Latents(pixels, table.arrays()[:len(columns)], autoencoder)


@torch.no_grad()
def embeddings(captions, encoder, tokenizer, cache=None):
    """The context (N, L, D) float16 of each of N captions, encoded once by CLIP's encoder as `checkpoint.load_clip` gives it.

    Half precision: MS-COCO's 414,113 captions take 49 GB of it.
    """
    device = next(encoder.parameters()).device

    def compute(rows):
        for start in range(0, len(rows), BATCH):
            batch = rows[start:start + BATCH]
            ids = tokenizer.tokenize([captions[row] for row in batch])                   # (n, L)
            yield batch, [encoder(ids.to(device)).half().cpu().numpy()]                  # (n, L, D)

    words = hashlib.sha256(json.dumps([*map(normalise, captions)]).encode()).hexdigest()
    about = dict(captions=words, encoder=encoder.origin["sha256"], rows=len(captions))
    columns = {"context": ((tokenizer.length, encoder.dim), np.float16)}
    with Table("contexts", about, len(captions), columns, cache) as table:
        fill(table, compute, "encoding")
        return table.arrays()[0]


@torch.no_grad()
def measured_scale(autoencoder, dataset, device):
    """The scale that gives a data set's latents a standard deviation of 1, from at most 1,024 of them (§2-5)."""
    images, _ = dataset.batch(np.linspace(0, len(dataset) - 1, min(1024, len(dataset)), dtype=int))
    generator = torch.Generator().manual_seed(0)

    def encoded(batch):
        mean, log_variance = autoencoder.encode(to_float(batch.to(device)))
        return sample_latent(mean, log_variance, torch.randn(mean.shape, generator=generator).to(device))
    return 1 / in_pieces(encoded, images, BATCH).std().item()
