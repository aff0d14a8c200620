"""The Vision Transformer and the parts that the networks here share.

Report §2-3 and §2-4: cut an image into patches, embed each linearly, add positions, run an encoder of self-attention
and MLP behind LayerNorms, read the class off a class token; §2-4-4: cut the patches from a CNN's feature map instead.
Papers: Vaswani et al. 2017 (attention), Dosovitskiy et al. 2021 (ViT); Ho et al. 2020 (time embedding).

Shapes: N images, C channels, H x W pixels, p patch, L = (H / p)(W / p) tokens row by row, D width, h heads, K classes.
Images are (N, C, H, W) in [-1, 1]. State-dict names are timm's, so its ViT weights load by name.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def attention(q, k, v, fused=True, mask=None):
    """softmax(q k^T / sqrt(d)) v, Vaswani et al. 2017, Eq. 1.  q (N, h, L, d); k, v (N, h, M, d). Returns (N, h, L, d).

    mask, bool, broadcastable to (N, h, L, M): False where a row must not see a column. fused=False writes the formula out;
    fused=True is the same function through PyTorch's fused kernel, which never stores the L x M weights. They agree within
    rounding. Training in bfloat16 on the CPU takes the formula: there the kernel's backward pass takes 1.5 to 10 times as long.
    """
    slow = q.is_cpu and q.dtype == torch.bfloat16 and q.requires_grad
    if fused and not slow:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])                        # (N, h, L, M)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1) @ v                                                # (N, h, L, d)


class Attention(nn.Module):
    """Multi-head attention (§2-4-1) of tokens x (N, L, D) to themselves, or with cross to a context (N, M, D)."""

    def __init__(self, dim, heads, qkv_bias=True, cross=False):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide width {dim}")
        self.heads, self.cross, self.fused = heads, cross, True
        if cross:
            self.q, self.kv = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, 2 * dim, bias=qkv_bias)
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, context=None):
        if self.cross:
            projected = (self.q(x), *self.kv(context).chunk(2, dim=2))                           # (N, L, D), two of (N, M, D)
        else:
            projected = self.qkv(x).chunk(3, dim=2)                                              # three of (N, L, D)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in projected)    # (N, h, L or M, d)
        out = attention(q, k, v, self.fused)                                                     # (N, h, L, d)
        return self.proj(out.transpose(1, 2).flatten(2))                                         # (N, L, D)


class PatchEmbed(nn.Module):
    """Cut images into p x p patches, flatten each and embed it linearly (§2-4-2, §2-8-1): (N, C, H, W) -> (N, L, D)."""

    def __init__(self, patch_size, channels, dim):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, dim, patch_size, stride=patch_size)   # stride = kernel: the patches do not overlap

    def forward(self, x):
        rows, columns = token_grid(x.shape[2:], self.patch_size)
        p = self.patch_size
        patches = x.unflatten(3, (columns, p)).unflatten(2, (rows, p))        # (N, C, rows, p, columns, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (N, L, C p p), the kernel's order
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)  # (N, L, D): the convolution, as one product


def unpatchify(tokens, grid, patch_size):
    """Lay tokens (N, L, p p C) out as an image (N, C, H, W); each token holds its patch as (p, p, C)."""
    rows, columns = grid
    p = patch_size
    patches = tokens.unflatten(2, (p, p, -1)).unflatten(1, (rows, columns))          # (N, rows, columns, p, p, C)
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)                # (N, C, rows p, columns p)


def sincos_position_embedding(dim, height, width):
    """2-D sine-cosine positions (§2-8-2), one row a token, row by row: (height * width, dim) float32.

    The first half of the columns encodes the token's column, the second half its row, each as sines then cosines.
    ValueError if 4 does not divide dim.
    """
    if dim % 4:
        raise ValueError(f"width {dim} is not a multiple of 4, which two-dimensional sine-cosine positions need")
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    column, row = (place.reshape(-1, 1) * frequencies for place in (column, row))            # angles, each (L, dim / 4)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1).float()      # (L, dim)


def timestep_embedding(t, dim):
    """Embed time as cosines, then sines, of geometrically falling frequencies.  Ho et al. 2020; the constants are DiT's.

    t (N,), whole or not. Returns (N, dim) float32: cos(t w_k) for w_k = 10000^(-k / (dim // 2)), then the sines; an odd dim
    ends in a column of zeros.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies                            # (N, dim // 2)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)           # (N, 2 (dim // 2))
    return F.pad(embedding, (0, dim % 2))                                # (N, dim)


class Mlp(nn.Module):
    """Two linear layers around a GELU, four times as wide inside: (N, L, D) -> (N, L, D).

    approximate="none" is the exact GELU of ViT and U-ViT, "tanh" its approximation in DiT's released weights.
    """

    def __init__(self, dim, approximate="none"):
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class Block(nn.Module):
    """An encoder block (§2-4-2): LayerNorm before self-attention and before the MLP, a residual around each."""

    def __init__(self, dim, heads, approximate="none", eps=1e-6, qkv_bias=True):     # eps of ViT's and DiT's released weights
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, approximate)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ConvStem(nn.Sequential):
    """The hybrid's small CNN (§2-4-4): an image (N, C, H, W) becomes a feature map (N, D, H / 4, W / 4)."""

    def __init__(self, channels, dim):
        layers = []
        for inputs, outputs, stride in ((channels, dim // 4, 1), (dim // 4, dim // 2, 2), (dim // 2, dim, 2)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.GroupNorm(1, outputs), nn.ReLU()]
        super().__init__(*layers)


class ViT(nn.Module):
    """Classify images (N, C, H, W) in [-1, 1]: returns logits (N, K).  Dosovitskiy et al. 2021; Fig. 2-3 of the report.

    hybrid=True cuts the patches from a small CNN's feature map of a quarter of each side (§2-4-4); a patch still covers
    patch_size pixels, which 4 must divide. ValueError if the patch does not divide the image, or the heads the width.
    """

    def __init__(self, image_size=224, patch_size=16, channels=3, dim=768, depth=12, heads=12, num_classes=1000,
                 hybrid=False):
        super().__init__()
        self.grid = token_grid(image_size, patch_size)
        self.image_size, self.channels = pair(image_size), channels
        self.patch_size, self.num_classes = patch_size, num_classes
        self.checkpointing = False         # see `run_block`
        if hybrid:
            if patch_size % 4:
                raise ValueError(f"the hybrid's feature map has a quarter of the image's sides: patch size {patch_size} is not a "
                                 "multiple of 4")
            self.stem, self.patch_embed = ConvStem(channels, dim // 2), PatchEmbed(patch_size // 4, dim // 2, dim)
        else:
            self.stem, self.patch_embed = nn.Identity(), PatchEmbed(patch_size, channels, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.grid), dim))     # learned; row 0 is the class token's
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        self.initialize()

    def initialize(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)      # timm's
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)

    def tokens(self, x):
        """All tokens after the last norm (N, 1 + L, D), the class token first."""
        check_image(self, x)
        x = self.patch_embed(self.stem(default_layout(x)))                               # (N, L, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)                 # (N, 1 + L, D)
        x = x + self.pos_embed
        for block in self.blocks:
            x = run_block(self, block, x)
        return self.norm(x)

    def forward(self, x):
        return self.head(self.tokens(x)[:, 0])                                           # (N, K)


SIZES = {                                          # Dosovitskiy et al. 2021, table 1; S: Touvron et al. 2021
    "Nano": dict(dim=64, depth=4, heads=4),        # ours, to judge drawn digits: under a megabyte
    "Ti": dict(dim=192, depth=6, heads=4),         # ours, for a laptop
    "S": dict(dim=384, depth=12, heads=6),
    "B": dict(dim=768, depth=12, heads=12),
    "L": dict(dim=1024, depth=24, heads=16),
}


# What all networks share besides: sizes, checks at their doors, memory

def pair(size):
    """(height, width) of a size given as one number or two."""
    return (size, size) if isinstance(size, int) else tuple(size)


def divided(image_size, factor, what):
    """Both sides of an image divided by a factor, which is called `what` in the message.

    ValueError, with the nearest sizes that work, where it does not divide a side.
    """
    height, width = pair(image_size)
    for side in (height, width):
        if side == 0 or side % factor:
            lower = side // factor * factor
            nearest = f"{lower} or {lower + factor}" if lower else factor
            raise ValueError(f"image size {side} is not a multiple of {what} {factor}: use {nearest}")
    return height // factor, width // factor


def token_grid(image_size, patch_size):
    """Rows and columns of patches (§2-4-2). ValueError where the patch does not divide a side."""
    return divided(image_size, patch_size, "patch size")


def check_image(network, x):
    """ValueError if x is not (N, C, H, W) of the network's channels and image_size."""
    expected = (network.channels, *network.image_size)
    if tuple(x.shape[1:]) != expected:
        raise ValueError(f"input of shape {tuple(x.shape[1:])} where the network was built for {expected}")


def checked_condition(network, x, t, y):
    """Check what a denoiser is given, at its door -> y as it uses it: labels, a context or None.

    x must be (N, channels, *image_size) of the network, t (N,). y: a context (N, M, context_dim) if it has a context_dim, or the
    ids (N, M, W) of a text if it has a .text_encoder, which makes the context of them here; labels (N,) if it has classes, None
    being the null label; None if it has neither. ValueError otherwise.
    """
    check_image(network, x)
    if t.shape != x.shape[:1]:
        raise ValueError(f"t of shape {tuple(t.shape)} for {len(x)} images: it must be (N,)")
    if network.context_dim is not None:
        if y is not None and not y.is_floating_point() and hasattr(network, "text_encoder"):
            y = network.text_encoder(y)                                  # (N, M, context_dim)
        if y is None or y.ndim != 3 or len(y) != len(x) or y.shape[2] != network.context_dim:
            raise ValueError(f"this network wants a text context y of shape ({len(x)}, M, {network.context_dim})")
    elif network.num_classes is None:
        if y is not None:
            raise ValueError("labels given to an unconditional network: y must be None")
    elif y is None:
        if network.null_label is None:
            raise ValueError("this network has no null class: it wants labels y")
        return torch.full_like(t, network.null_label, dtype=torch.long)
    elif y.shape != t.shape or y.is_floating_point():
        raise ValueError(f"y of shape {tuple(y.shape)}, {y.dtype}: it must be whole numbers ({len(x)},)")
    return y


def default_layout(x):
    """x (N, C, H, W) in PyTorch's default memory layout, whatever it came in: `unet.norm` says why.

    A copy: with one channel `.contiguous()` would keep the strides of NHWC bytes, from which convolutions take their layout.
    """
    return x.clone(memory_format=torch.contiguous_format)


def run_block(network, block, *inputs):
    """block(*inputs), recomputed in the backward pass if network.checkpointing: less memory for a third more work."""
    if network.checkpointing and network.training:
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
