"""The Inception-V3 network whose features FID, sFID and the Inception score are measured in.

Report §4-6. Szegedy et al. 2016, as TensorFlow's graph of 2015-12-05 has it, with 1008 outputs; names and shapes are those of
`pt_inception-2015-12-05`. It is never trained here: each batch norm is folded into its convolution. Images are enlarged to 299
pixels first, by the rule of TensorFlow 1 or by PyTorch's; published numbers rest on the former.
"""
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from files import cache_folder, download, sha256_of

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIDE = 299
SPATIAL_CHANNELS = 7                   # of Mixed_6d's first branch, ADM's choice: 17 x 17 x 7 = 2023 numbers


@lru_cache
def tf1_positions(size, side, device):
    """The two pixels of `size` that each of `side` lies between, and how near it is to the second, each (side,).

    Kept on the device: to make them for every batch would be to wait for it.
    """
    source = torch.arange(side) * torch.tensor(size / side, dtype=torch.float32)
    low = source.long()
    return tuple(place.to(device) for place in (low, (low + 1).clamp(max=size - 1), source - low))


def resize_tf1(x, side=SIDE):
    """Bilinear as in TensorFlow 1: pixel i comes from i * H / side, with no half-pixel shift.  x (N, C, H, W) float32."""
    for axis in (3, 2):                                                  # columns first, as there
        low, high, share = tf1_positions(x.shape[axis], side, x.device)
        share = share.unflatten(0, (-1, *[1] * (3 - axis)))              # (side,) or (side, 1)
        x = torch.lerp(x.index_select(axis, low), x.index_select(axis, high), share)
    return x                                                             # (N, C, side, side)


def resize_torch(x, side=SIDE):
    """Bilinear with PyTorch's half-pixel centres; neither rule smooths before it shrinks."""
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False)


class Conv(nn.Module):
    """Convolution, batch norm with fixed statistics, ReLU.  "Same" padding, or none with a stride or padded=False."""

    def __init__(self, inputs, outputs, kernel, stride=1, padded=True):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = [size // 2 if padded and stride == 1 else 0 for size in kernel]
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)                     # TensorFlow's epsilon
        self.register_load_state_dict_post_hook(lambda layer, _: layer.fold())
        self.fold()

    @torch.no_grad()
    def fold(self):
        """Make one convolution, scale (conv - mean) + bias, of both: done when weights are loaded, not for every batch."""
        bn = self.bn
        scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
        weight = self.conv.weight * scale[:, None, None, None]           # laid out as the images are: else each batch copies it
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last), persistent=False)
        self.register_buffer("bias", bn.bias - scale * bn.running_mean, persistent=False)

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, self.conv.stride, self.conv.padding).relu_()


class Mixed(nn.Module):
    """Branches side by side, joined by channels; the last one begins with a pooling, or is nothing but one.

    branches: name -> steps (outputs, kernel[, stride]); the last step may be a pair, whose two see the same input and are joined.
    pool: how many outputs the pooled branch has, None if it strides and is passed on as it is; average: by mean or by maximum.
    """

    def __init__(self, inputs, branches, pool=None, average=True):
        super().__init__()
        self.paths, self.outputs, self.average = [], pool or inputs, average             # a path: the convolutions of each step
        for name, steps in branches.items():
            path, width = [], inputs
            for i, step in enumerate(steps, 1):
                pair = step if isinstance(step[0], tuple) else (step,)
                path.append([Conv(width, *shape) for shape in pair])
                numbered = f"{name}_{i}" if len(steps) > 1 else name     # branch1x1; branch5x5_1; of a pair, branch3x3_2a
                for letter, conv in zip("ab" if len(pair) > 1 else [""], path[-1]):
                    self.add_module(numbered + letter, conv)
                width = sum(shape[0] for shape in pair)
            self.paths.append(path)
            self.outputs += width
        self.branch_pool = Conv(inputs, pool, 1) if pool else None

    def pooled(self, x):
        if self.branch_pool is None:
            return F.max_pool2d(x, 3, stride=2)
        if self.average:
            return self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))
        return self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))

    def forward(self, x):
        ends = []
        for *steps, last in self.paths:
            y = x
            for (conv,) in steps:
                y = conv(y)
            ends += [conv(y) for conv in last]
        return torch.cat([*ends, self.pooled(x)], dim=1)


