"""train.py: a run is a function of its settings, whatever interrupts it and however its batch is split."""
import csv
import math
import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refusal
from torch.testing import assert_close

import checkpoint
import data
import dit
import evaluate
import features
import files
import latents
import models
import objectives
import reports
import sample
import sampling
import scoring
import settings
import train
import unet
import uvit
import vit
from cli import side_by_side
from objectives import Denoising
from objectives import guarded_step, update_ema

ROOT = Path(__file__).parents[1]
TINY = ["--size", "Ti/16", "--batch-size", "8", "--device", "cpu"]
EXACT = dict(rtol=0, atol=0)


def trained(out, *argv):
    train.main([*TINY, *argv, "--out", str(out)])
    return out


def rows_of(run):
    """Rows of a run.csv without images/s, which are the machine's."""
    with open(Path(run).with_suffix(".csv"), newline="") as file:
        return [{name: value for name, value in row.items() if name != "images_per_s"} for row in csv.DictReader(file)]


def assert_same_run(a, b):
    """Weights, EMA, optimizer and rows are equal bit for bit."""
    first, second = checkpoint.load(a), checkpoint.load(b)
    for part in ("step", "model", "ema", "optimizer"):
        assert_close(getattr(first, part), getattr(second, part), **EXACT)
    assert rows_of(a) == rows_of(b)


def nudge(tensors):
    """Move weights, in place, so that no gradient is zero and noise, class and text show."""
    generator = torch.Generator().manual_seed(0)
    for value in tensors:
        value += 0.05 * torch.randn(value.shape, generator=generator)


def drawing_of(tmp_path, run, *argv):
    """Flags by which sample.py writes images of a run into an .npz."""
    return ["--ckpt", str(run), "--n", "3", "--steps", "2", "--out", str(tmp_path / "drawn.png"), "--npz",
            str(tmp_path / "drawn.npz"), *argv]


def images_of(tmp_path, run, *argv):
    """What sample.py writes of a run without --vae, or with what argv says."""
    sample.main(drawing_of(tmp_path, run, *argv))
    with np.load(tmp_path / "drawn.npz") as archive:
        return archive["arr_0"]


@pytest.fixture(scope="module", autouse=True)
def smaller(tiny_run):
    """What makes a run a function of its settings does not depend on its size: transformers of a hundredth, two steps a sample."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "STEPS", 2)
        for module in (dit, uvit, vit):
            patch.setitem(module.SIZES, "Ti", SMALLER)
        yield


SMALLER = dict(dim=64, depth=2, heads=2)
# On 8 x 8 images: four tokens, or a U-Net of three resolutions
BACKBONES = {"dit": "Ti/4", "uvit": "Ti/4", "unet": "Nano", "vit": "Ti/4", "vae": "Ti"}
every_backbone = pytest.mark.parametrize("model", BACKBONES)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags for 24 images of 8 x 8 pixels in three classes."""
    path = tmp_path_factory.mktemp("small") / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), dtype=np.uint8)
    np.savez(path, arr_0=pixels, arr_1=np.arange(24) % 3)
    return ["--data", str(path), "--batch-size", "8", "--device", "cpu", "--sample-every", "2"]


# A step

def test_the_flags_of_the_process_reach_the_loss(tmp_path):
    args, _ = settings.read_settings([*TINY, "--max-weight", "3", "--schedule", "linear", "--out", str(tmp_path / "run.pt")])
    training = train.Training(args, None, torch.device("cpu"), 0, 1)
    x0, t, y, eps = training.objective.draw(0, *training.dataset.batch(np.arange(8)))
    weight = torch.tensor(1 / (1 - np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t])).clamp(max=3)
    losses, _ = training.objective.loss(training.state.network, x0, t, y, eps)   # a fresh DiT puts out 0
    assert (weight > 1.01).any() and torch.allclose(losses.double(), weight * x0.double().square().mean(dim=(1, 2, 3)), rtol=1e-5)


