"""The autoencoder of latent diffusion: an image becomes a smaller map, on which diffusion costs a fraction, and back.

Report §2-5. Papers: Rombach et al. 2022 (LDM), section 3.1 and appendix G; Kingma & Welling 2014 (VAE). The encoder gives the
mean and log variance of a Gaussian q(z | x) for each number of the latent z, the decoder draws the image from z. They learn a
lower bound of the image's likelihood: log p(x) >= E_q log p(x | z) - KL(q(z | x) || N(0, I)). Latent diffusion weighs the KL with
1e-6, so that z loses little: it only keeps latents from drifting apart, and their distribution is left to diffusion.

Images are (N, C, H, W) in [-1, 1], any sides that the factor f divides; latents (N, c, h, w), h = H / f, w = W / f, not yet
multiplied by `scale`; D is the width of a map. State-dict names are those of CompVis's releases; models.py
knows the diffusers library's.
"""
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from unet import Upsample, as_linear
from vit import attention, divided


def kl_divergence(mean, log_variance):
    """KL(q(z | x) || N(0, I)) of each sample in nats: (N, c, h, w) twice -> (N,).  Kingma & Welling 2014, appendix B."""
    # expm1: variance - 1 without the rounding that would make the small divergences negative
    return 0.5 * (mean.square() + log_variance.expm1() - log_variance).flatten(1).sum(dim=1)


def sample_latent(mean, log_variance, noise):
    """Sample z from q(z | x), all (N, c, h, w); noise is standard normal.  Kingma & Welling 2014, section 2.4."""
    return mean + (0.5 * log_variance).exp() * noise


def pieces(function, x, size):
    """Yield function(x[:size]) and so on, `size` rows at a time, fewer where the device's memory does not hold them."""
    while len(x):
        size = min(size, len(x))
        try:
            piece = function(x[:size])
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        else:
            yield piece
            x = x[size:]
            continue
        size //= 2
        torch.cuda.empty_cache()       # not in the except block, where the error still holds what the try had in memory


def in_pieces(function, x, size):
    """function(x), computed in `pieces`."""
    return torch.cat(list(pieces(function, x, size)))


def conv(channels, out_channels):
    """A 3 x 3 convolution: (N, D, H, W) -> (N, D', H, W)."""
    return nn.Conv2d(channels, out_channels, 3, padding=1)


