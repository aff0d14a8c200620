"""DiT: Meta's numbers for adaLN-Zero, and identities that tie the three other designs to it; test_networks.py has the rest.

Where a claim is an identity it is checked in float64, to EXACT: rounding is 1e-16 for each of some thousand terms of size 1.
Golden outputs are compared to the tolerance that their file states. Networks are tiny, rectangular, and filled with formula
weights, so that nothing is hidden by a tensor that starts at zero.
"""
import copy
import functools
import hashlib
import re

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from ddpm import guided
from dit import BLOCKS, SIZES, AdaLNBlock, CrossAttentionBlock, DiT, InContextBlock
from formula import fill, golden, golden_json
from vit import sincos_position_embedding

EXACT = {"rtol": 1e-11, "atol": 1e-11}

sizes = st.integers(1, 4)
few = settings(max_examples=10)              # for whole networks
every_design = pytest.mark.parametrize("conditioning", BLOCKS)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fresh(conditioning="adaln-zero", **changes):
    """A tiny network as it starts: 2 x 3 patches of 2 x 2 pixels, 3 channels, 5 classes."""
    torch.manual_seed(0)
    arguments = dict(image_size=(4, 6), patch_size=2, channels=3, dim=16, depth=2, heads=2, num_classes=5) | changes
    return DiT(conditioning=conditioning, **arguments)


def dit(conditioning="adaln-zero", **changes):
    """The same with formula weights, in float64."""
    return fill(fresh(conditioning, **changes), computed=["pos_embed"]).double()


def batch(height=4, width=6):
    """Three images, times and labels, of which the last is null."""
    return normal(3, 3, height, width), torch.tensor([0, 437, 999]), torch.tensor([1, 4, 5])


def count(tensors):
    return sum(tensor.numel() for tensor in tensors)


# Golden data

@functools.cache
def meta_small():
    """Meta's small network, its file, and what passed through it on the way to its output."""
    network = DiT(image_size=8, patch_size=2, channels=4, dim=96, depth=3, heads=4, num_classes=10)
    data, meta = golden("dit_small", network)
    seen = {}
    hooks = [network.blocks[0].register_forward_hook(
                 lambda block, inputs, output: seen.update(tokens=inputs[0], conditioning=inputs[1], block_0=output)),
             network.final_layer.register_forward_hook(lambda layer, inputs, output: seen.update(final_layer=output))]
    seen["output"] = network(data["in_x"], data["in_t"], data["in_y"])
    for hook in hooks:
        hook.remove()
    return network, data, meta["tolerance"], seen


def test_output_equals_metas():
    network, data, tolerance, seen = meta_small()
    assert_close(seen["output"], data["out"], **tolerance)


@pytest.mark.parametrize("name", ["tokens", "conditioning", "block_0", "final_layer"])
def test_what_passes_through_equals_metas(name):
    network, data, tolerance, seen = meta_small()
    assert_close(seen[name], data[f"out_{name}"], **tolerance)


def test_a_block_and_the_final_layer_equal_metas_where_the_tokens_hardly_vary():
    network, data, tolerance, _ = meta_small()       # their variance is 1e-4, so that the norm's epsilon of 1e-6 shows
    tokens, c = data["in_block_tokens"], data["in_block_conditioning"]
    assert_close(network.blocks[0](tokens, c), data["out_block"], **tolerance)
    assert_close(network.final_layer(tokens, c), data["out_block_final"], **tolerance)


def test_double_precision_gives_metas_output_too():
    network, data, tolerance, _ = meta_small()
    output = copy.deepcopy(network).double()(data["in_x"].double(), data["in_t"], data["in_y"])
    assert_close(output, data["out"].double(), **tolerance)


def test_output_equals_metas_at_fractional_times():
    network, data, tolerance, _ = meta_small()
    assert_close(network(data["in_x"], data["in_t_fractional"], data["in_y"]), data["out_t_fractional"], **tolerance)


