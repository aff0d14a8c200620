"""gflops.py: it counts what the papers count, on any device, and prints the report's tables with ours beside theirs.

The golden numbers were counted with PyTorch's counter on the authors' own networks. What is small enough for a formula is
counted by hand as well, and how the cost grows with depth, batch, patch and side is known without any formula.
"""
import copy
import io
import math
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings, strategies as st

import uvit
import vit
from dit import BLOCKS, SIZES, DiT
from formula import golden_json
from ddpm import Diffusion, linear_betas
from gflops import (DIT_256, TABLES, TRAINED, Memory, fitting_parts, compared, count, inputs_of, main, network_cost, network_memory,
                    saved_bytes, show, training_memory)
from unet import ADM, RonnebergerUNet, SuperResUNet, UNet
from uvit import UViT
from vit import Attention, ViT

ROOT = Path(__file__).parent.parent
TRANSFORMERS, CONVNETS = golden_json("complexity_transformers"), golden_json("complexity_convnets")

TOKENS = dict(image_size=8, patch_size=2, channels=3, dim=16, depth=2, heads=2)
MAPS = dict(image_size=(8, 4), dim=32, multipliers=(1, 2), res_blocks=1)
NETWORKS = {
    **{f"dit-{design}": (DiT, TOKENS | dict(num_classes=5, conditioning=design)) for design in BLOCKS},
    "dit-unconditional": (DiT, TOKENS | dict(num_classes=None)),
    "uvit-labels": (UViT, TOKENS | dict(num_classes=5)),
    "uvit-text": (UViT, TOKENS | dict(context_dim=7, context_tokens=4)),
    "vit": (ViT, TOKENS | dict(num_classes=5)),
    "vit-hybrid": (ViT, TOKENS | dict(patch_size=4, num_classes=5, hybrid=True)),
    "unet-adm": (UNet, MAPS | ADM | dict(num_classes=5, head_dim=16, dropout=0.1)),
    "unet-ldm": (UNet, MAPS | dict(context_dim=7)),
    "unet-upsampler": (SuperResUNet, MAPS | dict(num_classes=5)),
}
every_network = pytest.mark.parametrize("name", NETWORKS)
every_transformer = pytest.mark.parametrize("name", [name for name in NETWORKS if not name.startswith("unet")])
few = settings(max_examples=5)


def built(name, device="meta", **changes):
    network, arguments = NETWORKS[name]
    with torch.device(device):
        return network(**arguments | changes)


def dit_matrices(D):
    """The shapes of the matrices of a block."""
    return (D, 3 * D), (D, D), (D, 4 * D), (4 * D, D), (D, 6 * D)


def multiply_adds(network):
    return count(network, *inputs_of(network))[1]


# The published networks

@pytest.mark.parametrize("name", TRANSFORMERS["dit"])
def test_every_dit_costs_what_metas_does(name):
    golden = TRANSFORMERS["dit"][name]
    ours = network_cost("dit", name.split()[0].removeprefix("DiT-"), image_size=golden["config"]["input_size"], channels=4,
                num_classes=1000, learn_sigma=True)
    assert ours == (golden["params"], golden["macs_flop_counter"])


@pytest.mark.parametrize("conditioning", BLOCKS)
def test_every_block_design_costs_what_is_derived_from_the_paper(conditioning):
    golden = TRANSFORMERS["dit_block_designs_derived"][conditioning.replace("-", "_")]
    assert network_cost("dit", "XL/2", **DIT_256, conditioning=conditioning) == (golden["params"], golden["macs"])


@pytest.mark.parametrize("name", TRANSFORMERS["uvit"])
def test_every_uvit_costs_what_its_authors_does(name):
    golden = TRANSFORMERS["uvit"][name]
    config = golden["config"]
    sizes = {(shape["dim"], shape["depth"]): size for size, shape in uvit.SIZES.items()}
    size = f"{sizes[config['embed_dim'], config['depth']]}/{config['patch_size']}"
    condition = (dict(context_dim=config["clip_dim"]) if "clip_dim" in config else        # their number counts the null row
                 {-1: dict(num_classes=None), 1000: dict(num_classes=1000, null_class=False),
                  1001: dict(num_classes=1000)}[config["num_classes"]])
    ours = network_cost("uvit", size, image_size=config["img_size"], channels=config["in_chans"], **condition)
    assert ours == (golden["params"], golden["macs_flop_counter"])


