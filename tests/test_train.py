"""train.py: a run is a function of its settings, whatever interrupts it and however its batch is split."""
import csv
import math
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image

import checkpoint
import data
import dit
import evaluate
import features
import files
import latents
import models
import sample
import train
import unet
from objectives import Denoising

ROOT = Path(__file__).parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TINY = ["--size", "Ti/16", "--batch-size", "8", "--device", "cpu"]


def command(*argv, launcher=()):
    """A command line of train.py in a process of its own."""
    return [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, argv)]


def rows_of(run):
    """Rows of a run.csv without the last column, images/s, which is the machine's."""
    with open(Path(run).with_suffix(".csv"), newline="") as file:
        return [row[:-1] for row in csv.reader(file)]


def assert_same_run(a, b):
    """Weights, EMA, optimizer and rows are equal bit for bit."""
    first, second = checkpoint.load(a), checkpoint.load(b)
    for part in ("model", "ema"):
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])
    states = first["optimizer"]["state"], second["optimizer"]["state"]
    assert all(torch.equal(states[0][i][name], states[1][i][name]) for i in states[0] for name in states[0][i])
    assert rows_of(a) == rows_of(b)


def nudged(run, out):
    """A copy of a run of one step with weights nudged, so that no gradient is zero, and its moments emptied."""
    content, generator = checkpoint.load(run), torch.Generator().manual_seed(0)
    for value in (*content["model"].values(), *content["ema"].values()):
        value += 0.05 * torch.randn(value.shape, generator=generator)
    for state in content["optimizer"]["state"].values():
        state["exp_avg"].zero_()
    checkpoint.save(out, content)
    return out


def gradients(run):
    """The gradient of the step after `nudged`, by name: Adam's first moment is a tenth of it."""
    content = checkpoint.load(run)
    names = [name for name, _ in checkpoint.build(content)[0].named_parameters()]
    found = {name: state["exp_avg"] * 10 for name, state in zip(names, content["optimizer"]["state"].values(), strict=True)}
    assert content["step"] == 2 and all(gradient.any() for gradient in found.values())
    return found


def assert_same_gradients(a, b):
    """Sums of float32 in other orders: within 1e-5 of each tensor's norm. The keys' third of a qkv bias has gradient 0."""
    for name in a:
        first, second = (gradient.chunk(3)[::2] if name.endswith("qkv.bias") else [gradient] for gradient in (a[name], b[name]))
        assert all((x - y).norm() <= 1e-5 * x.norm() for x, y in zip(first, second)), name


@pytest.fixture(scope="module")
def first_step(tmp_path_factory):
    """A run of one step without clipping, nudged; and the gradient of its second step, taken plainly."""
    folder = tmp_path_factory.mktemp("first")
    start = nudged(trained(folder / "run.pt", "--steps", "1", "--clip-grad", "0", "--decay", "none", "--sample-every", "1000"),
                   folder / "nudged.pt")
    return start, gradients(second_step(start, folder / "plain.pt"))


def second_step(start, out, *argv):
    """Resume a copy of a run for its second step."""
    shutil.copy(start, out)
    train.main(["--resume", "--steps", "2", "--out", str(out), *argv])
    return out


def trained(out, *argv):
    train.main([*TINY, *argv, "--out", str(out)])
    return out


