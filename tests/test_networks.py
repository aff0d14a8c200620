"""What every denoiser promises, whatever is inside: each claim is stated once and tried on DiT, U-ViT and the U-Nets.

Networks are tiny, rectangular and filled with formula weights, so that nothing is hidden by a tensor that starts at zero.
Where a claim is an identity it is checked in float64, to EXACT: rounding is 1e-16 for each of some thousand terms of size 1.
U-Nets are 64 wide or more: with one channel a group, GroupNorm takes away whatever is added to a channel, the time too.
"""
import copy
import functools
import re

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from dit import BLOCKS, DiT
from formula import fill
from unet import ADM, Stage, SuperResUNet, UNet
from uvit import UViT
from vit import Attention, Mlp, attention

EXACT = {"rtol": 1e-11, "atol": 1e-11}

TOKENS = dict(image_size=(4, 6), channels=3, patch_size=2, dim=16, depth=2, heads=2)
MAPS = dict(image_size=(4, 6), channels=3, dim=32, multipliers=(2, 3), res_blocks=1, heads=2)
LABELS, TEXT = dict(num_classes=5), dict(context_dim=7)
NETWORKS = {
    **{f"dit-{design}": (DiT, TOKENS | LABELS | dict(conditioning=design)) for design in BLOCKS},
    "dit-text": (DiT, TOKENS | TEXT | dict(conditioning="cross-attention")),
    "uvit-labels": (UViT, TOKENS | LABELS | dict(mlp_time_embed=True)),
    "uvit-unconditional": (UViT, TOKENS),
    "uvit-text": (UViT, TOKENS | TEXT | dict(context_tokens=4)),
    "uvit-ablated": (UViT, TOKENS | LABELS | dict(skip=False, conv=False)),
    "unet-ddpm": (UNet, MAPS),
    "unet-adm": (UNet, MAPS | LABELS | ADM | dict(out_channels=6, head_dim=32, new_attention_order=True)),
    "unet-pooling": (UNet, MAPS | LABELS | dict(conv_resample=False)),
    "unet-ldm": (UNet, MAPS | TEXT),
    "unet-upsampler": (SuperResUNet, MAPS | LABELS),
}

every_network = pytest.mark.parametrize("name", NETWORKS)
LABELLED, TEXTUAL = ([name for name in NETWORKS if key in NETWORKS[name][1]] for key in ("num_classes", "context_dim"))
every_label_network, every_text_network = (pytest.mark.parametrize("name", names) for names in (LABELLED, TEXTUAL))
every_unet = pytest.mark.parametrize("name", [name for name in NETWORKS if name.startswith("unet")])
every_textless_network = pytest.mark.parametrize("name", [name for name in NETWORKS if name not in TEXTUAL])


def fresh(name, **changes):
    """A network as it starts."""
    network, arguments = NETWORKS[name]
    return network(**arguments | changes)


@functools.cache                             # a U-Net's weights take longer to make than to run
def filled_once(name, **changes):
    network = fresh(name, **changes)
    return fill(network, computed=[key for key, _ in network.named_buffers()]).double()


def filled(name, **changes):
    """A network with formula weights, in float64; a copy, which the test may change."""
    return copy.deepcopy(filled_once(name, **changes))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(network, n=3):
    """What a network is given, by its names: images, times, and as it asks labels of which the last is null, texts, low."""
    height, width = network.image_size
    inputs = dict(x=normal(n, network.channels, height, width), t=torch.tensor([0, 437, 999])[3 - n:])
    if network.num_classes is not None:
        inputs["y"] = torch.tensor([1, 3, 5])[3 - n:]
    if network.context_dim is not None:
        inputs["y"] = normal(n, 4, network.context_dim, seed=1)
    if isinstance(network, SuperResUNet):
        inputs["low"] = normal(*inputs["x"][:, :, ::2, ::2].shape, seed=2)
    return inputs


def table(network):
    """The label table, None where there is none."""
    return next((module for module in network.modules() if isinstance(module, torch.nn.Embedding)), None)