@pytest.mark.parametrize("name", TRANSFORMERS["vit"])
def test_every_vit_costs_what_timms_does(name):
    golden, shape = TRANSFORMERS["vit"][name], {**vit.SIZES, "T": dict(dim=192, depth=12, heads=3)}[name[4].upper()]
    with torch.device("meta"):
        network = ViT(**shape)
    assert count(network, *inputs_of(network)) == (golden["params"], golden["macs_flop_counter"])


UNETS = {"ADM-64": "adm-64", "ADM-128": "adm-128", "ADM-256": "adm-256", "ADM-256-uncond": "adm-256", "ADM-512": "adm-512",
         "ADM-U-64-256": "adm-64-256", "ADM-U-128-512": "adm-128-512", "IDDPM-CIFAR10": "iddpm-cifar10",
         "IDDPM-ImageNet64": "iddpm-64", "DDPM-CIFAR10 (OpenAI layout)": "ddpm-cifar10",
         "DDPM-LSUN256 (OpenAI layout)": "ddpm-256", "LDM-4": "ldm-4", "LDM-8": "ldm-8"}
# Attention to a single token weighs one value: to the golden counter that is no product, here it is one of L x 1 by 1 x C, in
# the five cross-attentions of each level and the one in the middle.
WEIGHED = {"LDM-4": 5 * (32 ** 2 * 384 + 16 ** 2 * 576) + 6 * 8 ** 2 * 960,
           "LDM-8": 5 * (32 ** 2 * 256 + 16 ** 2 * 512) + 6 * 8 ** 2 * 1024}


@pytest.mark.parametrize("name", UNETS)
def test_every_unet_costs_what_its_authors_does(name):
    golden = CONVNETS["networks"][name]
    config = golden["config"]
    ours = network_cost("unet", UNETS[name], image_size=config["image_size"], channels=config["in_channels"],
                num_classes=config.get("num_classes"), null_class=False, learn_sigma=config["out_channels"] == 6)
    assert ours == (golden["params"], golden["macs_torch_flop_counter"] + WEIGHED.get(name, 0))


def test_ronnebergers_unet_costs_what_its_figure_says():
    golden = golden_json("unet_ronneberger2015")
    with torch.device("meta"):
        network, image = RonnebergerUNet(), torch.empty(1, *golden["facts"]["input"])
    assert count(network, image) == (golden["params_with_biases"], golden["macs"])


# By hand

@settings(max_examples=10)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2),
       st.booleans())
def test_a_dit_costs_its_closed_formula(rows, columns, p, C, k, depth, learned):
    L, D, K = rows * columns, 8 * k, 5
    network = built("dit-adaln-zero", image_size=(rows * p, columns * p), patch_size=p, channels=C, dim=D, depth=depth,
                    learn_sigma=learned)
    patches, time, modulation = L * p * p * C * D, 256 * D + D * D, 6 * D * D
    attention, mlp = 4 * L * D * D + 2 * L * L * D, 8 * L * D * D
    last = 2 * D * D + L * D * p * p * (1 + learned) * C
    assert multiply_adds(network) == patches + time + depth * (modulation + attention + mlp) + last
    table, positions = (K + 1) * D, L * D                                # neither multiplies
    biases = D + 2 * D + depth * (6 + 4 + 5) * D + 2 * D + p * p * (1 + learned) * C
    weights = p * p * C * D + time + depth * 18 * D * D + 2 * D * D + D * p * p * (1 + learned) * C
    assert count(network, *inputs_of(network))[0] == weights + biases + table + positions


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(3, 9),
       st.integers(3, 9))
def test_a_convolution_costs_its_kernel_at_every_place(channels, outputs, k, stride, padding, height, width):
    layer, kernels = nn.Conv2d(channels, outputs, k, stride, padding), outputs * channels * k * k
    rows, columns = (len(range(0, side + 2 * padding - k + 1, stride)) for side in (height, width))
    assert count(layer, torch.zeros(1, channels, height, width)) == (kernels + outputs, rows * columns * kernels)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 8))
def test_both_products_of_attention_are_counted_though_a_fused_kernel_hides_them(L, M, heads, width):
    D = heads * width
    tokens, context = torch.zeros(1, L, D), torch.zeros(1, M, D)
    assert count(Attention(D, heads), tokens)[1] == 4 * L * D * D + 2 * L * L * D
    assert count(Attention(D, heads, cross=True), tokens, context)[1] == 2 * (L + M) * D * D + 2 * L * M * D