# On 8 x 8 images: four tokens, or a U-Net of three resolutions
BACKBONES = {"dit": "Ti/4", "uvit": "Ti/4", "unet": "Ti", "vit": "Ti/4", "vae": "Ti"}
every_backbone = pytest.mark.parametrize("model", BACKBONES)
every_denoiser = pytest.mark.parametrize("model", [model for model in BACKBONES if model not in ("vit", "vae")])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags for 24 images of 8 x 8 pixels in three classes."""
    path = tmp_path_factory.mktemp("small") / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), dtype=np.uint8)
    np.savez(path, arr_0=pixels, arr_1=np.arange(24) % 3)
    return ["--data", str(path), "--batch-size", "8", "--device", "cpu", "--sample-every", "2"]


@every_backbone
def test_every_backbone_resumes_bit_for_bit_with_its_dropout(tmp_path, small, monkeypatch, model):
    monkeypatch.setitem(unet.SIZES, "Ti", {**unet.SIZES["Ti"], "dropout": 0.5})
    argv = [*small, "--model", model, "--size", BACKBONES[model], "--decay", "none"]
    train.main([*argv, "--steps", "4", "--out", str(tmp_path / "whole.pt")])
    train.main([*argv, "--steps", "2", "--out", str(tmp_path / "cut.pt")])
    torch.rand(5)                                          # elsewhere the global generator is where it may be
    train.main(["--resume", "--steps", "4", "--out", str(tmp_path / "cut.pt")])
    assert_same_run(tmp_path / "whole.pt", tmp_path / "cut.pt")
    assert [row[0] for row in rows_of(tmp_path / "cut.pt")] == ["step", "2", "4"]


@every_backbone
def test_every_backbone_accumulates_the_gradient_of_the_whole_batch(tmp_path, small, model):
    start = tmp_path / "run.pt"
    train.main([*small, "--model", model, "--size", BACKBONES[model], "--steps", "1", "--clip-grad", "0", "--decay", "none", "--out",
                str(start)])
    start = nudged(start, tmp_path / "nudged.pt")
    plain, split = (gradients(second_step(start, tmp_path / f"{n}.pt", "--accumulate", n)) for n in ("1", "4"))
    # matrices only: biases that a norm or a softmax takes out again have no gradient but rounding
    assert_same_gradients(*({name: value for name, value in found.items() if value.ndim > 1} for found in (plain, split)))


@every_denoiser
def test_every_denoiser_samples_and_is_guided(tmp_path, small, model):
    run = tmp_path / "run.pt"
    train.main([*small, "--model", model, "--size", BACKBONES[model], "--steps", "1", "--out", str(run)])
    nudged(run, run)
    images = []
    for scale in ("1", "4"):
        sample.main(["--ckpt", str(run), "--n", "3", "--steps", "3", "--cfg-scale", scale, "--out", str(tmp_path / "s.png"), "--npz",
                     str(tmp_path / "s.npz")])
        images.append(np.load(tmp_path / "s.npz")["arr_0"])
    assert images[0].shape == (3, 8, 8, 1) and not np.array_equal(*images)


def test_a_vit_learns_the_labels_and_logs_its_held_out_accuracy(tmp_path):
    dark_or_bright = np.concatenate([np.full((100, 8, 8, 1), value, np.uint8) for value in (60, 190)])
    np.savez(tmp_path / "images.npz", arr_0=dark_or_bright, arr_1=np.arange(200) // 100)
    train.main(["--model", "vit", "--size", "Ti/4", "--data", str(tmp_path / "images.npz"), "--steps", "40", "--batch-size", "16",
                "--warmup", "5", "--device", "cpu", "--ema", "0", "--sample-every", "20", "--out", str(tmp_path / "vit.pt")])
    rows = rows_of(tmp_path / "vit.pt")
    assert rows[0] == ["step", "images", "loss", "accuracy", "grad_norm", "lr"] and [row[0] for row in rows[1:]] == ["20", "40"]
    assert float(rows[-1][3]) == 1.0 and float(rows[-1][2]) < 0.3        # a guess costs 0.69 nats
    run = checkpoint.load(tmp_path / "vit.pt")
    assert run["diffusion"] is None and run["network"]["class"] == "ViT" and (tmp_path / "vit.png").exists()


def test_a_run_killed_at_random_moments_and_resumed_is_bit_identical(tmp_path):
    argv = [*TINY, "--steps", 300, "--save-every", 15, "--sample-every", 1000]
    subprocess.run(command(*argv, "--out", tmp_path / "whole.pt"), check=True, capture_output=True)
    cut, random = tmp_path / "cut.pt", np.random.default_rng(0)
    for _ in range(2):
        before = cut.stat().st_mtime_ns if cut.exists() else 0
        process = subprocess.Popen(command(*argv, "--out", cut, *(["--resume"] if before else [])), stdout=subprocess.DEVNULL)
        while process.poll() is None and not (cut.exists() and cut.stat().st_mtime_ns > before):
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.3))                # into the next steps, or the next save
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 0 < checkpoint.load(cut)["step"] < 300
    subprocess.run(command(*argv, "--out", cut, "--resume"), check=True, capture_output=True)
    assert_same_run(tmp_path / "whole.pt", cut)


def test_sigterm_saves_says_where_and_exits_0_and_resuming_is_bit_identical(tmp_path):
    argv = [*TINY, "--steps", 160, "--sample-every", 1000, "--save-every", 1000]
    subprocess.run(command(*argv, "--out", tmp_path / "whole.pt"), check=True, capture_output=True)
    process = subprocess.Popen(command(*argv, "--out", tmp_path / "cut.pt"), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "about" in line:                              # printed after ten steps
            break
    process.send_signal(signal.SIGTERM)
    said = process.stdout.read()
    assert process.wait() == 0 and "saved" in said and "--resume --out" in said
    assert 10 <= checkpoint.load(tmp_path / "cut.pt")["step"] < 160
    train.main(["--resume", "--out", str(tmp_path / "cut.pt")])          # no other flag is needed
    assert_same_run(tmp_path / "whole.pt", tmp_path / "cut.pt")


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path, first_step):
    start, plain = first_step
    assert_same_gradients(plain, gradients(second_step(start, tmp_path / "four.pt", "--accumulate", "4")))


@pytest.mark.parametrize("launch", ["accumulated", "two processes"])
def test_twelve_steps_stay_within_a_thousandth_however_the_batch_is_split(tmp_path, launch):
    argv = ["--steps", "12", "--sample-every", "1000"]
    one = checkpoint.load(trained(tmp_path / "one.pt", *argv))["model"]
    out = tmp_path / "split.pt"
    if launch == "accumulated":
        trained(out, *argv, "--accumulate", "4")
    else:
        subprocess.run(command(*TINY, *argv, "--out", out, launcher=TORCHRUN), check=True, capture_output=True)
    other = checkpoint.load(out)["model"]
    # weight matrices only: the keys' biases have no gradient but rounding, which Adam scales up to full steps
    for name in (name for name in one if one[name].ndim > 1):
        assert (one[name] - other[name]).norm() <= 1e-3 * one[name].norm(), name


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_two_processes_exchange_the_gradient_of_the_whole_batch(tmp_path, first_step, micro_batches):
    start, plain = first_step
    out = shutil.copy(start, tmp_path / "two.pt")
    subprocess.run(command("--resume", "--steps", 2, "--accumulate", micro_batches, "--out", out, launcher=TORCHRUN), check=True,
                   capture_output=True)
    assert_same_gradients(plain, gradients(out))


def test_training_lowers_the_loss_and_logs_every_fifty_steps(tmp_path):
    run = trained(tmp_path / "run.pt", "--steps", "150", "--warmup", "20", "--sample-every", "1000")
    rows = rows_of(run)
    assert rows[0] == "step,images,loss,loss_q1,loss_q2,loss_q3,loss_q4,grad_norm,lr".split(",")
    assert [int(row[0]) for row in rows[1:]] == [50, 100, 150] and [int(row[1]) for row in rows[1:]] == [400, 800, 1200]
    losses = [float(row[2]) for row in rows[1:]]
    # an untrained network outputs 0, whose error is the digits' mean square, 0.94
    assert losses[0] > losses[1] > losses[2] and losses[2] < 0.6
    assert float(rows[-1][8]) < 1e-6                       # the learning rate has fallen to 0


def test_a_picture_and_a_usable_checkpoint_stand_beside_the_csv(tiny_run):
    with Image.open(tiny_run.with_suffix(".png")) as image:
        assert image.size == (10 * (64 + 2) + 2, 8 * (64 + 2) + 2)       # ten columns of eight, magnified twice
    run = checkpoint.load(tiny_run)
    assert run["step"] == 4 and run["data"]["classes"] == [str(digit) for digit in range(10)]
    assert run["config"]["lr"] == train.LAPTOP["lr"] and run["network"]["class"] == "DiT"
    assert not tiny_run.with_suffix(".lock").exists()


@pytest.mark.parametrize("conditioning", dit.BLOCKS)
def test_each_block_design_trains_and_samples(tmp_path, conditioning):
    run = trained(tmp_path / "run.pt", "--steps", "2", "--conditioning", conditioning, "--variance", "learned")
    sample.main(["--ckpt", str(run), "--n", "2", "--steps", "2", "--out", str(tmp_path / "samples.png")])
    assert (tmp_path / "samples.png").exists()


def test_rectangles_without_labels_train_and_sample(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    run = trained(tmp_path / "run.pt", "--data", str(tmp_path / "images.npz"), "--steps", "2", "--flip", "--shift", "2")
    sample.main(["--ckpt", str(run), "--n", "3", "--steps", "2", "--npz", str(tmp_path / "s.npz"), "--out", str(tmp_path / "s.png")])
    with np.load(tmp_path / "s.npz") as archive:
        assert archive["arr_0"].shape == (3, 16, 32, 3) and "arr_1" not in archive


def test_without_dropped_labels_there_is_no_null_class(tmp_path):
    run = checkpoint.load(trained(tmp_path / "run.pt", "--steps", "1", "--cfg-drop", "0"))
    assert len(run["model"]["y_embedder.embedding_table.weight"]) == 10
    assert checkpoint.build(run)[0].null_label is None


def test_a_bad_flag_is_refused_before_the_data_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(train.data, "load", lambda *args, **kwargs: pytest.fail("the data was read"))
    for flags in (["--size", "XXL/2"], ["--model", "uvit", "--variance", "learned"], ["--model", "unet", "--size", "ldm-4"], ["--hybrid"]):
        with pytest.raises(SystemExit):
            train.main([*flags, "--out", str(tmp_path / "run.pt")])


def test_activation_checkpointing_changes_no_gradient(tmp_path, first_step):
    start, plain = first_step
    saved = gradients(second_step(start, tmp_path / "saved.pt", "--checkpointing"))
    assert all(torch.equal(plain[name], saved[name]) for name in plain)


def test_bf16_autocast_gives_nearly_the_same_gradient(tmp_path, first_step):
    start, plain = first_step
    rough = gradients(second_step(start, tmp_path / "rough.pt", "--precision", "bf16"))
    # bfloat16 keeps 8 bits: 0.4 % a rounding, and a few dozen roundings on the way
    assert all((plain[name] - rough[name]).norm() < 0.1 * plain[name].norm() for name in plain if name.endswith("weight"))
    assert any(not torch.equal(plain[name], rough[name]) for name in plain)


def test_non_finite_gradients_leave_weights_and_moments_unchanged():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 3)), torch.nn.Parameter(torch.randn(3))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)

    def step(gradients):
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient.clone()
        return train.guarded_step(optimizer, parameters, clip=1.0)
    good = [torch.randn(3, 3), torch.randn(3)]
    assert step(good)[1] == 1
    before = [tensor.clone() for p in parameters for tensor in (p, *optimizer.state[p].values())]
    for poison in (math.nan, math.inf):
        assert step([good[0], torch.tensor([1.0, poison, 0.0])])[1] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, (tensor for p in parameters for tensor in (p, *optimizer.state[p].values()))))
    assert step(good)[1] == 1 and not torch.equal(before[0], parameters[0])


def test_ten_bad_steps_in_a_row_end_the_run_and_leave_the_last_save(tmp_path, capsys, monkeypatch):
    honest = Denoising.loss

    def poisoned(self, model, *batch):
        poisoned.calls += 1
        losses, groups = honest(self, model, *batch)
        return losses * (math.nan if poisoned.calls > 30 else 1), groups
    poisoned.calls = 0
    monkeypatch.setattr(Denoising, "loss", poisoned)
    with pytest.raises(SystemExit) as stop:
        trained(tmp_path / "run.pt", "--steps", "100", "--save-every", "30", "--sample-every", "1000")
    assert stop.value.code == 2 and "20 steps in a row" in capsys.readouterr().err
    run = checkpoint.load(tmp_path / "run.pt")
    assert run["step"] == 30 and all(value.isfinite().all() for value in run["model"].values())


def test_ema_is_its_closed_sum_and_copies_buffers():
    network, ema = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    values, decay = [1.0, -2.0, 0.5, 3.0], 0.3
    with torch.no_grad():
        ema.weight.fill_(7.0)
        for k, value in enumerate(values):
            network.weight.fill_(value)
            network.running_mean.fill_(value)
            train.update_ema(ema, network, k, decay, torch.tensor(1.0))
    kept = [min(decay, (1 + k) / (10 + k)) for k in range(4)]            # 0.1, 0.18, 0.25, 0.3: the warm-up
    weights = [(1 - kept[k]) * math.prod(kept[k + 1:]) for k in range(4)]
    expected = 7.0 * math.prod(kept) + sum(w * value for w, value in zip(weights, values))
    assert torch.allclose(ema.weight, torch.full((3,), expected)) and torch.equal(ema.running_mean, torch.full((3,), 3.0))


def test_ema_ignores_a_step_that_was_not_taken():
    network, ema = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    before = ema.weight.detach().clone()
    train.update_ema(ema, network, 5, 0.9, torch.tensor(0.0))
    assert torch.equal(ema.weight, before)


@given(st.integers(0, 50), st.integers(51, 400), st.sampled_from(["none", "cosine"]))
def test_the_learning_rate_rises_linearly_and_falls_to_nothing_or_not_at_all(warmup, steps, decay):
    args = train.argparse.Namespace(lr=2.0, warmup=warmup, decay=decay, steps=steps)
    rates = [train.learning_rate(step, args) for step in range(steps)]
    assert all(0 < rate <= 2.0 for rate in rates)
    if decay == "none":
        assert rates[warmup:] == [2.0] * (steps - warmup)
        assert np.allclose(np.diff([0.0, *rates[:warmup]]), 2.0 / max(1, warmup))
    else:
        assert all(a > b for a, b in zip(rates[warmup:], rates[warmup + 1:])) and rates[-1] < 2.0 * (4 / steps) ** 2
        assert train.learning_rate(steps, args) < 1e-12


def settings_of(*argv):
    return train.settings([*TINY, *argv])[0]


def test_resuming_drops_rows_beyond_the_checkpoint_and_half_a_row(tmp_path):
    args = settings_of("--out", str(tmp_path / "run.pt"))
    names, row = "step,images,loss,loss_q1,loss_q2,loss_q3,loss_q4,grad_norm,lr,images_per_s", ",1,1,1,1,1,1,1,1,1"
    (tmp_path / "run.csv").write_text(f"{names}\n50{row}\n100{row}\n150{row}\n200,1,1")
    train.Log(tmp_path / "run.csv", args, Denoising, 120, torch.zeros(2, 4), 0)
    assert (tmp_path / "run.csv").read_text() == f"{names}\n50{row}\n100{row}\n"


def test_scores_that_are_new_or_given_up_on_resuming_leave_their_columns_empty(tmp_path):
    args, old = settings_of("--out", str(tmp_path / "run.pt")), tmp_path / "run.csv"
    old.write_text("step,images,loss,FD[old],grad_norm,lr,images_per_s\n50,400,1,7,2,3,4\n")
    objective = Namespace(groups=(), scores=("accuracy",))
    log = train.Log(old, args, objective, 50, torch.zeros(2, 1), 0)
    log.add(torch.tensor([0.5]), torch.tensor([0]))
    log.scores["accuracy"] = 0.75
    log.write(log.sums.clone(), 100, torch.tensor(2.0))
    with open(old, newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["FD[old]"], first["accuracy"], first["loss"]) == ("7", "", "1")
    assert (second["FD[old]"], second["accuracy"], float(second["loss"])) == ("", "0.75", 0.5)


def test_eval_every_writes_the_scores_of_the_averaged_weights_into_the_log(tmp_path):
    out = trained(tmp_path / "run.pt", "--steps", "4", "--eval-every", "2", "--eval-n", "20", "--sample-every", "3")
    with open(out.with_suffix(".csv"), newline="") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    scored = [step for step, row in rows.items() if row["FD[vit-mnist]"]]
    assert sorted(rows) == [2, 3, 4] and scored == [2, 4]
    dataset, run = data.load(), checkpoint.load(out)
    space = features.space_of(str(features.JUDGE), torch.device("cpu"))
    real = evaluate.measure_reference(dataset, space, "mnist").measured
    again = evaluate.score_network(*checkpoint.build(run), real, space, 20, dataset.classes)
    assert again == pytest.approx({metric: float(rows[4][space.title(metric)]) for metric in again}, rel=1e-5)      # 8 digits


def test_evaluating_changes_nothing_that_is_trained(tmp_path):
    one = trained(tmp_path / "one.pt", "--steps", "4")
    other = trained(tmp_path / "other.pt", "--steps", "4", "--eval-every", "2", "--eval-n", "4")
    first, second = (checkpoint.load(path)["model"] for path in (one, other))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_quarter_of_t_without_samples_is_left_empty_and_a_skipped_one_does_not_spread(tmp_path):
    args = settings_of("--out", str(tmp_path / "run.pt"), "--steps", "5")
    log = train.Log(tmp_path / "run.csv", args, Denoising, 0, torch.zeros(2, 4), 0)
    log.add(torch.tensor([1.0, math.nan, 3.0]), torch.tensor([0, 1, 0]))
    log.write(log.sums.clone(), 1, torch.tensor(2.0))
    row = rows_of(tmp_path / "run.pt")[1]
    assert float(row[3]) == 2.0 and [math.isnan(float(value)) for value in row[4:7]] == [True] * 3


def test_the_embedded_recipe_is_the_default(tmp_path):
    args, run = train.settings(["--out", str(tmp_path / "run.pt")])
    assert (args.model, args.size, args.data, args.prediction) == ("dit", "Ti/8", "mnist", "x0") and run is None
    paper = train.settings(["--size", "B/4", "--out", str(tmp_path / "run.pt")])[0]
    assert (paper.lr, paper.batch_size, paper.variance, paper.steps, paper.ema) == (1e-4, 256, "learned", 400_000, 0.9999)


@pytest.mark.parametrize("model, size, recipe", [
    ("uvit", None, train.LAPTOP), ("uvit", "S-deep/2", train.UVIT), ("unet", "ddpm-cifar10", train.DDPM), ("unet", "S", train.DDPM),
    ("unet", "iddpm-64", train.IDDPM), ("unet", "adm-256", train.DIT), ("dit", "Ti/4", train.LAPTOP)])
def test_what_flags_leave_out_takes_the_recipe_of_the_model_and_size(tmp_path, model, size, recipe):
    given = ["--model", model, *(["--size", size] if size else []), "--out", str(tmp_path / "run.pt")]
    args = vars(train.settings(given)[0])
    assert recipe.items() <= args.items() and args["size"] == (size or train.DEFAULT_SIZE[model])


@pytest.mark.parametrize("size, rate", [("Ti/8", train.TEXT_LR), ("S/2", train.UVIT["lr"])])
def test_captions_are_learned_at_a_rate_that_is_not_above_theirs(tmp_path, size, rate):
    given = ["--model", "uvit", "--size", size, "--data", "shapes", "--out", str(tmp_path / "run.pt")]
    assert train.settings([*given, "--text"])[0].lr == rate <= train.settings(given)[0].lr
    assert train.settings([*given, "--text", "--lr", "1"])[0].lr == 1


@pytest.mark.gpu
def test_a_gpu_trains_in_bf16_and_samples(tmp_path):
    train.main(["--size", "Ti/8", "--steps", "60", "--precision", "bf16", "--device", "cuda", "--out", str(tmp_path / "run.pt")])
    assert float(rows_of(tmp_path / "run.pt")[-1][2]) < 0.9
    sample.main(["--ckpt", str(tmp_path / "run.pt"), "--n", "10", "--out", str(tmp_path / "samples.png")])


# Autoencoders and their latents

def saved_autoencoder(path, seed=0, **changes):
    """A run of an untrained autoencoder of f = 2, written as train.py would."""
    torch.manual_seed(seed)
    arguments = dict(channels=1, dim=32, multipliers=(1, 2), res_blocks=1) | changes
    state = models.build(described := {"class": "AutoencoderKL", "arguments": arguments}).state_dict()
    checkpoint.save(path, dict(version=checkpoint.VERSION, step=1, config={}, network=described, diffusion=None, data={},
                               vae={"scale": 0.5}, model=state, ema=state, optimizer={}))
    return str(path)


@pytest.fixture
def latent(small, tmp_path):
    """Flags of a DiT on 4 x 4 x 4 latents of the small images; the autoencoder is vae.pt."""
    return [*small, "--vae", saved_autoencoder(tmp_path / "vae.pt"), "--size", "Ti/2", "--decay", "none", "--sample-every", "1000",
            "--cache", str(tmp_path / "cache")]


def refused(capsys, *argv):
    """The one line that a command line of train.py gets."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main(list(map(str, argv)))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    return error