# Shapes

@every_network
@settings(max_examples=8)
@given(st.integers(0, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(1, 4), st.booleans())
def test_output_is_an_image_like_x_with_twice_the_channels_if_the_variance_is_learned(name, n, rows, columns, k, channels,
                                                                                      learned):
    learned = learned and not name.startswith("uvit")                    # U-ViT learns no variance
    factor, changes = {                                                  # what must divide the sides
        "dit": (1 + k, dict(patch_size=1 + k, learn_sigma=learned)),
        "uvit": (1 + k, dict(patch_size=1 + k)),
        "unet": (2 ** k, dict(multipliers=(2,) * (k + 1), out_channels=(1 + learned) * channels))}[name.split("-")[0]]
    size = (factor * rows, factor * columns)
    network = fresh(name, image_size=size, channels=channels, **changes).double()
    assert network(**batch(network, n)).shape == (n, (1 + learned) * channels, *size)


@every_network
def test_a_single_number_is_a_square(name):
    with torch.device("meta"):
        assert fresh(name, image_size=4).image_size == (4, 4)


# What the output depends on

@every_network
def test_an_images_output_ignores_the_other_images_while_training_too(name):
    network, inputs = filled(name).train(), batch(filled(name))
    alone = [network(**{key: value[i:i + 1] for key, value in inputs.items()}) for i in range(3)]
    assert_close(network(**inputs), torch.cat(alone), **EXACT)


@every_network
def test_each_of_x_t_y_and_low_matters(name):
    network, inputs = filled(name), batch(filled(name))
    output, differs = network(**inputs), {}
    for key, value in inputs.items():
        other = network(**inputs | {key: value.flip(0)})                 # flipping three images leaves the middle one
        differs[key] = ((other - output).abs().amax(dim=(1, 2, 3)) > 1e-3).tolist()
    assert differs == dict.fromkeys(inputs, [True, False, True])


@every_network
def test_each_output_pixel_depends_on_every_input_pixel_and_token(name):
    network, inputs = filled(name), batch(filled(name), 1)
    numbers = [value.requires_grad_() for value in inputs.values() if value.is_floating_point()]         # x, a text, low
    network(**inputs)[0, 0, 3, 5].backward()
    assert all((value.grad != 0).all() for value in numbers)


@every_network
def test_every_row_and_column_of_every_parameter_gets_a_gradient(name):
    network, weight = filled(name), normal(3, 1, 4, 6, seed=3)
    inputs = batch(network)
    (network(**inputs) * weight).sum().backward()
    if network.num_classes is not None:
        (network(**inputs | dict(y=5 - inputs["y"])) * weight).sum().backward()          # the other rows of the label table
    # 1e-9 is far above rounding: an offset that a norm takes away has a gradient of 1e-15 instead of 0
    for key, value in network.named_parameters():
        size = value.grad.abs()
        assert size.amax(dim=0).min() > 1e-9, key                        # of a bias the largest: softmax takes away the keys'
        assert value.ndim == 1 or size.flatten(1).amax(dim=1).min() > 1e-9, key


@every_network
def test_the_gradient_is_the_slope_of_the_output(name):
    network, h = filled(name), 1e-5
    inputs = batch(network)
    weight = normal(*network(**inputs).shape, seed=3)

    def grown(factor):                       # the output, summed with weights, of all parameters times a factor
        parameters = {key: factor * value for key, value in network.named_parameters()}
        return (torch.func.functional_call(network, parameters, kwargs=inputs) * weight).sum()
    grown(1).backward()
    slope = sum((value * value.grad).sum() for value in network.parameters())
    # a central difference errs by h^2 / 6 third derivatives: 1e-7 slopes if these are some thousand; allow a hundred times it
    assert ((grown(1 + h) - grown(1 - h)) / (2 * h)).item() == pytest.approx(slope.item(), rel=1e-5)


@every_network
def test_a_state_dict_carries_the_whole_network(name):
    network, other = filled(name), fresh(name).double()
    other.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(other(**batch(network)), network(**batch(network)))


@every_unet
def test_dropout_is_random_while_training_and_gone_afterwards(name):
    network = filled(name, dropout=0.5).train()
    inputs = batch(network)
    assert not torch.allclose(network(**inputs), network(**inputs), atol=1e-3)
    assert torch.equal(network.eval()(**inputs), filled(name)(**inputs))


@every_unet
def test_dropout_drops_the_given_share(name):
    network, dropped = filled(name, dropout=0.25).train(), []
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, inputs, output: dropped.append((output == 0).flatten()))
    torch.manual_seed(0)
    network(**batch(network))
    share = torch.cat(dropped).double()
    assert share.mean().item() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / len(share)) ** 0.5)         # five standard errors


