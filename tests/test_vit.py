"""The parts that the transformers share, and the Vision Transformer: timm's and Meta's numbers, and properties of each part.

Where a claim is an identity it is checked in float64, to EXACT: rounding is 1e-16 for each of some hundred terms of size 1.
Golden outputs are compared to the tolerance that their file states.
"""
import functools
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import data
from formula import fill, golden, golden_json
from vit import (SIZES, Attention, Block, Mlp, PatchEmbed, ViT, attention, default_layout, sincos_position_embedding,
                 timestep_embedding, token_grid, unpatchify)

EXACT = {"rtol": 1e-11, "atol": 1e-11}
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}       # gradients sum some hundred products of size 1: 100 * 6e-8, on either side

sizes = st.integers(1, 5)
seeds = st.integers(0, 2 ** 32)
few = settings(max_examples=10)              # for whole networks
both = pytest.mark.parametrize("hybrid", [False, True], ids=["plain", "hybrid"])


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cut(images, p):
    """Patches (N, L, p p C) of images, sliced out one by one, row by row."""
    rows, columns = images.shape[2] // p, images.shape[3] // p
    corners = [(row * p, column * p) for row in range(rows) for column in range(columns)]
    return torch.stack([images[:, :, y:y + p, x:x + p].permute(0, 2, 3, 1).flatten(1) for y, x in corners], dim=1)


def vit(hybrid=False, image_size=(8, 12), **changes):
    """A tiny ViT with formula weights, in float64."""
    arguments = dict(patch_size=4, channels=2, dim=16, depth=2, heads=2, num_classes=5) | changes
    return fill(ViT(image_size, hybrid=hybrid, **arguments)).double()


# Golden data

@functools.cache
def timm():
    network = ViT(image_size=32, patch_size=8, channels=3, dim=48, depth=2, heads=3, num_classes=10)
    return network, *golden("vit_small", network)


def test_logits_equal_timms():
    network, data, meta = timm()
    assert_close(network(data["in_x"]), data["out_logits"], **meta["tolerance"])


def test_tokens_equal_timms():
    network, data, meta = timm()
    assert_close(network.tokens(data["in_x"]), data["out_tokens"], **meta["tolerance"])


def test_a_block_equals_timms_where_the_tokens_hardly_vary():
    network, data, meta = timm()             # their variance is 1e-4, so that the norm's epsilon of 1e-6 shows
    assert_close(network.blocks[0](data["in_block_tokens"]), data["out_block"], **meta["tolerance"])


@pytest.mark.parametrize("dim, grid", [(16, 3), (96, 4)])
def test_positions_equal_metas(dim, grid):
    data, meta = golden("dit_embeddings")
    table = sincos_position_embedding(dim, grid, grid)
    assert_close(table, data[f"out_pos_embed_dim{dim}_grid{grid}"], rtol=0, atol=meta["tolerance"]["pos_embed_atol"])


@pytest.mark.parametrize("dim", [256, 7])
def test_time_embedding_equals_metas_at_whole_and_fractional_times(dim):
    data, meta = golden("dit_embeddings")
    embedding = timestep_embedding(data["in_t"], dim)
    assert_close(embedding, data[f"out_timestep_dim{dim}"], rtol=0, atol=meta["tolerance"]["timestep_atol"])


def test_time_embedding_in_float32_is_as_good_as_in_float64():
    data, meta = golden("dit_embeddings")    # an angle of up to 1000 is wrong by a few 1e-8 of itself
    embedding = timestep_embedding(data["in_t"], 256)
    assert_close(embedding.double(), data["out_timestep_dim256_f64"], rtol=0, atol=meta["tolerance"]["timestep_atol"])


TINY = dict(dim=192, depth=12, heads=3)              # timm's; Ti of SIZES is half as deep


