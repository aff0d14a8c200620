"""U-Nets: Ronneberger's against his figure; the denoisers against OpenAI's and CompVis's numbers, and what each option means.

test_networks.py has what every denoiser promises. Where a claim is an identity of the denoiser it is checked in float64, to
EXACT: rounding is 1e-16 for each of some thousand terms of size 1. Denoisers are tiny, rectangular, filled with formula weights
and 64 wide or more: with one channel a group, GroupNorm takes away whatever is added to a channel. Ronneberger's network has
one width, the published one.
"""
import copy
import functools
import inspect
import math
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from formula import fill, golden, golden_json
from unet import (ADM, SIZES, UPSAMPLERS, AttentionBlock, Downsample, ResBlock, RonnebergerUNet, SpatialTransformer, SuperResUNet,
                  UNet, Upsample)
from vit import timestep_embedding

EXACT = {"rtol": 1e-11, "atol": 1e-11}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def count(tensors):
    return sum(tensor.numel() for tensor in tensors)


# Ronneberger's network

FIGURE = golden_json("unet_ronneberger2015")


@functools.cache
def segmenter_on_meta(channels=1, num_classes=2):
    with torch.device("meta"):
        return RonnebergerUNet(channels, num_classes)


@functools.cache
@torch.no_grad()
def segmented():
    """A fresh network, an image of 188 x 204 pixels, and what its modules were given and put out, by their names."""
    torch.manual_seed(0)
    network, x, seen = RonnebergerUNet(), normal(1, 1, 188, 204, dtype=torch.float32), {}
    hooks = [module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
             for name, module in network.named_modules()]
    network(x)
    for hook in hooks:
        hook.remove()
    return network, x, seen


def test_every_feature_map_of_figure_1_has_its_size():
    seen, maps = [], FIGURE["feature_maps"]
    network = copy.deepcopy(segmenter_on_meta())
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_hook(
                lambda module, inputs, output: seen.append([list(inputs[0].shape[1:]), list(output.shape[1:])]))
    network(torch.empty(1, *FIGURE["facts"]["input"], device="meta"))
    # a convolution goes from one map to the next; pooled and concatenated maps are what convolutions are given
    assert seen == [[given, made] for (_, given), (name, made) in zip(maps, maps[1:]) if "conv" in name]
    assert len(seen) == FIGURE["facts"]["convolution_layers"]


def test_parameters_are_ronnebergers():
    shapes = [list(parameter.shape) for parameter in segmenter_on_meta().parameters()]
    assert sorted(shapes) == sorted(FIGURE["parameter_shapes"])
    assert sum(map(math.prod, shapes)) == FIGURE["params_with_biases"] == 31_030_658


def legal(side):
    """Whether a side can be halved four times, each behind two convolutions, and leaves something of it to answer."""
    answered = side - 184
    for _ in range(4):
        if side < 6 or side % 2:                         # 4 less, then half
            return False
        side = (side - 4) // 2
    return answered > 0


LEGAL = [side for side in range(1200) if legal(side)]


@pytest.mark.parametrize("wide", [False, True])
def test_sides_that_do_not_work_are_an_error_that_names_the_nearest_that_do(wide):
    for side in range(1, 600):
        image = torch.empty((1, 3, 188, side) if wide else (1, 3, side, 188), device="meta")
        if side in LEGAL:
            assert segmenter_on_meta(3, 5)(image).shape == (1, 5, *((4, side - 184) if wide else (side - 184, 4)))
            continue
        with pytest.raises(ValueError, match=f"^side {side} leaves a map that cannot be halved, or nothing to answer: use ") as error:
            segmenter_on_meta(3, 5)(image)
        named = [int(number) for number in re.findall(r"\d+", str(error.value))[1:]]
        assert sorted(named) == sorted(sorted(LEGAL, key=lambda other: abs(other - side))[:2])