@pytest.mark.parametrize("scale", [1.5, 4.0])
@pytest.mark.parametrize("name, channels", [("first_three", 3), ("all", None)])
def test_guided_output_equals_metas(name, channels, scale):
    network, data, tolerance, _ = meta_small()
    x, t, y = (data[f"in_cfg_{key}"].chunk(2)[0] for key in "xty")       # the second half repeats x and t for the null label
    expected = data[f"out_cfg_{name}_channels_scale_{scale}".replace(".", "_")].chunk(2)[0]
    slack = {"rtol": tolerance["rtol"], "atol": scale * 2 * tolerance["atol"]}       # scale times a difference of two outputs
    assert_close(guided(network, y, torch.full_like(y, network.null_label), scale, channels)(x, t), expected, **slack)


def test_s8_equals_metas():
    network = DiT(image_size=32, patch_size=8, channels=4, **SIZES["S"])
    data, meta = golden("dit_s8", network)
    output = network(data["in_x"], data["in_t"], data["in_y"])
    assert_close(output[:, :, ::3, ::3], data["out_sub"], **meta["tolerance"])
    assert_close(output.mean(dim=(2, 3)), data["out_mean"], **meta["tolerance"])
    assert_close(output.std(dim=(2, 3), correction=0), data["out_std"], **meta["tolerance"])


@pytest.mark.parametrize("name, grid, dim", [("dit_small", 4, 96), ("dit_s8", 4, 384)])
def test_positions_are_metas_bit_for_bit(name, grid, dim):
    table = DiT(image_size=grid, patch_size=1, dim=dim, depth=0).pos_embed.numpy().astype("<f4")
    assert hashlib.sha256(table.tobytes()).hexdigest() == golden(name)[1]["pos_embed_sha256_f32le"]


def test_state_dict_has_the_names_and_shapes_of_metas_release():
    with torch.device("meta"):
        state = DiT(image_size=32, patch_size=8, channels=4, **SIZES["S"]).state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == dict(golden_json("dit_s8_keys")["keys"])


# Parameters

PUBLISHED = golden_json("complexity_transformers")


@pytest.mark.parametrize("name", PUBLISHED["dit"])
def test_heads_and_parameters_are_as_many_as_metas(name):
    expected, (size, patch) = PUBLISHED["dit"][name], re.match(r"DiT-(\w+)/(\d)", name).groups()
    with torch.device("meta"):
        network = DiT(image_size=64 if name.endswith("512") else 32, patch_size=int(patch), **SIZES[size])
    assert count(network.state_dict().values()) == expected["params"]
    assert count(value for value in network.parameters() if value.requires_grad) == expected["params_trainable"]
    assert {block.attn.heads for block in network.blocks} == {expected["config"]["num_heads"]}


@every_design
def test_parameters_of_each_design_of_xl_2_are_as_many_as_derived(conditioning):
    with torch.device("meta"):
        network = DiT(conditioning=conditioning)
    expected = PUBLISHED["dit_block_designs_derived"][conditioning.replace("-", "_")]["params"]
    assert count(network.state_dict().values()) == expected


# of a block, multiples of D^2 and D: attention (4, 4), MLP (8, 5); adaLN (6, 6) with gates, (4, 4) without; a norm (0, 2)
PER_BLOCK = {"adaln-zero": (18, 15), "adaln": (16, 13), "cross-attention": (16, 19), "in-context": (12, 13)}


@every_design
@given(st.integers(1, 6), st.integers(0, 3), sizes, sizes, st.integers(1, 50))
def test_parameters_follow_the_closed_form(conditioning, quarter, depth, p, channels, classes):
    D, (squares, lines) = 4 * quarter, PER_BLOCK[conditioning]
    network = DiT(p, p, channels, D, depth, heads=2, num_classes=classes, conditioning=conditioning)
    patches, time, labels = channels * p * p * D + D, (256 * D + D) + (D * D + D), (classes + 1) * D
    final = (2 * D * D + 2 * D if "adaln" in conditioning else 2 * D) + 2 * channels * p * p * (D + 1)
    assert count(network.parameters()) == patches + time + labels + depth * (squares * D * D + lines * D) + final


# Initialisation

@functools.cache
def initial():
    """A fresh network of the golden file's configuration, and the file."""
    torch.manual_seed(0)
    rules = golden_json("transformer_init")["dit"]
    return DiT(image_size=8, patch_size=2, channels=4, dim=96, depth=3, heads=4, num_classes=10), rules


