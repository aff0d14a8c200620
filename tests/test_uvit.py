"""U-ViT: its authors' numbers, and identities that tie it to the network without long skips or without the last convolution.

test_networks.py has what every denoiser promises. Where a claim is an identity it is checked in float64, to EXACT: rounding is
1e-16 for each of some thousand terms of size 1. Golden outputs are compared to the tolerance that their file states. Networks
are tiny, rectangular, and filled with formula weights.
"""
import copy
import functools

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from formula import fill, golden, golden_json
from uvit import SIZES, UViT
from vit import sincos_position_embedding, timestep_embedding

EXACT = {"rtol": 1e-11, "atol": 1e-11}
LABELS, TEXT = dict(num_classes=5), dict(context_dim=7, context_tokens=4)

sizes = st.integers(1, 4)
few = settings(max_examples=10)              # for whole networks
every_condition = pytest.mark.parametrize("condition", [{}, LABELS, TEXT], ids=["none", "labels", "text"])
every_depth = pytest.mark.parametrize("depth", [1, 2, 5, 6])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uvit(**changes):
    """A tiny network with formula weights, in float64: 2 x 3 patches of 2 x 2 pixels, 3 channels."""
    arguments = dict(image_size=(4, 6), patch_size=2, channels=3, dim=16, depth=4, heads=2) | changes
    return fill(UViT(**arguments)).double()


def with_weights_of(other, network):
    """The network with the other one's weights under all its names."""
    state = other.state_dict()
    network.load_state_dict({name: state[name] for name in network.state_dict()}, strict=True)
    return network


def batch(condition, height=4, width=6):
    """Three images, times, and labels or texts of four tokens."""
    y = torch.tensor([1, 4, 5]) if condition is LABELS else normal(3, 4, 7, seed=1) if condition is TEXT else None
    return normal(3, 3, height, width), torch.tensor([0, 437, 999]), y


def count(tensors):
    return sum(tensor.numel() for tensor in tensors)


# Golden data

def conditions(config):
    """Our arguments for what the authors' configuration is told. Their num_classes counts the rows of the label table, of which
    the last is null except where there are exactly the 1000 classes of ImageNet; -1 is no table."""
    if "clip_dim" in config:
        return dict(context_dim=config["clip_dim"], context_tokens=config["num_clip_token"])
    rows = config["num_classes"]
    return dict(num_classes=None if rows == -1 else rows if rows == 1000 else rows - 1, null_class=rows != 1000)


def of_authors(config):
    """A fresh network of the authors' configuration."""
    return UViT(config["img_size"], config["patch_size"], config["in_chans"], config["embed_dim"], config["depth"],
                config["num_heads"], mlp_time_embed=config["mlp_time_embed"], conv=config["conv"], **conditions(config))


@functools.cache
def authors_small(name):
    """One of the authors' small networks, its file, what it is given, and the file's tolerance."""
    network = of_authors(golden(f"uvit_small_{name}")[1]["config"])
    data, meta = golden(f"uvit_small_{name}", network)
    return network, data, (data["in_x"], data["in_timesteps"], data.get("in_y", data.get("in_context"))), meta["tolerance"]


every_small_network = pytest.mark.parametrize("name", ["unconditional", "class", "text"])


@every_small_network
def test_output_equals_the_authors(name):
    network, data, inputs, tolerance = authors_small(name)
    assert_close(network(*inputs), data["out"], **tolerance)


@every_small_network
def test_tokens_equal_the_authors(name):
    network, data, inputs, tolerance = authors_small(name)
    tokens, time = network.tokens(*inputs), 1 if name == "class" else 0
    rounding = dict(rtol=1e-5, atol=1e-4)    # t = 999 is an angle, which float32 rounds by up to 6e-5, and so another machine
    assert_close(tokens[:, time], data["out_tokens"][:, time], **rounding)
    tokens[:, time] = data["out_tokens"][:, time]
    assert_close(tokens, data["out_tokens"], **tolerance)


@every_small_network
def test_the_first_block_equals_the_authors(name):
    network, data, _, tolerance = authors_small(name)
    assert_close(network.in_blocks[0](data["out_tokens"]), data["out_in_block_0"], **tolerance)