# Times and conditions

@every_network
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_may_be_fractions_and_whole_floats_equal_integers(name, dtype):
    network, inputs = filled(name), batch(filled(name))
    whole = network(**inputs)
    assert torch.equal(network(**inputs | dict(t=inputs["t"].to(dtype))), whole)
    between = network(**inputs | dict(t=inputs["t"].to(dtype) + 0.5))
    assert ((between - whole).abs().amax(dim=(1, 2, 3)) > 1e-3).all()


@every_label_network
def test_no_labels_means_the_null_label(name):
    network, inputs = filled(name), batch(filled(name))
    assert network.null_label == 5
    assert torch.equal(network(**inputs | dict(y=None)), network(**inputs | dict(y=torch.full((3,), 5))))


@every_label_network
def test_the_last_row_of_the_label_table_is_for_dropped_labels_alone(name):
    network, inputs = filled(name), batch(filled(name))
    network(**inputs | dict(y=None)).square().sum().backward()
    assert table(network).weight.grad.any(dim=1).tolist() == [False] * 5 + [True]
    network.zero_grad()
    network(**inputs | dict(y=torch.tensor([0, 1, 4]))).square().sum().backward()
    assert table(network).weight.grad.any(dim=1).tolist() == [True, True, False, False, True, False]


@every_label_network
def test_without_a_null_class_there_are_as_many_rows_as_classes_and_labels_are_needed(name):
    network = filled(name, null_class=False)
    inputs = batch(network) | dict(y=torch.tensor([0, 2, 4]))
    assert len(table(network).weight) == 5 and network.null_label is None
    assert network(**inputs).shape[2:] == (4, 6)
    with pytest.raises(ValueError, match="no null class: it wants labels y"):
        network(**inputs | dict(y=None))


@every_textless_network
def test_an_unconditional_network_has_no_label_table_and_refuses_labels(name):
    network = filled(name, num_classes=None)
    inputs = batch(network)
    assert network.null_label is None and table(network) is None
    assert network(**inputs).shape[2:] == (4, 6)
    with pytest.raises(ValueError, match="labels given to an unconditional network: y must be None"):
        network(**inputs, y=torch.tensor([1, 2, 3]))


@every_text_network
def test_a_text_network_has_no_classes(name):
    with torch.device("meta"):
        network = fresh(name, num_classes=5)
    assert network.num_classes is None and network.null_label is None and table(network) is None


# Arithmetic that must not change the result

@every_network
def test_checkpointing_recomputes_each_block_for_the_same_gradients(name):
    network, calls, gradients = filled(name, **dict(dropout=0.5) if name.startswith("unet") else {}).train(), [], []
    blocks = [module for module in network.modules() if isinstance(module, (Mlp, Stage))]        # one in each block
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(network.checkpointing))
    for network.checkpointing in (False, True):
        network.zero_grad()
        torch.manual_seed(0)                 # the same dropout
        network(**batch(network)).square().sum().backward()
        gradients.append({key: value.grad.clone() for key, value in network.named_parameters()})
    assert_close(gradients[1], gradients[0], **EXACT)
    assert calls == [False] * len(blocks) + [True] * 2 * len(blocks)