def test_exactly_metas_zero_tensors_start_at_zero():
    network, rules = initial()
    assert {name for name, value in network.named_parameters() if not value.any()} == set(rules["zero_at_init"])


def test_exactly_metas_frozen_tensors_are_not_trained():
    network, rules = initial()
    assert set(network.state_dict()) - {name for name, _ in network.named_parameters()} == set(rules["not_trained"])


RULES = golden_json("transformer_init")["dit"]["rule"]


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.startswith("xavier")])
def test_products_start_uniform_within_metas_bound(name):
    weight, bound = initial()[0].state_dict()[name], float(RULES[name].split("bound ")[1])
    # the bound has 6 digits; none of 1536 uniform numbers comes within a hundredth of it once in 0.99^-1536 = 5e6 cases
    assert 0.99 * bound < weight.abs().max() <= bound + 1e-6
    assert weight.std().item() == pytest.approx(bound / 3 ** 0.5, rel=5 / weight.numel() ** 0.5)       # five standard errors
    assert abs(weight.mean()) < 5 * bound / weight.numel() ** 0.5


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.startswith("normal")])
def test_time_and_label_embeddings_start_normal_with_metas_deviation(name):
    weight, deviation = initial()[0].state_dict()[name], float(RULES[name].split("std ")[1])
    assert weight.std().item() == pytest.approx(deviation, rel=5 / (2 * weight.numel()) ** 0.5)        # five standard errors
    assert abs(weight.mean()) < 5 * deviation / weight.numel() ** 0.5
    assert weight.abs().max() > 3 * deviation        # 1056 normal numbers or more: a uniform one stays below 1.8 deviations


@every_design
def test_a_fresh_network_predicts_exactly_zero(conditioning):
    x, t, y = batch()
    assert not fresh(conditioning)(x.float(), t, y).any()


@every_design
def test_fresh_blocks_are_identities_in_adaln_zero_alone(conditioning):
    network, (_, t, y) = fresh(conditioning), batch()
    tokens, c = normal(3, 6, 16, dtype=torch.float32), network.condition(t, y)
    unchanged = [torch.equal(block(tokens, c), tokens) for block in network.blocks]
    assert unchanged == [conditioning == "adaln-zero"] * 2


@pytest.mark.parametrize("conditioning, starts_at_zero", [("adaln-zero", True), ("adaln", False)])
def test_the_modulation_starts_at_zero_in_adaln_zero_alone(conditioning, starts_at_zero):
    network = fresh(conditioning)
    weights = [module.adaLN_modulation[1].weight for module in (*network.blocks, network.final_layer)]
    assert [not weight.any() for weight in weights] == [starts_at_zero] * 3


# The designs are related

def test_adaln_is_adaln_zero_with_open_gates():
    gated, plain = fill(AdaLNBlock(16, 2)).double(), fill(AdaLNBlock(16, 2, gates=False)).double()
    weight, bias = (value.data.unflatten(0, (6, 16)) for value in gated.adaLN_modulation[1].parameters())
    plain.adaLN_modulation[1].weight.data, plain.adaLN_modulation[1].bias.data = (
        value[[0, 1, 3, 4]].flatten(0, 1) for value in (weight, bias))   # without the gates, third and sixth
    weight[[2, 5]], bias[[2, 5]] = 0, 1
    x, c = normal(3, 5, 16), normal(3, 16, seed=1)
    assert_close(plain(x, c), gated(x, c), **EXACT)


def test_adaln_with_a_constant_modulation_is_the_in_context_block():
    adaln, plain = fill(AdaLNBlock(16, 2, gates=False)).double(), fill(InContextBlock(16, 2)).double()
    gain1, bias1, gain2, bias2 = (value.data for norm in (plain.norm1, plain.norm2) for value in norm.parameters())
    adaln.adaLN_modulation[1].weight.data.zero_()
    adaln.adaLN_modulation[1].bias.data = torch.cat([bias1, gain1 - 1, bias2, gain2 - 1])
    x, c = normal(3, 5, 16), normal(3, 16, seed=1)
    assert_close(adaln(x, c), plain(x, None), **EXACT)


