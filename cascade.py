"""Cascades: one network draws a small image, an upsampler a large one that shrinks to it.

Report §3 (cascades with super-resolution). Papers: Ho et al. 2022 (Cascaded Diffusion Models); Dhariwal & Nichol 2021 (ADM-U).
The upsampler is `unet.SuperResUNet`, a denoiser that sees beside x_t an image low of a quarter of its sides. It learns from
pairs: low is the mean over 4 x 4 pixels of the image itself, with noise of a random amount, which Ho et al. call conditioning
augmentation (their section 4). Without it the upsampler believes every pixel of low, also those that a base got wrong, and
errors add up. Ho et al. pass the amount of noise to the network. The upsamplers that are released, ADM's, have no input for that,
and ours has the same architecture: it estimates the amount from low.

    python train.py --image-size 8 --size Ti/2 --out base.pt
    python train.py --model unet --size Ti-up --out sr.pt
    python sample.py --ckpt base.pt --cascade sr.pt
"""
from functools import partial

import torch
import torch.nn.functional as F

import ddpm
from unet import SuperResUNet
from vae import in_pieces

STEPS = 20                       # of DPM-Solver++, as where there is no low
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


@torch.no_grad()
def enlarge(network, diffusion, low, y, seed, indices):
    """Images (n, C, 4 h, 4 w) that low (n, C, h, w), numbers `indices` of a seed, may be the small ones of.

    network, diffusion: an upsampler, on low's device. y: labels (n,), where it has classes; None is its null class. By
    DPM-Solver++ without guidance, as low leaves little open, and with no noise on low, as the released upsamplers learned it;
    ours draws the digits no better with a little. Fewer at a time if the memory is full.
    """
    low, indices = low.clamp(-1, 1), list(indices)       # what an autoencoder decoded may lie beyond
    y = None if y is None or network.num_classes is None else y.to(low.device)

    def enlarged(rows):
        part = slice(rows.start, rows.stop)
        noise = torch.stack([torch.randn(network.channels, *network.image_size,
                                         generator=ddpm.keyed_generator((seed, indices[i], UPSAMPLED))) for i in rows])
        return ddpm.sample(diffusion, partial(network, low=low[part]), noise.shape, None if y is None else y[part], "dpm++",
                           min(STEPS, diffusion.T), noise=noise.to(low.device), clip=True)
    return in_pieces(enlarged, range(len(low)), len(low))
