"""U-Nets: Ronneberger's, which segments, and the one of DDPM, IDDPM, ADM and LDM, which denoises.

Report §2-2 and §3. Papers: Ronneberger et al. 2015; Ho et al. 2020 (DDPM); Nichol & Dhariwal 2021 (IDDPM); Dhariwal & Nichol
2021 (ADM); Rombach et al. 2022 (LDM). A contracting path halves the sides and widens the channels, an expanding path undoes
it, and each of its steps also sees the feature map of the same size from the way down.

The denoisers share one signature, model(x, t, y=None), see `vit.checked_condition`; where the variance is learned, out_channels is
twice channels, the prediction first. State-dict names are those of OpenAI's and CompVis's releases, which load strictly.
Shapes: N images, C channels of a map, H x W pixels, L = H W, E the width of the embedding of time and class, h heads, d = C / h.
"""
from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F

from vit import attention, checked_condition, default_layout, divided, pair, run_block, timestep_embedding


def two_convolutions(channels, out_channels):
    """Twice a 3 x 3 convolution without padding and a ReLU: (N, C, H, W) -> (N, C', H - 4, W - 4)."""
    return nn.Sequential(nn.Conv2d(channels, out_channels, 3), nn.ReLU(), nn.Conv2d(out_channels, out_channels, 3), nn.ReLU())


