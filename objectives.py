"""What a training step draws and minimises: denoising, classification, or autoencoding.

Report §4-5: noise an image, give the network the time and the class, let it predict the noise; Ho et al. 2020, algorithm 1.
§2-4: a ViT learns the labels. §2-5: an autoencoder learns to give images back. train.py's loop knows none of them. To it an
objective is

    groups                 names of the log's columns: the loss by group of samples
    draw(step, images, labels) -> batch            all that is random in a step, of n of the batch's N samples
    loss(model, *batch) -> losses (n,), and the group (n,) of each sample, 0 .. len(groups) - 1

What is random depends on (seed, step) and its purpose alone. It is drawn for the whole batch, of which each process takes its
part: so a run resumes exactly, and one process or eight train alike.
"""
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

import data
from cascade import augmented, shrink
from ddpm import keyed_generator
from vae import kl_divergence

KL_WEIGHT = 1e-6                                         # Rombach et al. 2022, appendix G
TIME, NOISE, DROP, FLIP, SHIFT, DROPOUT, LATENT, LOW = range(8)  # purposes, so that one use of randomness does not disturb another


class Randomness(NamedTuple):
    """What is random in training, drawn for a batch of N samples and cut to this process's part of it."""

    seed: int
    batch_size: int
    part: slice
    device: torch.device

    def generator(self, step, purpose):
        """A generator on the device of one use in one step."""
        return keyed_generator((self.seed, step, purpose), self.device)

    def uniform(self, generator, *shape):
        """Numbers (n, *shape) in [0, 1)."""
        return torch.rand(self.batch_size, *shape, generator=generator, device=self.device)[self.part]

    def normal(self, generator, *shape):
        """Standard normal numbers (n, *shape)."""
        return torch.randn(self.batch_size, *shape, generator=generator, device=self.device)[self.part]

    def whole(self, generator, low, high, *shape):
        """Whole numbers (n, *shape) from low to high - 1."""
        return torch.randint(low, high, (self.batch_size, *shape), generator=generator, device=self.device)[self.part]


class Pixels(NamedTuple):
    """What a network sees of images: their pixels, flipped and moved at random."""

    random: Randomness
    flip: bool
    shift: int

    def __call__(self, step, images):
        """Images (n, H, W, C) uint8 -> (n, C, H, W) in [-1, 1]."""
        flip = offset = None
        if self.flip:
            flip = self.random.uniform(self.random.generator(step, FLIP)) < 0.5                                  # (n,)
        if self.shift:
            offset = self.random.whole(self.random.generator(step, SHIFT), -self.shift, self.shift + 1, 2)       # (n, 2)
        return data.augment(data.to_float(images.to(self.random.device, non_blocking=True)), flip, offset)


class LatentSamples(NamedTuple):
    """What a network sees of images that were encoded: scaled latents, sampled afresh, of the image or its mirror image."""

    random: Randomness
    flip: bool
    scale: float

    def __call__(self, step, moments):
        """Moments (n, F, 2, c, h, w) of `latents.Latents` -> scale z (n, c, h, w)."""
        moments = moments.to(self.random.device, non_blocking=True)
        chosen = moments[:, 0]                                                           # (n, 2, c, h, w)
        if self.flip:
            flip = self.random.uniform(self.random.generator(step, FLIP)) < 0.5
            chosen = torch.where(flip.reshape(-1, 1, 1, 1, 1), moments[:, 1], chosen)    # of the mirror image
        mean, std = chosen.unbind(dim=1)                                                 # (n, c, h, w)
        eps = self.random.normal(self.random.generator(step, LATENT), *mean.shape[1:])
        return self.scale * (mean + std * eps)