def images_of(tmp_path, run, *argv):
    """What sample.py writes of a run without --vae, or with what argv says."""
    npz = tmp_path / "drawn.npz"
    npz.unlink(missing_ok=True)
    sample.main(["--ckpt", str(run), "--n", "3", "--steps", "2", "--out", str(tmp_path / "drawn.png"), "--npz", str(npz), *argv])
    with np.load(npz) as archive:
        return archive["arr_0"]


def test_an_autoencoder_learns_to_give_images_back_and_logs_its_held_out_psnr(tmp_path):
    ramps = np.linspace(-100, 100, 8)
    rng = np.random.default_rng(0)
    pixels = 128 + rng.uniform(-1, 1, (64, 1, 1)) * ramps
    np.savez(tmp_path / "images.npz", arr_0=np.broadcast_to(pixels, (64, 8, 8)).astype(np.uint8))
    run = tmp_path / "vae.pt"
    train.main(["--model", "vae", "--data", str(tmp_path / "images.npz"), "--steps", "40", "--batch-size", "8", "--warmup", "5",
                "--device", "cpu", "--ema", "0", "--sample-every", "10", "--out", str(run)])
    rows = rows_of(run)
    assert rows[0] == ["step", "images", "loss", "psnr", "grad_norm", "lr"]
    losses, scores = ([float(row[i]) for row in rows[1:]] for i in (2, 3))
    assert losses[0] > losses[1] > losses[3] and losses[3] < 0.5 * losses[0] and scores[3] > scores[0] + 3
    content = checkpoint.load(run)
    assert content["diffusion"] is None and content["network"]["class"] == "AutoencoderKL" and run.with_suffix(".png").exists()
    assert checkpoint.load_autoencoder(run).scale == content["vae"]["scale"] > 0