class RonnebergerUNet(nn.Module):
    """Segment images (N, C, H, W): returns logits (N, K, H - 184, W - 184), each pixel's class.  §2-2-1, Fig. 2-2.

    Without padding a map loses two pixels a convolution: the logits are those of the image's centre, and maps of the contracting
    path are cropped to the size of those on the expanding path. Of Ronneberger et al.'s training (elastic deformations, loss
    weights, dropout) nothing is here. ValueError on sides other than 188, 204, 220, …: every pooled map must have even sides.
    """

    def __init__(self, channels=1, num_classes=2):
        super().__init__()
        widths = (64, 128, 256, 512, 1024)
        self.down = nn.ModuleList(two_convolutions(a, b) for a, b in pairwise((channels, *widths)))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairwise(reversed(widths)))
        self.merge = nn.ModuleList(two_convolutions(a, b) for a, b in pairwise(reversed(widths)))
        self.last = nn.Conv2d(widths[0], num_classes, 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                inputs = module.in_channels * (9 if module.kernel_size == (3, 3) else 1)         # of one output
                nn.init.normal_(module.weight, std=(2 / inputs) ** 0.5)              # their section 3
                nn.init.zeros_(module.bias)

    def forward(self, x):
        for side in x.shape[2:]:
            if side < 188 or side % 16 != 12:
                lower = max(188, side - (side - 12) % 16)
                raise ValueError(f"side {side} leaves a map that cannot be halved, or nothing to answer: use {lower} or "
                                 f"{lower + 16}")
        skips = []
        for stage in self.down[:-1]:
            x = stage(x)                                                 # (N, C, H, W)
            skips.append(x)
            x = F.max_pool2d(x, 2)                                       # (N, C, H / 2, W / 2); "min pooling" in the report
        x = self.down[-1](x)
        for up, merge in zip(self.up, self.merge):
            x = up(x)                                                    # (N, C, H, W) -> (N, C / 2, 2 H, 2 W)
            skip = skips.pop()
            top, left = (skip.shape[2] - x.shape[2]) // 2, (skip.shape[3] - x.shape[3]) // 2
            skip = skip[:, :, top:top + x.shape[2], left:left + x.shape[3]]          # the centre
            x = merge(torch.cat([skip, x], dim=1))                       # C / 2 + C / 2 channels become C / 2
        return self.last(x)


def norm(channels, eps=1e-5):
    """GroupNorm of 32 groups; eps is that of the released weights.

    It needs maps in PyTorch's default layout: on those with channels last the CPU's kernel takes a variance as E[x^2] - E[x]^2,
    of which rounding leaves nothing where the mean is a thousand deviations.
    """
    return nn.GroupNorm(32, channels, eps=eps)


def zero(module):
    """The module with all its parameters zero: a residual branch that ends in it starts by adding nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def convolved(x, resample, convolve):
    """convolve(resample(x)), x (N, C, H, W).

    Repeating pixels twice is a transposed convolution by 2 x 2 ones, and with a 3 x 3 convolution after it one by 4 x 4 numbers:
    for a pixel 4 products instead of 9. Counts of operations and CUDA go the papers' way.
    """
    if not x.is_cpu or not isinstance(resample, nn.Upsample) or not isinstance(convolve, nn.Conv2d):
        return convolve(resample(x))
    kernel = F.pad(convolve.weight.transpose(0, 1).flip(2, 3), (1, 1, 1, 1))         # (C, C', 5, 5), its 3 x 3 amid zeros
    kernel = F.avg_pool2d(kernel, 2, stride=1, divisor_override=1)                   # (C, C', 4, 4), sums of 2 x 2 neighbours
    return F.conv_transpose2d(x, kernel, convolve.bias, stride=2, padding=1)         # (N, C', 2 H, 2 W)


class Downsample(nn.Sequential):
    """Halve the sides, by a convolution of stride 2 or the mean of 2 x 2 pixels: (N, C, H, W) -> (N, C, H / 2, W / 2)."""

    def __init__(self, channels, conv):
        super().__init__(OrderedDict(op=nn.Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)))


class Upsample(nn.Sequential):
    """Repeat each pixel twice along both sides, and convolve after it or not: (N, C, H, W) -> (N, C, 2 H, 2 W)."""

    def __init__(self, channels, conv):
        layer = nn.Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()
        super().__init__(OrderedDict(repeat=nn.Upsample(scale_factor=2), conv=layer))

    def forward(self, x):
        return convolved(x, self.repeat, self.conv)


class ResBlock(nn.Module):
    """Two convolutions with a residual; the embedding of time and class, emb (N, E), enters between them: (N, C, H, W) -> (N, C', H', W').

    scale_shift: emb modulates the second norm instead of being added before it (Dhariwal & Nichol 2021, section 3.1).
    resample: a layer that changes the sides, before the first convolution and of the residual (their section 3).
    """

    def __init__(self, channels, out_channels, emb_dim, dropout, scale_shift, resample=None):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample or nn.Identity()
        self.in_layers = nn.Sequential(norm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, (2 if scale_shift else 1) * out_channels))
        self.out_layers = nn.Sequential(norm(out_channels), nn.SiLU(), nn.Dropout(dropout),
                                        zero(nn.Conv2d(out_channels, out_channels, 3, padding=1)))
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, emb):
        normalize, activate, convolve = self.in_layers
        h = convolved(activate(normalize(x)), self.resample, convolve)               # (N, C', H', W')
        x = self.resample(x)                                                         # (N, C, H', W')
        normalize, activate, dropout, convolve = self.out_layers
        bias = self.emb_layers(emb)[:, :, None, None]                                # (N, C' or 2 C', 1, 1)
        if self.scale_shift:
            scale, shift = bias.chunk(2, dim=1)
            h = normalize(h) * (1 + scale) + shift
        else:
            h = normalize(h + bias)
        return self.skip_connection(x) + convolve(dropout(activate(h)))


def as_linear(conv, tokens):
    """A convolution of single pixels as a linear layer of tokens (N, L, C) -> (N, L, C')."""
    return F.linear(tokens, conv.weight.flatten(1), conv.bias)


class AttentionBlock(nn.Module):
    """Self-attention among the pixels of x (N, C, H, W), with a residual.

    The outputs of qkv are ordered [head][q, k, v][channel], or [q, k, v][head][channel] with new_order.
    """

    def __init__(self, channels, heads, new_order):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x):
        tokens = self.norm(x).flatten(2).transpose(1, 2)                             # (N, L, C)
        qkv = as_linear(self.qkv, tokens)                                            # (N, L, 3 C)
        if self.new_order:
            parts = qkv.unflatten(2, (3, self.heads, -1)).unbind(2)                  # three of (N, L, h, d)
        else:
            parts = qkv.unflatten(2, (self.heads, 3, -1)).unbind(3)
        out = attention(*(part.transpose(1, 2) for part in parts))                   # (N, h, L, d)
        out = as_linear(self.proj_out, out.transpose(1, 2).flatten(2))               # (N, L, C)
        return x + out.transpose(1, 2).unflatten(2, x.shape[2:])                     # (N, C, H, W)


class CrossAttention(nn.Module):
    """Attention of tokens x (N, L, C) to a context (N, M, context_dim), in CompVis's names."""

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k, self.to_v = nn.Linear(context_dim, dim, bias=False), nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x, context):
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for part in (self.to_q(x), self.to_k(context), self.to_v(context)))           # (N, h, L or M, d)
        return self.to_out(attention(q, k, v).transpose(1, 2).flatten(2))                        # (N, L, C)


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another, Shazeer 2020: (N, L, C) -> (N, L, 4 C)."""

    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Linear(dim, 8 * dim)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=2)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """LDM's block: attention among the pixels, then to the context, then an MLP, each behind a LayerNorm."""

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(dim, dim, heads), CrossAttention(dim, context_dim, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.ff = nn.ModuleDict({"net": nn.Sequential(GEGLU(dim), nn.Identity(), nn.Linear(4 * dim, dim))})

    def forward(self, x, context):
        tokens = self.norm1(x)
        x = x + self.attn1(tokens, tokens)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff["net"](self.norm3(x))


class SpatialTransformer(nn.Module):
    """LDM's attention, Rombach et al. 2022, section 3.3: a transformer block over the pixels of x (N, C, H, W), with a residual."""

    def __init__(self, channels, context_dim, heads):
        super().__init__()
        self.norm = norm(channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, heads)])    # one, but of that name
        self.proj_out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x, context):
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)               # (N, L, C)
        tokens = self.transformer_blocks[0](tokens, context)
        return x + self.proj_out(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))   # (N, C, H, W)


