"""The U-Nets: Ronneberger's figure map by map; OpenAI's and CompVis's numbers, and what each option of the denoiser does.

What all denoisers share is in test_networks.py. An identity is checked in float64 to EXACT; golden outputs to the tolerance that
their file states, in standard deviations of the output.
"""
import functools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from formula import fill, golden, golden_json
from unet import SIZES, UPSAMPLERS, AttentionBlock, Downsample, ResBlock, RonnebergerUNet, SpatialTransformer, SuperResUNet, UNet, upsample
from vit import timestep_embedding

EXACT = {"rtol": 1e-11, "atol": 1e-11}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fresh(network=UNet, **changes):
    """A tiny network as it starts: two resolutions of 32 and 64 channels, attention at the second, 5 classes."""
    torch.manual_seed(0)
    arguments = dict(image_size=(4, 6), channels=3, dim=32, res_blocks=1, multipliers=(1, 2), attention_ds=(2,), num_classes=5)
    return network(**(arguments | changes))


def unet(network=UNet, **changes):
    """The same with formula weights, in float64."""
    return fill(fresh(network, **changes)).double()


def batch():
    return normal(2, 3, 4, 6), torch.tensor([0, 999]), torch.tensor([1, 5])


def count(tensors):
    return sum(tensor.numel() for tensor in tensors)


# Ronneberger's

FIGURE = golden_json("unet_ronneberger2015")


def test_every_map_has_the_size_in_ronnebergers_figure():
    sizes = []

    def record(module, inputs, output):
        sizes.append(list(output.shape[1:]))
    with torch.device("meta"):
        network = RonnebergerUNet()
        for module in network.modules():
            if isinstance(module, (torch.nn.ReLU, torch.nn.ConvTranspose2d)) or module is network.last:
                module.register_forward_hook(record)
        for stage in network.merge:
            stage.register_forward_pre_hook(lambda module, inputs: sizes.append(list(inputs[0].shape[1:])))
        for stage in network.down[1:]:
            stage.register_forward_pre_hook(lambda module, inputs: sizes.append(list(inputs[0].shape[1:])))
        network(torch.empty(1, 1, 572, 572))
    assert sizes == [size for name, size in FIGURE["feature_maps"] if name != "input"]


def test_ronnebergers_parameters_have_the_shapes_in_his_figure():
    with torch.device("meta"):
        network = RonnebergerUNet()
    assert count(network.parameters()) == FIGURE["params_with_biases"] == 31_030_658
    assert Counter(tuple(value.shape) for value in network.parameters()) == Counter(map(tuple, FIGURE["parameter_shapes"]))


@functools.cache
def ronneberger():
    """A network in which signals survive all layers: formula weights."""
    return fill(RonnebergerUNet())


def test_each_skip_is_the_centre_of_its_map():
    network, maps, joined = ronneberger(), [], []
    hooks = [stage.register_forward_hook(lambda stage, inputs, output: maps.append(output)) for stage in network.down[:-1]]
    hooks += [stage.register_forward_pre_hook(lambda stage, inputs: joined.append(inputs[0])) for stage in network.merge]
    with torch.no_grad():
        network(normal(1, 1, 188, 204, dtype=torch.float32))
    for hook in hooks:
        hook.remove()
    for skip, merged in zip(reversed(maps), joined, strict=True):
        (height, width), (H, W) = merged.shape[2:], skip.shape[2:]
        top, left = (H - height) // 2, (W - width) // 2
        assert (H - height, W - width) == (2 * top, 2 * left)            # as much is cut off on both sides
        assert torch.equal(merged[:, :skip.shape[1]], skip[:, :, top:top + height, left:left + width])


def test_an_answer_depends_on_the_place_in_the_image_by_nothing_but_what_is_there():
    image = normal(1, 1, 204, 188, dtype=torch.float32)
    with torch.no_grad():
        whole, part = ronneberger()(image), ronneberger()(image[:, :, 16:])
    assert whole.shape == (1, 2, 20, 4) and part.shape == (1, 2, 4, 4)
    assert_close(whole[:, :, 16:], part, rtol=0, atol=1e-5 * whole.std().item())     # no border was made up