def squares(pool):
    """35 x 35 pixels: 1x1, 5x5, twice 3x3.  Szegedy et al. 2016, Fig. 5, where the 5x5 is a 3x3."""
    return dict(branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)], branch3x3dbl=[(64, 1), (96, 3), (96, 3)]), pool


def crosses(width):
    """17 x 17 pixels: 7x7 as a row and a column.  Szegedy et al. 2016, Fig. 6."""
    row, column = (width, (1, 7)), (width, (7, 1))
    return dict(branch1x1=[(192, 1)], branch7x7=[(width, 1), row, (192, (7, 1))],
                branch7x7dbl=[(width, 1), column, row, column, (192, (1, 7))]), 192


def fans():
    """8 x 8 pixels: 3x3 as a row beside a column.  Szegedy et al. 2016, Fig. 7."""
    pair = ((384, (1, 3)), (384, (3, 1)))
    return dict(branch1x1=[(320, 1)], branch3x3=[(384, 1), pair], branch3x3dbl=[(448, 1), (384, 3), pair]), 192


MIXED = {
    "Mixed_5b": squares(32), "Mixed_5c": squares(64), "Mixed_5d": squares(64),
    "Mixed_6a": (dict(branch3x3=[(384, 3, 2)], branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)]),),
    "Mixed_6b": crosses(128), "Mixed_6c": crosses(160), "Mixed_6d": crosses(160), "Mixed_6e": crosses(192),
    "Mixed_7a": (dict(branch3x3=[(192, 1), (320, 3, 2)], branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)]),),
    "Mixed_7b": fans(), "Mixed_7c": (*fans(), False),                    # the graph of 2015 pools the last by maximum
}


class Inception(nn.Module):
    """The FID network: images to features.  Weights: `load`."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padded=False)
        width = 192
        for name, arguments in MIXED.items():
            block = Mixed(width, *arguments)
            self.add_module(name, block)
            width = block.outputs
        self.fc = nn.Linear(width, 1008)
        self.eval().requires_grad_(False)

    def preprocess(self, images, tf1_resize=True):
        """uint8 (N, H, W, C) or float (N, C, H, W) in [-1, 1], grey or colour -> (N, 3, 299, 299) in about [-1, 1]."""
        axis = 3 if images.dtype == torch.uint8 else 1                   # of the channels
        if images.ndim != 4 or images.shape[axis] not in (1, 3):
            raise ValueError(f"images of shape {tuple(images.shape)} are neither uint8 NHWC nor float NCHW of 1 or 3 channels")
        pixels = images.permute(0, 3, 1, 2).float() if axis == 3 else 127.5 * (images.float() + 1)       # (N, C, H, W) in 0 .. 255
        if tf1_resize:
            x = (resize_tf1(pixels) - 128) / 128                         # the graph's own step
        else:
            x = resize_torch(pixels) / 127.5 - 1
        return x.expand(-1, 3, -1, -1)

    def features(self, images, tf1_resize=True):
        """Features of images as `preprocess` takes them -> dict of float32: pool (N, 2048), for FID, precision and recall;
        spatial (N, 2023), for sFID; logits (N, 1008) without the bias, for the Inception score."""
        x = self.preprocess(images, tf1_resize).contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))                # (N, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))         # (N, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)                                                 # (N, 192, 35, 35)
        for name in MIXED:
            x = self.get_submodule(name)(x)              # (N, 288, 35, 35) at 5d, (N, 768, 17, 17) at 6e, (N, 2048, 8, 8) at 7c
            if name == "Mixed_6d":
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)         # (N, 2023): its first branch comes first
        pool = x.mean(dim=(2, 3))                                                        # (N, 2048)
        return dict(pool=pool, spatial=spatial, logits=pool @ self.fc.weight.T)

    forward = features


def weights_file(path=None, cache=None):
    """The file of the canonical weights: the one given, or downloaded once.  OSError or ValueError if it is not to be had."""
    if path is None:
        return download(URL, SHA256, cache_folder(cache), "the weights of the FID Inception")
    found = sha256_of(path)
    if found != SHA256:
        raise ValueError(f"{path} holds other weights than FID's Inception: its SHA-256 is {found}, expected {SHA256}")
    return Path(path)


def load(state):
    """The network with the weights of a state dict, with or without num_batches_tracked.  ValueError if they do not fit."""
    network = Inception()
    own = {name: value for name, value in network.state_dict().items() if name.endswith("num_batches_tracked")}
    try:
        network.load_state_dict({**own, **state}, strict=True)
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"these are not the weights of FID's Inception: {reason}") from None
    return network
