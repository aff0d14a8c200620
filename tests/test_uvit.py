"""U-ViT: its authors' numbers, and what its tokens and long skips do.

What all denoisers share is in test_networks.py. An identity is checked in float64 to EXACT; golden outputs to the tolerance that
their file states.
"""
import functools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from formula import fill, golden, golden_json
from uvit import SIZES, UViT, UViTBlock

EXACT = {"rtol": 1e-11, "atol": 1e-11}
SMALL = {                                  # golden file: arguments
    "uvit_small_unconditional": dict(image_size=16, dim=64, depth=4, heads=4),
    "uvit_small_class": dict(image_size=8, channels=4, dim=48, depth=4, heads=3, num_classes=10, mlp_time_embed=True, conv=False),
    "uvit_small_text": dict(image_size=8, channels=4, dim=64, depth=2, heads=4, context_dim=32, context_tokens=7),
}
PUBLISHED = golden_json("complexity_transformers")["uvit"]
every_release = pytest.mark.parametrize("name", SMALL)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fresh(**changes):
    """A tiny network as it starts: 2 x 3 patches of 2 x 2 pixels, 3 channels, 5 classes."""
    torch.manual_seed(0)
    return UViT(**(dict(image_size=(4, 6), patch_size=2, channels=3, dim=16, depth=4, heads=2, num_classes=5) | changes))


def uvit(**changes):
    """The same with formula weights, in float64."""
    return fill(fresh(**changes)).double()


def batch():
    return normal(3, 3, 4, 6), torch.tensor([0, 437, 999]), torch.tensor([1, 4, 5])


def count(tensors):
    return sum(tensor.numel() for tensor in tensors)


# Golden data

@functools.cache
def authors(name):
    """A small network of the authors', its file, and what passed through it on the way to its output."""
    network = UViT(**SMALL[name])
    data, meta = golden(name, network)
    seen = {}
    hook = network.in_blocks[0].register_forward_hook(lambda block, inputs, output: seen.update(tokens=inputs[0], in_block_0=output))
    seen["output"] = network(data["in_x"], data["in_timesteps"], data.get("in_y", data.get("in_context")))
    hook.remove()
    return network, data, meta["tolerance"], seen


@every_release
def test_output_equals_the_authors(name):
    _, data, tolerance, seen = authors(name)
    assert_close(seen["output"], data["out"], **tolerance)


@every_release
@pytest.mark.parametrize("what", ["tokens", "in_block_0"])
def test_what_passes_through_equals_the_authors(name, what):
    _, data, tolerance, seen = authors(name)
    # one bit of an angle of 999 is 6e-5: the time's own token differs by it between machines
    assert_close(seen[what], data[f"out_{what}"], rtol=tolerance["rtol"], atol=tolerance["atol"] + 6e-5)


def test_blocks_equal_the_authors_where_the_tokens_hardly_vary():
    network, data, tolerance, _ = authors("uvit_small_class")    # so little that the norm's epsilon of 1e-5 shows
    tokens, skip = data["in_block_tokens"], data["in_block_skip"]
    assert_close(network.in_blocks[0](tokens), data["out_block_in"], **tolerance)
    assert_close(network.out_blocks[0](tokens, skip), data["out_block_out"], **tolerance)


# Parameters