class Stage(nn.Sequential):
    """Layers in a row, each given what it takes besides x: emb (N, E) or context (N, M, context_dim)."""

    def forward(self, x, emb, context):
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """The denoising U-Net.  Ho et al. 2020, appendix B; Dhariwal & Nichol 2021, section 3; Rombach et al. 2022.

    image_size is one number or (H, W). dim times a multiplier is the width of each resolution; between two of them the sides
    are halved. attention_ds: at which downsampling factors the pixels attend to each other, with `heads` heads, or as many as
    take head_dim channels each. num_classes and null_class: as in dit.py; context_dim: the width of a context that
    cross-attention sees. updown: ResBlocks halve and double the sides, not `Downsample` and `Upsample`, which convolve with
    conv_resample only. Take scale_shift with a width of 32: without it the time is added before a norm of one channel a group,
    which takes it out again. ValueError on sides that cannot be halved so often, heads that do not divide a width, a y that
    does not fit.
    """

    inputs = 1                         # images that the first convolution sees side by side

    def __init__(self, image_size, channels=3, out_channels=3, dim=128, res_blocks=2, attention_ds=(2,),
                 multipliers=(1, 2, 2, 2), heads=1, head_dim=None, num_classes=None, null_class=True, scale_shift=False,
                 updown=False, conv_resample=True, new_attention_order=False, context_dim=None, dropout=0.0):
        super().__init__()
        self.image_size, self.channels, self.out_channels, self.dim = pair(image_size), channels, out_channels, dim
        divided(image_size, 2 ** (len(multipliers) - 1), "the U-Net's total stride")
        self.context_dim = context_dim
        self.num_classes = None if context_dim is not None else num_classes
        self.null_label = self.num_classes if null_class else None
        self.checkpointing = False         # see `vit.run_block`
        emb_dim = 4 * dim
        self.time_embed = nn.Sequential(nn.Linear(dim, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        if self.num_classes is not None:
            self.label_emb = nn.Embedding(self.num_classes + bool(null_class), emb_dim)

        def res(width, out_width, resample=None):
            return ResBlock(width, out_width, emb_dim, dropout, scale_shift, resample)

        def attend(width):
            if width % (heads if head_dim is None else head_dim):
                raise ValueError(f"heads do not divide the width {width}: " + (f"{heads} heads" if head_dim is None else
                                                                               f"{head_dim} channels a head"))
            h = heads if head_dim is None else width // head_dim
            if context_dim is not None:
                return SpatialTransformer(width, context_dim, h)
            return AttentionBlock(width, h, new_attention_order)

        widths = [int(multiplier * dim) for multiplier in multipliers]

        def block(width, level):
            layers = [res(width, widths[level])]
            if 2 ** level in attention_ds:
                layers.append(attend(widths[level]))
            return layers

        width = widths[0]
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(self.inputs * channels, width, 3, padding=1))])
        skips = [width]                                                  # widths of the maps that the way up will see
        for level in range(len(widths)):
            for _ in range(res_blocks):
                self.input_blocks.append(Stage(*block(width, level)))
                width = widths[level]
                skips.append(width)
            if level + 1 < len(widths):
                self.input_blocks.append(Stage(res(width, width, nn.AvgPool2d(2)) if updown else Downsample(width, conv_resample)))
                skips.append(width)
        self.middle_block = Stage(res(width, width), attend(width), res(width, width))
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for i in range(res_blocks + 1):
                layers = block(width + skips.pop(), level)
                width = widths[level]
                if level and i == res_blocks:
                    layers.append(res(width, width, nn.Upsample(scale_factor=2)) if updown
                                  else Upsample(width, conv_resample))
                self.output_blocks.append(Stage(*layers))
        self.out = nn.Sequential(norm(width), nn.SiLU(), zero(nn.Conv2d(width, out_channels, 3, padding=1)))

    def denoise(self, x, t, y):
        """The network itself: x (N, inputs C, H, W), t (N,), y as `vit.checked_condition` returns it -> (N, out_channels, H, W)."""
        x = default_layout(x)
        emb = self.time_embed(timestep_embedding(t, self.dim).to(x.dtype))           # (N, E)
        if self.num_classes is not None:
            emb = emb + self.label_emb(y)
        skips = []
        for stage in self.input_blocks:
            x = run_block(self, stage, x, emb, y)
            skips.append(x)
        x = run_block(self, self.middle_block, x, emb, y)
        for stage in self.output_blocks:
            x = run_block(self, stage, torch.cat([x, skips.pop()], dim=1), emb, y)         # the last one in is the first out
        return self.out(x)

    def forward(self, x, t, y=None):
        return self.denoise(x, t, checked_condition(self, x, t, y))