def test_a_latent_run_resumes_bit_for_bit_and_encodes_once(tmp_path, latent, monkeypatch):
    argv = [*latent, "--flip", "--sample-every", "2"]
    train.main([*argv, "--steps", "4", "--out", str(tmp_path / "whole.pt")])
    monkeypatch.setattr(latents, "write_record", lambda *args: pytest.fail("encoded again"))
    train.main([*argv, "--steps", "2", "--out", str(tmp_path / "cut.pt")])
    train.main(["--resume", "--steps", "4", "--out", str(tmp_path / "cut.pt")])
    assert_same_run(tmp_path / "whole.pt", tmp_path / "cut.pt")
    first, second = checkpoint.load(tmp_path / "whole.pt"), checkpoint.load(tmp_path / "cut.pt")
    assert first["vae"].keys() == second["vae"].keys() and first["vae"]["sha256"] == second["vae"]["sha256"]
    assert (first["data"]["channels"], first["data"]["image_size"]) == (4, [4, 4])
    with Image.open(tmp_path / "cut.png") as picture:
        assert picture.size == (3 * 66 + 2, 8 * 66 + 2)  # decoded: images of 8 x 8 pixels, magnified, of three classes


def test_a_latent_run_trains_on_what_the_objective_draws_and_not_on_pixels(tmp_path, latent, monkeypatch):
    seen, original = [], Denoising.draw

    def recorded(self, step, images, labels, part):
        batch = original(self, step, images, labels, part)
        seen.append((images.shape, batch[0]))
        return batch
    monkeypatch.setattr(Denoising, "draw", recorded)
    train.main([*latent, "--steps", "3", "--out", str(tmp_path / "run.pt")])
    assert [shape for shape, _ in seen] == [(8, 1, 2, 4, 4, 4)] * 3
    autoencoder = checkpoint.load_autoencoder(tmp_path / "vae.pt")
    with torch.no_grad():
        mean, log_variance = autoencoder.encode(data.to_float(data.load(latent[1]).batch(np.arange(22))[0]))
    # the run's 24 latents: mean and deviation of all of the data's, times the scale of 0.5
    second_moment = (mean.square() + log_variance.exp()).mean().item()
    assert torch.stack([x for _, x in seen]).square().mean().item() == pytest.approx(0.25 * second_moment, rel=0.2)


