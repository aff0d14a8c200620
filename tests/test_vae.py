"""vae.py: CompVis's numbers from their names and the diffusers library's, the Gaussian's mathematics, and what a file must hold.

Networks are small and have formula weights. Identities are checked in float64, to EXACT: rounding is 1e-16 for each of some
thousand terms of size 1. Shapes are checked on the meta device, which computes none of the numbers.
"""
import json
import math
import weakref
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from checkpoint import load_autoencoder
from dit import DiT
from formula import GOLDEN, fill, formula_weight, golden, golden_json
from refusals import refusal
from test_checkpoint import written
from models import compvis_names, infer_autoencoder, released_autoencoder
from vae import SIZES, AttnBlock, AutoencoderKL, Norm, kl_divergence, pieces, sample_latent

EXACT = {"rtol": 1e-11, "atol": 1e-11}
SMALL = dict(dim=32, multipliers=(1, 2, 2), res_blocks=1)            # of the golden files
KEYS = golden_json("vae_keys")
COMPVIS, SHAPE, NEW, NEW_SHAPE, OLD = range(5)                       # its columns


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def on_meta(**arguments):
    with torch.device("meta"):
        return AutoencoderKL(**arguments)


def filled(**arguments):
    """A tiny network in float64; 64 wide, as a norm's group of one channel would hide what is added to a channel."""
    return fill(AutoencoderKL(**dict(dim=64, multipliers=(1, 1), res_blocks=1) | arguments)).double()


def shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def same(network, other):
    """Whether two networks have the same weights, bit for bit."""
    mine, its = network.state_dict(), other.state_dict()
    return mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)


# CompVis's numbers

@pytest.fixture(scope="module")
def released():
    network = AutoencoderKL(**SMALL)
    return network, *golden("vae_small", network)


TOLERANCE = dict(rtol=0, atol=3e-5)                                  # the file's: float32 alone was 2e-6 off float64


@torch.no_grad()
def test_moments_equal_compviss(released):
    network, data, _ = released
    mean, log_variance = network.encode(data["in_x"])
    assert_close(torch.cat([mean, log_variance], dim=1), data["out_moments"], **TOLERANCE)
    assert_close((mean, log_variance), (data["out_mean"], data["out_logvar"]), **TOLERANCE)


@torch.no_grad()
def test_moments_equal_compviss_where_x_hardly_varies(released):
    network, data, _ = released                                      # so that the norms' epsilon shows
    moments = torch.cat(network.encode(1e-3 * data["in_x"]), dim=1)
    assert_close(moments, data["out_moments_low"], rtol=0, atol=1e-3)


@torch.no_grad()
def test_decoded_images_equal_compviss(released):
    network, data, _ = released
    assert_close(network.decode(data["in_z"]), data["out_decode"], **TOLERANCE)


def test_a_sampled_latent_equals_compviss(released):
    _, data, _ = released
    assert_close(sample_latent(data["out_mean"], data["out_logvar"], data["in_noise"]), data["out_sample"])


def test_the_divergence_equals_compviss(released):
    _, data, _ = released
    assert_close(kl_divergence(data["out_mean"], data["out_logvar"]), data["out_kl"], rtol=1e-5, atol=0)


@torch.no_grad()
def test_the_whole_network_encodes_samples_and_decodes(released):
    network, data, _ = released
    image, mean, log_variance = network(data["in_x"], data["in_noise"])
    assert_close((mean, log_variance), (data["out_mean"], data["out_logvar"]), **TOLERANCE)
    assert_close(image, network.decode(data["out_sample"]), rtol=0, atol=1e-4)


@torch.no_grad()
def test_log_variances_are_clamped_as_compviss():
    data, _ = golden("vae_gaussian")
    network = AutoencoderKL(channels=8, dim=32, multipliers=(1,), res_blocks=1)
    network.encoder, network.quant_conv = nn.Identity(), nn.Identity()               # so that the input is the moments
    for moments, divergence in ((data["in_moments"], data["out_kl"]), (0.1 * data["in_moments"], data["out_kl_small"])):
        assert_close(kl_divergence(*network.encode(moments)), divergence, rtol=1e-5, atol=0)
    mean, log_variance = network.encode(data["in_moments"])
    assert torch.equal(mean, data["out_mean"]) and torch.equal(log_variance, data["out_logvar"])
    assert (log_variance.min(), log_variance.max()) == (-30, 20)
    assert_close(sample_latent(torch.zeros_like(mean), log_variance, torch.ones_like(mean)), data["out_std"], rtol=1e-5, atol=0)