def test_cross_attention_that_adds_nothing_is_the_in_context_block():
    cross, plain = fill(CrossAttentionBlock(16, 2)).double(), fill(InContextBlock(16, 2)).double()
    cross.cross_attn.proj.weight.data.zero_()
    cross.cross_attn.proj.bias.data.zero_()
    x, c = normal(3, 5, 16), normal(3, 2, 16, seed=1)
    assert_close(cross(x, c), plain(x, None), **EXACT)


def test_cross_attention_to_a_single_token_adds_the_same_to_all():
    block, x, c = fill(CrossAttentionBlock(16, 2)).double(), normal(3, 5, 16), normal(3, 1, 16, seed=1)
    block.attn.proj = block.mlp = torch.nn.Identity()
    block.attn.forward = block.mlp.forward = torch.zeros_like            # leaves x + cross-attention
    added = block(x, c) - x
    assert added.any()
    assert_close(added, added[:, :1].expand_as(added), **EXACT)


@every_design
def test_every_learned_norm_has_the_epsilon_of_the_others(conditioning):
    assert {module.eps for module in fresh(conditioning).modules() if isinstance(module, torch.nn.LayerNorm)} <= {1e-6}


@pytest.mark.parametrize("classes, extras", [(5, 2), (None, 1)])
def test_in_context_tokens_enter_the_blocks_and_leave_before_the_final_layer(classes, extras):
    network, (x, t, y), lengths = dit("in-context", num_classes=classes), batch(), []
    for module in (*network.blocks, network.final_layer):
        module.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))
    network(x, t, y if classes else None)
    assert lengths == [6 + extras, 6 + extras, 6]


# Positions

@every_design
@few
@given(st.integers(0, 2), st.integers(0, 3))
def test_moving_patches_with_their_positions_moves_the_output(conditioning, down, right):
    network, (x, t, y) = dit(conditioning, image_size=(6, 8)), batch(6, 8)
    output = network(x, t, y)
    network.pos_embed = network.pos_embed.unflatten(1, (3, 4)).roll((down, right), dims=(1, 2)).flatten(1, 2)
    moved = network(x.roll((2 * down, 2 * right), dims=(2, 3)), t, y)    # by whole patches
    assert_close(moved, output.roll((2 * down, 2 * right), dims=(2, 3)), **EXACT)


def test_positions_of_a_rectangle_lie_row_by_row_like_its_patches():
    assert torch.equal(fresh(image_size=(4, 6)).pos_embed[0], sincos_position_embedding(16, 2, 3))


@every_design
def test_moving_patches_without_their_positions_does_not(conditioning):
    network, (x, t, y) = dit(conditioning), batch()
    moved = network(x.roll((2, 2), dims=(2, 3)), t, y)
    assert not torch.allclose(moved, network(x, t, y).roll((2, 2), dims=(2, 3)), atol=1e-3)


# A text instead of labels

@pytest.mark.parametrize("length", [1, 4])
@every_design
def test_a_text_of_any_length_gives_an_image_like_x_and_every_token_counts(length, conditioning):
    x, t, _ = batch()
    network, text = dit(conditioning, context_dim=7, context_tokens=length), normal(3, length, 7)
    image = network(x, t, text)
    assert image.shape == (3, 6, 4, 6)
    for i in range(length):
        other = text.clone()
        other[:, i] += 1
        assert not torch.allclose(network(x, t, other), image, atol=1e-4)


@pytest.mark.parametrize("conditioning", ["adaln-zero", "adaln"])
def test_one_vector_for_adaln_tells_the_order_of_words_and_is_made_of_just_as_many(conditioning):
    x, t, _ = batch()
    network, text = dit(conditioning, context_dim=7, context_tokens=4), normal(3, 4, 7)
    assert not torch.allclose(network(x, t, text.flip(1)), network(x, t, text), atol=1e-4)
    with pytest.raises(ValueError, match="a text of 3 tokens where the network takes 4"):
        network(x, t, text[:, :3])


# Wrong arguments

@pytest.mark.parametrize("changes, message", [
    ({"dim": 18}, "width 18 is not a multiple of 4"),
    ({"conditioning": "film"}, "unknown conditioning 'film': one of adaln-zero, adaln, cross-attention, in-context")])
def test_a_network_that_cannot_be_built_is_an_error_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        fresh(**changes)
