"""inception.py: pytorch-fid's and torch-fidelity's numbers with weights made from names; both resizes; each part by itself.

The golden weights are formula weights with every batch norm's gain times 1.5, without which the features hardly depend on the
image. float32 sums round in another order on each machine: to 4e-6 of an output's standard deviation, of which the file allows
5e-4. Pixels of 0..255 are compared to PIXEL: three weighted means round by 255 * 6e-8 each.
"""
import functools
import json

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, strategies as st
from torch.testing import assert_close

import inception
from data import to_float
from files import sha256_of
from formula import GOLDEN, fill, formula_weight, golden, golden_json
from inception import MIXED, Conv, Inception, Mixed, load, resize_tf1, resize_torch, weights_file
from refusals import refusal

PIXEL = {"rtol": 0, "atol": 2e-4}
EXACT = {"rtol": 1e-11, "atol": 1e-11}

seeds = st.integers(0, 2 ** 32)
sides = st.integers(1, 40)
both_rules = pytest.mark.parametrize("resize", [resize_tf1, resize_torch])
both_paths = pytest.mark.parametrize("tf1_resize", [True, False], ids=["tf1", "torch"])


def pixels(*shape, seed=0, dtype=torch.float32):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Golden data

DATA, META = golden("inception_64")


@functools.cache
def weights():
    """The state dict of the golden file's names and shapes."""
    with np.load(GOLDEN / "inception_64.npz") as file:
        keys = json.loads(str(file["keys"]))
    made = {name: formula_weight(name, shape) for name, shape in keys}
    return {name: META["bn_gain"] * value if name.endswith("bn.weight") else value for name, value in made.items()}


@functools.cache
def network():
    return load(weights())


@functools.cache
def features(tf1_resize):
    return network().features(DATA["in_images"], tf1_resize)


@pytest.mark.parametrize("name, tf1_resize, expected", [
    ("pool", False, "out_pool3"), ("spatial", False, "out_spatial"), ("logits", False, "out_logits"),
    ("pool", True, "out_tf_pool3"), ("spatial", True, "out_tf_spatial"), ("logits", True, "out_tf_logits_unbiased")])
def test_features_equal_pytorch_fids_and_torch_fidelitys(name, tf1_resize, expected):
    found, expected = features(tf1_resize)[name], DATA[expected]
    if (name, tf1_resize) == ("logits", False):                          # pytorch-fid adds the bias
        found = found + network().fc.bias
    assert found.dtype == torch.float32
    assert_close(found, expected, rtol=0, atol=5e-4 * expected.std().item())


@pytest.mark.parametrize("rule, resize", [("tf1", resize_tf1), ("torch", resize_torch)])
@pytest.mark.parametrize("size", [32, 64])
def test_enlarged_pixels_equal_the_originals(size, rule, resize):
    arrays, _ = golden(f"resize_299_from_{size}")
    enlarged, index = resize(arrays["in_images"].permute(0, 3, 1, 2).float()), arrays["in_index"]
    assert enlarged.shape == (1, 3, 299, 299)
    assert_close(enlarged[:, :, index][:, :, :, index], arrays[f"out_{rule}"], rtol=0, atol=2e-3)


# Weights