def test_the_centre_of_each_map_is_copied_beside_what_comes_from_below():
    _, _, seen = segmented()
    for level, crop in enumerate(FIGURE["crops"]):       # the offsets are the same for every size
        offset, (above, below) = crop["offset"], (seen[f"down.{3 - level}"][1], seen[f"up.{level}"][1])
        cropped = above[:, :, offset:-offset, offset:-offset]
        assert cropped.shape == below.shape
        assert torch.equal(seen[f"merge.{level}"][0], torch.cat([cropped, below], dim=1))


def test_pooling_takes_the_largest_of_four():
    _, _, seen = segmented()
    for level in range(4):
        quads = seen[f"down.{level}"][1].unflatten(3, (-1, 2)).unflatten(2, (-1, 2))             # (N, C, H / 2, 2, W / 2, 2)
        assert torch.equal(seen[f"down.{level + 1}"][0], quads.amax(dim=(3, 5)))


def test_every_convolution_of_three_by_three_is_rectified_and_no_other():
    network, _, seen = segmented()
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            stage, place = name.rsplit(".", 1)
            assert torch.equal(seen[f"{stage}.{int(place) + 1}"][1], seen[name][1].clamp(min=0))
    assert all(seen[name][1].min() < 0 for name in ("up.0", "up.1", "up.2", "up.3", "last"))


def test_convolutions_start_normal_with_variance_2_over_inputs():
    for module in segmented()[0].modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            # a pixel of an up-convolution sees one pixel of each channel
            inputs = math.prod(module.weight.shape[1:]) if isinstance(module, nn.Conv2d) else module.in_channels
            weight, deviation = module.weight, (2 / inputs) ** 0.5
            assert weight.std().item() == pytest.approx(deviation, rel=5 / (2 * weight.numel()) ** 0.5)  # five standard errors
            assert weight.abs().max() > 1.8 * deviation  # a uniform number stays below
            assert not module.bias.any()


def striped(across, shift):
    """An image of stripes 2 pixels wide, lying in its left half and standing in its right, and the classes of what is answered.

    across turns it on its side: standing ones above, lying ones below.
    """
    row, column = torch.meshgrid(torch.arange(188), torch.arange(204), indexing="ij")
    standing = column >= 102
    image = ((torch.where(standing, column, row) + shift) // 2 % 2) * 2.0 - 1
    classes = standing.long()[92:-92, 92:-92]
    if across:
        image, classes = image.T, 1 - classes.T
    return image[None, None], classes[None]


@pytest.mark.slow
def test_twelve_steps_teach_the_whole_network_to_tell_lying_from_standing_stripes():
    torch.manual_seed(0)
    network = RonnebergerUNet()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-4)
    for step in range(12):
        x, classes = striped(across=step % 2 == 1, shift=0)
        if step % 4 > 1:
            x, classes = x.flip(2, 3), classes.flip(1, 2)
        optimizer.zero_grad()
        F.cross_entropy(network(x), classes).backward()
        optimizer.step()
    with torch.no_grad():
        for across in (False, True):
            x, classes = striped(across, shift=1)        # stripes in places that it has not seen
            # of 80 pixels; five seeds gave 0.94 or more
            assert (network(x).argmax(dim=1) == classes).float().mean() > 0.85


# Denoisers: golden data

OURS = {"image_size": "image_size", "in_channels": "channels", "out_channels": "out_channels", "model_channels": "dim",
        "num_res_blocks": "res_blocks", "attention_resolutions": "attention_ds", "channel_mult": "multipliers",
        "num_heads": "heads", "num_head_channels": "head_dim", "num_classes": "num_classes", "context_dim": "context_dim",
        "use_scale_shift_norm": "scale_shift", "resblock_updown": "updown", "conv_resample": "conv_resample",
        "use_new_attention_order": "new_attention_order"}