class Norm(nn.GroupNorm):
    """GroupNorm of 32 groups, whatever the layout and the mean of a map (N, D, H, W); epsilon is that of the released weights.

    With channels last the CPU's kernel takes a variance as E[x^2] - E[x]^2, of which rounding leaves nothing where the mean is a
    thousand deviations. Such a map first loses each group's mean over its first row, which changes no output. What is left of the
    mean is at most sqrt(H - 1) deviations, as the first row's own deviation is part of the variance. in_place: the map is changed.
    """

    def __init__(self, channels, in_place=False):
        super().__init__(32, channels, eps=1e-6)
        self.in_place = in_place

    def forward(self, x):
        if x.is_contiguous(memory_format=torch.channels_last):
            means = x[:, :, 0].detach().unflatten(1, (self.num_groups, -1)).mean((2, 3))                 # (N, 32)
            means = means.repeat_interleave(x.shape[1] // self.num_groups, dim=1)[..., None, None]       # (N, D, 1, 1)
            x = x.sub_(means) if self.in_place else x - means
        return super().forward(x)


def silu(x):
    """SiLU, in the memory of x where no gradient will ask for it: new pages cost the CPU more than the function."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResnetBlock(nn.Module):
    """Two convolutions with a residual: (N, D, H, W) -> (N, D', H, W)."""

    def __init__(self, width, out_width):
        super().__init__()
        self.norm1, self.conv1 = Norm(width), conv(width, out_width)
        self.norm2, self.conv2 = Norm(out_width, in_place=True), conv(out_width, out_width)
        self.nin_shortcut = nn.Identity() if width == out_width else nn.Conv2d(width, out_width, 1)

    def forward(self, x):
        h = self.conv1(silu(self.norm1(x)))                              # (N, D', H, W)
        h = self.conv2(silu(self.norm2(h)))
        return h.add_(self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Self-attention among the L = H W pixels of x (N, D, H, W), one head of all channels, with a residual."""

    def __init__(self, width):
        super().__init__()
        self.norm = Norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        tokens = self.norm(x).flatten(2).mT                              # (N, L, D)
        q, k, v = (as_linear(layer, tokens).unsqueeze(1) for layer in (self.q, self.k, self.v))                  # (N, 1, L, D)
        out = as_linear(self.proj_out, attention(q, k, v).squeeze(1))    # (N, L, D)
        return x + out.mT.unflatten(2, x.shape[2:])                      # (N, D, H, W)


def downsample(width):
    """Halve even sides: (N, D, H, W) -> (N, D, H / 2, W / 2). Zeros stand right and below only, as for the released weights."""
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2)))


def blocks(width, out_width, n):
    """n residual blocks, of which the first changes the width."""
    return nn.Sequential(*(ResnetBlock(out_width if i else width, out_width) for i in range(n)))


def middle(width):
    """The layers of the smallest map, between both paths; here every pixel sees every other."""
    return nn.ModuleDict({"block_1": ResnetBlock(width, width), "attn_1": AttnBlock(width), "block_2": ResnetBlock(width, width)})


class Encoder(nn.Module):
    """An image (N, C, H, W) -> (N, 2 c, h, w), the moments of its latent. down.0 is of the image's size."""

    def __init__(self, channels, dim, widths, res_blocks, latent_channels):
        super().__init__()
        self.conv_in = conv(channels, dim)
        self.down = nn.ModuleList()
        for before, width in zip([dim, *widths], widths):
            self.down.append(nn.ModuleDict({"block": blocks(before, width, res_blocks)}))
            if len(self.down) < len(widths):                 # the smallest map is the last
                self.down[-1]["downsample"] = downsample(width)
        self.mid = middle(widths[-1])
        self.norm_out, self.conv_out = Norm(widths[-1]), conv(widths[-1], 2 * latent_channels)

    def forward(self, x):
        x = self.conv_in(x)                                              # (N, D, H, W)
        for level in (*self.down, self.mid):
            for layer in level.values():
                x = layer(x)                                             # the last: (N, D, h, w)
        return self.conv_out(silu(self.norm_out(x)))


class Decoder(nn.Module):
    """A latent (N, c, h, w) -> an image (N, C, H, W). up.0 is of the image's size and comes last."""

    def __init__(self, channels, widths, res_blocks, latent_channels):
        super().__init__()
        self.conv_in = conv(latent_channels, widths[-1])
        self.mid = middle(widths[-1])
        self.up = nn.ModuleList()
        for width, before in zip(widths, [*widths[1:], widths[-1]]):
            level = nn.ModuleDict({"block": blocks(before, width, res_blocks + 1)})
            if self.up:
                level["upsample"] = Upsample(width, conv=True)
            self.up.append(level)
        self.norm_out, self.conv_out = Norm(widths[0]), conv(widths[0], channels)

    def forward(self, z):
        x = self.conv_in(z)                                              # (N, D, h, w)
        for level in (self.mid, *reversed(self.up)):
            for layer in level.values():
                x = layer(x)                                             # the last: (N, D, H, W)
        return self.conv_out(silu(self.norm_out(x)))


def checked_map(x, channels, what):
    """x in the layout in which the device convolves fastest. ValueError if it is not (N, channels, H, W)."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"{what} of shape {tuple(x.shape)} where the autoencoder takes (N, {channels}, H, W)")
    # a copy: of one channel, both layouts count as contiguous, and convolutions go by the strides
    return x.clone(memory_format=torch.channels_last if x.is_cpu else torch.contiguous_format)


class AutoencoderKL(nn.Module):
    """Stable Diffusion's autoencoder, of its size by default.  Rombach et al. 2022, table 8: f = 8, KL, c = 4.

    dim times a multiplier is the width of each resolution; between two of them the sides are halved. The encoder has res_blocks
    residual blocks a resolution, the decoder one more. scale is what latents are multiplied by, outside, to have deviation 1
    for diffusion: SD's until another is set. ValueError on a dim that is not a multiple of 32, the norms' groups.
    """

    def __init__(self, channels=3, dim=128, multipliers=(1, 2, 4, 4), res_blocks=2, latent_channels=4):
        super().__init__()
        if dim == 0 or dim % 32:
            lower = max(32, dim // 32 * 32)
            raise ValueError(f"dim {dim} is not a multiple of 32, the groups of its norms: use {lower} or {lower + 32}")
        self.channels, self.latent_channels = channels, latent_channels
        self.factor, self.scale = 2 ** (len(multipliers) - 1), 0.18215
        widths = [dim * multiplier for multiplier in multipliers]
        self.encoder = Encoder(channels, dim, widths, res_blocks, latent_channels)
        self.decoder = Decoder(channels, widths, res_blocks, latent_channels)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, x):
        """Mean and log variance of q(z | x), each (N, c, h, w), of images x (N, C, H, W); ValueError if x does not fit."""
        x = checked_map(x, self.channels, "images")
        divided(x.shape[2:], self.factor, "the autoencoder's factor")
        moments = self.quant_conv(self.encoder(x)).to(x.dtype)               # autocast puts out bfloat16
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)             # CompVis's limits: the variance is 1e-13 … 5e8

    def decode(self, z):
        """The images (N, C, H, W) of latents z (N, c, h, w); ValueError if z does not fit."""
        return self.decoder(self.post_quant_conv(checked_map(z, self.latent_channels, "latents"))).to(z.dtype)

    def forward(self, x, noise):
        """Images x, encoded, sampled with standard normal noise like their latents and decoded -> image, mean, log variance."""
        mean, log_variance = self.encode(x)
        return self.decode(sample_latent(mean, log_variance, noise)), mean, log_variance


SIZES = {
    "Ti": dict(dim=32, multipliers=(1, 2, 2), res_blocks=1),     # ours, for a laptop: 32 x 32 pixels become 4 x 8 x 8 numbers
    "SD": dict(),
}