def test_names_shapes_and_types_are_those_of_the_released_file():
    listed = golden_json("inception_keys")
    with torch.device("meta"):
        own = Inception()
    assert {name: (list(value.shape), str(value.dtype)) for name, value in own.state_dict().items()} == {
        name: (shape, f"torch.{dtype}") for name, shape, dtype in listed["keys"]}
    assert sum(value.numel() for value in own.parameters()) == listed["params"]
    norms = [module for module in own.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == listed["batchnorms"] and {norm.eps for norm in norms} == {listed["bn_eps"]}


def test_batch_counts_may_be_there_or_not():
    assert not any(name.endswith("num_batches_tracked") for name in weights())
    full = network().state_dict()
    assert len(full) == len(weights()) + golden_json("inception_keys")["batchnorms"]
    again = load(full).state_dict()
    assert all(torch.equal(again[name], value) for name, value in full.items())


def test_the_loaded_network_is_the_given_weights_in_eval_mode_without_gradients():
    assert all(torch.equal(network().state_dict()[name], value) for name, value in weights().items())
    assert not any(module.training for module in network().modules())
    assert not any(value.requires_grad for value in network().parameters()) and not features(True)["pool"].requires_grad


FITLESS = {
    "missing": (lambda state: state.pop("Mixed_6e.branch7x7_2.bn.bias"), "Mixed_6e.branch7x7_2.bn.bias"),
    "extra": (lambda state: state.update({"AuxLogits.fc.bias": torch.zeros(3)}), "AuxLogits.fc.bias"),
    "misshapen": (lambda state: state.update({"fc.weight": torch.zeros(1000, 2048)}), "fc.weight"),
    "no tensor": (lambda state: state.update({"fc.bias": 3.0}), "fc.bias"),
    "nothing": (lambda state: state.clear(), "Conv2d_1a_3x3.conv.weight"),
}


@pytest.mark.parametrize("case", FITLESS)
def test_weights_that_do_not_fit_are_refused_in_one_line(case):
    change, name = FITLESS[case]
    state = dict(weights())
    change(state)
    refusal(lambda: load(state), "these are not the weights of FID's Inception", name)


def test_what_is_no_state_dict_is_refused():
    refusal(lambda: load([torch.zeros(3)]), "these are not the weights of FID's Inception")


# Resizing

@both_rules
@given(sides, seeds)
def test_resizing_to_the_same_size_changes_nothing(resize, side, seed):
    x = pixels(2, 3, side, side, seed=seed)
    assert torch.equal(resize(x, side), x)


@both_rules
@given(sides, sides, sides, st.floats(-300, 300))
def test_one_level_stays_that_level(resize, height, width, side, level):
    enlarged = resize(torch.full((1, 2, height, width), level), side)
    assert_close(enlarged, torch.full((1, 2, side, side), level), rtol=1e-6, atol=0)


@pytest.mark.parametrize("resize, place", [
    (resize_tf1, lambda i, scale: i * scale), (resize_torch, lambda i, scale: (i + 0.5) * scale - 0.5)], ids=["tf1", "torch"])
@given(sides, sides, st.integers(1, 300))
def test_pixel_i_comes_from_the_place_that_the_rule_says(resize, place, height, width, side):
    row, column = torch.arange(height), torch.arange(width)              # a ramp tells where each pixel comes from
    enlarged = resize((row[:, None] + 100.0 * column)[None, None], side)
    y, x = (place(torch.arange(side).double(), size / side).clamp(0, size - 1) for size in (height, width))
    # places of up to 40 are off by 40 * 6e-8 in float32, columns counted 100 times; values of up to 4000 round as much
    assert_close(enlarged[0, 0].double(), y[:, None] + 100 * x, rtol=0, atol=4e-3)


@both_rules
@given(sides, sides, st.integers(1, 60), seeds)
def test_resizing_commutes_with_transposition_and_mixes_no_channels(resize, height, width, side, seed):
    x = pixels(2, 3, height, width, seed=seed)
    assert_close(resize(x.mT, side), resize(x, side).mT, **PIXEL)
    assert torch.equal(resize(x, side)[1:, 2:], resize(x[1:, 2:], side))


@both_rules
@given(sides, sides, seeds)
def test_no_new_extremes_arise(resize, height, width, seed):
    x = pixels(1, 1, height, width, seed=seed)
    enlarged = resize(x, 50)
    assert x.min() - 2e-4 <= enlarged.min() and enlarged.max() <= x.max() + 2e-4


# Images

@both_paths
@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_and_floats_of_the_same_pixels_are_the_same_image(tf1_resize, channels):
    images = pixels(2, 9, 7, channels, dtype=torch.uint8)
    prepared = network().preprocess(images, tf1_resize)
    assert prepared.shape == (2, 3, 299, 299) and prepared.dtype == torch.float32
    # x / 127.5 - 1 and back rounds by a few 6e-8 of 1
    assert_close(network().preprocess(to_float(images), tf1_resize), prepared, rtol=0, atol=1e-6)


@both_paths
def test_grey_is_three_equal_channels(tf1_resize):
    grey = pixels(2, 9, 7, 1, dtype=torch.uint8)
    prepared = network().preprocess(grey, tf1_resize)
    assert torch.equal(prepared[:, 1:], prepared[:, :2])
    assert_close(prepared, network().preprocess(grey.expand(-1, -1, -1, 3), tf1_resize), rtol=0, atol=1e-6)      # other kernels


@pytest.mark.parametrize("tf1_resize, lowest, highest", [(True, -1, 127 / 128), (False, -1, 1)], ids=["tf1", "torch"])
def test_black_and_white_are_the_ends_of_the_range(tf1_resize, lowest, highest):
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)
    black, white = network().preprocess(images, tf1_resize)
    assert_close(black, torch.full_like(black, lowest))
    assert_close(white, torch.full_like(white, highest))