def ours(config):
    """Our arguments for OpenAI's or CompVis's configuration, where -1 is no number; their label tables have no null row."""
    return dict(null_class=False) | {OURS[key]: None if value == -1 else value for key, value in config.items() if key in OURS}


@functools.cache
@torch.no_grad()
def released_small(name):
    """A small released network, its file, its inputs, and the mean and deviation of what the blocks of its trace put out."""
    config = golden(f"unet_{name}_small")[1]["config"]
    network = (SuperResUNet if name == "superres" else UNet)(**ours(config))
    data, meta = golden(f"unet_{name}_small", network)
    inputs = dict(x=data["in_x"], t=data["in_t"], y=data.get("in_y", data.get("in_context")))
    if name == "superres":
        inputs["low"] = data["in_low_res"]
    trace = []
    hooks = [network.get_submodule(block).register_forward_hook(
                 lambda block, inputs, output: trace.append(torch.stack([output.mean(), output.std()])))
             for block in meta["trace_names"]]
    output = network(**inputs)
    for hook in hooks:
        hook.remove()
    return network, data, inputs, output, torch.stack(trace)


every_released_network = pytest.mark.parametrize("name", ["ddpm", "adm", "superres", "ldm"])


def tolerance(expected, deviations):
    return dict(rtol=0, atol=deviations * expected.std().item())


@every_released_network
def test_output_equals_the_releases(name):
    _, data, _, output, _ = released_small(name)
    assert_close(output, data["out_y"], **tolerance(data["out_y"], 5e-5))


@every_released_network
@torch.no_grad()
def test_output_equals_the_releases_where_x_hardly_varies(name):
    network, data, inputs, _, _ = released_small(name)               # so that the norms' epsilon shows
    output = network(**inputs | dict(x=1e-3 * inputs["x"]))
    assert_close(output, data["out_y_low"], **tolerance(data["out_y_low"], 1e-3))


@every_released_network
def test_what_each_block_puts_out_has_the_mean_and_deviation_of_the_releases(name):
    _, data, _, _, trace = released_small(name)
    assert_close(trace, data["out_trace"], rtol=0, atol=5e-5)        # the deviations are about 1


@pytest.mark.parametrize("name", ["ddpm", "adm", "superres"])
def test_time_embedding_equals_openais(name):
    _, data, _, _, _ = released_small(name)
    assert_close(timestep_embedding(data["in_t"], 32), data["out_temb"], rtol=0, atol=1e-4)      # float32 rounds t = 999 by 6e-5


def test_every_norm_has_the_epsilon_of_the_releases():
    networks = [released_small(name)[0] for name in ("ddpm", "adm", "superres", "ldm")]
    norms = [module for network in networks for module in network.modules() if isinstance(module, (nn.GroupNorm, nn.LayerNorm))]
    inside = [module.norm for module in networks[3].modules() if isinstance(module, SpatialTransformer)]
    assert {module.eps for module in inside} == {1e-6}
    assert {module.eps for module in norms if not any(module is other for other in inside)} == {1e-5}


# Published configurations

PUBLISHED = golden_json("complexity_convnets")["networks"]
SIZE_OF = {
    "ADM-64": "adm-64", "ADM-128": "adm-128", "ADM-256": "adm-256", "ADM-256-uncond": "adm-256", "ADM-512": "adm-512",
    "ADM-U-64-256": "adm-64-256", "ADM-U-128-512": "adm-128-512", "IDDPM-CIFAR10": "iddpm-cifar10",
    "IDDPM-ImageNet64": "iddpm-64", "DDPM-CIFAR10 (OpenAI layout)": "ddpm-cifar10", "DDPM-LSUN256 (OpenAI layout)": "ddpm-256",
    "LDM-4": "ldm-4", "LDM-8": "ldm-8", "LDM-4 (num_head_channels 32)": "ldm-4",
    "DDPM-CIFAR10 (Ho et al.'s own layout)": "ddpm-cifar10",
    "DDPM-LSUN/CelebA-HQ 256 (Ho et al.'s own layout)": "ddpm-256"}