@pytest.mark.parametrize("side, nearest", [(572 + 8, "572 or 588"), (187, "188 or 204"), (30, "188 or 204"), (200, "188 or 204")])
def test_a_side_that_leaves_an_odd_map_is_an_error_that_names_the_nearest(side, nearest):
    with torch.device("meta"), pytest.raises(ValueError, match=nearest):
        RonnebergerUNet()(torch.empty(1, 1, 188, side))


@pytest.mark.parametrize("side", [188, 204, 572])
def test_the_border_of_92_pixels_is_lost(side):
    with torch.device("meta"):
        assert RonnebergerUNet(3, 4)(torch.empty(2, 3, side, side)).shape == (2, 4, side - 184, side - 184)


def test_ten_steps_teach_it_to_segment_two_textures():
    torch.manual_seed(0)
    network, generator = RonnebergerUNet(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-4)
    stripes, right = (torch.arange(204) % 4 < 2).float() * 2 - 1, []     # two pixels wide, standing or lying
    for step in range(10):
        border = int(torch.randint(96, 109, (), generator=generator))    # between the textures; which is on top alternates
        standing = ((torch.arange(204) >= border) ^ (step % 2 == 1))[:, None].expand(204, 188)
        image = torch.where(standing, stripes[None, :188], stripes[:, None])[None, None]         # (1, 1, 204, 188)
        truth = standing[92:112, 92:96].long()[None]                     # (1, 20, 4), the pixels that are answered
        logits = network(image)
        clear = (torch.arange(92, 112) - border + 0.5).abs() > 4         # on the border nobody can tell
        right.append((logits.argmax(dim=1) == truth)[0, clear].float().mean().item())
        F.cross_entropy(logits, truth).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert right[0] < 0.8 and min(right[-3:]) > 0.95                     # each image is new to the network


# Golden data

SMALL = dict(image_size=16, channels=3, dim=32, multipliers=(1, 2), attention_ds=(2,))
ADM_LIKE = dict(out_channels=6, num_classes=10, null_class=False, scale_shift=True, updown=True)
RELEASES = {
    "ddpm": (UNet, dict(res_blocks=2, heads=4)),
    "adm": (UNet, dict(res_blocks=2, head_dim=16, **ADM_LIKE)),
    "superres": (SuperResUNet, dict(res_blocks=1, heads=2, **ADM_LIKE)),
    "ldm": (UNet, dict(res_blocks=1, heads=4, context_dim=24)),
}
every_release = pytest.mark.parametrize("name", RELEASES)


@functools.cache
def released(name):
    """A small network of OpenAI's or CompVis's, its file, and its inputs after x."""
    network, changes = RELEASES[name]
    network = network(**SMALL, **changes)
    data, meta = golden(f"unet_{name}_small", network)
    rest = [data["in_t"], data.get("in_y", data.get("in_context")), data.get("in_low_res")]
    return network.requires_grad_(False), data, meta, rest if name == "superres" else rest[:2]


@every_release
@pytest.mark.parametrize("amplitude, out, tolerance", [(1, "out_y", 5e-5), (1e-3, "out_y_low", 1e-3)])
def test_output_equals_the_releases(name, amplitude, out, tolerance):
    network, data, _, rest = released(name)          # at the low amplitude the norms' epsilon shows
    output = network(amplitude * data["in_x"], *rest)
    assert_close(output, data[out], rtol=0, atol=tolerance * data[out].std().item())