UNSEEN = {"two channels of bytes": pixels(2, 8, 8, 2, dtype=torch.uint8), "two channels": torch.zeros(2, 2, 8, 8),
          "an image of bytes": pixels(8, 8, 3, dtype=torch.uint8), "an image": torch.zeros(3, 8, 8),
          "channels first as bytes": pixels(2, 3, 8, 8, dtype=torch.uint8), "channels last": torch.zeros(2, 8, 8, 3)}


@pytest.mark.parametrize("case", UNSEEN)
def test_what_is_no_batch_of_images_is_refused(case):
    images = UNSEEN[case]
    refusal(lambda: network().features(images), f"images of shape {tuple(images.shape)} are neither uint8 NHWC nor float NCHW")


# Parts

@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3, 5, (1, 7), (7, 1), (1, 3)]), st.sampled_from([1, 2]),
       st.booleans(), seeds)
def test_a_convolution_with_its_norm_folded_in_is_convolution_norm_and_relu(inputs, outputs, kernel, stride, padded, seed):
    layer, x = fill(Conv(inputs, outputs, kernel, stride, padded)).double(), normal(2, inputs, 9, 8, seed=seed)
    layer.fold()
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    same = padded and stride == 1                                        # zeros around, as many as keep the size
    if same:
        x_around = nn.functional.pad(x, (width // 2, width // 2, height // 2, height // 2))
    convolution = nn.functional.conv2d(x_around if same else x, layer.conv.weight, stride=stride)
    assert_close(layer(x), layer.bn(convolution).relu(), **EXACT)
    assert layer(x).shape[2:] == ((9, 8) if same else ((9 - height) // stride + 1, (8 - width) // stride + 1))


def neighbours(x):
    """The up to nine values at and around each pixel, those beyond the border NaN: (9, N, C, H, W)."""
    around = nn.functional.pad(x, (1, 1, 1, 1), value=torch.nan)
    return torch.stack([around[:, :, i:i + x.shape[2], j:j + x.shape[3]] for i in range(3) for j in range(3)])


@pytest.mark.parametrize("average", [True, False], ids=["average", "maximum"])
@given(st.integers(1, 6), st.integers(1, 6), seeds)
def test_a_pooled_branch_sees_the_neighbours_that_there_are(average, height, width, seed):
    block, x = Mixed(3, dict(branch1x1=[(2, 1)]), 4, average), normal(2, 3, height, width, seed=seed) - 3
    block.branch_pool = nn.Identity()
    seen = neighbours(x)
    assert_close(block.pooled(x), seen.nanmean(dim=0) if average else seen.nan_to_num(-torch.inf).amax(dim=0), **EXACT)
    assert_close(block.pooled(torch.full_like(x, -2)), torch.full_like(x, -2), **EXACT)      # also at the border


@given(st.integers(3, 9), st.integers(3, 9), seeds)
def test_a_strided_block_passes_on_the_largest_of_each_nine(height, width, seed):
    block, x = Mixed(3, dict(branch3x3=[(2, 3, 2)])), normal(2, 3, height, width, seed=seed) - 3
    windows = neighbours(x)[:, :, :, 1:-1:2, 1:-1:2]
    assert torch.equal(block.pooled(x), windows.amax(dim=0))


def test_the_last_block_alone_pools_by_maximum_and_two_blocks_stride():
    blocks = {name: getattr(network(), name) for name in MIXED}
    kinds = {name: "strided" if block.branch_pool is None else "average" if block.average else "maximum"
             for name, block in blocks.items()}
    assert kinds == dict.fromkeys(MIXED, "average") | {"Mixed_6a": "strided", "Mixed_7a": "strided", "Mixed_7c": "maximum"}


def test_a_block_joins_its_branches_by_channels_in_their_order():
    block = Mixed(3, dict(branch1x1=[(2, 1)], branch3x3=[(4, 1), ((5, (1, 3)), (5, (3, 1)))]), 6)
    block, x = fill(block).double(), normal(2, 3, 5, 6)
    middle = block.branch3x3_1(x)
    parts = [block.branch1x1(x), block.branch3x3_2a(middle), block.branch3x3_2b(middle), block.pooled(x)]
    assert torch.equal(block(x), torch.cat(parts, dim=1)) and block(x).shape[1] == block.outputs == 18


# The whole

@functools.cache
def traced():
    """Features of two images, by PyTorch's resize, and what came out of each module on the way."""
    seen = {}
    hooks = [module.register_forward_hook(lambda _module, _inputs, output, name=name: seen.update({name: output}))
             for name, module in network().named_modules() if name]
    try:
        return network()(DATA["in_images"], tf1_resize=False), seen
    finally:
        for hook in hooks:
            hook.remove()


def test_spatial_features_are_seven_channels_of_the_first_branch_of_6d_pixel_by_pixel():
    found, seen = traced()
    branch = seen["Mixed_6d.branch1x1"]
    assert branch.shape == (2, 192, 17, 17)
    assert torch.equal(found["spatial"], branch.permute(0, 2, 3, 1)[..., :7].reshape(2, 2023))
    assert (found["spatial"] >= 0).all()                                 # after the ReLU


def test_pooled_features_are_the_mean_over_the_last_map():
    found, seen = traced()
    assert seen["Mixed_7c"].shape == (2, 2048, 8, 8)
    assert_close(found["pool"], seen["Mixed_7c"].double().mean(dim=(2, 3)).float())


def test_logits_are_the_last_layer_without_its_bias():
    found, _ = traced()
    assert_close(found["logits"], network().fc(found["pool"]) - network().fc.bias, rtol=1e-4, atol=1e-4)
    assert found["logits"].shape == (2, 1008) and network().fc.bias.abs().max() > 0.1


@pytest.mark.parametrize("name, shape", [("Conv2d_1a_3x3", (32, 149)), ("Conv2d_2a_3x3", (32, 147)), ("Conv2d_2b_3x3", (64, 147)),
                                         ("Conv2d_3b_1x1", (80, 73)), ("Conv2d_4a_3x3", (192, 71)), ("Mixed_5b", (256, 35)),
                                         ("Mixed_5d", (288, 35)), ("Mixed_6e", (768, 17)), ("Mixed_7a", (1280, 8))])
def test_maps_have_the_sizes_of_the_paper(name, shape):
    channels, side = shape
    assert traced()[1][name].shape == (2, channels, side, side)


def test_an_images_features_do_not_depend_on_its_batch():
    alone, together = network().features(DATA["in_images"][1:], False), features(False)
    for name, value in together.items():
        assert_close(alone[name], value[1:], rtol=0, atol=1e-4 * value.std().item())


# The file of the weights; test_bad_input.py refuses one with another hash, test_data.py says how files are downloaded

def test_the_expected_hash_is_the_one_in_the_address():
    assert inception.SHA256[:8] in inception.URL and len(inception.SHA256) == 64


def test_weights_are_downloaded_once_and_then_found_in_the_cache(tmp_path, monkeypatch):
    remote, kept = tmp_path / "weights.pth", tmp_path / "cache" / "weights.pth"
    remote.write_bytes(b"weights of a network")
    monkeypatch.setattr(inception, "URL", remote.as_uri())
    monkeypatch.setattr(inception, "SHA256", sha256_of(remote))
    assert weights_file(cache=kept.parent) == kept and kept.read_bytes() == b"weights of a network"
    remote.rename(tmp_path / "own.pth")
    assert weights_file(cache=kept.parent) == kept
    assert weights_file(str(tmp_path / "own.pth")) == tmp_path / "own.pth"               # a file that is named is taken as it is
    kept.write_bytes(b"damaged")
    refusal(lambda: weights_file(cache=kept.parent), kept, "delete it", kind=OSError)
