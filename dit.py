"""DiT, the diffusion transformer: a ViT that predicts noise. Time and class enter its blocks in one of four ways.

Report §2-6, §2-7, §2-8 and §4-2 … §4-4. Paper: Peebles & Xie 2023, figure 3 and section 3.2 (the block designs), table 1
(sizes). Every denoiser here has one signature: model(x, t, y=None) with x (N, C, H, W), t (N,) the step in 0 .. T-1 and
y = labels (N,), a context (N, M, context_dim) or None; it returns (N, C, H, W), or (N, 2C, H, W) where the variance is
learned, the prediction first. Classes are 0 .. K-1; row K of the label table is the unconditional input of classifier-free
guidance. State-dict names are those of Meta's release, which loads strictly. Shapes: L tokens, D width, p patch.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from vit import (Attention, Block, Mlp, PatchEmbed, checked_condition, pair, run_block, sincos_position_embedding,
                 timestep_embedding, token_grid, unpatchify)


def modulate(x, shift, scale):
    """The adaptive LayerNorm (adaLN) of x (N, L, D): its shift and scale (N, D) come from the condition."""
    normal = F.layer_norm(x, x.shape[-1:], eps=1e-6)                     # epsilon of the released weights
    return normal * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    """Time t (N,) -> (N, D), §2-6-1: sine-cosine features and a two-layer MLP."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        return self.mlp(timestep_embedding(t, 256).to(self.mlp[0].weight.dtype))     # 256 features, as in Meta's release


class LabelEmbedder(nn.Module):
    """Labels y (N,) -> (N, D), §2-6-1: a table of `rows` rows."""

    def __init__(self, rows, dim):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, dim)

    def forward(self, y):
        return self.embedding_table(y)


class AdaLNBlock(nn.Module):
    """The adaLN-Zero block of tokens x (N, L, D) and condition c (N, D), and with gates=False the adaLN block.

    One linear layer makes shifts and scales of c, and with gates also factors of both residual branches. Where these start at
    zero, as in `DiT.initialize`, a fresh block is the identity.
    """

    def __init__(self, dim, heads, gates=True):
        super().__init__()
        self.gates = gates
        self.attn = Attention(dim, heads)
        self.mlp = Mlp(dim, "tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, (6 if gates else 4) * dim))

    def forward(self, x, c):
        modulation = self.adaLN_modulation(c)                                        # (N, 6 D) or (N, 4 D)
        if not self.gates:
            shift_attn, scale_attn, shift_mlp, scale_mlp = modulation.chunk(4, dim=1)
            x = x + self.attn(modulate(x, shift_attn, scale_attn))
            return x + self.mlp(modulate(x, shift_mlp, scale_mlp))
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        x = x + gate_attn.unsqueeze(1) * self.attn(modulate(x, shift_attn, scale_attn))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(x, shift_mlp, scale_mlp))


class CrossAttentionBlock(Block):
    """The cross-attention block: a ViT block with attention to the condition's sequence c (N, M, D) before its MLP."""

    def __init__(self, dim, heads):
        super().__init__(dim, heads, "tanh")
        self.norm_cross = nn.LayerNorm(dim, eps=1e-6)
        self.cross_attn = Attention(dim, heads, cross=True)

    def forward(self, x, c):
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm_cross(x), c)
        return x + self.mlp(self.norm2(x))


class InContextBlock(Block):
    """The in-context block: a ViT block; the condition is among the tokens."""

    def __init__(self, dim, heads):
        super().__init__(dim, heads, "tanh")

    def forward(self, x, c):
        return super().forward(x)


class FinalLayer(nn.Module):
    """LayerNorm, adaptive to c (N, D) or not, and the linear decoder (§4-4): tokens (N, L, D) -> (N, L, p p out_channels)."""

    def __init__(self, dim, patch_size, out_channels, adaptive):
        super().__init__()
        self.adaptive = adaptive
        self.linear = nn.Linear(dim, patch_size ** 2 * out_channels)
        if adaptive:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        else:
            self.norm_final = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x, c):
        if not self.adaptive:
            return self.linear(self.norm_final(x))
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(x, shift, scale))


BLOCKS = {                                         # §2-8-3; Peebles & Xie 2023, figure 3
    "adaln-zero": AdaLNBlock,
    "adaln": lambda dim, heads: AdaLNBlock(dim, heads, gates=False),
    "cross-attention": CrossAttentionBlock,
    "in-context": InContextBlock,
}