# Names, shapes, sizes

def test_names_and_shapes_are_those_of_stable_diffusion():
    network = on_meta(**SIZES["SD"])
    assert shapes(network.state_dict()) == {row[COMPVIS]: tuple(row[SHAPE]) for row in KEYS["keys"]}


def test_parameters_are_as_many_as_stable_diffusions():
    network = on_meta()
    total, encoder, decoder = (sum(parameter.numel() for parameter in module.parameters())
                               for module in (network, network.encoder, network.decoder))
    assert (total, encoder, decoder) == (KEYS["params"], KEYS["encoder_params"], KEYS["decoder_params"])
    assert total == 83_653_863


@pytest.mark.parametrize("rows", ["keys", "small_config_keys"])
@pytest.mark.parametrize("name, shape", [(COMPVIS, SHAPE), (NEW, NEW_SHAPE), (OLD, NEW_SHAPE), (NEW, SHAPE), (OLD, SHAPE)])
def test_both_layouts_old_and_new_map_one_to_one(rows, name, shape):
    rows = KEYS[rows]
    renamed = compvis_names({row[name]: torch.empty(row[shape], device="meta") for row in rows})
    assert list(shapes(renamed).items()) == [(row[COMPVIS], tuple(row[SHAPE])) for row in rows]


multipliers = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
architectures = st.fixed_dictionaries(dict(channels=st.integers(1, 4), dim=st.sampled_from([32, 64, 96]), multipliers=multipliers,
                                           res_blocks=st.integers(1, 3), latent_channels=st.integers(1, 5)))


@given(architectures)
def test_the_inferred_architecture_is_what_was_built(arguments):
    assert infer_autoencoder(on_meta(**arguments).state_dict()) == arguments


def test_the_architecture_of_stable_diffusion_is_inferred_from_either_layout():
    for name, shape in ((COMPVIS, SHAPE), (NEW, NEW_SHAPE), (OLD, SHAPE)):
        state = {row[name]: torch.empty(row[shape], device="meta") for row in KEYS["keys"]}
        found = infer_autoencoder(compvis_names(state))
        assert found == dict(channels=3, dim=128, multipliers=(1, 2, 4, 4), res_blocks=2, latent_channels=4)


# The diffusers library's names

@pytest.fixture(scope="module")
def library():
    """Weights under the library's names, made from those names, as they stand in its newer files."""
    with np.load(GOLDEN / "vae_small_diffusers.npz") as file:
        return {name: formula_weight(name, shape) for name, shape in json.loads(str(file["keys"]))}


@torch.no_grad()
def test_weights_under_the_librarys_names_give_its_output(library):
    network, (data, _) = released_autoencoder(library), golden("vae_small_diffusers")
    mean, log_variance = network.encode(data["in_x"])
    assert_close(torch.cat([mean, log_variance], dim=1), data["out_moments"], **TOLERANCE)
    assert_close(kl_divergence(mean, log_variance), data["out_kl"], rtol=1e-5, atol=0)
    assert_close(network.decode(data["in_z"]), data["out_decode"], **TOLERANCE)


def as_kernels(state):
    return {name: value[:, :, None, None] if value.ndim == 2 else value for name, value in state.items()}


def with_old_names(state):
    old = {row[NEW]: row[OLD] for row in KEYS["small_config_keys"]}
    return {old[name]: value for name, value in state.items()}


def within_a_pipeline(prefix, state):
    others = {"model.diffusion_model.out.2.weight": torch.ones(3), "encoder.layer.0.weight": torch.ones(2), "step": torch.ones(())}
    return {prefix + name: value for name, value in state.items()} | others


VARIANTS = {
    "old names": with_old_names,
    "old names and kernels": lambda state: as_kernels(with_old_names(state)),
    "kernels": as_kernels,
    "CompVis's names": compvis_names,
    "CompVis's names and matrices": lambda state: {name: value.squeeze() if "attn" in name else value
                                                   for name, value in compvis_names(state).items()},
    "another order": lambda state: dict(reversed(state.items())),
    "within Stable Diffusion": lambda state: within_a_pipeline("first_stage_model.", compvis_names(state)),
    "within a pipeline": lambda state: within_a_pipeline("vae.", state),
    "with its loss": lambda state: compvis_names(state) | {"loss.logvar": torch.ones(()), "model_ema.decay": torch.ones(())},
    "double precision": lambda state: {name: value.double() for name, value in state.items()},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layout_loads_the_same_network(library, variant):
    assert same(released_autoencoder(VARIANTS[variant](library)), released_autoencoder(library))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_to_float32(library, dtype):
    state = {name: value.to(dtype) for name, value in library.items()}
    network = released_autoencoder(state)
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}
    assert same(network, released_autoencoder({name: value.float() for name, value in state.items()}))


