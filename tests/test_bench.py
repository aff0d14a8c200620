"""bench.py: rates stand beside a ruler, and its stopwatch changes nothing."""
import copy
import re

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import bench
import checkpoint
import data
import inception
import latents
import objectives
import peers
import text
import train
import vae
from models import build, describe
from objectives import Classification, Denoising


@pytest.fixture
def no_picture(monkeypatch):
    """Training without the picture at its end, which takes longer than the few steps that a test makes."""
    monkeypatch.setattr(train, "sample_report", lambda *_: {})


@pytest.fixture
def rulers(monkeypatch):
    """The rulers that are asked for: here each is as fast as 2 GFLOP/s before, and 4 after."""
    asked = []

    def ruler_rate(ruler, device, dtype):
        asked.append(ruler)
        return 2e9 if len(asked) % 2 else 4e9
    monkeypatch.setattr(bench, "ruler_rate", ruler_rate)
    return asked


@pytest.mark.parametrize("ruler", ["product", "convolution"])
def test_a_rulers_rate_is_that_of_a_machine(ruler):
    rate = bench.ruler_rate(ruler, torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e16


def test_a_rate_is_said_beside_the_mean_of_the_rulers_before_and_after(rulers):
    with bench.ruled("product", "cpu", torch.float32) as rates:
        assert rates == [2e9]
    assert bench.beside_ruler(6e9, 1.0, rates, "float32 product") == "6 GFLOP/s, 200% of a large float32 product's 3"


def test_the_evaluators_parts_are_timed_beside_a_product_and_a_convolution(capsys, monkeypatch, rulers):
    monkeypatch.setattr(bench, "FEATURES", 64)
    monkeypatch.setattr(bench, "TIMED_IMAGES", 2)
    bench.main(["evaluate", "--n", "100", "--device", "cpu"])
    said = capsys.readouterr().out
    assert all(part in said for part in ("Fréchet distance, 64 features", "100 x 100", "images/s"))
    assert rulers == ["product"] * 2 + ["convolution"] * 2


@pytest.mark.parametrize("model, learn_sigma", [("dit", False), ("dit", True), ("uvit", False)])
def test_a_peer_is_our_network_in_other_words(model, learn_sigma):
    """In output and gradients, of a number of images that is not the number of tokens, and whatever the weights are."""
    torch.manual_seed(0)
    described = describe(model, "Ti/4", (16, 16), 3, 5, learn_sigma=learn_sigma)
    ours = build(described)
    for weight in ours.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    peer = peers.peer(described, ours.state_dict())
    x, t, y = torch.randn(3, 3, 16, 16), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 5])
    slopes = [torch.autograd.grad(network(x, t, y).square().mean(), [weight for weight in network.parameters()
                                                                      if weight.requires_grad]) for network in (ours, peer)]
    assert ours(x, t, y).std() > 0.1
    assert_close(peer(x, t, y), ours(x, t, y), rtol=1e-4, atol=1e-4)
    names = [[name for name, weight in network.named_parameters() if weight.requires_grad] for network in (ours, peer)]
    assert_close(dict(zip(names[1], slopes[1])), dict(zip(names[0], slopes[0])), rtol=1e-3, atol=1e-5)


def test_a_peers_blocks_are_ours_in_other_words():
    """Those of the U-Net, with and without attention to all pixels, the autoencoder and CLIP's text encoder."""
    torch.manual_seed(0)
    ids = torch.randint(50, (3, 7))
    x, t, y = torch.randn(3, 3, 16, 16), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 5])
    networks = [(build(describe("unet", "Ti", (16, 16), 3, 5)), (x, t, y)),
                (build(describe("vae", "Ti", None, 3)), (x, torch.randn(3, 4, 4, 4))),
                (text.CLIPTextEncoder(vocab=50, length=7, dim=32, depth=2, heads=4), (ids,))]
    for ours, inputs in networks:
        for weight in ours.parameters():
            weight.data += 0.05 * torch.randn_like(weight)
        theirs = peers.with_plain_blocks(copy.deepcopy(ours))
        assert sum(type(module) in peers.PLAIN.values() for module in theirs.modules()) > 1
        assert not any(type(module) in peers.PLAIN for module in theirs.modules())
        outputs = [network(*inputs) for network in (theirs, ours)]
        assert_close(*outputs, rtol=1e-4, atol=1e-4)
        slopes = [torch.autograd.grad((out if torch.is_tensor(out) else out[0]).square().mean(), [*network.parameters()])
                  for out, network in zip(outputs, (theirs, ours))]
        assert_close(*slopes, rtol=1e-3, atol=1e-5)