def descent(tmp_path, argv, double, n=8, **changes):
    """The step of a nudged network by gradient descent with a rate of 1, and the slope of the mean loss of its whole batch."""
    args, _ = settings.read_settings([*argv, "--lr", "1024", "--warmup", "0", "--decay", "none", "--clip-grad", "0",
                                      "--out", str(tmp_path / "run.pt")])
    vars(args).update(precision="fp32")
    training = train.Training(args, None, torch.device("cpu"), 0, 1)
    vars(args).update(changes)
    state, objective = training.state, training.objective
    nudge(value.data for value in state.parameters)
    batch = [None if z is None else z[:n] for z in objective.draw(0, *training.dataset.batch(np.arange(8)))]
    if double:
        state.network.double(), state.ema.double()
        batch = [z.double() if z is not None and z.is_floating_point() else z for z in batch]
    slope = torch.autograd.grad(objective.loss(state.network, *batch)[0].mean(), state.parameters)
    state.network.checkpointing = args.checkpointing
    state.optimizer = torch.optim.SGD(state.parameters, fused=True)
    before = [value.detach().clone() for value in state.parameters]
    objective.draw = lambda step, *read: batch
    train.train_step(state, state.network, objective, batch[:2], 0, args, 0, 1)
    return [(old - new.detach()) / 1024 for old, new in zip(before, state.parameters)], slope            # 1024: exact in binary


@every_backbone
@pytest.mark.parametrize("changes", [dict(accumulate=1), dict(accumulate=4, checkpointing=True)], ids=["plain", "saving memory"])
def test_a_step_goes_down_the_slope_of_the_whole_batch_however_it_is_computed(tmp_path, small, model, changes):
    step, slope = descent(tmp_path, [*small, "--model", model, "--size", BACKBONES[model]], double=True, **changes)
    assert all(value.any() for value in slope)
    assert_close(step, list(slope), rtol=1e-4, atol=1e-9)                # of a ViT and an autoencoder the loss is float32


@every_backbone
def test_so_does_a_step_by_halves_of_unequal_size(tmp_path, small, monkeypatch, two_threads, model):
    monkeypatch.setattr(objectives, "side_by_side", lambda function, parts, workers: (
        shares.append((len(parts), workers)), side_by_side(function, parts, workers))[1])
    shares = []
    step, slope = descent(tmp_path, [*small, "--model", model, "--size", BACKBONES[model]], double=True, n=7)
    assert shares == [(1, 2)] + 4 * [(2, 2)]             # drawing by one thread; gradients, norms, steps, averages by two
    assert_close(step, list(slope), rtol=1e-4, atol=1e-9)


def test_a_run_by_halves_has_the_same_bits_whichever_half_is_late(tmp_path, two_threads, monkeypatch):
    def delayed(self, model, *batch, honest=Denoising.loss):
        second = batch[0].storage_offset() > 0
        time.sleep(0.1 * (second == late))
        names.add(threading.current_thread().name)
        return honest(self, model, *batch)
    names = set()
    monkeypatch.setattr(Denoising, "loss", delayed)
    for late in (False, True):
        trained(tmp_path / f"{late}.pt", "--steps", "3", "--accumulate", "1")
    assert_same_run(tmp_path / "False.pt", tmp_path / "True.pt")
    assert len(names) == 2                               # the same two threads in all six steps


@pytest.mark.parametrize("changes", [dict(world=2), dict(accumulate=2), dict(model="mlp"), dict(n=3), dict(dropout=0.1),
                                     dict(compiled=True), dict(threads=1), dict(threads=3)], ids=str)
def test_no_step_is_by_halves_with(two_threads, changes):
    def whether(world=1, accumulate=1, model="dit", n=4, dropout=0.0, compiled=False, threads=2):
        torch.set_num_threads(threads)
        network = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout(dropout))
        network.compile(backend="eager") if compiled else None
        return objectives.halves(network, Namespace(accumulate=accumulate, model=model), n, world)
    assert whether() and not whether(**changes)


def test_bf16_autocast_goes_nearly_down_the_slope(tmp_path):
    step, slope = descent(tmp_path, TINY, double=False, precision="bf16")
    matrices = [(a, b) for a, b in zip(step, slope) if a.ndim > 1]
    # bfloat16 keeps 8 bits: 0.4 % a rounding, and a few dozen roundings on the way
    assert all(0 < (a - b).norm() < 0.1 * b.norm() for a, b in matrices)


by_threads = pytest.mark.parametrize("threads", [1, 2])


@by_threads
def test_non_finite_gradients_leave_weights_and_moments_unchanged(two_threads, threads):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 3)), torch.nn.Parameter(torch.randn(3))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)

    def step(*gradients):
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient.clone()
        _, finite = guarded_step(optimizer, parameters, 1.0, threads)
        return finite, [tensor.clone() for p in parameters for tensor in (p.detach(), *optimizer.state[p].values())]
    good = [torch.randn(3, 3), torch.randn(3)]
    finite, before = step(*good)
    assert finite == 1
    for poison in (math.nan, math.inf):
        finite, after = step(good[0], torch.tensor([1.0, poison, 0.0]))
        assert finite == 0
        assert_close(after, before, **EXACT)
    finite, after = step(*good)
    assert finite == 1 and not torch.equal(before[0], after[0])