class SuperResUNet(UNet):
    """ADM's upsampler (§3, cascades): a UNet that also sees a smaller image low (N, C, h, w), scaled to x's size bilinearly.

    The arguments are UNet's; channels counts those of one image. ValueError without a low of as many images and channels as x.
    """

    inputs, factor = 2, 4              # x's sides are four times low's, in training and in all releases

    def forward(self, x, t, y=None, low=None):
        y = checked_condition(self, x, t, y)
        if low is None or low.ndim != 4 or low.shape[:2] != x.shape[:2]:
            raise ValueError(f"an upsampler wants low, the small images ({len(x)}, {self.channels}, h, w)")
        low = F.interpolate(low, x.shape[2:], mode="bilinear", align_corners=False)
        return self.denoise(torch.cat([x, low], dim=1), t, y)            # (N, 2 C, H, W)


ADM = dict(scale_shift=True, updown=True)
SIZES = {
    # ours, ADM's design: for a laptop, Nano at the cost of DiT-Ti/4, and Ti-up, which needs no attention, as low says where what is
    "Nano": dict(dim=32, res_blocks=1, multipliers=(1, 1, 2), attention_ds=(4,), head_dim=32, **ADM),
    "Ti": dict(dim=32, res_blocks=1, multipliers=(1, 2, 2), attention_ds=(4,), head_dim=32, **ADM),
    "Ti-up": dict(dim=32, res_blocks=1, multipliers=(1, 1, 2), attention_ds=(), head_dim=32, **ADM),
    "Nano-latent": dict(dim=64, res_blocks=2, multipliers=(1, 1), attention_ds=(2,), head_dim=32, **ADM),    # as DiT-Ti/2, on 8x8
    "S": dict(dim=128, res_blocks=2, multipliers=(1, 2, 2, 2), attention_ds=(2, 4), head_dim=64, **ADM),
    "B": dict(dim=192, res_blocks=3, multipliers=(1, 2, 2, 2), attention_ds=(2, 4), head_dim=64, **ADM),
    "ldm-coco": dict(image_size=32, dim=128, attention_ds=(2, 4), context_dim=768),      # a guess at the 53M U-Net of Fig. 5-1
    # published, with the side of what they were trained on
    "ddpm-cifar10": dict(image_size=32, dim=128, dropout=0.1),
    "ddpm-256": dict(image_size=256, dim=128, multipliers=(1, 1, 2, 2, 4, 4), attention_ds=(16,)),
    "iddpm-cifar10": dict(image_size=32, dim=128, res_blocks=3, attention_ds=(2, 4), heads=4, scale_shift=True, dropout=0.3),
    "iddpm-64": dict(image_size=64, dim=128, res_blocks=3, multipliers=(1, 2, 3, 4), attention_ds=(4, 8), heads=4,
                     scale_shift=True),
    "adm-64": dict(image_size=64, dim=192, res_blocks=3, multipliers=(1, 2, 3, 4), attention_ds=(2, 4, 8), head_dim=64,
                   new_attention_order=True, dropout=0.1, **ADM),
    "adm-128": dict(image_size=128, dim=256, multipliers=(1, 1, 2, 3, 4), attention_ds=(4, 8, 16), heads=4, **ADM),
    "adm-256": dict(image_size=256, dim=256, multipliers=(1, 1, 2, 2, 4, 4), attention_ds=(8, 16, 32), head_dim=64, **ADM),
    "adm-512": dict(image_size=512, dim=256, multipliers=(0.5, 1, 1, 2, 2, 4, 4), attention_ds=(16, 32, 64), head_dim=64,
                    **ADM),
    "adm-64-256": dict(image_size=256, dim=192, multipliers=(1, 1, 2, 2, 4, 4), attention_ds=(8, 16, 32), heads=4, **ADM),
    "adm-128-512": dict(image_size=512, dim=192, multipliers=(1, 1, 2, 2, 4, 4), attention_ds=(16, 32), head_dim=64, **ADM),
    "ldm-4": dict(image_size=64, dim=192, multipliers=(1, 2, 3, 5), attention_ds=(2, 4, 8), context_dim=512),
    "ldm-8": dict(image_size=32, dim=256, multipliers=(1, 2, 4), attention_ds=(1, 2, 4), head_dim=32, context_dim=512),
}
UPSAMPLERS = ("Ti-up", "adm-64-256", "adm-128-512")       # these are SuperResUNets, from a quarter of the sides
