"""models.py: every name builds its network, a wrong name gets the list, and a description is plain values that say all.

Networks are built on the meta device: shapes without numbers, at 64 x 64, which every total stride and patch here divides.
"""
import copy
import functools

import pytest
import torch

import bench
import gflops
from models import MODELS, NETWORKS, TRAINABLE, build, check_options, compile_blocks, describe, named
from refusals import refusal

NAMES = [(model, size if model == "unet" else f"{size}/4") for model, (_, sizes) in MODELS.items() for size in sizes]
every_name = pytest.mark.parametrize("model, size", NAMES, ids=[f"{model} {size}" for model, size in NAMES])
UPSAMPLERS = {"Ti-up", "adm-64-256", "adm-128-512"}                      # ADM's are those whose file names say both sides


def on_meta(description):
    with torch.device("meta"):
        return build(description)


def output_shape(network, *inputs):
    """Of what a network makes of two images."""
    with torch.device("meta"):
        x = torch.empty(2, network.channels, *network.image_size)
        return tuple(network(x, torch.zeros(2, dtype=torch.long), *inputs).shape)


def plain(value):
    """Whether a value is made of numbers, text, None, tuples, lists and dicts alone: no array, no class, no type."""
    if type(value) is dict:
        return all(map(plain, (*value, *value.values())))
    return all(map(plain, value)) if type(value) in (list, tuple) else type(value) in (int, float, str, bool, type(None))


# Names and sizes

@every_name
def test_every_size_builds_what_its_description_says(tmp_path, model, size):
    description = describe(model, size, 64, 3, num_classes=10)
    network = on_meta(description)
    fixed = {name: value for name, value in MODELS[model][1][size.removesuffix("/4")].items() if name != "image_size"}
    fixed |= {"patch_size": 4} if size.endswith("/4") else {}
    assert fixed.items() <= description["arguments"].items()             # a published side gives way to the data's
    assert type(network).__name__ == description["class"]
    assert (network.image_size, network.channels) == ((64, 64), 3)
    assert network.num_classes == (None if "context_dim" in fixed else 10)
    assert_survives_the_disk(tmp_path, description)


def assert_survives_the_disk(folder, description):
    """Plain values come back the same and in the same order."""
    torch.save(description, folder / "description.pt")
    again = torch.load(folder / "description.pt", weights_only=True)
    assert plain(description) and again == description and list(again["arguments"]) == list(description["arguments"])


def test_exactly_the_upsamplers_see_a_small_image_too():
    described = {size: describe("unet", size, 64, 3) for size in MODELS["unet"][1]}
    assert {size for size, description in described.items() if description["class"] == "SuperResUNet"} == UPSAMPLERS
    for size in UPSAMPLERS:
        network = on_meta(described[size])
        assert network.input_blocks[0][0].in_channels == 6
        assert output_shape(network, None, torch.empty(2, 3, 16, 16, device="meta")) == (2, 3, 64, 64)


def test_every_described_class_can_be_built():
    names = [*NAMES, ("vae", "Ti"), ("mlp", "Ti")]
    assert {describe(model, size, 64, 3, num_classes=10)["class"] for model, size in names} == set(NETWORKS)


def test_describing_and_changing_a_description_leave_the_tables_as_they_are():
    before = copy.deepcopy({model: sizes for model, (_, sizes) in TRAINABLE.items()})
    for model, size in (*NAMES, ("vae", "Ti"), ("mlp", "Ti")):
        describe(model, size, 32, 1, num_classes=2)["arguments"].update(dim=7, depth=7)
        named(model, size)[1].update(dim=7, depth=7)
    assert {model: sizes for model, (_, sizes) in TRAINABLE.items()} == before


@pytest.mark.parametrize("model, size", [
    *((model, size) for model in ("dit", "uvit", "vit") for size in
      ("XXL/4", "B", "S/0", "S/00", "S/", "S/x", "S/-2", "S/+2", "S/2.0", "S/ 2", "S/2/2", "S/²", "s/4", "/4", "", "adm-64")),
    *(("unet", size) for size in ("XL", "adm-1024", "Ti/2", "S/0", "S/", "S/x", "/", "", "adm-64-256/4", "ti", "B/4")),
    *(("vae", size) for size in ("XL", "Ti/2", "SD/8", "SD/", "/", "", "sd", "B/4")),
    *(("mlp", size) for size in ("XL", "Ti/2", "Ti/", "/", "", "ti"))])
def test_a_name_that_there_is_not_is_refused_with_the_list(model, size):
    with pytest.raises(ValueError) as caught:
        named(model, size)
    message = str(caught.value)
    assert f"--size {size}: " in message and ", ".join(TRAINABLE[model][1]) in message
    assert message.endswith(", without a patch size" if model in ("unet", "vae", "mlp") else " and a patch size, as in B/4")


# Options

@pytest.mark.parametrize("model, size, options, said", [
    *((model, size, dict(conditioning="adaln"), f"--conditioning adaln is a choice of DiT's, not of {model}")
      for model, size in (("uvit", "S/4"), ("unet", "S"), ("vit", "S/4"), ("vae", "Ti"), ("mlp", "Ti"))),
    *((model, size, dict(hybrid=True), f"--hybrid is a choice of ViT's, not of {model}")
      for model, size in (("dit", "S/4"), ("uvit", "S/4"), ("unet", "S"), ("vae", "Ti"), ("mlp", "Ti"))),
    *((model, size, dict(learn_sigma=True), f"--variance learned: {model} puts out no variance")
      for model, size in (("uvit", "S/4"), ("vit", "S/4"), ("vae", "Ti"), ("mlp", "Ti"))),
])
def test_an_option_that_does_not_go_with_the_model_is_refused_by_its_name_also_before_the_data_is_known(model, size, options, said):
    for refuse in (check_options, functools.partial(describe, image_size=64, channels=3, num_classes=10)):
        refusal(lambda: refuse(model, size, **options), said)