def test_every_published_denoiser_has_a_size():
    assert set(SIZE_OF) == {name for name in PUBLISHED if "classifier" not in name}
    assert set(SIZE_OF.values()) == set(SIZES) - {"Nano", "Nano-latent", "Ti", "Ti-up", "S", "B", "ldm-coco"}         # ours


@pytest.mark.parametrize("name", SIZE_OF)
def test_parameters_are_as_many_as_published(name):
    config, size = PUBLISHED[name]["config"], SIZE_OF[name]
    stated = {key: value for key, value in ours(config).items() if key in ("channels", "out_channels", "num_classes", "null_class")}
    with torch.device("meta"):
        network = (SuperResUNet if size in UPSAMPLERS else UNet)(**SIZES[size], **stated)
    assert count(network.parameters()) == count(network.state_dict().values()) == PUBLISHED[name]["params"]


@pytest.mark.parametrize("name", [name for name in SIZE_OF if "own layout" not in name and "head_channels" not in name])
def test_sizes_are_the_published_configurations(name):
    config, size = PUBLISHED[name]["config"], SIZE_OF[name]          # heads do not show in the number of parameters
    stated, ignored = ("channels", "out_channels", "num_classes", "null_class"), ("dropout",)
    defaults = {key: value.default for key, value in inspect.signature(UNet).parameters.items()}
    sized, published = ({key: set(value) if key == "attention_ds" else tuple(value) if key == "multipliers" else value
                         for key, value in (defaults | arguments).items() if key not in stated + ignored}
                        for arguments in (SIZES[size], ours(config)))
    assert sized == published
    assert (size in UPSAMPLERS) == (config["kind"] == "SuperResModel")


def test_published_dropout_is_of_the_small_images():
    rates = {size: arguments["dropout"] for size, arguments in SIZES.items() if "dropout" in arguments}
    assert rates == {"ddpm-cifar10": 0.1, "iddpm-cifar10": 0.3, "adm-64": 0.1}


# Tiny denoisers

MAPS = dict(image_size=(4, 6), channels=3, dim=32, multipliers=(2, 3), res_blocks=1, heads=2)


def fresh(network=UNet, **changes):
    """A tiny network as it starts: maps of 4 x 6 and 2 x 3 pixels, 64 and 96 wide, with attention on the smaller."""
    torch.manual_seed(0)
    return network(**MAPS | changes)


def filled(network=UNet, **changes):
    """The same with formula weights, in float64."""
    return fill(fresh(network, **changes)).double()


def with_weights(network, state):
    """The network with these weights, in float64."""
    network.double().load_state_dict(state, strict=True)
    return network


def batch(**inputs):
    """Three images, times, and what else is given."""
    return dict(x=normal(3, 3, 4, 6), t=torch.tensor([0, 437, 999])) | inputs


# Initialisation

variants = pytest.mark.parametrize("changes", [{}, dict(num_classes=5, **ADM), dict(context_dim=7), dict(conv_resample=False)],
                                   ids=["ddpm", "adm", "ldm", "pooling"])


def condition(changes):
    """What a variant is told besides the time."""
    return torch.tensor([1, 4, 5]) if "num_classes" in changes else normal(3, 2, 7) if "context_dim" in changes else None


@variants
def test_a_fresh_network_predicts_exactly_zero(changes):
    assert not fresh(**changes).double()(**batch(y=condition(changes))).any()


@variants
def test_only_what_ends_a_residual_branch_starts_at_zero(changes):
    values = dict(fresh(**changes).named_parameters())
    ends = {name for name in values if re.search(r"out_layers\.3\.|proj_out\.|^out\.2\.", name)}
    assert {name for name, value in values.items() if name.endswith("weight") and not value.any()} == {*filter(
        re.compile("weight$").search, ends)} and not any(values[name].any() for name in ends)