SIZE_OF = {"celeba64_uvit_small": "S", "cifar10_uvit_small": "S", "imagenet64_uvit_mid": "M", "imagenet64_uvit_large": "L",
           "imagenet256_uvit_large": "L", "imagenet256_uvit_huge": "H", "imagenet512_uvit_large": "L", "imagenet512_uvit_huge": "H",
           "mscoco_uvit_small": "S", "mscoco_uvit_small depth 16 (deep)": "S-deep"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_configuration_has_the_authors_parameters_and_heads(name):
    config = PUBLISHED[name]["config"]
    rows = config.get("num_classes", -1)                         # the null class among them where there are 1001
    with torch.device("meta"):
        network = UViT(config["img_size"], config["patch_size"], config["in_chans"], **SIZES[SIZE_OF[name]],
                       num_classes=min(rows, 1000) if rows > 0 else None, null_class=rows == 1001, context_dim=config.get("clip_dim"))
    assert count(network.parameters()) == PUBLISHED[name]["params"]
    assert (network.mid_block.attn.heads, hasattr(network.final_layer, "weight")) == (config["num_heads"], config["conv"])


@given(st.integers(1, 6), st.integers(0, 5), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.booleans(), st.booleans())
def test_parameters_follow_the_closed_form(half, depth, p, channels, conv, skip, mlp):
    D, P = 2 * half, p * p * channels
    network = UViT((p, 2 * p), p, channels, D, depth, heads=2, num_classes=7, conv=conv, skip=skip, mlp_time_embed=mlp)
    block = 12 * D * D + 10 * D                                  # attention 4 D^2 + D, MLP 8 D^2 + 5 D, two norms of 2 D
    ends = (P * D + D) + (D * P + P) + 2 * D + (9 * channels ** 2 + channels) * conv
    told = 8 * D + (1 + 1 + 2) * D + (8 * D * D + 5 * D) * mlp   # 8 labels; positions of label, time and two patches
    merged = (2 * D * D + D) * (depth // 2) * skip
    assert count(network.parameters()) == ends + told + (2 * (depth // 2) + 1) * block + merged


# Initialisation

@functools.cache
def initial():
    torch.manual_seed(0)
    return UViT(image_size=16, channels=4, dim=384, depth=2, heads=4, mlp_time_embed=True, num_classes=10)


def test_exactly_the_authors_zero_tensors_start_at_zero():
    zero = {name for name, value in initial().named_parameters() if not value.any()}
    assert zero == set(golden_json("transformer_init")["uvit"]["zero_at_init_small"])


def test_products_positions_and_labels_start_normal_with_the_authors_deviations():
    for name, value in initial().named_parameters():
        if value.ndim < 2 or "patch_embed" in name or "final_layer" in name:
            continue
        deviation = 1.0 if name == "label_emb.weight" else 0.02
        assert value.std().item() == pytest.approx(deviation, rel=5 / (2 * value.numel()) ** 0.5), name       # five standard errors
        assert abs(value.mean()) < 5 * deviation / value.numel() ** 0.5, name
        assert value.abs().max() > 3 * deviation, name           # a uniform one would stay below 1.8 deviations


def test_convolutions_start_uniform_within_pytorchs_bound():
    for layer, inputs in ((initial().patch_embed.proj, 16), (initial().final_layer, 36)):
        bound = inputs ** -0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound and layer.bias.any()


# Tokens

@pytest.mark.parametrize("changes, extras", [(dict(num_classes=None), 1), ({}, 2), (dict(context_dim=7, context_tokens=4), 5)])
def test_extra_tokens_enter_the_blocks_and_leave_before_the_image(changes, extras):
    network, lengths = uvit(**changes), []
    for block in (*network.in_blocks, network.mid_block, *network.out_blocks):
        block.register_forward_hook(lambda block, inputs, output: lengths.append(inputs[0].shape[1]))
    x, t, y = batch()
    y = None if extras == 1 else y if extras == 2 else normal(3, 4, 7)
    assert network(x, t, y).shape == x.shape
    assert lengths == [extras + 6] * 5


def test_a_new_label_changes_the_first_token_alone_and_a_new_time_the_second():
    network, (x, t, y) = uvit(), batch()
    before = network.tokens(x, t, y)
    for changed, place in ((network.tokens(x, t, (y + 1) % 5), 0), (network.tokens(x, (t + 100) % 1000, y), 1)):
        assert (changed != before).any(dim=2).any(dim=0).nonzero().flatten().tolist() == [place]


def test_a_new_text_changes_the_tokens_between_time_and_patches_alone():
    network, (x, t, _) = uvit(context_dim=7, context_tokens=4), batch()
    texts = normal(3, 4, 7), normal(3, 4, 7, seed=1)
    first, second = (network.tokens(x, t, text) for text in texts)
    assert (first != second).any(dim=2).any(dim=0).nonzero().flatten().tolist() == [1, 2, 3, 4]


def test_a_text_of_another_length_than_the_positions_is_an_error():
    network, (x, t, _) = uvit(context_dim=7, context_tokens=4), batch()
    with pytest.raises(ValueError, match="5 tokens where the network has positions for 4"):
        network(x, t, normal(3, 5, 7))


def test_moving_tokens_with_their_positions_moves_the_output():
    network, (x, t, y) = uvit(conv=False), batch()
    output = network(x, t, y)
    patches = network.pos_embed.data[:, 2:].unflatten(1, (2, 3)).roll((1, 1), dims=(1, 2)).flatten(1, 2)
    network.pos_embed.data = torch.cat([network.pos_embed.data[:, :2], patches], dim=1)
    assert_close(network(x.roll((2, 2), dims=(2, 3)), t, y), output.roll((2, 2), dims=(2, 3)), **EXACT)


# Long skips and the last convolution

def test_the_kth_block_from_the_end_gets_what_the_kth_block_put_out():
    network, (x, t, y), put_out, got = uvit(depth=6), batch(), [], []
    for block in network.in_blocks:
        block.register_forward_hook(lambda block, inputs, output: put_out.append(output))
    for block in network.out_blocks:
        block.register_forward_pre_hook(lambda block, inputs: got.append(inputs[1]))
    network(x, t, y)
    assert len(got) == 3 and all(a is b for a, b in zip(got, reversed(put_out)))


def test_a_block_merges_its_skip_before_anything_else():
    block, x, skip = fill(UViTBlock(16, 2, skip=True)).double(), normal(3, 5, 16), normal(3, 5, 16, seed=1)
    weight, bias = block.skip_linear.weight, block.skip_linear.bias
    merged = x @ weight[:, :16].T + skip @ weight[:, 16:].T + bias
    assert_close(block(x, skip), block(merged), **EXACT)


def test_skips_that_are_not_looked_at_leave_the_network_without_skips():
    network, plain, (x, t, y) = uvit(), uvit(skip=False), batch()
    with_skips = network(x, t, y)
    for block in network.out_blocks:
        block.skip_linear.weight.data = torch.eye(16, 32, dtype=torch.float64)
        block.skip_linear.bias.data.zero_()
    assert_close(network(x, t, y), plain(x, t, y), **EXACT)
    assert (with_skips - plain(x, t, y)).abs().amax(dim=(1, 2, 3)).min() > 1e-2


def test_a_last_convolution_that_copies_is_none():
    network, plain, (x, t, y) = uvit(), uvit(conv=False), batch()
    smoothed = network(x, t, y)
    network.final_layer.weight.data = torch.nn.init.dirac_(network.final_layer.weight.data)
    network.final_layer.bias.data.zero_()
    assert_close(network(x, t, y), plain(x, t, y), **EXACT)
    assert not torch.allclose(smoothed, plain(x, t, y), atol=1e-2)


def test_the_last_convolution_joins_neighbouring_patches_at_the_right_places():
    network, (x, t, y) = uvit(), batch()
    without = torch.nn.functional.conv2d(uvit(conv=False)(x, t, y), network.final_layer.weight, network.final_layer.bias, padding=1)
    assert_close(network(x, t, y), without, **EXACT)


@settings(max_examples=10)
@given(st.integers(0, 7))
def test_depth_counts_the_blocks_of_both_halves(depth):
    network = fresh(depth=depth)
    assert (len(network.in_blocks), len(network.out_blocks)) == (depth // 2, depth // 2)


def test_time_enters_through_the_embedding_itself_or_an_mlp():
    x, t, y = batch()
    plain, mlp = uvit(dim=16), uvit(dim=16, mlp_time_embed=True)
    angles = t[:, None] * torch.tensor([10000 ** (-k / 8) for k in range(8)], dtype=torch.float64)
    wave = torch.cat([angles.cos(), angles.sin()], dim=1)
    # float32 keeps an angle of 1000 to 6e-5
    assert_close(plain.tokens(x, t, y)[:, 1] - plain.pos_embed[0, 1], wave, rtol=0, atol=2e-4)
    first, _, second = mlp.time_embed
    hidden = wave @ first.weight.T + first.bias
    through = (hidden * hidden.sigmoid()) @ second.weight.T + second.bias
    assert_close(mlp.tokens(x, t, y)[:, 1] - mlp.pos_embed[0, 1], through, rtol=0, atol=2e-3)
    assert math.prod(first.weight.shape) == 4 * 16 * 16