@every_release
def test_mean_and_deviation_of_every_stage_equal_the_releases(name):
    network, data, meta, rest = released(name)
    seen = []
    hooks = [network.get_submodule(stage).register_forward_hook(lambda stage, inputs, output: seen.append((output.mean(), output.std())))
             for stage in meta["trace_names"]]
    network(data["in_x"], *rest)
    for hook in hooks:
        hook.remove()
    assert_close(torch.tensor(seen), data["out_trace"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["ddpm", "adm", "superres"])
def test_time_features_equal_openais(name):
    _, data, _, _ = released(name)
    # one bit of an angle of 999 is 6e-5
    assert_close(timestep_embedding(data["in_t"], 32), data["out_temb"], rtol=0, atol=6e-5)


PUBLISHED = golden_json("complexity_convnets")["networks"]
NAMES = {"ADM-64": "adm-64", "ADM-128": "adm-128", "ADM-256": "adm-256", "ADM-256-uncond": "adm-256", "ADM-512": "adm-512",
         "ADM-U-64-256": "adm-64-256", "ADM-U-128-512": "adm-128-512", "IDDPM-CIFAR10": "iddpm-cifar10",
         "IDDPM-ImageNet64": "iddpm-64", "DDPM-CIFAR10 (OpenAI layout)": "ddpm-cifar10",
         "DDPM-LSUN256 (OpenAI layout)": "ddpm-256", "LDM-4": "ldm-4", "LDM-8": "ldm-8"}


@pytest.mark.parametrize("name", NAMES)
def test_every_published_configuration_has_the_releases_parameters(name):
    config, size = PUBLISHED[name]["config"], NAMES[name]
    with torch.device("meta"):
        network = (SuperResUNet if size in UPSAMPLERS else UNet)(**SIZES[size] | dict(
            channels=config["in_channels"], out_channels=config["out_channels"], num_classes=config.get("num_classes"), null_class=False))
    assert count(network.parameters()) == PUBLISHED[name]["params"]
    assert network.image_size == (config["image_size"],) * 2


def test_published_heads_are_as_many_as_the_releases():
    heads = {}
    for size in ("adm-64", "adm-128", "iddpm-cifar10", "ldm-4", "ldm-8", "ddpm-cifar10"):
        with torch.device("meta"):
            network = UNet(**SIZES[size])
        middle = network.middle_block[1]
        heads[size] = middle.heads if size[:3] != "ldm" else middle.transformer_blocks[0].attn1.heads
    # 768 channels / 64; given; given; given; 1024 channels / 32; given
    assert heads == {"adm-64": 12, "adm-128": 4, "iddpm-cifar10": 4, "ldm-4": 1, "ldm-8": 32, "ddpm-cifar10": 1}
    with torch.device("meta"):
        orders = {size: UNet(**SIZES[size]).middle_block[1].new_order for size in ("adm-64", "adm-128", "adm-256")}
    assert orders == {"adm-64": True, "adm-128": False, "adm-256": False}


# How it starts

@pytest.mark.parametrize("changes", [{}, dict(scale_shift=True, updown=True), dict(context_dim=7)])
def test_a_fresh_network_predicts_exactly_zero(changes):
    x, t, y = batch()
    assert not fresh(**changes)(x.float(), t, normal(2, 3, 7).float() if "context_dim" in changes else y).any()


@pytest.mark.parametrize("block", [ResBlock(32, 32, 8, 0.0, True), AttentionBlock(32, 2, False), SpatialTransformer(32, 7, 2)])
def test_a_fresh_residual_branch_adds_nothing(block):
    x = normal(2, 32, 4, 6, dtype=torch.float32)
    told = {ResBlock: [normal(2, 8).float()], SpatialTransformer: [normal(2, 3, 7).float()]}.get(type(block), [])
    assert torch.equal(block(x, *told), x)


# The parts

def test_both_orders_of_qkv_are_one_function_with_its_rows_in_another_order():
    old, new, x = fill(AttentionBlock(32, 4, False)).double(), fill(AttentionBlock(32, 4, True)).double(), normal(2, 32, 3, 5)
    for mine, theirs in zip(new.qkv.parameters(), old.qkv.parameters()):
        mine.data = theirs.data.unflatten(0, (4, 3, 8)).transpose(0, 1).flatten(0, 2)    # [head][q, k, v] to [q, k, v][head]
    assert_close(new(x), old(x), **EXACT)


def test_attention_is_the_formula_head_by_head():
    block, x = fill(AttentionBlock(32, 4, False)).double(), normal(2, 32, 3, 5)
    q, k, v = block.qkv(block.norm(x).flatten(2)).unflatten(1, (4, 3, 8)).unbind(2)      # each (N, h, d, L), as Conv1d has it
    weights = torch.einsum("nhdl,nhdm->nhlm", q, k).div(8 ** 0.5).softmax(dim=3)
    out = torch.einsum("nhlm,nhdm->nhdl", weights, v).flatten(1, 2)
    assert_close(block(x), x + block.proj_out(out).unflatten(2, (3, 5)), **EXACT)


def test_moving_an_image_around_moves_what_attention_says():
    x, context = normal(2, 32, 3, 5), normal(2, 4, 7)
    for block, told in ((fill(AttentionBlock(32, 4, False)).double(), []), (fill(SpatialTransformer(32, 7, 4)).double(), [context])):
        assert_close(block(x.roll((1, 2), dims=(2, 3)), *told), block(x, *told).roll((1, 2), dims=(2, 3)), **EXACT)


def test_the_time_scales_and_shifts_the_second_norm_or_is_added_before_it():
    for scale_shift, rows in ((True, 64), (False, 32)):
        block, emb = fill(ResBlock(32, 32, 8, 0.0, scale_shift)).double(), normal(2, 8)
        told = F.linear(F.silu(emb), block.emb_layers[1].weight, block.emb_layers[1].bias)
        assert told.shape == (2, rows)
        x = normal(2, 32, 4, 6)
        h = block.in_layers(x)
        if scale_shift:
            h = block.out_layers[0](h) * (1 + told[:, :32, None, None]) + told[:, 32:, None, None]
        else:
            h = block.out_layers[0](h + told[:, :, None, None])
        assert_close(block(x, emb), x + block.out_layers[3](F.silu(h)), **EXACT)


def test_a_resampling_block_resamples_before_its_first_convolution_and_beside_it():
    block, x, emb = fill(ResBlock(32, 32, 8, 0.0, True, torch.nn.AvgPool2d(2))).double(), normal(2, 32, 4, 6), normal(2, 8)
    plain = fill(ResBlock(32, 32, 8, 0.0, True)).double()
    plain.in_layers[0] = plain.in_layers[1] = torch.nn.Identity()        # given what is resampled already
    branch = plain(F.avg_pool2d(F.silu(block.in_layers[0](x)), 2), emb) - F.avg_pool2d(F.silu(block.in_layers[0](x)), 2)
    assert_close(block(x, emb), F.avg_pool2d(x, 2) + branch, **EXACT)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_the_mean_of_four_pixels_undoes_repeating_them(channels, rows, columns):
    x = normal(2, channels, rows, columns)
    larger = upsample(x)
    assert larger.shape == (2, channels, 2 * rows, 2 * columns) and torch.equal(larger[:, :, 1::2, ::2], x)
    assert_close(Downsample(channels, conv=False)(larger), x, **EXACT)


@pytest.mark.parametrize("changes, weights", [(dict(), 2), (dict(conv_resample=False), 0), (dict(updown=True), 0)])
def test_resampling_learns_where_it_should(changes, weights):
    names = {name for name, _ in fresh(**changes).named_parameters()}
    assert len({name for name in names if name.endswith(("op.weight", "0.conv.weight", "1.conv.weight", "2.conv.weight"))}) == weights
    blocks = len({name.split(".emb_layers")[0] for name in names if "emb_layers" in name})
    assert blocks == 2 + 2 + 4 + (2 if changes.get("updown") else 0)     # down, middle, up; and the two that resample


@settings(max_examples=10)
@given(st.sets(st.sampled_from([1, 2, 4])))
def test_pixels_attend_to_each_other_at_the_stated_resolutions_and_in_the_middle(attention_ds):
    network, seen = unet(image_size=(8, 12), multipliers=(1, 1, 2), attention_ds=attention_ds), []
    for module in network.modules():
        if isinstance(module, AttentionBlock):
            module.register_forward_hook(lambda module, inputs, output: seen.append(8 // output.shape[2]))
    network(normal(1, 3, 8, 12), torch.tensor([7]), torch.tensor([1]))
    assert Counter(seen) == Counter([4] + [ds for ds in attention_ds for _ in range(3)])     # one down, two up, of each


def test_a_width_of_a_head_overrides_the_number_of_heads():
    heads = [module.heads for module in fresh(attention_ds=(1, 2), heads=3, head_dim=16).modules() if isinstance(module, AttentionBlock)]
    assert heads == [2, 4, 4, 4, 4, 2, 2]                # 32 and 64 channels


def test_the_way_up_sees_the_maps_of_the_way_down_last_in_first_out():
    network, down, up = unet(res_blocks=2), [], []
    for stage in network.input_blocks:
        stage.register_forward_hook(lambda stage, inputs, output: down.append(output))
    for stage in network.output_blocks:
        stage.register_forward_pre_hook(lambda stage, inputs: up.append(inputs[0]))
    network(*batch())
    assert len(up) == len(down) == 6
    assert all(torch.equal(joined[:, -skip.shape[1]:], skip) for joined, skip in zip(up, reversed(down)))


def test_the_text_reaches_the_pixels_through_cross_attention_whatever_its_order():
    network, (x, t, _) = unet(context_dim=7), batch()
    context = normal(2, 5, 7)
    assert_close(network(x, t, context.flip(1)), network(x, t, context), **EXACT)
    assert (network(x, t, context) - network(x, t, context + 1)).abs().amax(dim=(1, 2, 3)).min() > 1e-3


# The upsampler

def test_a_constant_small_image_is_a_constant_channel_after_the_images():
    network, (x, t, y) = unet(SuperResUNet), batch()
    low = normal(2, 3, 1, 1).expand(2, 3, 2, 3)
    assert_close(network(x, t, y, low), network.denoise(torch.cat([x, low[:, :, :1, :1].expand_as(x)], dim=1), t, y), **EXACT)


def test_a_small_image_is_enlarged_between_the_centres_of_its_pixels():
    network, (x, t, y) = unet(SuperResUNet), batch()
    low, seen = normal(2, 3, 2, 3), []
    network.input_blocks[0].register_forward_pre_hook(lambda stage, inputs: seen.append(inputs[0]))
    network(x, t, y, low)
    enlarged = seen[0][:, 3:]
    # pixel 1 of 4 lies a quarter of a small pixel past the centre of small pixel 0
    assert_close(enlarged[:, :, 1, 0], 0.75 * low[:, :, 0, 0] + 0.25 * low[:, :, 1, 0], **EXACT)
    assert_close(enlarged[:, :, 0, 1], 0.75 * low[:, :, 0, 0] + 0.25 * low[:, :, 0, 1], **EXACT)
    assert torch.equal(seen[0][:, :3], x) and torch.equal(enlarged[:, :, 0, 0], low[:, :, 0, 0])


def test_an_upsampler_that_does_not_look_at_the_small_image_is_a_unet():
    large, plain, (x, t, y) = unet(SuperResUNet), unet(), batch()
    state = large.state_dict()
    first = state["input_blocks.0.0.weight"]
    first[:, 3:] = 0
    plain.load_state_dict({**state, "input_blocks.0.0.weight": first[:, :3]})
    assert_close(large(x, t, y, normal(2, 3, 2, 2)), plain(x, t, y), **EXACT)
