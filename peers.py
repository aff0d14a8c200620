"""The networks again, in the style of their authors' code: what bench.py measures ours against.

Report §2-2, §2-5, §2-6, §2-8, §4-1 … §4-4, §4-6. Nothing else here uses them. The transformers were written anew, but as the papers'
code is: patches by a convolution, one matrix for q, k and v, PyTorch's attention, norms and modulation apart, and an average of the
weights that goes from parameter to parameter. Of U-Net, autoencoder, text encoder and Inception only the blocks are written again,
and put into our networks, which say what follows what. State-dict names are ours, so that both have the same weights; tests compare
outputs and gradients. Shapes: N images, C channels, L tokens, D width, p patch, h heads, d = D / h.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from inception import Conv
from models import build
from text import TextBlock
from unet import AttentionBlock, ResBlock, Upsample
from vae import AttnBlock, Decoder, Encoder, Norm, ResnetBlock
from vit import pair, sincos_position_embedding, timestep_embedding


class PlainAttention(nn.Module):
    """Multi-head attention of tokens (N, L, D), as timm's."""

    def __init__(self, dim, heads, qkv_bias=True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        N, L, D = x.shape
        q, k, v = self.qkv(x).reshape(N, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)     # (N, h, L, d)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, L, D))


class PlainMlp(nn.Module):
    """Two linear layers around an activation, as timm's."""

    def __init__(self, dim, activation):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 4 * dim), activation, nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class PlainPatchEmbed(nn.Module):
    """A convolution with a stride, as timm's: (N, C, H, W) -> (N, L, D)."""

    def __init__(self, patch_size, channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def plain_unpatchify(x, patch_size, channels):
    """Tokens (N, L, p p C) of a square image -> (N, C, H, W), as DiT's code has it."""
    side = int(x.shape[1] ** 0.5)
    x = x.reshape(len(x), side, side, patch_size, patch_size, channels)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), channels, side * patch_size, side * patch_size)