@every_small_network
def test_double_precision_gives_the_authors_output_too(name):
    network, data, (x, t, y), tolerance = authors_small(name)
    y = y.double() if name == "text" else y
    assert_close(copy.deepcopy(network).double()(x.double(), t, y), data["out"].double(), **tolerance)


def test_a_block_of_each_half_equals_the_authors_where_the_tokens_hardly_vary():
    network, data, _, tolerance = authors_small("class")             # so that the norm's epsilon of 1e-5 shows
    tokens, skip = data["in_block_tokens"], data["in_block_skip"]
    assert_close(network.in_blocks[0](tokens), data["out_block_in"], **tolerance)
    assert_close(network.out_blocks[0](tokens, skip), data["out_block_out"], **tolerance)


def test_every_norm_has_the_epsilon_of_the_released_weights():
    assert {module.eps for module in uvit().modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-5}


# Parameters

PUBLISHED = golden_json("complexity_transformers")["uvit"]
SIZE_OF = {"small": "S", "deep": "S-deep", "mid": "M", "large": "L", "huge": "H"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_heads_and_parameters_are_as_many_as_the_authors(name):
    config, size = PUBLISHED[name]["config"], [size for word, size in SIZE_OF.items() if word in name][-1]      # "small (deep)"
    with torch.device("meta"):
        network = UViT(config["img_size"], config["patch_size"], config["in_chans"], **SIZES[size], **conditions(config))
    assert count(network.parameters()) == count(network.state_dict().values()) == PUBLISHED[name]["params"]
    blocks = (*network.in_blocks, network.mid_block, *network.out_blocks)
    assert [block.attn.heads for block in blocks] == [config["num_heads"]] * (config["depth"] + 1)


@given(st.integers(1, 6), st.integers(0, 7), sizes, sizes, st.sampled_from([0, 1, 50]), st.booleans(),
       st.sampled_from([None, 1, 7]), sizes, st.booleans(), st.booleans(), st.booleans())
def test_parameters_follow_the_closed_form(half, depth, p, channels, classes, null, context, tokens, mlp, conv, skip):
    D, k = 2 * half, depth // 2
    network = UViT((2 * p, 3 * p), p, channels, D, depth, heads=2, num_classes=classes or None, null_class=null,
                   context_dim=context, context_tokens=tokens, mlp_time_embed=mlp, conv=conv, skip=skip)
    rows = 0 if context or not classes else classes + null
    extras = 1 + tokens if context else 1 + (rows > 0)
    conditions = (context * D + D if context else rows * D) + mlp * (8 * D * D + 5 * D)
    blocks = (2 * k + 1) * (12 * D * D + 10 * D) + skip * k * (2 * D * D + D)        # odd and even depth alike
    patches, positions = channels * p * p * D + D, (extras + 6) * D
    final = 2 * D + (D + 1) * p * p * channels + conv * (9 * channels + 1) * channels
    assert count(network.parameters()) == patches + conditions + positions + blocks + final


@every_depth
def test_half_of_the_blocks_are_on_each_side_of_the_middle_one(depth):
    network = uvit(depth=depth)
    assert len(network.in_blocks) == len(network.out_blocks) == depth // 2
    assert [hasattr(block, "skip_linear") for block in (*network.in_blocks, network.mid_block, *network.out_blocks)] == \
        [False] * (depth // 2 + 1) + [True] * (depth // 2)


# Initialisation

RULES = golden_json("transformer_init")["uvit"]


@functools.cache
def initial():
    """A fresh network of the golden file's configuration."""
    torch.manual_seed(0)
    return of_authors(RULES["config"])


def test_exactly_the_authors_zero_tensors_start_at_zero():
    assert {name for name, value in initial().named_parameters() if not value.any()} == set(RULES["zero_at_init_small"])


def test_norms_start_with_a_gain_of_one():
    gains = [module.weight for module in initial().modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(gains) == 7 and all((gain == 1).all() for gain in gains)


NORMAL = {name: 1.0 if name.startswith("label_emb") else 0.02 for name, value in initial().named_parameters()
          if name == "pos_embed" or value.ndim == 2}


@pytest.mark.parametrize("name", NORMAL)
def test_products_positions_and_labels_start_normal_with_the_authors_deviation(name):
    value, deviation = initial().state_dict()[name], NORMAL[name]
    assert value.std().item() == pytest.approx(deviation, rel=5 / (2 * value.numel()) ** 0.5)          # five standard errors
    assert abs(value.mean()) < 5 * deviation / value.numel() ** 0.5
    assert value.abs().max() > 3 * deviation         # 4224 normal numbers or more: a uniform one stays below 1.8 deviations


def test_a_small_network_may_start_as_dit_does():
    torch.manual_seed(0)
    network = UViT(image_size=(8, 4), patch_size=2, dim=64, depth=2, heads=4, num_classes=3, dit_init=True)
    positions, product = network.pos_embed, network.out_blocks[0].skip_linear
    assert torch.equal(positions[0, 2:], sincos_position_embedding(64, 4, 2)) and positions.requires_grad
    assert positions[0, :2].std().item() == pytest.approx(0.02, rel=0.4)
    bound = (6 / (128 + 64)) ** 0.5
    assert 0.95 * bound < product.weight.abs().max() <= bound and not product.bias.any()


@pytest.mark.parametrize("name, inputs", [("patch_embed.proj", 2 * 2 * 4), ("final_layer", 3 * 3 * 4)])
def test_convolutions_start_as_pytorchs(name, inputs):
    weight, bias = initial().get_submodule(name).parameters()
    bound = inputs ** -0.5
    assert 0.9 * bound < weight.abs().max() <= bound     # none of 144 uniform numbers above 0.9: once in 0.9^-144 = 4e6 cases
    assert weight.std().item() == pytest.approx(bound / 3 ** 0.5, rel=5 / weight.numel() ** 0.5)       # five standard errors
    assert 0 < bias.abs().max() <= bound


# Tokens

def changed(network, before, after):
    """Which tokens differ between two (x, t, y) in the first image."""
    return (network.tokens(*before) != network.tokens(*after))[0].any(dim=1).nonzero().flatten().tolist()


@pytest.mark.parametrize("condition, first_patch", [({}, 1), (LABELS, 2), (TEXT, 5)], ids=["none", "labels", "text"])
def test_the_tokens_are_told_time_then_patches_row_by_row(condition, first_patch):
    network, (x, t, y) = uvit(**condition), batch(condition)
    assert changed(network, (x, t, y), (x, t + 1, y)) == [1 if condition is LABELS else 0]
    for i in range(6):
        row, column = 2 * (i // 3), 2 * (i % 3)
        other = x.clone()
        other[:, :, row + 1, column] += 1                # a pixel of patch i
        assert changed(network, (x, t, y), (other, t, y)) == [first_patch + i]


def test_the_label_is_the_first_token():
    network, (x, t, y) = uvit(**LABELS), batch(LABELS)
    assert changed(network, (x, t, y), (x, t, y.flip(0))) == [0]


def test_a_texts_tokens_lie_in_order_between_the_time_and_the_patches():
    network, (x, t, y) = uvit(**TEXT), batch(TEXT)
    for j in range(4):
        other = y.clone()
        other[:, j, 3] += 1
        assert changed(network, (x, t, y), (x, t, other)) == [1 + j]


@pytest.mark.parametrize("condition, place", [({}, 0), (LABELS, 1), (TEXT, 0)], ids=["none", "labels", "text"])
def test_the_time_enters_as_its_embedding_or_through_an_mlp(condition, place):
    (x, t, y), embedded = batch(condition), timestep_embedding(torch.tensor([0, 437, 999]), 16).double()
    plain, through = uvit(**condition), uvit(mlp_time_embed=True, **condition)
    for network, expected in ((plain, embedded), (through, through.time_embed(embedded))):
        assert_close(network.tokens(x, t, y)[:, place] - network.pos_embed[0, place], expected, **EXACT)


@every_condition
def test_every_token_has_a_position_of_its_own_that_is_added(condition):
    network, inputs = uvit(**condition), batch(condition)
    tokens = network.tokens(*inputs)
    positions = network.pos_embed.data.clone()
    network.pos_embed.data.zero_()
    assert_close(tokens - network.tokens(*inputs), positions.expand_as(tokens), **EXACT)


@every_condition
@every_depth
def test_told_tokens_enter_every_block_and_leave_after_the_last(condition, depth):
    network, lengths = uvit(depth=depth, **condition), []
    for module in (*network.in_blocks, network.mid_block, *network.out_blocks):
        module.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))
    assert network(*batch(condition)).shape == (3, 3, 4, 6)
    extras = 4 + 1 if condition is TEXT else 2 if condition is LABELS else 1
    assert lengths == [extras + 6] * (2 * (depth // 2) + 1)


@every_condition
@few
@given(st.integers(0, 2), st.integers(0, 3))
def test_moving_patches_with_their_positions_moves_the_output(condition, down, right):
    network, (x, t, y) = uvit(image_size=(6, 8), conv=False, **condition), batch(condition, 6, 8)
    output, shift = network(x, t, y), (2 * down, 2 * right)              # by whole patches
    patches = network.pos_embed.data[:, -12:]
    patches.copy_(patches.unflatten(1, (3, 4)).roll((down, right), dims=(1, 2)).flatten(1, 2))
    assert_close(network(x.roll(shift, dims=(2, 3)), t, y), output.roll(shift, dims=(2, 3)), **EXACT)


@pytest.mark.parametrize("length", [3, 5])
def test_a_text_of_another_length_is_an_error(length):
    network, (x, t, _) = uvit(**TEXT), batch(TEXT)
    with pytest.raises(ValueError, match=f"a text of {length} tokens where the network has positions for 4"):
        network(x, t, normal(3, length, 7))


# Long skips

@every_depth
def test_the_last_block_down_is_the_first_that_is_seen_again(depth):
    network, seen = uvit(depth=depth), []
    for k, block in enumerate(network.in_blocks):        # block k puts out nothing but k
        block.register_forward_hook(lambda block, inputs, output, k=k: torch.full_like(output, k))
    for block in network.out_blocks:                     # the skip is the second half of what is merged
        block.skip_linear.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0][:, :, 16:].unique().tolist()))
    network(*batch({}))
    assert seen == [[k] for k in reversed(range(depth // 2))]


@every_condition
def test_merging_that_ignores_the_skips_gives_the_network_without_them(condition):
    network, inputs = uvit(**condition), batch(condition)
    with_skips = network(*inputs)
    for block in network.out_blocks:
        block.skip_linear.weight.data = torch.eye(16, 32, dtype=torch.float64)           # [I, 0]
        block.skip_linear.bias.data.zero_()
    without = with_weights_of(network, uvit(skip=False, **condition))
    assert_close(network(*inputs), without(*inputs), **EXACT)
    assert not torch.allclose(with_skips, without(*inputs), atol=1e-3)


@pytest.mark.parametrize("place", [0, 1])
def test_each_long_skip_matters(place):
    network = uvit()
    output = network(*batch({}))
    network.out_blocks[place].skip_linear.weight.data[:, 16:] = 0        # the half that the skip meets
    assert not torch.allclose(network(*batch({})), output, atol=1e-3)


def test_without_skips_nothing_is_left_of_them():
    assert not [name for name in uvit(skip=False).state_dict() if "skip" in name]
    assert [name for name in uvit().state_dict() if "skip" in name] == [
        f"out_blocks.{k}.skip_linear.{part}" for k in (0, 1) for part in ("weight", "bias")]


# The last convolution

def test_a_last_convolution_that_copies_gives_the_network_without_it():
    network = uvit()
    output = network(*batch({}))
    torch.nn.init.dirac_(network.final_layer.weight)
    torch.nn.init.zeros_(network.final_layer.bias)
    without = with_weights_of(network, uvit(conv=False))
    assert_close(network(*batch({})), without(*batch({})), **EXACT)
    assert not torch.allclose(network(*batch({})), output, atol=1e-3)


def test_the_last_convolution_is_of_the_image_so_that_it_joins_patches():
    network = uvit()
    without = with_weights_of(network, uvit(conv=False))
    image = torch.nn.functional.pad(without(*batch({})), (1, 1, 1, 1))                   # zeros around (N, C, H + 2, W + 2)
    windows = image.unfold(2, 3, 1).unfold(3, 3, 1)                                      # (N, C, H, W, 3, 3)
    expected = torch.einsum("nihwkl,oikl->nohw", windows, network.final_layer.weight)
    assert_close(network(*batch({})), expected + network.final_layer.bias[:, None, None], **EXACT)


def test_the_time_is_not_rounded_under_autocast():
    network, (x, t, _) = uvit().float(), batch(None)
    exact = network.tokens(x.float(), t, None)[:, 0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network.tokens(x.float(), t, None)[:, 0], exact)