def test_a_latent_run_carries_a_small_autoencoder_and_samples_without_any_flag(tmp_path, latent):
    run = tmp_path / "run.pt"
    train.main([*latent, "--steps", "2", "--out", str(run)])
    torch.load(run, weights_only=True)
    kept, autoencoder = checkpoint.load(run)["vae"], checkpoint.load_autoencoder(tmp_path / "vae.pt")
    assert set(kept) == {"path", "sha256", "scale", "network", "model"} and kept["scale"] == 0.5
    assert kept["path"] == str(tmp_path / "vae.pt") and kept["sha256"] == files.sha256_of(tmp_path / "vae.pt")
    assert all(torch.equal(value, autoencoder.state_dict()[name]) for name, value in kept["model"].items())
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
    torch.load(run, weights_only=True)
    assert set(checkpoint.load(run)["vae"]) == {"path", "sha256", "scale"}
    images = images_of(tmp_path, run)                    # the file is where it was
    assert images.shape == (3, 8, 8, 1)
    (tmp_path / "vae.pt").rename(moved)
    capsys.readouterr()
    assert images_of(tmp_path, run).shape == (3, 4, 4, 4)
    assert "without --vae FILE they are written as they are" in capsys.readouterr().out
    assert np.array_equal(images_of(tmp_path, run, "--vae", str(moved)), images)
    for other in (saved_autoencoder(tmp_path / "other.pt", seed=1), None):
        saved_autoencoder(tmp_path / "vae.pt", seed=1)   # by its name, or where the right one was
        with pytest.raises(SystemExit) as stopped:
            images_of(tmp_path, run, *(["--vae", other] if other else []))
        assert stopped.value.code == 2 and "is another autoencoder than the network was trained with" in capsys.readouterr().err