# Files

FILES = {
    "vae.safetensors": written,
    "vae.pt": lambda path, state: torch.save(state, path),
    "diffusion_pytorch_model.bin": lambda path, state: torch.save(state, path, _use_new_zipfile_serialization=False),
    "model.ckpt": lambda path, state: torch.save({"epoch": 3, "state_dict": state}, path),
}


@pytest.mark.parametrize("name", FILES)
def test_a_saved_network_comes_back_in_eval_mode(tmp_path, name):
    network = fill(AutoencoderKL(channels=1, dim=32, multipliers=(2, 1), res_blocks=2, latent_channels=3))
    FILES[name](tmp_path / name, network.state_dict())
    loaded = load_autoencoder(tmp_path / name)
    assert same(loaded, network) and not loaded.training and loaded.scale == 0.18215
    assert all(parameter.requires_grad for parameter in loaded.parameters())


STATE = AutoencoderKL(**SMALL).state_dict()
NO_AUTOENCODER = {
    "nothing": {}, "a list": [torch.ones(3)], "names alone": list(STATE), "a tensor": torch.ones(3), "none": None,
    "a number": 3, "a wrapped number": {"state_dict": 3}, "numbers for names": {1: torch.ones(3)},
    "numbers for tensors": dict.fromkeys(STATE, 1), "another network": DiT(4, 2, 4, 16, 1, 1, 3).state_dict(),
    "half of one": {name: value for name, value in STATE.items() if name.startswith("encoder.")},
    "a scalar for a kernel": STATE | {"encoder.conv_in.weight": torch.ones(())},
    "a width of none": STATE | {"encoder.conv_in.weight": torch.ones(0, 3, 3, 3)},
    "a width of 40": STATE | {"encoder.conv_in.weight": torch.ones(40, 3, 3, 3)},
}


@pytest.mark.parametrize("case", NO_AUTOENCODER)
def test_a_file_without_an_autoencoder_is_refused(tmp_path, case):
    torch.save(NO_AUTOENCODER[case], tmp_path / "vae.pt")
    refusal(lambda: load_autoencoder(tmp_path / "vae.pt"), f"cannot use {tmp_path / 'vae.pt'}: its tensors have the names of no "
            "autoencoder known here")