def test_a_peers_inception_is_ours_in_other_words():
    """With norms that change what they see, and weights that let as much out of a layer as into it."""
    torch.manual_seed(0)
    ours = inception.Inception()
    ours.load_state_dict({name: value if not value.is_floating_point() else 2.4 * value if value.ndim == 4 else
                          value + torch.empty_like(value).uniform_(-0.1, 0.1) for name, value in ours.state_dict().items()})
    theirs, images = peers.with_plain_blocks(copy.deepcopy(ours)), torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    assert sum(isinstance(module, peers.PlainConv) for module in theirs.modules()) == 94
    assert all(values.std() > 0.1 for values in ours(images).values())
    assert_close(theirs(images), ours(images), rtol=1e-3, atol=1e-3)


def test_what_reads_batches_is_timed_beside_the_training_loop(capsys, no_picture):
    bench.main(["data", "--size", "Ti/16", "--steps", "3", "--batch-size", "4", "--device", "cpu"])
    *_, memory, decoded, cached, loop = capsys.readouterr().out.splitlines()
    for line, shape in ((memory, "32x32x1"), (decoded, "64x64x3"), (cached, "16x16x4")):
        assert re.search(rf", {shape}: [\d,]+ images/s, [\d.]+% of a step of dit Ti/16$", line)
    assert re.fullmatch(r"train.py, dit Ti/16, batch 4, cpu: \d+ images/s", loop)


def test_pairs_are_timed_in_turn_and_each_is_first_as_often(monkeypatch):
    calls = []

    def seconds_of(operation):
        before = len(calls)
        operation()
        return 0.25 * calls[before:].count("ours") + 0.5 * calls[before:].count("theirs")
    monkeypatch.setattr(bench, "seconds_of", seconds_of)
    seconds = bench.in_turn(lambda: calls.append("ours"), lambda: calls.append("theirs"), 2)
    assert calls == ["ours", "theirs"] * 2 + ["ours", "ours", "theirs", "theirs", "ours", "ours"]
    assert (seconds == [[0.25, 0.5]] * 2).all()


def test_our_networks_are_timed_beside_their_authors(capsys, monkeypatch):
    monkeypatch.setattr(bench, "in_turn", lambda ours, theirs, pairs: (ours(), theirs(), np.tile([0.1, 0.2], (pairs, 1)))[2])
    monkeypatch.setattr(text.CLIPTextEncoder.__init__, "__defaults__", (49408, 77, 8, 1, 1, None))
    names = ("dit Ti/8", "uvit Ti/8", "unet Ti", "vae Ti", "clip L/14", "inception")
    bench.main(["peers", "--networks", *names, "--batch-size", "2", "--pairs", "3"])
    rows = capsys.readouterr().out.splitlines()[4:]
    assert rows == [f"| {name} | {part} | 100.0 ms | 200.0 ms | 2.00 (2.00 – 2.00) |" for name in names
                    for part in bench.PEERS[name][1]]
    bench.main(["peers", "--networks", "vae Ti", "clip L/14", "--parts", "decode", "--batch-size", "2", "--pairs", "3"])
    assert [row.split(" | ")[:2] for row in capsys.readouterr().out.splitlines()[4:]] == [["| vae Ti", "decode"]]