@every_network
def test_fused_and_explicit_attention_give_the_same_output(name, monkeypatch):
    network = filled(name)
    fused = network(**batch(network))
    monkeypatch.setattr("unet.attention", functools.partial(attention, fused=False))
    monkeypatch.delattr("torch.nn.functional.scaled_dot_product_attention")          # so that nothing can still call it
    for module in network.modules():
        if isinstance(module, Attention):
            module.fused = False
    assert_close(network(**batch(network)), fused, **EXACT)


@every_network
def test_bfloat16_autocast_is_close(name):
    network = filled(name).float()
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in batch(network).items()}
    exact = network(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = network(**inputs).float()
    # each of at most 50 products in a row rounds to 8 bits, 1 / 512 of itself on average: 50^0.5 / 512 = 1.4 %; allow twice that
    assert 0 < (rounded - exact).norm() < 0.028 * exact.norm()


# Wrong inputs

WRONG = [
    *((name, dict(x=normal(3, *shape)), f"input of shape {shape} where the network was built for (3, 4, 6)")
      for name in NETWORKS for shape in [(3, 6, 4), (4, 4, 6), (3, 4, 8)]),
    *((name, dict(t=t), f"t of shape {tuple(t.shape)} for 3 images: it must be (N,)")
      for name in NETWORKS for t in [torch.tensor(5), torch.tensor([5]), torch.zeros(3, 1)]),
    *((name, dict(y=y), f"y of shape {tuple(y.shape)}, {y.dtype}: it must be whole numbers (3,)")
      for name in LABELLED for y in [torch.tensor([1]), torch.tensor([[1], [2], [3]]), torch.ones(3)]),
    *((name, dict(y=y), "wants a text context y of shape (3, M, 7)")
      for name in TEXTUAL for y in [None, torch.tensor([1, 2, 3]), normal(3, 7), normal(3, 4, 6), normal(2, 4, 7)]),
    *(("unet-upsampler", dict(low=low), "an upsampler wants low, the small images (3, 3, h, w)")
      for low in [None, normal(3, 3, 2), normal(3, 1, 2, 3), normal(2, 3, 2, 3)]),
]


@pytest.mark.parametrize("name, wrong, message", WRONG, ids=[f"{name} {message[:30]}" for name, _, message in WRONG])
def test_an_input_of_another_shape_or_kind_is_an_error_that_says_what_is_wanted(name, wrong, message):
    network = filled_once(name)
    with pytest.raises(ValueError, match=re.escape(message)):
        network(**batch(network) | wrong)


@every_label_network
@pytest.mark.parametrize("label", [6, -1])
def test_a_label_that_is_no_class_is_an_error(name, label):
    network = filled_once(name)
    with pytest.raises(IndexError):
        network(**batch(network) | dict(y=torch.tensor([0, label, 2])))


@every_network
@pytest.mark.parametrize("size, side, nearest", [((4, 9), 9, "8 or 12"), ((2, 4), 2, "4"), ((4, 0), 0, "4")])
def test_a_size_that_cannot_be_is_an_error_that_names_the_nearest_ones_which_can(name, size, side, nearest):
    what, changes = (("the U-Net's total stride", dict(multipliers=(2, 2, 2))) if name.startswith("unet") else
                     ("patch size", dict(patch_size=4)))
    with torch.device("meta"):
        with pytest.raises(ValueError, match=f"^image size {side} is not a multiple of {what} 4: use {nearest}$"):
            fresh(name, image_size=size, **changes)
        for side in nearest.split(" or "):
            fresh(name, image_size=int(side), **changes)


@every_network
def test_heads_that_do_not_divide_the_width_are_an_error(name):
    by_number = dict(head_dim=None) if name.startswith("unet") else {}
    with pytest.raises(ValueError, match="heads do not divide (the )?width (16|64|96)") as error:
        fresh(name, heads=5, **by_number)
    assert "5 heads" in str(error.value)