@every_name
def test_the_options_of_every_name_itself_go_with_it(model, size):
    check_options(model, size)


def test_a_classifier_without_classes_is_refused():
    refusal(lambda: describe("vit", "S/4", 64, 3), "--model vit learns labels")


@pytest.mark.parametrize("model, size", [("dit", "Ti/8"), ("unet", "Ti")])
def test_a_learned_variance_doubles_the_channels_put_out(model, size):
    for learned in (False, True):
        network = on_meta(describe(model, size, (32, 64), 3, learn_sigma=learned))
        assert network.image_size == (32, 64) and network.out_channels == (1 + learned) * 3


@pytest.mark.parametrize("model, size", [("dit", "Ti/8"), ("uvit", "Ti/8"), ("unet", "Ti")])
def test_classes_and_a_null_class_are_as_described(model, size):
    for classes, null_class in ((10, True), (10, False), (None, True)):
        network = on_meta(describe(model, size, 64, 3, num_classes=classes, null_class=null_class))
        assert network.num_classes == classes and network.null_label == (classes if null_class else None)


@pytest.mark.parametrize("conditioning", [None, "adaln-zero", "adaln", "cross-attention", "in-context"])
def test_a_dit_has_the_block_design_that_is_named_or_else_adaln_zero(conditioning):
    assert on_meta(describe("dit", "Ti/8", 64, 3, conditioning=conditioning)).conditioning == (conditioning or "adaln-zero")


@pytest.mark.parametrize("hybrid", [False, True])
def test_a_hybrid_vit_has_a_cnn_before_its_patches(hybrid):
    network = on_meta(describe("vit", "Ti/8", 64, 3, num_classes=10, hybrid=hybrid))
    convolutions = [module for module in network.stem.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) == (3 if hybrid else 0)


# The autoencoder, which takes any image size

@pytest.mark.parametrize("size", TRAINABLE["vae"][1])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_autoencoders_description_survives_the_disk_and_is_of_no_image_size_or_class(tmp_path, size, channels):
    description = describe("vae", size, 64, channels, num_classes=10)
    assert named("vae", size) == (TRAINABLE["vae"][0], TRAINABLE["vae"][1][size])
    assert description == describe("vae", size, (32, 8), channels, null_class=False)
    assert description["arguments"] == {**TRAINABLE["vae"][1][size], "channels": channels}
    assert_survives_the_disk(tmp_path, description)
    network = on_meta(description)
    assert type(network).__name__ == "AutoencoderKL" and network.channels == channels and network.factor == {"Ti": 4, "SD": 8}[size]


# Compiled

@pytest.fixture
def compiled(monkeypatch):
    """A list of the graphs that are compiled, here as they are."""
    graphs = []

    def counting(graph, example):
        graphs.append(graph)
        return graph
    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend=counting))
    return graphs


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model, size, graphs", [("dit", "Ti/4", 1), ("uvit", "Ti/4", 2), ("vit", "Ti/4", 1), ("mlp", "Ti", 1)])
def test_blocks_of_a_kind_are_compiled_once_and_keep_names_and_outputs(compiled, model, size, graphs, checkpointing):
    network = build(describe(model, size, 8, 1, 3))
    for parameter in network.parameters():
        parameter.data += 0.1                            # a fresh DiT puts out 0
    inputs = [torch.ones_like(z, device="cpu") for z in gflops.inputs_of(network) if z is not None]
    average, names = copy.deepcopy(network), list(network.state_dict())
    network.checkpointing = checkpointing
    compile_blocks(network)
    for _ in range(2):
        out = network(*inputs)
        out.square().mean().backward()
    assert len(compiled) == graphs and list(network.state_dict()) == names
    torch.testing.assert_close(out, average(*inputs), rtol=0, atol=0)
    assert len(compiled) == graphs, "the average was compiled, too"


def test_the_buckets_of_gradients_do_not_cut_a_compiled_block(compiled, monkeypatch, tmp_path):
    monkeypatch.setattr(torch._dynamo.config, "optimize_ddp", True)       # PyTorch's default
    network = build(describe("dit", "Ti/4", 8, 1, 3))
    compile_blocks(network)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        shared = torch.nn.parallel.DistributedDataParallel(network)
        shared(torch.ones(2, 1, 8, 8), torch.tensor([0, 1]), torch.tensor([0, 1])).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len(compiled) == 1


@pytest.mark.parametrize("model, size, kinds", [("uvit", "Ti/4", {"UViTBlock", "TextBlock"}), ("unet", "Nano", {"UNet"})])
def test_a_text_encoder_is_compiled_with_its_network(model, size, kinds):
    network = build(describe(model, size, 8, 1, context_dim=64, context_tokens=4) | {"text": dict(dim=64, length=4)})
    compile_blocks(network)
    assert {type(module).__name__ for module in network.modules() if module._compiled_call_impl} == kinds


@pytest.mark.parametrize("command, argv", [(bench, ["train"]), (gflops, [])])
@pytest.mark.parametrize("model", ["vae", "mlp"])
def test_only_training_offers_an_autoencoder_and_a_network_of_points(command, argv, model, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main([*argv, "--model", model])
    assert stopped.value.code == 2 and f"argument --model: invalid choice: '{model}'" in capsys.readouterr().err
    assert set(TRAINABLE) - set(MODELS) == {"vae", "mlp"}