# How the cost grows

@every_transformer
def test_cost_is_linear_in_depth(name):
    costs = np.array([count(network, *inputs_of(network)) for network in (built(name, depth=depth) for depth in (2, 4, 6, 8))])
    more = np.diff(costs, axis=0)                                        # of parameters, of multiply-adds
    assert (more > 0).all() and (more == more[0]).all()


@every_network
def test_a_batch_costs_as_much_as_its_images(name):
    network = built(name)
    one, inputs = multiply_adds(network), inputs_of(network)
    for n in (2, 3):
        batch = [None if z is None else z.expand(n, *z.shape[1:]) for z in inputs]
        assert count(network, *batch) == (count(network, *inputs)[0], n * one)


@few
@given(st.sampled_from(["dit-adaln-zero", "dit-adaln"]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_half_the_patch_costs_four_times_the_linear_layers_and_sixteen_times_the_attention(name, rows, columns, k):
    def block(p, dim):
        """One block's cost: what a second block adds."""
        shape = dict(image_size=(4 * rows, 4 * columns), patch_size=p, dim=dim)
        return multiply_adds(built(name, depth=2, **shape)) - multiply_adds(built(name, depth=1, **shape))
    linear, attention = [], []
    for p in (4, 2, 1):
        narrow, wide = block(p, 8 * k), block(p, 16 * k)                 # linear layers cost four times, attention twice
        attention.append((4 * narrow - wide) // 2)
        linear.append(narrow - attention[-1])
    assert attention == [attention[0], 16 * attention[0], 256 * attention[0]] and attention[0] > 0
    once = (4 * linear[0] - linear[1]) / 3                               # the modulation is computed once, not for each token
    assert once > 0 and linear[2] - once == 4 * (linear[1] - once) == 16 * (linear[0] - once)


@pytest.mark.parametrize("height, width", [(4, 4), (8, 4)])
@pytest.mark.parametrize("design", [{}, ADM], ids=["ddpm", "adm"])
def test_twice_the_side_costs_a_unet_four_times_the_convolutions(design, height, width):
    def outside_attention(zoom):
        L, C = zoom * height // 2 * zoom * width // 2, 2 * MAPS["dim"]               # in the middle, the only attention
        network = UNet(**MAPS | design | dict(image_size=(zoom * height, zoom * width), attention_ds=()))
        return multiply_adds(network) - 2 * L * L * C
    with torch.device("meta"):
        one, two, four = map(outside_attention, (1, 2, 4))
    assert two > one and four - two == 4 * (two - one)                   # the time is embedded once, whatever the side


# What counting leaves behind

@every_network
@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_the_network_where_and_as_it_was(name, training):
    network = built(name, "cpu").train(training)
    before, parameters = copy.deepcopy(network.state_dict()), dict(network.named_parameters())
    inputs = [None if z is None else torch.zeros_like(z, device="cpu") for z in inputs_of(network)]
    count(network, *inputs)
    assert all(module.training == training for module in network.modules())
    assert all(value is parameters[key] and value.requires_grad for key, value in network.named_parameters())
    assert all(value.device.type == "cpu" and value.equal(before[key]) for key, value in network.state_dict().items())
    output = network(*inputs)
    assert output.device.type == "cpu" and output.requires_grad          # it still computes, and learns


@every_network
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_network_with_weights_costs_what_its_shapes_do(name, checkpointing):
    network = built(name, "cpu")
    network.checkpointing = checkpointing                                # which recomputes in the backward pass only
    inputs = [None if z is None else torch.zeros_like(z, device="cpu") for z in inputs_of(network)]
    assert count(network, *inputs) == count(built(name), *inputs_of(built(name)))


# Memory of training

def noise_loss(learned=False):
    """A loss of a denoiser as in training."""
    diffusion = Diffusion(linear_betas(), variance="learned" if learned else "small")
    return lambda model, x, t, y, *low: diffusion.losses(lambda *z: model(*z, *low), x, t, y, x)["loss"].mean()


def class_loss(model, x):
    return nn.functional.cross_entropy(model(x).float(), torch.zeros(len(x), dtype=torch.long, device=x.device))


def seen_by_hooks(network, loss, n, half=False):
    """Bytes that n images have autograd save on the CPU, by CUDA's functions: unique storages, parameters and buffers excepted."""
    inputs = [None if z is None else torch.zeros(n, *z.shape[1:], dtype=z.dtype) for z in inputs_of(network)]
    own, kept = {z.data_ptr() for z in (*network.parameters(), *network.buffers())}, {}

    def pack(z):
        kept[z.untyped_storage().data_ptr()] = z.untyped_storage()
        return z
    with (torch.autograd.graph.saved_tensors_hooks(pack, lambda z: z), torch.autocast("cpu", torch.bfloat16, enabled=half),
          patch.object(torch.Tensor, "is_cpu", False)):
        loss(network, *inputs)
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)


LARGER = dict(image_size=(16, 16), dim=64)                               # so that a few bytes of a kernel's do not count


# In bfloat16 only the networks whose norms see float32 alone: others' are in bfloat16 on the CPU, in float32 on CUDA
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name, half", [*((name, False) for name in NETWORKS), ("dit-adaln-zero", True), ("dit-adaln", True)])
def test_activations_are_what_autograd_saves(name, half, checkpointing):
    network = built(name, "cpu", **LARGER)
    network.checkpointing = checkpointing
    losses = [class_loss if name.startswith("vit") else noise_loss(learned=name.startswith("dit")) for _ in range(2)]
    batch = [None if z is None else z.new_empty((3, *z.shape[1:])) for z in inputs_of(network)]
    found, _ = saved_bytes(network, losses[0], batch, half, checkpointing)
    assert found == pytest.approx(seen_by_hooks(network, losses[1], 3, half), rel=0.05)


def test_training_keeps_what_does_not_depend_on_the_batch_and_the_activations_of_each_image():
    network = built("dit-adaln-zero", **LARGER)
    batch, loss = inputs_of(network), noise_loss(learned=True)
    for memory, checkpointing in zip(training_memory(network, loss, batch, True), (False, True)):
        images = [z.new_empty((7, *z.shape[1:])) for z in batch]
        saved, _ = saved_bytes(network, loss, images, True, checkpointing)
        block = saved_bytes(network, loss, images, True, False)[1] if checkpointing else 0
        assert memory.needed(7) == memory.state + saved + block
        assert memory.state == 20 * sum(value.numel() for value in network.parameters())


@pytest.mark.parametrize("size", ["B/4", "S/2"])
def test_a_dits_activations_in_bf16_are_48_bytes_a_token_and_width_in_each_block(size):
    # float32: the input of both norms and what they put out, 16; bfloat16: what enters qkv and fc1, 4; q, k, v, 6; the output of
    # attention and both of the branches, 6; before and behind the GELU, 16
    memory, _ = network_memory("dit", size, **DIT_256)
    shape, tokens = SIZES[size.split("/")[0]], (32 // int(size[-1])) ** 2
    assert memory.image == pytest.approx(48 * tokens * shape["dim"] * shape["depth"], rel=0.06)
    weights = 2 * sum(math.prod(shape) for shape in dit_matrices(shape["dim"])) * shape["depth"]
    assert memory.fixed == pytest.approx(weights, rel=0.05)


@given(st.integers(0, 100), st.integers(0, 20), st.integers(1, 30), st.integers(1, 24), st.integers(1, 1000))
def test_the_least_accumulation_that_fits_is_found(state, fixed, image, n, card):
    memory = Memory(state, fixed, image)
    found, fitting = fitting_parts(memory, n, card), [n // k for k in range(1, n + 1) if n % k == 0 and
                                                     state + fixed + k * image <= 0.9 * card]
    assert found == (min(fitting) if fitting else None)


# Ours beside theirs

@pytest.mark.parametrize("ours, published, said, far", [
    (33.148, "33", "as printed", False), (32.5001, "33", "as printed", False), (0.357, "0.36", "as printed", False),
    (130.51, "130", "+0.39%", False), (118.6214, "118.64", "-0.02%", False), (5.5667, "5.56", "+0.12%", False),
    (100.49, "100.0", "+0.49%", False), (100.51, "100.0", "+0.51%", True), (99.51, "100.0", "-0.49%", False),
    (99.49, "100.0", "-0.51%", True), (0.354, "0.36", "-1.67%", True)])
def test_a_difference_is_said_and_above_half_a_percent_flagged(ours, published, said, far):
    text, flag = compared(ours, published)
    assert text.split(maxsplit=2) == [f"{ours:.2f}", published, said] and flag is far


def test_a_number_that_nobody_published_stands_alone_in_columns_as_wide():
    text, flag = compared(12.3456, None)
    assert text.split() == ["12.35"] and not flag and len(text) == len(compared(12.3456, "12.3")[0])


@given(st.floats(1, 3000), st.integers(0, 2))
def test_what_rounds_to_the_published_digits_is_as_printed(ours, places):
    assert "as printed" in compared(ours, f"{ours:.{places}f}")[0]


def test_a_difference_without_a_reason_is_called_not_explained(capsys):
    networks = [("dit", "S/8", DIT_256)]                                     # 33.15 million, 0.358 Gflops
    show({"a table": [("near", networks, "33", "0.36"), ("far", networks, "33", "0.40"),
                      ("wide", networks, "34", "0.36"), ("known", networks, "33", "0.40", "a reason"),
                      ("twice", 2 * networks, "66", "0.72")]})
    near, far, wide, known, twice = capsys.readouterr().out.splitlines()[3:]
    assert near.endswith("as printed") and far.endswith("not explained") and wide.endswith("not explained")
    assert known.endswith("a reason") and "66.30" in twice and "0.72" in twice


# The command

def parsed(text):
    """{title: {name: (million parameters, published, Gflops, published, remark)}} of the printed tables; numbers as text."""
    tables = {}
    for part in text.strip().split("\n\n")[:-1]:                        # the last one is of memory
        title, header, *lines = part.splitlines()
        assert header.split() == ["M", "parameters", "published", "Gflops", "published"]
        columns = re.compile(r"(.{27})(.{10}) (.{9}) .{11} (.{10}) (.{9}) .{11}(.*)")
        cells = [[cell.strip() for cell in columns.fullmatch(line.ljust(100)).groups()] for line in lines]
        tables[title] = {name: rest for name, *rest in cells}
    return tables


@pytest.fixture(scope="module")
def printed_text():
    """What the command prints."""
    with redirect_stdout(io.StringIO()) as out:
        assert main([]) is None                                          # exit status 0
    return out.getvalue()


@pytest.fixture(scope="module")
def printed(printed_text):
    """The tables as the command prints them, by their titles."""
    return parsed(printed_text)


def test_the_command_prints_every_row_of_every_table(printed):
    assert list(printed) == list(TABLES)
    assert [list(rows) for rows in printed.values()] == [[name for name, *_ in rows] for rows in TABLES.values()]
    assert all(float(row[0]) > 0 and float(row[2]) > 0 for rows in printed.values() for row in rows.values())


def test_the_dit_table_has_our_counts_beside_the_papers(printed):
    tables = list(printed.values())
    for name, golden in TRANSFORMERS["dit"].items():
        parameters, _, ours, published, _ = tables[0][name.removesuffix(" 256").replace(" 512", " at 512x512")]
        assert (parameters, ours) == (f"{golden['params'] / 1e6:.2f}", f"{golden['gmacs']:.2f}")
        assert published == f"{golden['paper_gflops']:.{len(published.partition('.')[2])}f}"
    for name in BLOCKS:
        golden = TRANSFORMERS["dit_block_designs_derived"][name.replace("-", "_")]
        _, _, ours, published, _ = tables[1][f"DiT-XL/2 {name}"]
        assert (ours, published) == (f"{golden['gmacs']:.2f}", f"{golden['paper_gflops']}")


def test_the_table_of_memory_has_what_was_counted_on_fake_cuda_tensors(printed_text):
    title, header, *lines = printed_text.strip().split("\n\n")[-1].splitlines()
    rows = {line[:24].strip(): [float(number) for number in line[24:].split()] for line in lines}
    assert "bf16" in title and "256 images" in title and len(rows) == len(TRAINED)
    for state, activations, whole, recomputed, less in rows.values():
        assert whole == pytest.approx(state + activations, abs=0.11) and less == pytest.approx(state + recomputed, abs=0.11)
    for name, (whole, less) in {"DiT-XL/2": (109, 21 + 3.4), "DiT-L/2": (82, None), "U-ViT-H/2": (89, None)}.items():
        assert rows[name][2] == pytest.approx(whole, abs=1)              # GiB; and one block of XL/2 is recomputed at a time
        assert less is None or rows[name][4] == pytest.approx(less, abs=1)


def test_text_encoder_and_autoencoder_have_the_sizes_of_the_figure(printed):
    rows = printed[next(title for title in TABLES if title.startswith("Fig. 5-1"))]
    found = {name: (rows[name][0], rows[name][1]) for name in ("CLIP's text encoder (TE)", "Stable Diffusion's (AE)")}
    assert list(found.values()) == [("123.06", "123"), ("83.65", "84")]          # 123,060,480 and 83,653,863 of the releases
    by_hand = 12 * (12 * 77 * 768 ** 2 + 2 * 77 ** 2 * 768)              # layers; a token's products, and both of attention
    assert float(rows["CLIP's text encoder (TE)"][2]) == pytest.approx(by_hand / 1e9, abs=0.005)


@pytest.mark.parametrize("name", CONVNETS["quoted_numbers"])
def test_the_imagenet_table_quotes_what_is_published(printed, name):
    golden = CONVNETS["quoted_numbers"][name]
    row = list(printed.values())[-1][re.sub(r"at (\d+)", r"at \1x\1", name)]
    assert float(row[3]) == golden["quoted_gflops"]
    assert abs(float(row[2]) - golden["reproduced"]) < 0.015             # a last digit apart: of LDM, see above


def test_every_difference_above_half_a_percent_carries_a_remark(printed):
    far = {}
    for rows in printed.values():
        for name, (*numbers, remark) in rows.items():
            for ours, published in (numbers[:2], numbers[2:]):
                places = len(published.partition(".")[2])
                if published and f"{float(ours):.{places}f}" != published and abs(float(ours) / float(published) - 1) > 0.005:
                    far[name] = remark
    assert far == {"LDM-4": "not explained"}


def one(capsys, flags):
    """(parameters, Gflops, GiB of weights, with gradients and moments, with averaged weights) as printed for one network."""
    assert main(flags.split()) is None
    said = re.search(r"parameters ([\d,]+); ([\d.]+) Gflops.*weights ([\d.]+) GiB.*moments ([\d.]+) GiB.*averaged weights "
                     r"([\d.]+) GiB", capsys.readouterr().out, re.DOTALL)
    return [float(number.replace(",", "")) for number in said.groups()]


def test_training_with_adam_takes_sixteen_bytes_a_parameter(capsys):
    parameters, _, weights, training, averaged = one(capsys, "--model uvit --size H/2 --image-size 64")
    with torch.device("meta"):
        network = UViT(64, 2, 3, **uvit.SIZES["H"], num_classes=1000)
    assert parameters == sum(value.numel() for value in network.parameters())
    for printed, size in ((weights, 4), (training, 16), (averaged, 20)):         # float32: weight, gradient, two moments, average
        assert abs(printed - size * parameters / 2 ** 30) <= 0.005


@pytest.mark.parametrize("flags, network, arguments", [
    ("--model dit --size S/8", DiT, dict(patch_size=8, **SIZES["S"])),
    ("--model dit --size S/8 --channels 4", DiT, dict(patch_size=8, channels=4, **SIZES["S"])),
    ("--model dit --size S/8 --num-classes 0", DiT, dict(patch_size=8, num_classes=None, **SIZES["S"])),
    ("--model dit --size S/8 --variance learned", DiT, dict(patch_size=8, learn_sigma=True, **SIZES["S"])),
    ("--model dit --size S/8 --conditioning in-context", DiT, dict(patch_size=8, conditioning="in-context", **SIZES["S"])),
    ("--model vit --size Ti/8 --num-classes 10", ViT, dict(patch_size=8, num_classes=10, dim=192, depth=6, heads=4)),
    ("--model vit --size Ti/8 --hybrid", ViT, dict(patch_size=8, dim=192, depth=6, heads=4, hybrid=True)),
])
def test_flags_say_which_network_is_counted(capsys, monkeypatch, flags, network, arguments):
    monkeypatch.setattr("gflops.network_memory", lambda *_, **__: 2 * (Memory(0, 0, 0),))           # takes a second
    with torch.device("meta"):
        network = network(**dict(image_size=32, channels=3, **{"learn_sigma": False} if network is DiT else {}) | arguments)
    parameters, gflops, *_ = one(capsys, flags)
    assert parameters == sum(value.numel() for value in network.state_dict().values())
    assert gflops == round(multiply_adds(network) / 1e9, 3)


def test_a_real_process_ends_with_status_0():
    done = subprocess.run([sys.executable, ROOT / "gflops.py", "--model", "unet", "--size", "Ti"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "UNet Ti" in done.stdout
