"""Cascades: one network draws a small image, an upsampler a large one that shrinks to it.

Report §3 (cascades with super-resolution). Papers: Ho et al. 2022 (Cascaded Diffusion Models); Dhariwal & Nichol 2021 (ADM-U).
The upsampler is `unet.SuperResUNet`, a denoiser that sees beside x_t an image low of a quarter of its sides. It learns from
pairs: low is the mean over 4 x 4 pixels of the image itself, with noise of a random amount, which Ho et al. call conditioning
augmentation (their section 4). Without it the upsampler believes every pixel of low, also those that a base got wrong, and
errors add up. They tell the network how much noise there is. The upsamplers that are released, ADM's, have no input for that,
and ours has the same architecture: it has to see the amount in low itself, and nothing is told when sampling.

    python train.py --image-size 8 --size Ti/2 --out base.pt
    python train.py --model unet --size Ti-up --out sr.pt
    python sample.py --ckpt base.pt --cascade sr.pt
"""
from functools import partial

import torch
import torch.nn.functional as F

import ddpm
from checkpoint import build, load
from sampling import STEPS
from unet import SuperResUNet
from vae import in_pieces

MAX_SIGMA = 0.2                  # of low's noise in training; pixels lie in [-1, 1]
UPSAMPLED = 1                    # in a key of noise: the upsampler's, which the base must not share


def shrink(x):
    """The mean over 4 x 4 pixels: x (N, C, H, W) -> (N, C, H / 4, W / 4)."""
    return F.avg_pool2d(x, SuperResUNet.factor)


def augmented(low, sigma, eps):
    """low (N, C, h, w) with noise eps like it; sigma (N,) in 0 .. 1 is the amount as a share of MAX_SIGMA.

    Noise is added and low not scaled, so that its brightness is right whatever the amount, of which the network is not told.
    """
    return low + MAX_SIGMA * sigma.reshape(-1, 1, 1, 1) * eps


def load_upsampler(path, base, labelled, shape):
    """The upsampler in a file, and its process, for images (H, W, C) = shape that the network of a run draws.

    base: that run, as `checkpoint.load` gives it; labelled: its network's number of classes, or None. ValueError if the file
    holds no upsampler, or one of other images or classes.
    """
    described = load(path)
    network, diffusion = build(described)
    if not isinstance(network, SuperResUNet):
        raise ValueError(f"--cascade {path} holds a {type(network).__name__}, which enlarges nothing: an upsampler is trained by "
                         "train.py --model unet --size Ti-up")
    height, width = (side // network.factor for side in network.image_size)
    if (height, width, network.channels) != tuple(shape):
        raise ValueError(f"--cascade {path} enlarges {height}x{width} pixels of {network.channels} channels, and --ckpt draws "
                         "{}x{} of {}".format(*shape))
    if network.num_classes is not None:
        names, own_names = (run["data"].get("classes") for run in (base, described))     # None where they are not known
        fits = labelled == network.num_classes and (not names or not own_names or names == own_names)
        if labelled is None:                             # then it is told its null class
            fits = network.null_label is not None
        if not fits:
            raise ValueError(f"--cascade {path} was trained with {network.num_classes} classes, which are not those of --ckpt")
    return network, diffusion


@torch.no_grad()
def enlarge(network, diffusion, low, y, seed, indices):
    """Images (n, C, 4 h, 4 w) that low (n, C, h, w), numbers `indices` of a seed, may be the small ones of.

    network, diffusion: an upsampler, on low's device. y: labels (n,), where it has classes; None is its null class. By
    DPM-Solver++ without guidance, as low leaves little open, and with no noise on low, as the released upsamplers learned it;
    ours draws the digits no better with a little. Fewer at a time if the memory is full.
    """
    low, indices = low.clamp(-1, 1), list(indices)       # what an autoencoder decoded may lie beyond
    y = None if y is None or network.num_classes is None else y.to(low.device)

    def some(rows):
        noise = torch.stack([torch.randn(network.channels, *network.image_size,
                                         generator=ddpm.keyed_generator((seed, indices[i], UPSAMPLED))) for i in rows])
        return ddpm.sample(diffusion, partial(network, low=low[rows]), noise.shape, None if y is None else y[rows], "dpm++",
                           min(STEPS, diffusion.T), noise=noise.to(low.device), clip=True)
    return in_pieces(some, torch.arange(len(low)), len(low))