# Resampling

def means(x):
    """The mean of each 2 x 2 pixels."""
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(3, 5))


def repeated(x):
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def test_without_convolutions_sides_are_halved_by_means_and_doubled_by_repeating():
    x = normal(2, 32, 4, 6)
    assert_close(Downsample(32, conv=False)(x), means(x), **EXACT)
    assert torch.equal(Upsample(32, conv=False)(x), repeated(x))


def test_with_convolutions_every_second_pixel_is_kept_or_the_repeated_ones_are_convolved():
    x, down, up = normal(2, 32, 4, 6), fill(Downsample(32, conv=True)).double(), fill(Upsample(32, conv=True)).double()
    every_pixel = F.conv2d(x, down.op.weight, down.op.bias, padding=1)
    assert_close(down(x), every_pixel[:, :, ::2, ::2], **EXACT)
    assert_close(up(x), up.conv(repeated(x)), **EXACT)


@pytest.mark.parametrize("device, products", [("cpu", 4), ("meta", 9)])                  # for a pixel; counts are the papers'
@pytest.mark.parametrize("updown", [False, True])
def test_on_the_cpu_a_repeated_map_is_convolved_by_fewer_products(device, products, updown):
    x, emb, repeat = torch.empty(1, 32, 4, 4, device=device), torch.empty(1, 8, device=device), nn.Upsample(scale_factor=2)
    layer = (ResBlock(32, 32, 8, 0.0, False, repeat) if updown else Upsample(32, conv=True)).to(device)
    with FlopCounterMode(display=False) as counter:
        layer(x, emb) if updown else layer(x)
    others = updown * (9 * 32 ** 2 * 8 ** 2 + 8 * 32)    # of the second convolution and of emb
    assert counter.get_total_flops() == 2 * (products * 32 ** 2 * 8 ** 2 + others)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_blocks_resample_before_their_first_convolution(scale_shift):
    plain, down, up = (fill(ResBlock(64, 96, 8, 0.0, scale_shift, f)).double()
                       for f in (None, nn.AvgPool2d(2), nn.Upsample(scale_factor=2)))
    x, emb = normal(2, 64, 4, 6), normal(2, 8, seed=1)
    # repeating pixels changes neither the norm's statistics nor the mean of each four, so that these are one function
    assert_close(down(repeated(x), emb), plain(x, emb), **EXACT)
    assert_close(up(x, emb), plain(repeated(x), emb), **EXACT)


def test_blocks_resample_behind_their_first_nonlinearity():
    block, x, given = fill(ResBlock(64, 96, 8, 0.0, False, nn.AvgPool2d(2))).double(), normal(2, 64, 4, 6), []
    block.in_layers[2].register_forward_hook(lambda layer, inputs, output: given.append(inputs[0]))
    block(x, normal(2, 8))
    assert_close(given[0], means(F.silu(block.in_layers[0](x))), **EXACT)


# Time, classes, context

def test_a_class_is_an_offset_of_the_times_embedding():
    network = filled(num_classes=5, scale_shift=True)
    state = network.state_dict()
    table = state.pop("label_emb.weight")
    for label in (0, 5):                                 # added behind the time's MLP
        plain = with_weights(fresh(scale_shift=True), state | {"time_embed.2.bias": state["time_embed.2.bias"] + table[label]})
        assert_close(network(**batch(y=torch.full((3,), label))), plain(**batch()), **EXACT)


def test_a_block_that_is_told_nothing_is_the_same_whichever_way():
    added, modulated = (fill(ResBlock(64, 96, 8, 0.0, scale_shift)).double() for scale_shift in (False, True))
    for block in (added, modulated):
        nn.init.zeros_(block.emb_layers[1].weight), nn.init.zeros_(block.emb_layers[1].bias)
    x, emb = normal(2, 64, 4, 6), normal(2, 8)
    assert_close(modulated(x, emb), added(x, emb), **EXACT)