@pytest.mark.parametrize("name, size", [("tiny", TINY), ("small", SIZES["S"]), ("base", SIZES["B"]), ("large", SIZES["L"])])
def test_heads_and_parameters_are_as_many_as_timms(name, size):
    with torch.device("meta"):
        network = ViT(image_size=224, patch_size=16, **size)
    expected = golden_json("complexity_transformers")["vit"][f"vit_{name}_patch16_224"]
    assert sum(value.numel() for value in network.parameters()) == expected["params"]
    assert {block.attn.heads for block in network.blocks} == {expected["config"]["num_heads"]}


def test_every_norm_has_timms_epsilon():
    assert {module.eps for module in timm()[0].modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-6}


# Embeddings of time and position

@given(st.integers(2, 40), st.floats(0, 1000), st.floats(0, 1000), st.floats(0, 1000))
def test_two_times_are_as_alike_as_their_difference_says(dim, t, s, shift):
    times = torch.tensor([t, s, t + shift, s + shift])
    a, b, c, d = timestep_embedding(times, dim).double()
    # each of dim products has two factors of at most 1, each wrong by an angle of 2000 times a few 6e-8
    assert_close(a @ b, c @ d, rtol=0, atol=dim * 1e-3)


@given(st.integers(2, 41), st.floats(0, 1000))
def test_time_embedding_is_a_cosine_and_a_sine_of_each_frequency(dim, t):
    row = timestep_embedding(torch.tensor([t]), dim)[0]
    cosines, sines, padding = row.split([dim // 2, dim // 2, dim % 2])
    assert_close(cosines ** 2 + sines ** 2, torch.ones(dim // 2))
    assert not padding.any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_time_zero_embeds_as_ones_then_zeros_in_float32(dtype):
    embedding = timestep_embedding(torch.zeros(2, dtype=dtype), 6)
    assert_close(embedding, torch.tensor([[1., 1, 1, 0, 0, 0]] * 2), rtol=0, atol=0)


@given(st.integers(1, 12), sizes, sizes)
def test_first_half_of_a_position_tells_the_column_only_and_second_half_the_row_only(quarter, height, width):
    table = sincos_position_embedding(4 * quarter, height, width).reshape(height, width, 2, -1)
    assert torch.equal(table[:, :, 0], table[:1, :, 0].expand_as(table[:, :, 0]))
    assert torch.equal(table[:, :, 1], table[:, :1, 1].expand_as(table[:, :, 1]))


@given(st.integers(1, 12), st.integers(1, 20), st.integers(1, 20))
def test_no_two_positions_are_alike(quarter, height, width):
    table = sincos_position_embedding(4 * quarter, height, width)
    distances = torch.cdist(table, table) + 9 * torch.eye(len(table))
    assert distances.min() > 0.1             # of up to 20 whole numbers of radians no two are closer on the circle: 19 - 6 pi


@given(st.integers(1, 12), sizes, sizes, st.integers(0, 4))
def test_positions_of_a_rectangle_are_those_of_a_larger_square(quarter, height, width, more):
    side = max(height, width) + more
    square = sincos_position_embedding(4 * quarter, side, side).reshape(side, side, -1)
    assert torch.equal(sincos_position_embedding(4 * quarter, height, width), square[:height, :width].flatten(0, 1))


@given(st.integers(1, 12), st.integers(1, 8))
def test_two_positions_are_as_alike_as_their_offset_says(quarter, side):
    table = sincos_position_embedding(4 * quarter, side + 1, side + 1).double().reshape(side + 1, side + 1, -1)
    here, down_right = table[:-1, :-1].flatten(0, 1), table[1:, 1:].flatten(0, 1)
    assert_close(here @ here.T, down_right @ down_right.T, rtol=0, atol=1e-5)        # 4 * 12 products, each to 1e-7


def test_positions_need_a_width_that_is_a_multiple_of_4():
    with pytest.raises(ValueError, match="width 6 is not a multiple of 4"):
        sincos_position_embedding(6, 2, 2)


# Patches

@given(sizes, sizes, sizes, sizes, sizes, seeds)
def test_patch_embedding_is_a_strided_convolution(n, rows, columns, p, channels, seed):
    embed, x = fill(PatchEmbed(p, channels, 7)).double(), normal(n, channels, rows * p, columns * p, seed=seed)
    convolution = F.conv2d(x, embed.proj.weight, embed.proj.bias, stride=p)          # (N, D, rows, columns)
    assert_close(embed(x), convolution.flatten(2).transpose(1, 2), **EXACT)


@given(sizes, sizes, sizes, sizes, sizes, seeds)
def test_unpatchify_undoes_cutting(n, rows, columns, p, channels, seed):
    x = normal(n, channels, rows * p, columns * p, seed=seed)
    assert torch.equal(unpatchify(cut(x, p), (rows, columns), p), x)


@given(sizes, sizes, sizes, st.data())
def test_a_patch_is_embedded_from_its_own_pixels_alone(rows, columns, p, data):
    embed, x = fill(PatchEmbed(p, 3, 7)).double(), normal(1, 3, rows * p, columns * p)
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    changed = x.clone()
    changed[:, :, row * p:(row + 1) * p, column * p:(column + 1) * p] += 1
    differs = (embed(x) != embed(changed)).any(dim=2)[0]
    assert differs.nonzero().tolist() == [[row * columns + column]]


@given(st.integers(1, 300), st.integers(1, 40))
def test_the_grid_is_the_quotient_or_the_error_names_the_nearest_sizes_that_work(side, p):
    if side % p == 0:
        assert token_grid((side, 3 * p), p) == (side // p, 3)
        return
    with pytest.raises(ValueError, match=f"image size {side} is not a multiple of patch size {p}: use") as error:
        token_grid((3 * p, side), p)
    nearest = [size for size in range(1, side + p) if size % p == 0 and abs(size - side) < p]
    assert [int(number) for number in re.findall(r"\d+", str(error.value).split("use")[1])] == nearest


def test_an_image_without_pixels_is_an_error():
    with pytest.raises(ValueError, match="image size 0 is not a multiple of patch size 4"):
        token_grid((8, 0), 4)


def test_a_single_number_is_a_square():
    assert token_grid(12, 4) == token_grid((12, 12), 4) == (3, 3)


# Attention

def gradients(function, *inputs, seed=0):
    """The value of a function and its gradients, for a random direction of the output."""
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    output = function(*inputs)
    return output, *torch.autograd.grad((output * normal(*output.shape, seed=seed).to(output)).sum(), inputs)


@given(sizes, sizes, sizes, sizes, sizes, seeds)
def test_fused_attention_is_the_formula_and_so_are_its_gradients(n, heads, queries, keys, d, seed):
    q = normal(n, heads, queries, d, seed=seed, dtype=torch.float32)
    k, v = normal(2, n, heads, keys, d, seed=seed + 1, dtype=torch.float32)
    fused, explicit = gradients(attention, q, k, v), gradients(functools.partial(attention, fused=False), q, k, v)
    assert_close(fused, explicit, **FLOAT32)


@pytest.mark.parametrize("fused", [False, True])
@given(sizes, st.integers(2, 6), seeds)
def test_what_a_mask_hides_might_as_well_not_be_there(fused, queries, keys, seed):
    q, k, v = normal(1, 2, queries, 4, seed=seed), *normal(2, 1, 2, keys, 4, seed=seed + 1)
    seen = torch.arange(keys) != seed % keys
    assert_close(attention(q, k, v, fused, mask=seen[None]), attention(q, k[:, :, seen], v[:, :, seen], fused))


@pytest.mark.parametrize("cross", [False, True])
@given(sizes, sizes, sizes, sizes, st.integers(1, 4), st.booleans(), seeds)
def test_an_attention_layer_is_the_same_fused_and_explicit(cross, n, length, context, heads, d, bias, seed):
    layer = fill(Attention(heads * d, heads, qkv_bias=bias, cross=cross))
    inputs = [normal(n, tokens, heads * d, seed=seed + i, dtype=torch.float32) for i, tokens in enumerate((length, context))]
    inputs = inputs[:1 + cross]
    fused = gradients(layer, *inputs)
    layer.fused = False
    assert_close(fused, gradients(layer, *inputs), **FLOAT32)


@given(sizes, sizes, st.integers(1, 4), st.integers(1, 4))
def test_an_unfused_layer_does_every_multiply_add_of_the_formula(n, length, heads, d):
    layer, D = Attention(heads * d, heads), heads * d
    layer.fused = False                      # PyTorch's counter overlooks the fused kernel on a CPU
    with FlopCounterMode(display=False) as counter:
        layer(torch.zeros(n, length, D))
    products = 3 * D * D + 2 * length * D + D * D    # of a token: into q, k, v; scores and weighted sum; out
    assert counter.get_total_flops() == 2 * n * length * products


@pytest.mark.parametrize("fused", [True, False])
@given(sizes, sizes, sizes, sizes, seeds)
def test_attention_to_a_constant_sequence_returns_the_constant(fused, queries, keys, heads, d, seed):
    q, k, value = normal(2, heads, queries, d, seed=seed), normal(2, heads, keys, d, seed=seed + 1), normal(2, heads, 1, d)
    out = attention(q, k, value.expand(-1, -1, keys, -1), fused)
    assert_close(out, value.expand(-1, -1, queries, -1), **EXACT)


@pytest.mark.parametrize("fused", [True, False])
@given(st.integers(2, 8), seeds)
def test_log_odds_of_two_keys_are_their_scores_difference_over_root_d(fused, d, seed):
    q, k = normal(d, seed=seed), normal(2, d, seed=seed + 1)
    v = torch.eye(2, d, dtype=torch.float64)                             # so that the output begins with the two weights
    first, second = attention(q[None, None, None], k[None, None], v[None, None], fused)[0, 0, 0, :2]
    assert_close((first / second).log(), q @ (k[0] - k[1]) / d ** 0.5, **EXACT)


@given(st.integers(1, 8), st.sampled_from([1, 2, 3, 6]), st.randoms())
def test_attention_without_positions_commutes_with_a_permutation_of_tokens(length, heads, random):
    block, x = fill(Block(12, heads)).double(), normal(2, length, 12)
    order = random.sample(range(length), length)
    assert_close(block(x[:, order]), block(x)[:, order], **EXACT)


@pytest.mark.parametrize("dtype, trains", [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)])
def test_training_in_bfloat16_on_the_cpu_writes_attention_out(monkeypatch, dtype, trains):
    calls, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **how: (calls.append(how), kernel(*args, **how))[1])
    q, k, v = (normal(2, 3, 16, 8, seed=seed).to(dtype).requires_grad_(trains) for seed in range(3))
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    out = attention(q, k, v, mask=mask)
    assert len(calls) == (0 if trains and dtype == torch.bfloat16 else 1)
    digits = 2 ** -6 if dtype == torch.bfloat16 else 1e-6
    assert_close(out, kernel(q, k, v, attn_mask=mask), rtol=digits, atol=digits)


@given(sizes, sizes)
def test_cross_attention_of_a_sequence_to_itself_is_self_attention(n, length):
    layer, cross, x = fill(Attention(12, 3)).double(), Attention(12, 3, cross=True).double(), normal(n, length, 12)
    for name in ("weight", "bias"):
        getattr(cross.q, name).data, getattr(cross.kv, name).data = getattr(layer.qkv, name).data.split([12, 24])
    cross.proj = layer.proj
    assert_close(cross(x, x), layer(x), **EXACT)


@given(st.integers(1, 6), st.integers(2, 6), st.randoms())
def test_cross_attention_does_not_see_the_order_of_its_context(length, context, random):
    layer, x, y = fill(Attention(12, 3, cross=True)).double(), normal(2, length, 12), normal(2, context, 12, seed=1)
    order = random.sample(range(context), context)
    assert_close(layer(x, y[:, order]), layer(x, y), **EXACT)


def test_cross_attention_treats_each_token_alone():
    layer, x, y = fill(Attention(12, 3, cross=True)).double(), normal(2, 5, 12), normal(2, 4, 12, seed=1)
    assert_close(layer(x[:, 2:3], y), layer(x, y)[:, 2:3], **EXACT)


def test_heads_work_side_by_side():
    layer, x = fill(Attention(12, 3)).double(), normal(2, 5, 12)
    layer.proj = torch.nn.Identity()
    q, k, v = (part[:, None, :, 4:8] for part in layer.qkv(x).split(12, dim=2))      # the second of three heads, 4 wide
    assert_close(layer(x)[:, :, 4:8], attention(q, k, v, fused=False).squeeze(1), **EXACT)


@pytest.mark.parametrize("build", [lambda: Attention(12, 5), lambda: ViT(8, 4, dim=12, depth=1, heads=5)])
def test_heads_that_do_not_divide_the_width_are_an_error(build):
    with pytest.raises(ValueError, match="5 heads do not divide width 12"):
        build()


def gelu_error(mlp):
    """By how much an MLP's nonlinearity differs from h Phi(h), at most."""
    mlp.fc2 = torch.nn.Identity()
    hidden = mlp.fc1(normal(2, 50, 6))
    return (mlp(normal(2, 50, 6)) - hidden * torch.special.ndtr(hidden)).abs().max()


def test_gelu_is_exact_unless_the_approximation_is_asked_for():
    assert gelu_error(fill(Mlp(6)).double()) < 1e-11
    assert 1e-4 < gelu_error(fill(Mlp(6, approximate="tanh")).double()) < 5e-4       # Hendrycks & Gimpel's is 4.7e-4 at worst


def test_an_mlp_treats_each_token_alone():
    mlp, x = fill(Mlp(6)).double(), normal(2, 5, 6)
    assert_close(mlp(x[:, 3:4]), mlp(x)[:, 3:4], **EXACT)


# The whole network

@both
@few
@given(st.integers(1, 3), sizes, sizes, st.integers(1, 3), st.integers(1, 7))
def test_logits_have_one_row_an_image_and_one_column_a_class(hybrid, n, rows, columns, channels, classes):
    network = vit(hybrid, (4 * rows, 4 * columns), channels=channels, num_classes=classes)
    assert network(normal(n, channels, 4 * rows, 4 * columns)).shape == (n, classes)


@both
def test_an_images_logits_ignore_the_other_images_while_training_too(hybrid):
    network, x = vit(hybrid).train(), normal(3, 2, 8, 12)
    assert_close(network(x)[1:2], network(x[1:2]), **EXACT)


@both
def test_every_parameter_gets_a_gradient(hybrid):
    torch.manual_seed(0)
    network = ViT((8, 12), 4, channels=2, dim=16, depth=2, heads=2, num_classes=5, hybrid=hybrid)        # fresh
    F.cross_entropy(network(normal(3, 2, 8, 12, dtype=torch.float32)), torch.tensor([0, 3, 4])).backward()
    assert [name for name, value in network.named_parameters() if not value.grad.any()] == []


@both
def test_checkpointing_recomputes_each_block_for_the_same_gradients(hybrid):
    network, calls, gradients = vit(hybrid).train(), [], []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(network.checkpointing))
    for network.checkpointing in (False, True):
        network.zero_grad()
        network(normal(2, 2, 8, 12)).square().sum().backward()
        gradients.append({name: value.grad.clone() for name, value in network.named_parameters()})
    assert_close(gradients[0], gradients[1], **EXACT)
    depth = len(network.blocks)
    assert calls == [False] * depth + [True] * 2 * depth


@both
def test_every_pixel_matters(hybrid):
    network = vit(hybrid)
    _, gradient = gradients(network, normal(1, 2, 8, 12))
    assert (gradient != 0).all()


def test_the_order_of_patches_matters_through_the_positions_alone():
    network, x = vit(), normal(1, 2, 8, 12)
    rolled = x.roll((4, 8), dims=(2, 3))     # by whole patches
    assert not torch.allclose(network(rolled), network(x), atol=1e-3)
    network.pos_embed.data[:, 1:] = 0
    assert_close(network(rolled), network(x), **EXACT)


def test_the_hybrid_has_as_many_tokens_as_the_plain_network():
    x = normal(1, 2, 8, 12)
    assert vit(hybrid=True).tokens(x).shape == vit(hybrid=False).tokens(x).shape == (1, 1 + 2 * 3, 16)


@both
def test_only_the_hybrids_features_look_beyond_their_own_patch(hybrid):
    network, x = vit(hybrid), normal(1, 2, 8, 12)
    changed = x.clone()
    changed[:, :, :4, :4] += normal(1, 2, 4, 4, seed=1)
    differs = (network.patch_embed(network.stem(x)) != network.patch_embed(network.stem(changed))).any(dim=2)[0]
    assert differs[0] and differs[1:].any() == hybrid


def test_the_hybrids_patches_are_multiples_of_4_pixels():
    with pytest.raises(ValueError, match="patch size 6 is not a multiple of 4"):
        ViT(12, 6, dim=16, depth=1, heads=2, hybrid=True)


@both
@pytest.mark.parametrize("shape", [(2, 12, 8), (2, 8, 10), (3, 8, 12)], ids=str)     # the first makes as many tokens, upright
def test_images_of_another_size_are_an_error(hybrid, shape):
    with pytest.raises(ValueError, match=re.escape(f"input of shape {shape} where the network was built for (2, 8, 12)")):
        vit(hybrid)(normal(1, *shape))


def test_an_image_that_the_patch_does_not_divide_is_an_error_at_once():
    with pytest.raises(ValueError, match="image size 30 is not a multiple of patch size 4: use 28 or 32"):
        ViT((32, 30), 4)


def test_a_fresh_network_starts_as_timms():
    torch.manual_seed(0)
    network = ViT(32, 8, dim=48, depth=2, heads=3, num_classes=10)
    linears = [module for module in network.modules() if isinstance(module, torch.nn.Linear)]
    assert not any(linear.bias.any() for linear in linears)
    for weight in (*(linear.weight for linear in linears), network.pos_embed):
        # a standard deviation of n normal numbers errs by 1 / sqrt(2 n) of itself: five of these
        assert weight.std().item() == pytest.approx(0.02, rel=5 / (2 * weight.numel()) ** 0.5)
    assert 0 < network.cls_token.abs().max() < 1e-5          # ten standard deviations


def striped(n, generator):
    """Images (n, 1, 16, 16) of lying (class 0) and standing (class 1) stripes of any phase, with noise."""
    labels = torch.randint(2, (n,), generator=generator)
    phase = 2 * torch.pi * torch.rand(n, 1, 1, generator=generator)
    wave = torch.sin(torch.arange(16).reshape(-1, 1) * torch.pi / 2 + phase).expand(-1, -1, 16)
    images = torch.where(labels[:, None, None] == 1, wave.transpose(1, 2), wave)
    return (images + 0.3 * torch.randn(n, 16, 16, generator=generator)).unsqueeze(1), labels


@both
def test_a_few_dozen_steps_teach_lying_from_standing_stripes(hybrid):
    torch.manual_seed(0)
    network = ViT(16, 8, channels=1, dim=32, depth=1, heads=2, num_classes=2, hybrid=hybrid)
    optimizer, generator, losses = torch.optim.AdamW(network.parameters(), lr=3e-3), torch.Generator().manual_seed(0), []
    for _ in range(60):
        images, labels = striped(32, generator)
        losses.append(F.cross_entropy(network(images), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize("channels", [1, 3])
def test_images_read_as_bytes_enter_convolutions_in_the_default_layout(channels):
    bytes_nhwc = torch.zeros(2, 4, 4, channels, dtype=torch.uint8)
    maps = torch.nn.Conv2d(channels, 8, 3)(default_layout(data.to_float(bytes_nhwc)))
    assert maps.stride() == (32, 4, 2, 1)                                # (2, 8, 2, 2): channels last would be (32, 1, 16, 8)