MISFITS = {                                                          # what is other than in STATE, and what is said of it
    "a wide kernel": ({"decoder.conv_out.weight": torch.ones(3, 64, 3, 3)}, "is (3, 64, 3, 3) and should be (3, 32, 3, 3)"),
    "a matrix for a kernel": ({"decoder.conv_out.weight": torch.ones(3, 32)}, "is (3, 32) and should be (3, 32, 3, 3)"),
    "attention on a level": ({"encoder.down.1.attn.0.q.weight": torch.ones(64, 64, 1, 1)}, "(64, 64, 1, 1) and should be absent"),
    "a narrow level": ({"encoder.down.1.block.0.conv1.weight": torch.ones(8, 32, 3, 3)}, "and should be"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_tensor_that_does_not_fit_is_named_with_its_shape(tmp_path, case):
    change, said = MISFITS[case]
    torch.save(STATE | change, tmp_path / "vae.pt")
    refusal(lambda: load_autoencoder(tmp_path / "vae.pt"), f"cannot use {tmp_path / 'vae.pt'}: ",
            said, *([] if case == "a narrow level" else change))


@pytest.mark.parametrize("name", ["quant_conv.bias", "decoder.up.2.upsample.conv.weight", "encoder.mid.attn_1.norm.weight"])
def test_a_missing_tensor_is_named(name):
    refusal(lambda: released_autoencoder({key: value for key, value in STATE.items() if key != name}), f"{name} is missing")


# Full memory

def test_what_a_try_had_in_memory_is_gone_before_the_cache_is_emptied(monkeypatch):
    """An error keeps the frames that it came through, and they their tensors, for as long as it is handled."""
    tried, alive = [], []

    def double(rows):
        activation = 2 * rows
        tried.append(weakref.ref(activation))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("no more")
        return activation
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(tried[-1]() is not None))
    x = torch.arange(8)
    assert torch.equal(torch.cat(list(pieces(double, x, 8))), 2 * x)
    assert len(tried) == 6 and alive == [False, False]                   # of 8 and of 4, then four times 2


# What the networks take

@pytest.mark.parametrize("dim, said", [(48, "use 32 or 64"), (0, "use 32 or 64"), (1, "use 32 or 64"), (100, "use 96 or 128")])
def test_a_width_that_groups_of_32_do_not_divide_is_refused(dim, said):
    refusal(lambda: on_meta(dim=dim), f"dim {dim} is not a multiple of 32", said)


@given(st.integers(1, 3), multipliers, st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=10)
def test_sides_shrink_by_the_factor_and_decoding_inverts_the_shape(n, multipliers, rows, columns):
    network = on_meta(dim=64, multipliers=multipliers, res_blocks=1)                 # 32: PyTorch refuses to normalize one number
    assert network.factor == 2 ** (len(multipliers) - 1)
    x = torch.empty(n, 3, rows * network.factor, columns * network.factor, device="meta")
    mean, log_variance = network.encode(x)
    assert mean.shape == log_variance.shape == (n, 4, rows, columns)
    assert network.decode(mean).shape == x.shape


@pytest.mark.parametrize("upright", [False, True])
def test_sides_that_do_not_work_are_an_error_that_names_the_nearest_that_do(upright):
    network = on_meta(**SMALL)
    for side in range(1, 30):
        x = torch.empty((1, 3, side, 8) if upright else (1, 3, 8, side), device="meta")
        if side % 4 == 0:
            assert network.encode(x)[0].shape[2:] == ((side // 4, 2) if upright else (2, side // 4))
            continue
        nearest = [size for size in (side // 4 * 4, side // 4 * 4 + 4) if size]
        refusal(lambda: network.encode(x), f"size {side} is not a multiple of the autoencoder's factor 4: "
                f"use {' or '.join(map(str, nearest))}")


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 4, 8, 8), (3, 8, 8), (1, 3, 8, 8, 8)])
def test_images_of_another_shape_are_refused(shape):
    refusal(lambda: on_meta(**SMALL).encode(torch.empty(shape, device="meta")), f"images of shape {shape}", "(N, 3, H, W)")


@pytest.mark.parametrize("shape", [(4, 2, 2), (1, 3, 2, 2), (1, 8, 2, 2), (4,)])
def test_latents_of_another_shape_are_refused(shape):
    refusal(lambda: on_meta(**SMALL).decode(torch.empty(shape, device="meta")), f"latents of shape {shape}", "(N, 4, H, W)")


# The Gaussian

small = st.floats(-2 ** -10, 2 ** -10, width=32)


@given(st.lists(st.tuples(st.floats(-100, 100, width=32) | small, st.floats(-30, 20, width=32) | small), min_size=1, max_size=4))
@settings(max_examples=200)
def test_the_divergence_is_never_negative_in_float32(moments):
    mean, log_variance = torch.tensor(moments).T.reshape(2, -1, 1, 1, 1)
    divergence = kl_divergence(mean, log_variance)
    assert divergence.shape == (len(moments),) and divergence.min() >= 0


@given(st.floats(-100, 100), st.floats(-30, 20), st.integers(0, 3))
@settings(max_examples=100)
def test_the_divergence_is_zero_only_at_the_prior(mean, log_variance, place):
    assume(max(abs(mean), abs(log_variance)) > 1e-6)                 # at 1e-8 float64 rounds variance - 1 - log variance away
    moments = torch.zeros(2, 1, 1, 2, 2, dtype=torch.float64)
    assert kl_divergence(*moments).item() == 0
    moments.flatten(1)[:, place] = torch.tensor([mean, log_variance], dtype=torch.float64)
    assert kl_divergence(*moments).item() > 0


@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-6, 2)), min_size=4, max_size=4), st.integers(0, 2 ** 32))
def test_the_divergence_is_the_mean_log_ratio_of_the_densities(moments, seed):
    n = 20_000
    mean, log_variance = torch.tensor(moments, dtype=torch.float64).T.reshape(2, 1, 1, 2, 2)
    z = sample_latent(mean, log_variance, normal(n, 1, 2, 2, seed=seed))
    q, p = torch.distributions.Normal(mean, log_variance.exp().sqrt()), torch.distributions.Normal(0, 1)
    ratios = (q.log_prob(z) - p.log_prob(z)).sum(dim=(1, 2, 3))
    # six standard errors of the mean: with 25 draws and a tail as heavy as chi-squared's, one in a million would be further off
    error = 6 * ratios.std().item() / math.sqrt(n) + 1e-12
    assert kl_divergence(mean, log_variance).item() == pytest.approx(ratios.mean().item(), rel=0, abs=error)