def test_scale_and_shift_act_on_the_second_norm():
    block, (x, emb) = fill(ResBlock(64, 96, 8, 0.0, scale_shift=True)).double(), (normal(2, 64, 4, 6), normal(2, 8))
    scale, shift = normal(2, 96, seed=2)
    nn.init.zeros_(block.emb_layers[1].weight)
    plain = copy.deepcopy(block)                         # in which the norm's own gain and offset do the same
    block.emb_layers[1].bias.data = torch.cat([scale, shift])            # scale first
    nn.init.zeros_(plain.emb_layers[1].bias)
    gain, offset = plain.out_layers[0].parameters()
    gain.data, offset.data = gain * (1 + scale), offset * (1 + scale) + shift
    assert_close(block(x, emb), plain(x, emb), **EXACT)


def test_the_order_of_a_contexts_tokens_does_not_matter():
    network, context = filled(context_dim=7), normal(3, 5, 7, seed=1)
    assert_close(network(**batch(y=context.flip(1))), network(**batch(y=context)), **EXACT)


def test_a_context_of_one_token_is_told_to_all_pixels_alike():
    block, tokens = fill(SpatialTransformer(64, 7, 2)).double().transformer_blocks[0], normal(2, 6, 64)
    block.attn1.forward = lambda x, context: torch.zeros_like(x)
    block.ff["net"] = nn.Linear(64, 64).double()
    nn.init.zeros_(block.ff["net"].weight), nn.init.zeros_(block.ff["net"].bias)         # leaves x + cross-attention
    added = block(tokens, normal(2, 1, 7)) - tokens
    assert added.any()
    assert_close(added, added[:, :1].expand_as(added), **EXACT)


# Attention

def test_new_attention_order_is_that_of_every_block():
    old = filled(heads=2, attention_ds=(1, 2))
    state = {name: value.unflatten(0, (2, 3, -1)).transpose(0, 1).flatten(0, 2) if ".qkv." in name else value
             for name, value in old.state_dict().items()}                # [head][q, k, v] -> [q, k, v][head]
    new, unmoved = (with_weights(fresh(heads=2, attention_ds=(1, 2), new_attention_order=True), weights)
                    for weights in (state, old.state_dict()))
    assert_close(new(**batch()), old(**batch()), **EXACT)
    assert not torch.allclose(unmoved(**batch()), old(**batch()), atol=1e-3)


@given(st.permutations(range(6)), st.booleans())
def test_attention_does_not_know_where_pixels_lie(order, new_order):
    block, x = fill(AttentionBlock(64, 2, new_order)).double(), normal(2, 64, 2, 3)
    moved = block(x.flatten(2)[:, :, order].unflatten(2, (2, 3))).flatten(2)
    assert_close(moved, block(x).flatten(2)[:, :, order], **EXACT)