class DiT(nn.Module):
    """The diffusion transformer of Fig. 2-5 and Fig. 4-2.

    image_size is one number or (H, W) and counts what the network sees: latents where there is an autoencoder.
    num_classes=None builds no label table: y must then be None. null_class adds the unconditional row, which y=None means.
    learn_sigma: also put out a variance. context_dim: width of the tokens of a text, which takes the label's place; for adaLN it
    has exactly context_tokens. ValueError on a size the patch does not divide, heads that do not divide the width, a y that does
    not fit.
    """

    def __init__(self, image_size=32, patch_size=2, channels=4, dim=1152, depth=28, heads=16, num_classes=1000,
                 null_class=True, learn_sigma=True, conditioning="adaln-zero", context_dim=None, context_tokens=77):
        super().__init__()
        if conditioning not in BLOCKS:
            raise ValueError(f"unknown conditioning {conditioning!r}: one of {', '.join(BLOCKS)}")
        self.image_size, self.patch_size, self.channels = pair(image_size), patch_size, channels
        self.grid = token_grid(image_size, patch_size)
        self.conditioning, self.context_dim, self.context_tokens = conditioning, context_dim, context_tokens
        self.num_classes = None if context_dim is not None else num_classes
        self.null_label = self.num_classes if null_class else None
        self.out_channels = 2 * channels if learn_sigma else channels
        self.checkpointing = False         # see `vit.run_block`
        adaptive = conditioning.startswith("adaln")

        self.x_embedder = PatchEmbed(patch_size, channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        if self.num_classes is not None:
            self.y_embedder = LabelEmbedder(self.num_classes + bool(null_class), dim)
        if context_dim is not None:
            self.context_embedder = nn.Linear(context_dim, dim) if not adaptive else nn.Sequential(
                nn.Flatten(), nn.Linear(context_tokens * context_dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
        self.register_buffer("pos_embed", sincos_position_embedding(dim, *self.grid)[None])      # (1, L, D), not learned
        self.blocks = nn.ModuleList(BLOCKS[conditioning](dim, heads) for _ in range(depth))
        self.final_layer = FinalLayer(dim, patch_size, self.out_channels, adaptive)
        self.initialize()

    def initialize(self):
        """Meta's initialisation: Xavier-uniform weights, zero biases, then what must start small or at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))                # as the matrix that it is used as
        nn.init.zeros_(self.x_embedder.proj.bias)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        if self.num_classes is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.zeros_(self.final_layer.linear.weight)                # the first prediction is 0, whatever the block
        if self.conditioning == "adaln-zero":
            for module in (*self.blocks, self.final_layer):           # gates start at 0: each block is the identity
                nn.init.zeros_(module.adaLN_modulation[1].weight)

    def condition(self, t, y):
        """The condition c of the blocks: one vector (N, D) for adaLN, the sequence [t, y] (N, M, D) for the other two.

        The vector is t + y. A text y, a sequence, becomes one vector by an MLP of all its M tokens, one after the other.
        """
        t, vector = self.t_embedder(t), self.conditioning.startswith("adaln")        # (N, D)
        if self.context_dim is not None:
            if vector and y.shape[1] != self.context_tokens:
                raise ValueError(f"a text of {y.shape[1]} tokens where the network takes {self.context_tokens}")
            y = self.context_embedder(y)                                             # (N, D) or (N, M, D)
            return t + y if vector else torch.cat([t.unsqueeze(1), y], dim=1)
        embeddings = [t] if y is None else [t, self.y_embedder(y)]
        return sum(embeddings) if vector else torch.stack(embeddings, dim=1)

    def forward(self, x, t, y=None):
        y = checked_condition(self, x, t, y)
        c = self.condition(t, y)                                                     # (N, D) or (N, M, D)
        x = self.x_embedder(x) + self.pos_embed                                      # (N, L, D)
        if self.conditioning == "in-context":
            x = torch.cat([x, c], dim=1)                                             # (N, L + M, D)
        for block in self.blocks:
            x = run_block(self, block, x, c)
        x = x[:, :math.prod(self.grid)]                                              # (N, L, D): in-context tokens leave
        x = self.final_layer(x, c)                                                   # (N, L, p p out_channels)
        return unpatchify(x, self.grid, self.patch_size)                             # (N, out_channels, H, W)


SIZES = {                                          # §4-3; Peebles & Xie 2023, table 1
    "Nano": dict(dim=96, depth=6, heads=4),        # ours, for a laptop
    "Ti": dict(dim=192, depth=6, heads=4),
    "XS": dict(dim=256, depth=6, heads=4),
    "Nano-deep": dict(dim=96, depth=12, heads=4),  # ours, of the study of scaling
    "Ti-deep": dict(dim=192, depth=12, heads=4),
    "S-shallow": dict(dim=384, depth=6, heads=6),
    "S": dict(dim=384, depth=12, heads=6),
    "B": dict(dim=768, depth=12, heads=12),
    "L": dict(dim=1024, depth=24, heads=16),
    "XL": dict(dim=1152, depth=28, heads=16),
}