def test_samples_have_the_mean_and_the_variance():
    n, mean, log_variance = 100_000, torch.tensor([[[[0.0, -2.0, 5.0]]]]), torch.tensor([[[[-6.0, 0.0, 2.0]]]])
    z = sample_latent(mean, log_variance, normal(n, 1, 1, 3, dtype=torch.float32))
    deviation = log_variance.exp().sqrt()
    # five standard errors: deviation / sqrt(n) of the mean, variance sqrt(2 / n) of the variance
    assert ((z.mean(dim=0) - mean).abs() < 5 * deviation / n ** 0.5).all()
    assert ((z.var(dim=0) / deviation.square() - 1).abs() < 5 * (2 / n) ** 0.5).all()


def test_divergences_and_samples_are_differentiable_where_the_gaussian_is_the_prior():
    mean, log_variance = torch.zeros(2, 1, 1, 1, 1, requires_grad=True).unbind()
    gradients = torch.autograd.grad(kl_divergence(mean, log_variance).sum(), (mean, log_variance), retain_graph=True)
    assert [gradient.item() for gradient in gradients] == [0, 0]                     # it is smallest there
    gradients = torch.autograd.grad(sample_latent(mean, log_variance, torch.full((1, 1, 1, 1), 3.0)).sum(), (mean, log_variance))
    assert [gradient.item() for gradient in gradients] == [1, 1.5]                   # dz / d log variance = deviation noise / 2


# The network

def images_and_noise(network, n=3, rows=2, columns=3):
    f = network.factor
    return (normal(n, network.channels, f * rows, f * columns),
            normal(n, network.latent_channels, rows, columns, seed=1))


@torch.no_grad()
def test_a_sample_ignores_its_batch_mates():
    network = filled()
    x, noise = images_and_noise(network)
    others = torch.cat([-3 * x[:1], x[1:2], x[:1] ** 2])
    for together, apart, among in zip(network(x, noise), network(x[1:2], noise[1:2]), network(others, noise)):
        assert_close(together[1:2], apart, **EXACT)
        assert_close(together[1:2], among[1:2], **EXACT)
        assert not torch.allclose(together[:1], among[:1])


@torch.no_grad()
def test_transposed_kernels_see_a_transposed_image_transposed():
    network = filled(multipliers=(1, 2))                 # rows and columns are alike in everything, the zeros at their ends as well
    x, noise = images_and_noise(network)
    outputs = network(x, noise)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.transpose(2, 3)
    for upright, lying in zip(network(x.transpose(2, 3), noise.transpose(2, 3)), outputs):
        assert_close(upright, lying.transpose(2, 3), **EXACT)


def test_every_parameter_gets_a_gradient():
    network = filled(multipliers=(1, 2)).train()
    x, noise = images_and_noise(network)
    image, mean, log_variance = network(x, noise)
    ((image - x).abs().mean() + 1e-6 * kl_divergence(mean, log_variance).mean()).backward()
    for name, parameter in network.named_parameters():
        if name.endswith("attn_1.k.bias"):               # is added to a query's products with all keys alike: softmax takes it out
            assert parameter.grad.abs().max() < 1e-12
        else:
            assert parameter.grad.abs().min() > 0, name


def without_norms(network):
    """The network without its norms, each of which also sees the whole map."""
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    return network


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("attentive", [True, False])
def test_by_its_attention_every_output_depends_on_every_input(part, attentive):
    network = without_norms(filled(multipliers=(1,)))
    if not attentive:
        nn.init.zeros_(getattr(network, part).mid["attn_1"].proj_out.weight)
    x = normal(1, 3 if part == "encoder" else 4, 1, 40).requires_grad_()
    output = network.encode(x)[0] if part == "encoder" else network.decode(x)
    output[..., 0].sum().backward()
    # else a 3 x 3 convolution looks one pixel further, of which encoders have 2 + 2 * 3 in a row here and decoders 2 + 2 * 4
    seen = 40 if attentive else 9 if part == "encoder" else 11
    assert x.grad.abs().amax(dim=(0, 1, 2)).ne(0).tolist() == [column < seen for column in range(40)]