def test_another_autoencoder_is_refused_on_resuming(tmp_path, latent, capsys):
    run = tmp_path / "run.pt"
    train.main([*latent, "--steps", "1", "--out", str(run)])
    other, before = saved_autoencoder(tmp_path / "other.pt", seed=1), run.read_bytes()
    refused(capsys, "--resume", "--steps", 2, "--vae", other, "--out", run)
    shutil.copy(other, tmp_path / "vae.pt")
    assert "is another autoencoder than the run in" in refused(capsys, "--resume", "--steps", 2, "--out", run)
    assert run.read_bytes() == before


def test_what_does_not_go_with_latents_is_refused(tmp_path, latent, tiny_run, capsys):
    out = ["--out", tmp_path / "run.pt"]
    assert "--shift: it moves pixels, and --vae encodes them once" in refused(capsys, *latent, "--shift", 2, *out)
    for model in ("vit", "vae"):
        assert "--vae: " in refused(capsys, *latent, "--model", model, *out)
    assert ("image size 4 is not a multiple of patch size 3: use 3 or 6; of latents: an image's side is 2 times that"
            in refused(capsys, *latent, "--size", "Ti/3", *out))
    colour = saved_autoencoder(tmp_path / "colour.pt", channels=3)
    for path, said in ((features.JUDGE, "it holds a ViT, which is no autoencoder"), (tiny_run, "it holds a DiT"),
                       (colour, "takes images of 3 channels"), (tmp_path / "none.pt", "there is no such file")):
        assert said in refused(capsys, *latent, "--vae", path, *out)
    assert not (tmp_path / "run.pt").exists()