def test_a_step_is_timed_with_an_option_beside_one_that_differs_in_nothing_else(capsys, monkeypatch, two_threads):
    def told(state, model, objective, batch, step, args, rank, world):
        halves = objectives.halves(state.network, args, len(batch[0]), world)
        return {**vars(args), "halves": halves, "compiled": any(block._compiled_call_impl for block in state.network.blocks)}
    monkeypatch.setattr(bench, "train_step", told)
    found = []
    monkeypatch.setattr(bench, "in_turn", lambda one, other, pairs: (
        found.append((one(), other())), np.tile([0.1, 0.2], (pairs, 1)))[1])
    bench.main(["options", "--networks", "dit Ti/8", "--batch-size", "4", "--pairs", "3"])
    differing = [{key for key in one if one[key] != other[key]} - {"out"} for one, other in found]
    assert differing == [{"precision"}, {"compile", "compiled", "halves"}, {"halves"}]
    assert found[0][0]["precision"] == "bf16" and found[1][0]["compiled"] and found[2][0]["halves"]
    assert [line.split(" | ")[1:] for line in capsys.readouterr().out.splitlines()[-3:]] == [
        [f"training, {option}", "100.0 ms", "200.0 ms", "2.00 (2.00 – 2.00) |"] for option in ("bf16", "compiled", "halves")]


@pytest.mark.parametrize("model, size, ruler", [("dit", "Ti/4", "product"), ("vit", "Ti/4", "product"),
                                                ("unet", "Ti", "convolution")])
def test_the_training_loop_is_timed_as_it_is_and_left_as_it_was(tmp_path, capsys, no_picture, rulers, model, size, ruler):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((20, 8, 8, 1), np.uint8), arr_1=np.arange(20) % 2)

    def measured():
        return Denoising.loss, Classification.loss, torch.Tensor.backward, torch.optim.AdamW.step
    before = measured()
    bench.main(["train", "--model", model, "--size", size, "--batch-size", "2", "--steps", "4", "--device", "cpu", "--data",
                str(tmp_path / "images.npz")])
    said = capsys.readouterr().out
    assert f"of a large {ruler}'s 3" in said and "backward" in said and "rest of the loop" in said
    assert "before them, the first 3 steps took" in said
    assert measured() == before and rulers == [ruler] * 2


def test_on_a_gpu_calls_are_timed_by_events_for_which_nothing_waits(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def elapsed_time(self, later):
            return later.milliseconds - self.milliseconds

    class Stream:
        clock = iter((100.0, 350.0, 400.0, 1100.0))

        def record_event(self, event):
            event.milliseconds = next(self.clock)
            return event

    class Worker:
        def work(self, x):
            return 2 * x
    for name, replaced in dict(is_initialized=lambda: True, Event=Event, current_stream=Stream,
                               synchronize=lambda: pytest.fail("waits")).items():
        monkeypatch.setattr(torch.cuda, name, replaced)
    with bench.stopwatch(Worker, "work") as calls:
        assert [Worker().work(x) for x in (1, 2)] == [2, 4]
    assert bench.seconds_from(calls[0][0], calls).tolist() == [[0.0, 0.25], [0.3, 1.0]]


def test_the_loop_trains_on_cached_random_and_fresh_latents_by_turns_and_is_left_as_it_was(tmp_path, monkeypatch, no_picture):
    torch.manual_seed(0)
    torch.save(vae.AutoencoderKL(**vae.SIZES["Ti"]).state_dict(), tmp_path / "sd.ckpt")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=pixels, arr_1=np.arange(40) % 10)
    drawn, before = [], (data.Batches.__getitem__, Denoising.draw)

    def noting(objective, step, moments, labels):
        drawn.append((step, moments.flatten(0, 2), labels))
        return before[1](objective, step, moments, labels)
    with monkeypatch.context() as patched:
        patched.setattr(Denoising, "draw", noting)
        bench.main(["latents", "--vae", str(tmp_path / "sd.ckpt"), "--data", str(tmp_path / "images.npz"), "--batch-size", "4",
                    "--steps", "2", "--device", "cpu"])
    assert (data.Batches.__getitem__, Denoising.draw) == before and [step for step, *_ in drawn] == list(range(3 * bench.ROUND))
    dataset, autoencoder = data.load(str(tmp_path / "images.npz")), checkpoint.load_autoencoder(str(tmp_path / "sd.ckpt"))
    batches = data.Batches(dataset, 4, 0)
    for step, moments, labels in drawn:
        images, expected = batches[step]
        fresh = torch.from_numpy(np.stack(latents.encode(autoencoder, images), axis=1)).flatten(0, 1)
        kind = step // bench.ROUND                                        # cached, random, encoded
        assert torch.equal(labels, expected)
        assert (moments == 1).all() if kind == 1 else torch.allclose(moments, fresh, atol=1e-5)