class Denoising:
    """Predict the noise, or what the Diffusion's prediction says (§4-5).  The loss is logged by quarter of t.

    inputs: Pixels or LatentSamples. y_null: the unconditional input, which takes the condition's place in a share cfg_drop of the
    samples; None if it is not learned.
    """

    groups = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")

    def __init__(self, diffusion, inputs, y_null=None, cfg_drop=0.0):
        self.diffusion, self.inputs, self.random, self.cfg_drop = diffusion, inputs, inputs.random, cfg_drop
        self.y_null = y_null.to(self.random.device) if torch.is_tensor(y_null) else y_null           # a caption's, or a label

    def draw(self, step, images, labels):
        """x0 (n, C, H, W), t (n,), y, eps like x0.  y: labels (n,), a text's ids (n, L, W) or context (n, L, D), or None."""
        random = self.random
        x0 = self.inputs(step, images)
        t = random.whole(random.generator(step, TIME), 0, self.diffusion.T)
        eps = random.normal(random.generator(step, NOISE), *x0.shape[1:])
        if labels is None:
            return x0, t, None, eps
        y = labels.to(random.device, non_blocking=True)
        y = y.float() if y.is_floating_point() else y                    # contexts are kept in half precision
        if self.y_null is not None:                      # guidance (§3) needs both, Ho & Salimans 2022, algorithm 1
            dropped = random.uniform(random.generator(step, DROP)) < self.cfg_drop
            y = torch.where(dropped.reshape(-1, *(1,) * (y.ndim - 1)), self.y_null, y)
        return x0, t, y, eps

    def loss(self, model, x0, t, y, eps):
        """Losses (n,), and the quarter of 0 .. T-1 in which each t lies."""
        return self.diffusion.losses(model, x0, t, y, eps)["loss"], t * 4 // self.diffusion.T


class SuperResolution(Denoising):
    """Denoise beside the same image of a quarter of the sides, made noisy (§3, see cascade.py)."""

    def draw(self, step, images, labels):
        """As of `Denoising`, and low (n, C, H / 4, W / 4)."""
        x0, t, y, eps = super().draw(step, images, labels)
        low, generator = shrink(x0), self.random.generator(step, LOW)
        sigma = self.random.uniform(generator)
        return x0, t, y, eps, augmented(low, sigma, self.random.normal(generator, *low.shape[1:]))

    def loss(self, model, x0, t, y, eps, low):
        """Losses (n,), and the quarter of 0 .. T-1 in which each t lies."""
        return super().loss(partial(model, low=low), x0, t, y, eps)


class Classification:
    """Cross-entropy of the labels (§2-4)."""

    groups = ()

    def __init__(self, inputs):
        self.inputs = inputs

    def draw(self, step, images, labels):
        """x (n, C, H, W), y (n,)."""
        return self.inputs(step, images), labels.to(self.inputs.random.device, non_blocking=True)

    def loss(self, model, x, y):
        """Losses (n,), in nats; all samples are of one group."""
        return F.cross_entropy(model(x).float(), y, reduction="none"), torch.zeros_like(y)


class Autoencoding:
    """Give images back through a small latent (§2-5): L1, and the KL divergence with a weight of 1e-6, both per number of the
    image. Rombach et al. 2022, appendix G; its perceptual and adversarial terms need other trained networks and are left out.

    latent_shape: (c, h, w).
    """

    groups = ()

    def __init__(self, inputs, latent_shape):
        self.inputs, self.latent_shape = inputs, latent_shape

    def draw(self, step, images, labels):
        """x (n, C, H, W), noise (n, c, h, w)."""
        random = self.inputs.random
        return self.inputs(step, images), random.normal(random.generator(step, NOISE), *self.latent_shape)

    def loss(self, model, x, noise):
        """Losses (n,); all samples are of one group."""
        image, mean, log_variance = model(x, noise)
        reconstruction = (image.float() - x).abs().flatten(1).mean(dim=1)
        divergence = kl_divergence(mean.float(), log_variance.float()) / x[0].numel()
        return reconstruction + KL_WEIGHT * divergence, torch.zeros_like(divergence, dtype=torch.long)