def plain_modulate(x, shift, scale):
    """adaLN's modulation of normalised tokens (N, L, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PlainDiTBlock(nn.Module):
    """The adaLN-Zero block, as DiT's code has it."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn = PlainAttention(dim, heads)
        self.mlp = PlainMlp(dim, nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(plain_modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(plain_modulate(self.norm2(x), shift_mlp, scale_mlp))


class PlainFinalLayer(nn.Module):
    """The adaptive norm and the decoder, as DiT's code has it."""

    def __init__(self, dim, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(plain_modulate(self.norm_final(x), shift, scale))


class PlainDiT(nn.Module):
    """DiT of square images with adaLN-Zero (Peebles & Xie 2023)."""

    def __init__(self, image_size, patch_size, channels, dim, depth, heads, num_classes, learn_sigma):
        super().__init__()
        self.patch_size, self.out_channels = patch_size, 2 * channels if learn_sigma else channels
        self.x_embedder = PlainPatchEmbed(patch_size, channels, dim)
        self.t_embedder, self.y_embedder = nn.Module(), nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.y_embedder.embedding_table = nn.Embedding(num_classes + 1, dim)
        side = image_size // patch_size
        self.pos_embed = nn.Parameter(sincos_position_embedding(dim, side, side)[None], requires_grad=False)
        self.blocks = nn.ModuleList([PlainDiTBlock(dim, heads) for _ in range(depth)])
        self.final_layer = PlainFinalLayer(dim, patch_size, self.out_channels)

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder.mlp(timestep_embedding(t, 256)) + self.y_embedder.embedding_table(y)
        for block in self.blocks:
            x = block(x, c)
        return plain_unpatchify(self.final_layer(x, c), self.patch_size, self.out_channels)


class PlainUViTBlock(nn.Module):
    """A block as U-ViT's code has it, with the linear layer of a long skip or without."""

    def __init__(self, dim, heads, skip=False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = PlainAttention(dim, heads, qkv_bias=False)
        self.mlp = PlainMlp(dim, nn.GELU())
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x, skip=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainUViT(nn.Module):
    """U-ViT of square images and labels (Bao et al. 2023)."""

    def __init__(self, image_size, patch_size, channels, dim, depth, heads, num_classes):
        super().__init__()
        self.dim, self.patch_size, self.channels = dim, patch_size, channels
        self.patch_embed = PlainPatchEmbed(patch_size, channels, dim)
        self.label_emb = nn.Embedding(num_classes + 1, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + (image_size // patch_size) ** 2, dim))
        self.in_blocks = nn.ModuleList([PlainUViTBlock(dim, heads) for _ in range(depth // 2)])
        self.mid_block = PlainUViTBlock(dim, heads)
        self.out_blocks = nn.ModuleList([PlainUViTBlock(dim, heads, skip=True) for _ in range(depth // 2)])
        self.norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, patch_size ** 2 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, t, y):
        x = self.patch_embed(x)
        x = torch.cat([timestep_embedding(t, self.dim).unsqueeze(1), x], dim=1)
        x = torch.cat([self.label_emb(y).unsqueeze(1), x], dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.decoder_pred(self.norm(x))[:, 2:]
        return self.final_layer(plain_unpatchify(x, self.patch_size, self.channels))


class PlainUNetResBlock(ResBlock):
    """The U-Net's block as OpenAI's code has it."""

    def forward(self, x, emb):
        h = self.in_layers[-1](self.resample(self.in_layers[:-1](x)))
        x = self.resample(x)
        emb = self.emb_layers(emb)[..., None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


class PlainUNetAttention(AttentionBlock):
    """The U-Net's attention as OpenAI's code has it: convolutions of one pixel, and products by einsum (its legacy order)."""

    def forward(self, x):
        N, C, *sides = x.shape
        x = x.reshape(N, C, -1)
        q, k, v = self.qkv(self.norm(x)).reshape(N * self.heads, 3 * C // self.heads, -1).split(C // self.heads, dim=1)
        scale = (C // self.heads) ** -0.25
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
        h = self.proj_out(torch.einsum("bts,bcs->bct", weight, v).reshape(N, C, -1))
        return (x + h).reshape(N, C, *sides)


class PlainUpsample(Upsample):
    """The convolution of a map whose pixels were repeated."""

    def forward(self, x):
        return self.conv(self.repeat(x))


class PlainEncoder(Encoder):
    """The encoder of images in PyTorch's default layout."""

    def forward(self, x):
        return super().forward(x.contiguous())


class PlainDecoder(Decoder):
    """The decoder of latents in PyTorch's default layout."""

    def forward(self, z):
        return super().forward(z.contiguous())


class PlainNorm(Norm):
    """PyTorch's GroupNorm, in whatever layout."""

    def forward(self, x):
        return nn.GroupNorm.forward(self, x)


class PlainAutoencoderBlock(ResnetBlock):
    """The autoencoder's block as the diffusers library has it."""

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.dropout(F.silu(self.norm2(h)), 0.0, self.training))
        return (self.nin_shortcut(x) + h) / 1.0


class PlainAutoencoderAttention(AttnBlock):
    """The autoencoder's attention as the diffusers library has it."""

    def forward(self, x):
        N, C, H, W = x.shape
        tokens = self.norm(x.view(N, C, H * W)).transpose(1, 2)
        q, k, v = (F.linear(tokens, layer.weight[:, :, 0, 0], layer.bias).view(N, -1, 1, C).transpose(1, 2)
                   for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, -1, C)
        h = F.linear(h, self.proj_out.weight[:, :, 0, 0], self.proj_out.bias)
        return (h.transpose(-1, -2).reshape(N, C, H, W) + x) / 1.0


class PlainTextBlock(TextBlock):
    """CLIP's block as Hugging Face's library has it."""

    def forward(self, x, mask):
        N, L, D = x.shape
        h, a = self.layer_norm1(x), self.self_attn
        q, k, v = (layer(h).view(N, L, self.heads, -1).transpose(1, 2) for layer in (a.q_proj, a.k_proj, a.v_proj))
        bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(x.dtype).min)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).contiguous().reshape(N, L, D)
        x = x + a.out_proj(h)
        h = self.mlp.fc1(self.layer_norm2(x))
        return x + self.mlp.fc2(h * torch.sigmoid(1.702 * h))


class PlainConv(Conv):
    """Inception's convolution as pytorch-fid has it: a batch norm of its own, and PyTorch's default layout."""

    def forward(self, x):
        return F.relu(self.bn(self.conv(x.contiguous())), inplace=True)


PLAIN = {plain.__base__: plain for plain in (PlainUNetResBlock, PlainUNetAttention, PlainUpsample, PlainEncoder, PlainDecoder,
                                              PlainNorm, PlainAutoencoderBlock, PlainAutoencoderAttention, PlainTextBlock, PlainConv)}


def with_plain_blocks(network):
    """A network, changed: its blocks in their authors' style."""
    for module in network.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    return network


def peer(described, weights):
    """The network of a description of models.py with its weights: an adaLN-Zero DiT or a U-ViT of square images and classes, a
    U-Net or an autoencoder."""
    if described["class"] in ("DiT", "UViT"):
        a = described["arguments"]
        common = [a[name] for name in ("image_size", "patch_size", "channels", "dim", "depth", "heads", "num_classes")]
        common[0], = set(pair(common[0]))
        network = PlainDiT(*common, a["learn_sigma"]) if described["class"] == "DiT" else PlainUViT(*common)
    else:
        network = with_plain_blocks(build(described))
    network.load_state_dict(weights)
    return network


@torch.no_grad()
def average_each(ema, model, decay):
    """The average of the weights, parameter by parameter."""
    averages = dict(ema.named_parameters())
    for name, parameter in model.named_parameters():
        averages[name].mul_(decay).add_(parameter, alpha=1 - decay)