@torch.no_grad()
def test_attention_weighs_values_by_the_likeness_of_one_query_and_key_of_all_channels():
    block, x = fill(AttnBlock(32)).double(), normal(1, 32, 2, 3)
    h = block.norm(x)[0].flatten(1)                                                  # (D, L)
    q, k, v = (layer.weight[:, :, 0, 0] @ h + layer.bias[:, None] for layer in (block.q, block.k, block.v))
    weights = torch.exp(q.T @ k / 32 ** 0.5)                                         # (L, L)
    mixed = v @ (weights / weights.sum(dim=1, keepdim=True)).T                       # (D, L)
    out = x[0].flatten(1) + block.proj_out.weight[:, :, 0, 0] @ mixed + block.proj_out.bias[:, None]
    assert_close(block(x)[0].flatten(1), out, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 3])             # of one channel, both layouts count as contiguous: digits come so
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_on_the_cpu_the_convolutions_see_channels_last(channels, layout):
    network, strides = filled(channels=channels, latent_channels=channels), []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: strides.append((inputs[0].stride(), inputs[0].shape)))
    x, noise = (tensor.clone(memory_format=layout) for tensor in images_and_noise(network))
    before = x.stride()
    network(x, noise)
    network.decode(noise)
    assert len(strides) > 20 and all(stride == (C * H * W, 1, W * C, C) for stride, (_, C, H, W) in strides)
    assert x.stride() == before                                                      # the caller's stays as it is


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("mean, first_row, sides", [                                 # of the map, and beyond it of a row
    (0, 0, (9, 7)), (1000, 0, (9, 7)), (1000, 30, (9, 7)), (-1e5, 0, (9, 7)), (1000, 0, (1, 1)), (1000, 0, (1, 5))])
def test_a_norm_loses_no_digits_to_a_large_mean(layout, mean, first_row, sides):
    norm, x = fill(Norm(128)), normal(2, 128, *sides, dtype=torch.float32)
    x[:, :, 0] += first_row
    x = (x + mean).clone(memory_format=layout).requires_grad_()                      # rounded here, before the norm
    y = x.detach().double().contiguous().requires_grad_()
    groups, factor, bias = y.reshape(2, 32, -1), norm.weight[:, None, None].double(), norm.bias[:, None, None].double()
    normal_groups = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
    exact, weights = normal_groups.reshape(x.shape) * factor + bias, normal(*x.shape, seed=1)
    slopes, exact_slopes = (torch.autograd.grad((out * weights).sum(), z)[0] for out, z in ((norm(x), x), (exact, y)))
    tolerance = 1e-5 + 5e-7 * abs(mean)                  # float32 keeps no more of a deviation of 1 beside the mean
    assert_close(norm(x).double(), exact, rtol=tolerance, atol=tolerance)
    assert_close(slopes.double(), exact_slopes, rtol=tolerance, atol=tolerance)


# Learning

def stripes(n, generator):
    """Images of 16 x 16 pixels, stripes 4 to 8 wide, lying or standing; at least 6 of the 16 lines are dark, and 6 light."""
    place = torch.arange(16)
    width, shift = torch.randint(4, 9, (2, n, 1), generator=generator)
    line = ((place + shift) // width % 2) * 1.6 - 0.8                                # (n, 16)
    lying = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    return torch.where(lying, line[:, None, :, None].expand(n, 1, 16, 16), line[:, None, None, :].expand(n, 1, 16, 16))


@pytest.mark.slow
def test_forty_steps_of_adam_teach_it_stripes_that_it_has_not_seen():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = AutoencoderKL(channels=1, **SIZES["Ti"])
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(40):
        x = stripes(16, generator)
        image, mean, log_variance = network(x, torch.randn(16, 4, 4, 4, generator=generator))
        loss = (image - x).abs().mean() + 1e-6 * kl_divergence(mean, log_variance).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = stripes(64, generator)
    with torch.no_grad():
        error = (network.decode(network.encode(x)[0]) - x).abs().mean()
    assert error < 0.4                                   # five seeds gave 0.31 or less; a grey for each image is off by 0.6 or more