@pytest.fixture(scope="module")
def latent_32(tmp_path_factory):
    """The data, a run of latents of 32 x 32 grey images that was scored as it trained, and its cache."""
    folder = tmp_path_factory.mktemp("latent")
    np.savez(folder / "images.npz", arr_0=np.random.default_rng(0).integers(0, 256, (24, 32, 32, 1), dtype=np.uint8))
    autoencoder = saved_autoencoder(folder / "vae.pt", multipliers=(1, 1, 1))
    train.main(["--data", str(folder / "images.npz"), "--vae", autoencoder, "--size", "Ti/4", "--steps", "2", "--batch-size", "4",
                "--device", "cpu", "--cache", str(folder / "cache"), "--eval-every", "1", "--eval-n", "6", "--features",
                str(features.JUDGE), "--sample-every", "1000", "--out", str(folder / "run.pt")])
    return folder


def test_a_latent_run_is_scored_on_its_pixels_in_training_and_afterwards_without_any_flag(latent_32):
    run, judge = latent_32 / "run.pt", str(features.JUDGE)
    evaluate.main(["--ckpt", str(run), "--n", "6", "--features", judge, "--metrics", "FD", "--cache", str(latent_32 / "cache"),
                   "--results", str(latent_32 / "results.csv")])
    with open(latent_32 / "results.csv", newline="") as file, open(run.with_suffix(".csv"), newline="") as log:
        again, trained_rows = next(csv.DictReader(file)), list(csv.DictReader(log))
    space = features.space_of(judge, torch.device("cpu"))
    assert len(trained_rows) == 2
    assert float(trained_rows[1][space.title("FD")]) == pytest.approx(float(again["FD"]), rel=1e-4)      # 8 digits, other batches
