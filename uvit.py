"""U-ViT: a ViT for diffusion in which everything is a token, with long skip connections between its two halves.

Report §3 and §4-1, Fig. 4-1. Paper: Bao et al. 2023, "All are Worth Words": time, condition and noisy patches enter one
sequence; the k-th block from the end also sees what the k-th block put out; a 3 x 3 convolution may end the network.

One signature with the other denoisers: model(x, t, y=None), see `vit.checked_condition`. It returns one prediction like x: U-ViT
learns no variance. State-dict names are those of the authors' release, which loads strictly; its networks count time in units
of their own (`models.released_process`). Shapes: L patches, E extra tokens, D width, p patch.
"""
import math

import torch
import torch.nn as nn

from vit import (Block, PatchEmbed, checked_condition, pair, run_block, sincos_position_embedding, timestep_embedding, token_grid,
                 unpatchify)


class UViTBlock(Block):
    """A ViT block; with skip=True it first merges a long skip connection into its tokens, linearly: (N, E + L, D)."""

    def __init__(self, dim, heads, skip=False):
        super().__init__(dim, heads, eps=1e-5, qkv_bias=False)           # as in the released weights
        if skip:
            self.skip_linear = nn.Linear(2 * dim, dim)

    def forward(self, x, skip=None):
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=2))            # (N, E + L, 2 D) -> (N, E + L, D)
        return super().forward(x)


class UViT(nn.Module):
    """Bao et al. 2023, figure 1: depth // 2 blocks down, one in the middle, depth // 2 up.

    image_size, num_classes and null_class: as in dit.py. context_dim: the width of a text of exactly context_tokens tokens,
    which takes the label's place. mlp_time_embed passes the time's embedding through an MLP. conv=False and skip=False leave
    out the last convolution and the long skips, as in the paper's ablations. dit_init begins as DiT does.
    ValueError on a size the patch does not divide, heads that do not divide the width, a y that does not fit.
    """

    def __init__(self, image_size=32, patch_size=2, channels=3, dim=512, depth=12, heads=8, num_classes=None, null_class=True,
                 context_dim=None, context_tokens=77, mlp_time_embed=False, conv=True, skip=True,
                 dit_init=False):
        super().__init__()
        self.image_size, self.patch_size, self.channels = pair(image_size), patch_size, channels
        self.grid = token_grid(image_size, patch_size)
        self.dim, self.context_dim, self.context_tokens, self.skip = dim, context_dim, context_tokens, skip
        self.num_classes = None if context_dim is not None else num_classes
        self.null_label = self.num_classes if null_class else None
        self.checkpointing = False         # see `vit.run_block`

        self.patch_embed = PatchEmbed(patch_size, channels, dim)
        self.time_embed = (nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim)) if mlp_time_embed
                           else nn.Identity())
        self.extras = 1                                                  # E: the time, and the condition
        if self.num_classes is not None:
            self.label_emb = nn.Embedding(self.num_classes + bool(null_class), dim)
            self.extras += 1
        if context_dim is not None:
            self.context_embed = nn.Linear(context_dim, dim)
            self.extras += context_tokens
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + math.prod(self.grid), dim))   # learned, of all tokens
        self.in_blocks = nn.ModuleList(UViTBlock(dim, heads) for _ in range(depth // 2))
        self.mid_block = UViTBlock(dim, heads)
        self.out_blocks = nn.ModuleList(UViTBlock(dim, heads, skip) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.decoder_pred = nn.Linear(dim, patch_size ** 2 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()
        self.initialize(dit_init)

    def initialize(self, dit_init):
        """The authors': weights normal with deviation 0.02, biases zero; convolutions and label table as PyTorch's.

        That suits wide networks and long trainings. With dit_init products are Xavier-uniform and the positions of patches sines
        and cosines, as DiT's: a short training then learns much earlier where patches lie and what the label says (RESULTS.md).
        """
        nn.init.normal_(self.pos_embed, std=0.02)
        if dit_init:
            self.pos_embed.data[:, self.extras:] = sincos_position_embedding(self.dim, *self.grid)               # (L, D)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight) if dit_init else nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def tokens(self, x, t, y):
        """All inputs as one sequence (N, E + L, D): [label, time, patches] or [time, text, patches]."""
        patches = self.patch_embed(x)                                                    # (N, L, D)
        time = timestep_embedding(t, self.dim).to(self.pos_embed.dtype)                  # (N, D); exact, also under autocast
        sequence = [self.time_embed(time).unsqueeze(1), patches]                         # (N, 1, D), (N, L, D)
        if self.context_dim is not None:
            if y.shape[1] != self.context_tokens:
                raise ValueError(f"a text of {y.shape[1]} tokens where the network has positions for {self.context_tokens}")
            sequence.insert(1, self.context_embed(y))                                    # (N, M, D)
        elif y is not None:
            sequence.insert(0, self.label_emb(y).unsqueeze(1))                           # (N, 1, D)
        return torch.cat(sequence, dim=1) + self.pos_embed                               # (N, E + L, D)

    def forward(self, x, t, y=None):
        y = checked_condition(self, x, t, y)
        x, skips = self.tokens(x, t, y), []                                              # (N, E + L, D)
        for block in self.in_blocks:
            x = run_block(self, block, x)
            skips.append(x)
        x = run_block(self, self.mid_block, x)
        for block in self.out_blocks:
            x = run_block(self, block, x, skips.pop() if self.skip else None)                  # the last output first
        x = self.decoder_pred(self.norm(x))[:, self.extras:]                             # (N, L, p p C): the extra tokens leave
        return self.final_layer(unpatchify(x, self.grid, self.patch_size))               # (N, C, H, W)


SIZES = {                                                # Bao et al. 2023, table 1, which counts the middle block too
    "Nano": dict(dim=192, depth=4, heads=4, dit_init=True),            # ours: at patch 4 it costs what DiT-Ti/4 does
    "Ti": dict(dim=192, depth=6, heads=4, dit_init=True),              # ours, for a laptop
    "Ti-no-skips": dict(dim=192, depth=6, heads=4, dit_init=True, skip=False),     # and without what the study of skips leaves out
    "Ti-no-conv": dict(dim=192, depth=6, heads=4, dit_init=True, conv=False),
    "S": dict(dim=512, depth=12, heads=8),
    "S-deep": dict(dim=512, depth=16, heads=8),          # of MS-COCO
    "M": dict(dim=768, depth=16, heads=12),
    "L": dict(dim=1024, depth=20, heads=16),
    "H": dict(dim=1152, depth=28, heads=16, conv=False),
}
