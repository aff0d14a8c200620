"""Points in the plane: a swiss roll, a small denoiser of points, and a distance between two sets of them.

Report §2-1-2, Fig. 2-1. Sohl-Dickstein et al. 2015, Fig. 1, show diffusion on such a roll, where all of it can be seen. A point is
an image of one pixel and two channels, (2, 1, 1) float32, its coordinates around 0 with a deviation of about 1: no bytes, and no
range to clip to. So the process, the samplers and the training loop are those of images.
"""
import math

import torch
from torch import nn

from ddpm import keyed_generator
from vit import timestep_embedding

POINTS = 20_000                                  # of the data set "swissroll"
NOISE = 0.04                                     # deviation around the roll, whose arms lie about 0.9 apart
TURNS = (1.5 * math.pi, 4.5 * math.pi)           # the angles from the inner end to the outer
MEAN = (2.0, 2 / (3 * math.pi))                  # of angle (cos, sin) for an angle uniform in TURNS
SCALE = math.sqrt(4.875) * math.pi               # its variances are 4.875 pi^2 - 4.25 and 4.875 pi^2 + 0.25 - 4 / (9 pi^2)


def swiss_roll(n, seed=0):
    """n points (n, 2) float32 of a spiral, the angle uniform and the radius in proportion to it, with a little noise."""
    generator = keyed_generator(seed)
    angle = TURNS[0] + (TURNS[1] - TURNS[0]) * torch.rand(n, 1, generator=generator)
    roll = angle * torch.cat([angle.cos(), angle.sin()], dim=1)                      # (n, 2)
    return (roll - torch.tensor(MEAN)) / SCALE + NOISE * torch.randn(n, 2, generator=generator)


def sliced_wasserstein(a, b, directions=128):
    """Mean Wasserstein-1 distance of the projections of two sets of points (n, 2) on fixed directions, evenly over a half turn.

    On a line the best transport pairs the points by rank. ValueError on sets of unequal size.
    """
    if a.shape != b.shape:
        raise ValueError(f"sets of {len(a)} and {len(b)} points: the distance pairs them, take as many of each")
    angle = math.pi * torch.arange(directions, dtype=torch.float64) / directions
    axes = torch.stack([angle.cos(), angle.sin()])                                   # (2, directions)
    return ((a.double() @ axes).sort(dim=0).values - (b.double() @ axes).sort(dim=0).values).abs().mean().item()


class MLP(nn.Module):
    """A denoiser of points: the point and the embedded time, through residual layers whose input the time shifts.

    dim, its width; depth, the number of layers.
    """

    channels, image_size = 2, (1, 1)             # a point is an image of one pixel
    num_classes = null_label = context_dim = None
    checkpointing = False

    def __init__(self, dim=128, depth=4):
        super().__init__()
        self.dim = dim
        self.point, self.time = nn.Linear(2, dim), nn.Linear(dim, dim)
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth))
        self.final = nn.Linear(dim, 2)

    def forward(self, x, t, y=None):
        """x (N, 2, 1, 1), t (N,) -> a prediction like x.  ValueError on a condition: points have none."""
        if y is not None:
            raise ValueError("the MLP has no classes: y must be None")
        time = self.time(timestep_embedding(t, self.dim))                            # (N, D)
        h = self.point(x.flatten(1))                                                 # (N, D)
        for layer in self.layers:
            h = h + layer(nn.functional.silu(h + time))
        return self.final(nn.functional.silu(h)).reshape(x.shape)


SIZES = {"Ti": dict(dim=128, depth=4)}           # ours: a minute on one core