@by_threads
@pytest.mark.parametrize("clip", [0, 0.5, 100.0])
def test_a_step_clips_as_pytorch_does(two_threads, clip, threads):
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3))] for _ in range(2))
    optimizers = [torch.optim.AdamW(parameters, lr=0.1, eps=1.0, fused=True) for parameters in (ours, theirs)]     # eps: size counts
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        norm, _ = guarded_step(optimizers[0], ours, clip, threads)
        assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, clip or math.inf))
        optimizers[1].step()
        assert_close(ours, theirs)


def test_ten_bad_steps_in_a_row_end_the_run_and_leave_the_last_save(tmp_path, capsys, monkeypatch):
    honest, calls = Denoising.loss, []

    def poisoned(self, model, *batch):
        calls.append(batch)
        losses, groups = honest(self, model, *batch)
        return losses * (math.nan if len(calls) > 30 else 1), groups
    monkeypatch.setattr(Denoising, "loss", poisoned)
    with pytest.raises(SystemExit) as stop:
        trained(tmp_path / "run.pt", "--steps", "100", "--save-every", "30", "--sample-every", "1000")
    assert stop.value.code == 2 and "20 steps in a row" in capsys.readouterr().err
    run = checkpoint.load(tmp_path / "run.pt")
    assert run.step == 30 and all(value.isfinite().all() for value in run.model.values())


@by_threads
def test_ema_is_its_closed_sum_and_copies_buffers(two_threads, threads):
    network, ema = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    values, decay = [1.0, -2.0, 0.5, 3.0], 0.3
    with torch.no_grad():
        ema.weight.fill_(7.0), ema.bias.fill_(7.0)
        for k, value in enumerate(values):
            for tensor in (network.weight, network.bias, network.running_mean):
                tensor.fill_(value)
            update_ema(ema, network, k, decay, threads)
    kept = [min(decay, (1 + k) / (10 + k)) for k in range(4)]            # 0.1, 0.18, 0.25, 0.3: the warm-up
    weights = [(1 - kept[k]) * math.prod(kept[k + 1:]) for k in range(4)]
    expected = 7.0 * math.prod(kept) + sum(w * value for w, value in zip(weights, values))
    assert_close([ema.weight, ema.bias, ema.running_mean], [torch.full((3,), value) for value in (expected, expected, 3.0)])


@by_threads
def test_a_skipped_step_brings_no_nan_into_the_average_which_goes_on_towards_the_weights(two_threads, threads):
    network, ema = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    expected = [0.9 * a.detach() + 0.1 * w.detach() for a, w in zip(ema.parameters(), network.parameters())]
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    _, finite = guarded_step(torch.optim.AdamW(network.parameters(), fused=True), list(network.parameters()), 1.0, threads)
    update_ema(ema, network, 1000, 0.9, threads)
    assert finite == 0
    assert_close(list(ema.parameters()), expected)


# Stopping and going on

@pytest.mark.parametrize("model, size", [*BACKBONES.items(), ("unet", "Ti-up")])
def test_every_backbone_resumes_bit_for_bit_with_its_dropout(tmp_path, small, monkeypatch, model, size):
    for name in ("Nano", "Ti-up"):
        monkeypatch.setitem(unet.SIZES, name, {**unet.SIZES[name], "dropout": 0.5})
    argv = [*small, "--model", model, "--size", size, "--decay", "none"]
    train.main([*argv, "--steps", "4", "--out", str(tmp_path / "whole.pt")])
    train.main([*argv, "--steps", "2", "--out", str(tmp_path / "cut.pt")])
    torch.rand(5)                                          # elsewhere the global generator is where it may be
    train.main(["--resume", "--steps", "4", "--out", str(tmp_path / "cut.pt")])
    assert_same_run(tmp_path / "whole.pt", tmp_path / "cut.pt")
    assert [row["step"] for row in rows_of(tmp_path / "cut.pt")] == ["2", "4"]