@pytest.mark.parametrize("context_dim", [None, 7])
@settings(max_examples=10)                   # of a whole network
@given(st.sets(st.sampled_from([1, 2, 4])), st.integers(1, 3))
def test_attention_sits_exactly_where_it_is_asked_for_and_in_the_middle(context_dim, where, res_blocks):
    network, sides = fresh(image_size=(4, 8), multipliers=(1, 1, 2), attention_ds=where, res_blocks=res_blocks,
                           context_dim=context_dim), []
    for module in network.modules():
        if isinstance(module, (AttentionBlock, SpatialTransformer)):
            module.register_forward_hook(lambda module, inputs, output: sides.append(tuple(inputs[0].shape[2:])))
    network(normal(1, 3, 4, 8, dtype=torch.float32), torch.tensor([5]), None if context_dim is None else torch.ones(1, 2, 7))
    blocks = Counter({(4 // ds, 8 // ds): 2 * res_blocks + 1 for ds in where})           # res_blocks down, one more up
    assert Counter(sides) == blocks + Counter([(1, 2)])


@pytest.mark.parametrize("context_dim", [None, 7])
def test_head_dim_overrides_heads(context_dim):
    arguments = dict(image_size=(4, 6), multipliers=(2, 4), attention_ds=(1, 2), context_dim=context_dim)
    by_width = fresh(heads=3, head_dim=16, **arguments)             # 3 divides neither width
    heads = {(module.norm.num_channels, module.heads) for module in by_width.modules() if isinstance(module, AttentionBlock)}
    cross = {(module.to_q.in_features, module.heads) for name, module in by_width.named_modules() if re.search("attn[12]$", name)}
    assert heads | cross == {(64, 4), (128, 8)}


@pytest.mark.parametrize("head_dim", [128, 24])
def test_head_dim_that_does_not_divide_a_width_is_an_error(head_dim):
    with pytest.raises(ValueError, match=f"heads do not divide the width 64: {head_dim} channels a head"):
        fresh(multipliers=(2, 2), head_dim=head_dim)


# The way down is seen again on the way up

@pytest.mark.parametrize("changes", [{}, ADM], ids=["ddpm", "adm"])
def test_the_last_map_on_the_way_down_is_the_first_that_is_seen_again(changes):
    network, seen = fresh(res_blocks=2, **changes), []
    for k, stage in enumerate(network.input_blocks):     # stage k puts out nothing but k
        stage.register_forward_hook(lambda stage, inputs, output, k=k: torch.full_like(output, k))
    for stage in network.output_blocks:                  # the maps of the way down are the last channels of what is merged
        stage.register_forward_hook(lambda stage, inputs, output: seen.append(inputs[0][:, -64:].unique().tolist()))
    network.double()(**batch())
    assert seen == [[k] for k in reversed(range(6))]


# The upsampler

@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 6), (8, 12)])
def test_an_upsampler_is_the_network_of_x_and_low_side_by_side(size):
    upsampler = filled(SuperResUNet)
    twice = with_weights(fresh(channels=6), upsampler.state_dict())
    low = torch.tensor([-0.5, 0.1, 0.8], dtype=torch.float64)[:, None, None].expand(3, 3, *size)     # constant in a channel
    x = batch()["x"]
    together = torch.cat([x, low[:, :, :1, :1].expand_as(x)], dim=1)                     # however it is scaled
    assert_close(upsampler(**batch(low=low)), twice(**batch(x=together)), **EXACT)


@given(st.integers(2, 5), st.sampled_from([1, 2, 4]))
def test_a_slope_in_low_is_scaled_to_the_same_slope(columns, factor):
    upsampler, seen = fresh(SuperResUNet, image_size=(2, 2 * columns * factor), multipliers=(1, 1)).double(), []
    upsampler.input_blocks[0].register_forward_hook(lambda stage, inputs, output: seen.append(inputs[0][0, 3]))
    centres = torch.arange(2 * columns, dtype=torch.float64) + 0.5                       # of its pixels, in its pixels' width
    low = centres.expand(1, 3, 2, -1)
    x = normal(1, 3, 2, 2 * columns * factor)
    upsampler(x, torch.tensor([5]), low=low)
    fine = (torch.arange(2 * columns * factor) + 0.5) / factor                           # where x's pixels lie
    # bilinear between the centres of low's pixels, constant beyond the outermost
    assert_close(seen[0], fine.clamp(0.5, 2 * columns - 0.5).double().expand(2, -1), **EXACT)


# Layout

@variants
def test_the_norms_see_the_default_layout(changes):      # with channels last, the CPU's loses digits where the mean is large
    network, seen = filled(**changes), []
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].is_contiguous()))
    inputs = batch(y=condition(changes))
    network(**inputs | dict(x=inputs["x"].to(memory_format=torch.channels_last)))        # as a batch of NHWC bytes comes
    assert len(seen) > 10 and all(seen)