def test_sigterm_finishes_the_step_saves_and_says_how_to_go_on_which_is_bit_identical(tmp_path, monkeypatch, capsys):
    argv, honest = ["--steps", "8", "--sample-every", "1000", "--save-every", "1000"], train.train_step
    whole, cut = trained(tmp_path / "whole.pt", *argv), tmp_path / "cut.pt"

    def interrupted(state, model, objective, batch, step, *rest):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        honest(state, model, objective, batch, step, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", interrupted)
        trained(cut, *argv)                                # returns: status 0
    assert checkpoint.load(cut).step == 5
    line = capsys.readouterr().out.splitlines()[-1]
    assert str(cut) in line
    train.main(line[line.index("--resume"):].removesuffix(" goes on").split())           # no other flag is needed
    assert_same_run(whole, cut)


def two_processes(*argv):
    """Train in two processes, of which torchrun would tell each by the same variables -> their exit statuses."""
    with socket.create_server(("localhost", 0)) as free:
        group = dict(MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2")

    def run(rank):
        os.environ.update(group, RANK=rank, LOCAL_RANK=rank)
        train.main([*map(str, argv)])
    processes = [multiprocessing.get_context("fork").Process(target=run, args=rank) for rank in "01"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_two_processes_train_stop_and_resume_as_one_process_trains(tmp_path, monkeypatch):
    def stopping(state, model, objective, batch, step, *rest, honest=train.train_step):
        if step == 3:
            raise ValueError("stopped")
        honest(state, model, objective, batch, step, *rest)
    monkeypatch.setattr(reports, "LOG_EVERY", 2)
    argv = ["--steps", "6", "--save-every", "3", "--sample-every", "1000", "--warmup", "0", "--lr", "0.001"]
    one, two, alone = trained(tmp_path / "one.pt", *argv), tmp_path / "two.pt", tmp_path / "alone.pt"
    with monkeypatch.context() as patch:                 # saved after three steps: the losses of the third are of both processes
        patch.setattr(train, "train_step", stopping)
        assert two_processes(*TINY, *argv, "--out", two) == [2, 2] and checkpoint.load(two).step == 3
    for ending in (".pt", ".csv"):
        shutil.copy(two.with_suffix(ending), alone.with_suffix(ending))
    train.main(["--resume", "--out", str(alone)])        # by another number of processes
    with monkeypatch.context() as patch:                 # on two unlike GPUs, of which the first needs no parts
        patch.setattr(train, "gpu_memory", lambda device: (10 ** 9, 4_900_000)[int(os.environ["RANK"])])
        assert two_processes("--resume", "--accumulate", "auto", "--out", two) == [0, 0]
    assert checkpoint.load(two).config["accumulate"] == 2
    rows, *others = ([{name: float(value) for name, value in row.items()} for row in rows_of(run)] for run in (one, two, alone))
    weights, *their_weights = (checkpoint.load(run).model for run in (one, two, alone))
    assert [row["step"] for row in rows] == [2, 4, 6]
    for other, theirs in zip(others, their_weights):
        # sums of float32 in other orders, of which Adam makes steps: losses, and norms of the gradient, within a thousandth
        assert all(a == pytest.approx(b, rel=1e-3, nan_ok=True) for a, b in zip(rows, other, strict=True))
        # matrices only: the keys' biases have no gradient but rounding, which Adam scales up to full steps
        assert all((value - theirs[name]).norm() <= 1e-3 * value.norm() for name, value in weights.items() if value.ndim > 1)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A run of four steps on 60 digits: scored after 2 and 4, with pictures after 3 and 4; and its flags."""
    folder = tmp_path_factory.mktemp("scored")
    images, labels = data.load().batch(np.arange(60))
    np.savez(folder / "digits.npz", arr_0=images, arr_1=labels)
    argv = ["--data", str(folder / "digits.npz"), "--steps", "4", "--eval-every", "2", "--eval-n", "8", "--features",
            str(features.JUDGE), "--sample-every", "3", "--cache", str(folder / "cache")]
    return trained(folder / "run.pt", *argv), argv


@pytest.mark.parametrize("what, call, step", [("sample_scores", 1, 2), ("sample_scores", 2, 4), ("sample_report", 1, 3),
                                              ("sample_report", 2, 4)])
def test_a_stop_in_a_score_or_a_picture_costs_neither_a_step_nor_the_row(tmp_path, scored, monkeypatch, what, call, step):
    honest, calls, cut = getattr(train, what), [], tmp_path / "cut.pt"

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise RuntimeError("stopped")
        return honest(*arguments)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(train, what, stopped)
        trained(cut, *scored[1])
    assert checkpoint.load(cut).step == step
    train.main(["--resume", "--out", str(cut)])
    assert_same_run(scored[0], cut)


# What is written

def test_eval_every_writes_the_scores_of_the_averaged_weights_into_the_log(scored):
    path, argv = scored
    rows, space = {row["step"]: row for row in rows_of(path)}, features.space_of(str(features.JUDGE), torch.device("cpu"))
    assert list(rows) == ["2", "3", "4"] and [step for step in rows if rows[step][space.title("FD")]] == ["2", "4"]
    dataset = data.load(argv[1])
    real = scoring.measure_reference(dataset, space, "digits", cache=argv[-1]).measured
    again = scoring.score_network(*checkpoint.load(path).build(), real, space, 8, dataset.classes)
    assert again == pytest.approx({metric: float(rows["4"][space.title(metric)]) for metric in again}, rel=1e-5)     # 8 digits


def test_evaluating_changes_nothing_that_is_trained(tmp_path, scored):
    plain = trained(tmp_path / "run.pt", *scored[1][:4])
    assert_close(checkpoint.load(plain).model, checkpoint.load(scored[0]).model, **EXACT)


def test_training_lowers_the_loss_and_logs_every_fifty_steps(tmp_path):
    rows = rows_of(trained(tmp_path / "run.pt", "--steps", "150", "--warmup", "20", "--sample-every", "1000"))
    assert list(rows[0]) == "step,images,loss,loss_q1,loss_q2,loss_q3,loss_q4,grad_norm,lr".split(",")
    assert [(row["step"], row["images"]) for row in rows] == [("50", "400"), ("100", "800"), ("150", "1200")]
    losses = [float(row["loss"]) for row in rows]
    # an untrained network outputs 0, whose error is the digits' mean square, 0.94
    assert losses[0] > losses[1] > losses[2] and losses[2] < 0.6
    assert float(rows[-1]["lr"]) < 1e-6                    # it has fallen to 0


def test_a_picture_and_a_usable_checkpoint_stand_beside_the_csv(tiny_run):
    with Image.open(tiny_run.with_suffix(".png")) as image:
        assert image.size == (10 * (64 + 2) + 2, 8 * (64 + 2) + 2)       # ten columns of eight, magnified twice
    run = checkpoint.load(tiny_run)
    assert run.step == 4 and run.data.classes == [str(digit) for digit in range(10)]
    assert run.config["lr"] == settings.LAPTOP["lr"] and run.network["class"] == "DiT"
    assert not tiny_run.with_suffix(".lock").exists()


# What is trained

@pytest.mark.parametrize("argv", [*(f"--model {model} --size {BACKBONES[model]}" for model in ("uvit", "unet")),
                                  *(f"--size Ti/4 --variance learned --conditioning {design}" for design in dit.BLOCKS)])
def test_every_denoiser_and_block_design_trains_samples_and_is_guided(tmp_path, small, argv):
    out = tmp_path / "run.pt"
    train.main([*small, *argv.split(), "--steps", "1", "--out", str(out)])
    run = checkpoint.load(out)
    nudge(run.ema.values())
    checkpoint.save(out, run)
    images = [images_of(tmp_path, out, "--cfg-scale", scale) for scale in ("1", "4")]
    assert images[0].shape == (3, 8, 8, 1) and not np.array_equal(*images)


def test_a_vit_learns_the_labels_and_logs_its_held_out_accuracy(tmp_path):
    dark_or_bright = np.concatenate([np.full((100, 8, 8, 1), value, np.uint8) for value in (60, 190)])
    np.savez(tmp_path / "images.npz", arr_0=dark_or_bright, arr_1=np.arange(200) // 100)
    train.main(["--model", "vit", "--size", "Ti/4", "--data", str(tmp_path / "images.npz"), "--steps", "40", "--batch-size", "16",
                "--warmup", "5", "--device", "cpu", "--ema", "0", "--sample-every", "20", "--out", str(tmp_path / "vit.pt")])
    rows, run = rows_of(tmp_path / "vit.pt"), checkpoint.load(tmp_path / "vit.pt")
    assert list(rows[0]) == "step,images,loss,accuracy,grad_norm,lr".split(",") and [row["step"] for row in rows] == ["20", "40"]
    assert float(rows[-1]["accuracy"]) == 1.0 and float(rows[-1]["loss"]) < 0.3          # a guess costs 0.69 nats
    assert run.diffusion is None and run.network["class"] == "ViT" and (tmp_path / "vit.png").exists()


def test_rectangles_without_labels_train_and_sample(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    run = trained(tmp_path / "run.pt", "--data", str(tmp_path / "images.npz"), "--steps", "2", "--flip", "--shift", "2")
    sample.main(drawing_of(tmp_path, run))
    with np.load(tmp_path / "drawn.npz") as archive:
        assert archive["arr_0"].shape == (3, 16, 32, 3) and "arr_1" not in archive


def test_without_dropped_labels_there_is_no_null_class(tmp_path):
    run = checkpoint.load(trained(tmp_path / "run.pt", "--steps", "1", "--cfg-drop", "0"))
    assert len(run.model["y_embedder.embedding_table.weight"]) == 10 and run.build()[0].null_label is None


# A GPU's memory

@pytest.fixture
def card(monkeypatch):
    """A function that gives the CPU the memory of a GPU, in MiB; and no picture, which would take longer than training."""
    monkeypatch.setattr(train, "sample_report", lambda *_: {})
    return lambda size: monkeypatch.setattr(train, "gpu_memory", lambda device: size * 2 ** 20)


# By count SMALLER takes 4.1 MiB in 4 x 4 patches for one image, 6.2 for four, 9 for eight; in 2 x 2 patches 6.1 for one, and with
# --checkpointing 5
def test_auto_accumulates_as_little_as_fits_and_the_run_keeps_the_number(tmp_path, card, capsys):
    argv = ["--size", "Ti/4", "--steps", "3"]
    whole = trained(tmp_path / "whole.pt", *argv, "--accumulate", "auto")    # on the CPU: 1
    assert checkpoint.load(whole).config["accumulate"] == 1
    card(8.5)
    auto, two = (trained(tmp_path / f"{name}.pt", *argv, "--accumulate", name) for name in ("auto", "2"))
    assert checkpoint.load(auto).config["accumulate"] == 2
    assert_same_run(auto, two)
    said = capsys.readouterr().out
    assert said.count("--accumulate 2: a step takes 0.0 GiB by count, and this GPU has 0.0 GiB") == 2 and "WARNING" not in said
    trained(tmp_path / "one.pt", *argv)
    assert "WARNING: a step takes" in (said := capsys.readouterr().out) and "--accumulate 2 takes" in said


@pytest.mark.parametrize("size, argv, remedy", [(6.2, [], "--checkpointing takes"), (6.2, ["--checkpointing"], None),
                                                (3, [], "take a smaller --size"), (3, ["--checkpointing"], "take a smaller --size")])
def test_what_does_not_fit_image_by_image_is_refused_with_what_would(tmp_path, card, capsys, size, argv, remedy):
    card(size)
    argv = ["--size", "Ti/2", "--steps", "1", "--accumulate", "auto", *argv]
    if remedy is None:
        assert trained(tmp_path / "run.pt", *argv).exists()
    else:
        with pytest.raises(SystemExit) as stopped:
            trained(tmp_path / "run.pt", *argv)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and "by count for one image at a time" in error and remedy in error


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pictures_and_scores_are_drawn_in_the_precision_of_training(tmp_path, monkeypatch, precision):
    seen = []
    monkeypatch.setattr(train, "sample_report", lambda *_: seen.append(torch.is_autocast_enabled("cpu")) or {})
    trained(tmp_path / "run.pt", "--steps", "1", "--precision", precision)
    assert seen == [precision == "bf16"] and checkpoint.load(tmp_path / "run.pt").config["precision"] == precision


# Autoencoders and their latents

def saved_autoencoder(path, seed=0, **changes):
    """A run of an untrained autoencoder of f = 2, written as train.py would."""
    torch.manual_seed(seed)
    arguments = dict(channels=1, dim=32, multipliers=(1, 2), res_blocks=1) | changes
    state = models.build(described := {"class": "AutoencoderKL", "arguments": arguments}).state_dict()
    checkpoint.save(path, checkpoint.Run(checkpoint.VERSION, 1, {}, described, None, checkpoint.Data(None, None, None, 1, 8), state,
                                         state, vae=checkpoint.Autoencoder(0.5)))
    return str(path)


@pytest.fixture
def latent(small, tmp_path):
    """Flags of a DiT on 4 x 4 x 4 latents of the small images; the autoencoder is vae.pt."""
    return [*small, "--vae", saved_autoencoder(tmp_path / "vae.pt"), "--size", "Ti/2", "--decay", "none", "--sample-every", "1000",
            "--cache", str(tmp_path / "cache")]


def refused(capsys, *argv, command=train.main):
    """The one line that a command line gets."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command(list(map(str, argv)))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    return error


def test_an_autoencoder_learns_to_give_images_back_and_logs_its_held_out_psnr(tmp_path):
    ramps = np.linspace(-100, 100, 8)
    rng = np.random.default_rng(0)
    pixels = 128 + rng.uniform(-1, 1, (64, 1, 1)) * ramps
    np.savez(tmp_path / "images.npz", arr_0=np.broadcast_to(pixels, (64, 8, 8)).astype(np.uint8))
    run = tmp_path / "vae.pt"
    train.main(["--model", "vae", "--data", str(tmp_path / "images.npz"), "--steps", "40", "--batch-size", "8", "--warmup", "5",
                "--device", "cpu", "--ema", "0", "--sample-every", "10", "--out", str(run)])
    rows = rows_of(run)
    assert list(rows[0]) == ["step", "images", "loss", "psnr", "grad_norm", "lr"]
    losses, scores = ([float(row[name]) for row in rows] for name in ("loss", "psnr"))
    assert losses[0] > losses[1] > losses[3] and losses[3] < 0.5 * losses[0] and scores[3] > scores[0] + 3
    content = checkpoint.load(run)
    assert content.diffusion is None and content.network["class"] == "AutoencoderKL" and run.with_suffix(".png").exists()
    assert checkpoint.load_autoencoder(run).scale == content.vae.scale > 0


def test_a_latent_run_resumes_bit_for_bit_and_encodes_once(tmp_path, latent, monkeypatch):
    argv = [*latent, "--flip", "--sample-every", "2"]
    train.main([*argv, "--steps", "4", "--out", str(tmp_path / "whole.pt")])
    monkeypatch.setattr(latents.Table, "write", lambda *args: pytest.fail("encoded again"))
    train.main([*argv, "--steps", "2", "--out", str(tmp_path / "cut.pt")])
    train.main(["--resume", "--steps", "4", "--out", str(tmp_path / "cut.pt")])
    assert_same_run(tmp_path / "whole.pt", tmp_path / "cut.pt")
    first, second = checkpoint.load(tmp_path / "whole.pt"), checkpoint.load(tmp_path / "cut.pt")
    assert first.vae.sha256 == second.vae.sha256 and (first.data.channels, first.data.image_size) == (4, [4, 4])
    with Image.open(tmp_path / "cut.png") as picture:
        assert picture.size == (3 * 66 + 2, 8 * 66 + 2)  # decoded: images of 8 x 8 pixels, magnified, of three classes


def test_a_latent_run_trains_on_scaled_latents_and_not_on_pixels(tmp_path, latent, monkeypatch):
    seen, honest = [], Denoising.loss

    def recorded(self, model, x0, *rest):
        seen.append(x0)
        return honest(self, model, x0, *rest)
    monkeypatch.setattr(Denoising, "loss", recorded)
    train.main([*latent, "--steps", "3", "--out", str(tmp_path / "run.pt")])
    autoencoder = checkpoint.load_autoencoder(tmp_path / "vae.pt")
    with torch.no_grad():
        mean, log_variance = autoencoder.encode(data.to_float(data.load(latent[1]).batch(np.arange(22))[0]))
    # the run's 24 latents: mean and deviation of all of the data's, times the scale of 0.5
    second_moment = (mean.square() + log_variance.exp()).mean().item()
    assert torch.cat(seen).shape == (24, 4, 4, 4)
    assert torch.cat(seen).square().mean().item() == pytest.approx(0.25 * second_moment, rel=0.2)


def test_a_latent_run_carries_a_small_autoencoder_and_samples_without_any_flag(tmp_path, latent):
    run = tmp_path / "run.pt"
    train.main([*latent, "--steps", "2", "--out", str(run)])
    kept, autoencoder = checkpoint.load(run).vae, checkpoint.load_autoencoder(tmp_path / "vae.pt")
    assert (kept.scale, kept.path, kept.sha256) == (0.5, str(tmp_path / "vae.pt"), files.sha256_of(tmp_path / "vae.pt"))
    assert_close(kept.model, dict(autoencoder.state_dict()), **EXACT)
    named = images_of(tmp_path, run, "--vae", str(tmp_path / "vae.pt"))
    (tmp_path / "vae.pt").unlink()
    images = images_of(tmp_path, run)
    assert images.shape == (3, 8, 8, 1) and images.dtype == np.uint8 and np.array_equal(images, named)
    checkpoint.main([str(run), "--slim", str(tmp_path / "slim.pt")])
    assert images_of(tmp_path, tmp_path / "slim.pt").shape == (3, 8, 8, 1)


def test_a_latent_run_of_a_big_autoencoder_carries_its_path_and_hash_alone(tmp_path, latent, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "EMBEDDED", 0)
    run, moved = tmp_path / "run.pt", tmp_path / "moved.pt"
    train.main([*latent, "--steps", "1", "--out", str(run)])
    kept = checkpoint.load(run).vae
    assert kept.path and kept.sha256 and kept.network is kept.model is None
    images = images_of(tmp_path, run)                    # the file lies beside it
    assert images.shape == (3, 8, 8, 1)
    (tmp_path / "vae.pt").rename(moved)
    capsys.readouterr()
    assert "name it by --vae FILE" in refused(capsys, *drawing_of(tmp_path, run), command=sample.main)
    assert np.array_equal(images_of(tmp_path, run, "--vae", str(moved)), images)
    for other in ([], ["--vae", saved_autoencoder(tmp_path / "other.pt", seed=1)]):
        saved_autoencoder(tmp_path / "vae.pt", seed=1)   # where the right one was, or by its name
        said = refused(capsys, *drawing_of(tmp_path, run, *other), command=sample.main)
        assert "is another autoencoder than the network was trained with" in said


def test_another_autoencoder_is_refused_on_resuming(tmp_path, latent, capsys):
    run = tmp_path / "run.pt"
    train.main([*latent, "--steps", "1", "--out", str(run)])
    other, before = saved_autoencoder(tmp_path / "other.pt", seed=1), run.read_bytes()
    refused(capsys, "--resume", "--steps", 2, "--vae", other, "--out", run)
    shutil.copy(other, tmp_path / "vae.pt")
    assert "is another autoencoder than the run in" in refused(capsys, "--resume", "--steps", 2, "--out", run)
    assert run.read_bytes() == before


def test_a_latent_run_whose_parts_do_not_go_together_is_refused(tmp_path, latent, tiny_run, capsys):
    out = ["--out", tmp_path / "run.pt"]
    assert ("image size 4 is not a multiple of patch size 3: use 3 or 6; of latents: an image's side is 2 times that"
            in refused(capsys, *latent, "--size", "Ti/3", *out))
    colour = saved_autoencoder(tmp_path / "colour.pt", channels=3)
    for path, said in ((features.JUDGE, "it holds a ViT, which is no autoencoder"), (tiny_run, "it holds a DiT"),
                       (colour, "takes images of 3 channels")):
        assert said in refused(capsys, *latent, "--vae", path, *out)
    assert not (tmp_path / "run.pt").exists()


def test_an_image_that_the_autoencoders_factor_does_not_divide_is_refused_before_a_step(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((20, 9, 9), np.uint8))
    args, _ = settings.read_settings(["--model", "vae", "--data", str(tmp_path / "images.npz"), "--device", "cpu",
                                      "--out", str(tmp_path / "run.pt")])
    refusal(lambda: train.Training(args, None, torch.device("cpu"), 0, 1), "image size 9 is not a multiple of")


def test_a_latent_run_is_scored_on_its_pixels_in_training_and_afterwards_without_any_flag(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=np.random.default_rng(0).integers(0, 256, (24, 32, 32, 1), dtype=np.uint8))
    autoencoder, run = saved_autoencoder(tmp_path / "vae.pt", multipliers=(1, 1, 1)), tmp_path / "run.pt"
    scored_by = ["--features", str(features.JUDGE), "--cache", str(tmp_path / "cache")]
    train.main(["--data", str(tmp_path / "images.npz"), "--vae", autoencoder, "--size", "Ti/4", "--steps", "2", "--batch-size", "4",
                "--device", "cpu", "--eval-every", "1", "--eval-n", "6", *scored_by, "--sample-every", "1000", "--out", str(run)])
    evaluate.main(["--ckpt", str(run), "--n", "6", *scored_by, "--metrics", "FD", "--results", str(tmp_path / "results.csv")])
    again, rows = rows_of(tmp_path / "results.csv")[0]["FD"], rows_of(run)
    space = features.space_of(str(features.JUDGE), torch.device("cpu"))
    assert len(rows) == 2
    assert float(rows[1][space.title("FD")]) == pytest.approx(float(again), rel=1e-4)    # 8 digits, other batches
