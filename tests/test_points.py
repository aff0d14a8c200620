"""points.py: the roll is a roll, the distance one of transport, and points go through the loop and the commands of images."""
import csv
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image
from refusals import refusal

import checkpoint
import data
import evaluate
import pictures
import sample
import train
from ddpm import Diffusion, linear_betas
from points import MEAN, MLP, NOISE, SCALE, TURNS, sliced_wasserstein, swiss_roll

SMALL = ["--data", "swissroll", "--batch-size", "64", "--device", "cpu"]


@pytest.fixture(scope="module")
def roll_run(tmp_path_factory):
    """run.pt of a network that was trained on the roll for 200 steps; its log and its picture are beside it."""
    out = tmp_path_factory.mktemp("roll") / "run.pt"
    train.main([*SMALL, "--steps", "200", "--batch-size", "256", "--out", str(out)])
    return out


@pytest.fixture
def network():
    torch.manual_seed(0)
    return MLP(dim=16, depth=2)


def cloud(n, seed=0, dim=2):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The roll

def test_a_points_radius_is_its_angle_up_to_whole_turns_and_the_noise():
    x, y = (swiss_roll(5000).double() * SCALE + torch.tensor(MEAN)).unbind(dim=1)
    radius, angle = torch.hypot(x, y), torch.atan2(y, x)
    off = (radius - angle + math.pi) % (2 * math.pi) - math.pi           # the noise along the radius, and 1 / radius of that across
    noise = NOISE * SCALE                                                # 0.28, at radii from 4.7 to 14
    assert abs(off.mean()) < 5 * noise / 5000 ** 0.5 + 0.02              # the radius of a noisy point is a little larger
    assert noise < off.std() < 1.05 * noise and off.abs().max() < 6 * noise


def test_the_angle_is_uniform_from_the_inner_end_to_the_outer():
    radius = (swiss_roll(5000).double() * SCALE + torch.tensor(MEAN)).norm(dim=1).sort().values
    uniform = torch.linspace(*TURNS, 5000)
    off = (radius - uniform)[250:-250]                                   # at the ends the noise shows
    assert off.abs().max() < 5 * 3 * math.pi * 0.5 / 5000 ** 0.5         # 5 standard deviations of the median, the largest


def test_the_constants_are_the_mean_and_the_common_deviation_by_quadrature():
    angle = np.linspace(*TURNS, 2_000_001)
    for k, coordinate in enumerate((angle * np.cos(angle), angle * np.sin(angle))):
        mean = np.trapezoid(coordinate, angle) / (3 * math.pi)
        deviation = math.sqrt(np.trapezoid((coordinate - mean) ** 2, angle) / (3 * math.pi)) / SCALE
        assert abs(mean - MEAN[k]) < 1e-6 and 0.95 < deviation < 1.01


def test_coordinates_have_mean_0_and_a_deviation_of_about_1():
    roll = swiss_roll(20_000)
    assert roll.mean(dim=0).abs().max() < 5 / 20_000 ** 0.5 and (roll.std(dim=0) - 1).abs().max() < 0.06


def test_a_seed_gives_the_same_points_and_another_seed_others():
    assert torch.equal(swiss_roll(10, 3), swiss_roll(10, 3)) and swiss_roll(10).dtype == torch.float32
    assert not torch.equal(swiss_roll(10, 3), swiss_roll(10, 4)) and swiss_roll(10).shape == (10, 2)


def test_the_data_set_holds_out_a_tenth_and_gives_floats_of_one_pixel():
    parts = {split: data.load("swissroll", split=split) for split in ("train", "test", "all")}
    rows = {split: dataset.batch(np.arange(len(dataset)))[0].flatten(1) for split, dataset in parts.items()}
    assert [len(rows[split]) for split in rows] == [18_000, 2_000, 20_000]
    together = {tuple(point) for split in ("train", "test") for point in rows[split].tolist()}
    assert together == {tuple(point) for point in rows["all"].tolist()} and len(together) == 20_000
    batch, labels = parts["train"].batch(np.array([5, 0, 5]))
    assert batch.shape == (3, 2, 1, 1) and batch.dtype == torch.float32 and labels is None
    assert torch.equal(batch[0], batch[2]) and torch.equal(data.to_float(batch), batch)
    assert (parts["train"].channels, parts["train"].image_size, parts["train"].num_classes) == (2, (1, 1), None)


# The distance

@given(n=st.integers(2, 6), seed=st.integers(0, 99))
def test_no_pairing_of_the_projections_is_shorter(n, seed):
    a, b = cloud(n, seed), cloud(n, seed + 100)
    best = [min(sum(abs(p[i] - q[k]) for i, k in enumerate(order)) / n for order in itertools.permutations(range(n)))
            for angle in (math.pi * i / 4 for i in range(4))
            for p, q in [[(z @ torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)).tolist() for z in (a, b)]]]
    assert sliced_wasserstein(a, b, directions=4) == pytest.approx(np.mean(best), rel=1e-12)


@given(seed=st.integers(0, 99), turn=st.integers(0, 255), shift=st.floats(-3, 3), scale=st.floats(0.1, 5))
def test_the_distance_does_not_see_order_and_common_motions_and_grows_with_the_scale(seed, turn, shift, scale):
    a, b = cloud(20, seed), cloud(20, seed + 100) + 0.5
    d = sliced_wasserstein(a, b)
    angle = math.pi * turn / 128                                         # takes the 128 directions to themselves
    rotation = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    assert d > 0 and sliced_wasserstein(a, a.flip(0)) == 0 and sliced_wasserstein(b, a.flip(0)) == pytest.approx(d, rel=1e-12)
    assert sliced_wasserstein(a @ rotation + shift, b @ rotation + shift) == pytest.approx(d, rel=1e-9)
    assert sliced_wasserstein(scale * a, scale * b) == pytest.approx(scale * d, rel=1e-9)


@given(seed=st.integers(0, 99))
def test_a_detour_is_no_shorter(seed):
    a, b, c = (cloud(15, seed + k) * (1 + k % 3) for k in (0, 100, 200))
    assert sliced_wasserstein(a, c) <= sliced_wasserstein(a, b) + sliced_wasserstein(b, c) + 1e-12


@given(x=st.floats(-2, 2), y=st.floats(-2, 2))
def test_a_shift_is_as_far_as_its_mean_projection(x, y):
    a = cloud(30)
    expected = 2 / math.pi * math.hypot(x, y)                            # the mean of |cos| over a turn
    assert sliced_wasserstein(a, a + torch.tensor([x, y])) == pytest.approx(expected, rel=1e-3, abs=1e-12)


# The network

def test_point_and_time_matter_and_batch_mates_do_not(network):
    x, t = cloud(4).float().reshape(4, 2, 1, 1), torch.tensor([0, 10, 500, 999])
    out = network(x, t)
    assert out.shape == x.shape
    assert torch.allclose(network(x[2:3], t[2:3]), out[2:3], atol=1e-6)          # float32 sums of 16 terms, in another order
    assert (network(x, t.flip(0)) - out).abs().amin(dim=(1, 2, 3)).min() > 1e-4
    for k in range(2):
        moved = x.clone()
        moved[:, k] += 0.1
        assert (network(moved, t) - out).abs().amax(dim=(1, 2, 3)).min() > 1e-4


def test_every_parameter_gets_a_gradient(network):
    x = cloud(8).float().reshape(8, 2, 1, 1)
    loss = Diffusion(linear_betas()).losses(network, x, torch.arange(8) * 100, None, x.flip(0))["loss"]
    loss.mean().backward()
    assert all(value.grad.abs().max() > 0 for value in network.parameters())


def test_points_have_no_condition(network):
    refusal(lambda: network(torch.zeros(1, 2, 1, 1), torch.zeros(1), torch.zeros(1, dtype=torch.long)), "no classes")
    assert network.num_classes is network.null_label is network.context_dim is None and not network.checkpointing


# The commands

def distances(run):
    """The column of a run's log."""
    with open(run.with_suffix(".csv"), newline="") as file:
        return [row["distance"] for row in csv.DictReader(file)]


def held_out():
    return data.load("swissroll", split="test").batch(np.arange(2000))[0].flatten(1)


def test_two_hundred_steps_bring_samples_nearer_to_the_roll_than_the_noise_they_come_from(roll_run):
    assert float(distances(roll_run)[-1]) < 0.75 * sliced_wasserstein(cloud(2000), held_out())


def test_the_logs_distance_is_that_of_what_sample_draws_whatever_its_batches(roll_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample.main(["--ckpt", str(roll_run), "--npz", "points.npz", "--batch-size", "700", "--device", "cpu"])
    with np.load("points.npz") as archive:
        drawn = torch.from_numpy(archive["arr_0"])
        assert archive.files == ["arr_0"]
    *earlier, last = distances(roll_run)
    assert drawn.shape == (2000, 2) and drawn.dtype == torch.float32 and set(earlier) == {""}
    assert float(last) == pytest.approx(sliced_wasserstein(drawn, held_out()), rel=1e-4)


def test_pictures_of_points_are_two_scatters_in_colours_of_their_own(roll_run, tmp_path):
    sample.main(["--ckpt", str(roll_run), "--n", "200", "--out", str(tmp_path / "s.png"), "--device", "cpu"])
    for path in (roll_run.with_suffix(".png"), tmp_path / "s.png"):
        picture = np.asarray(Image.open(path))
        left, right = np.split(picture.astype(int), 2, axis=1)
        blue = [(half[..., 2] - half[..., 0] > 60).sum() for half in (left, right)]
        assert picture.shape[2] == 3 and blue[0] == 0 and blue[1] > 200
    assert (left[40:400, 60:440] < 40).all(axis=2).sum() > 200           # the data, in black


def test_stopping_and_going_on_is_the_same_bit_for_bit(tmp_path):
    whole, halves = tmp_path / "whole.pt", tmp_path / "halves.pt"
    train.main([*SMALL, "--steps", "4", "--decay", "none", "--out", str(whole)])
    train.main([*SMALL, "--steps", "2", "--decay", "none", "--out", str(halves)])
    train.main(["--resume", "--steps", "4", "--out", str(halves)])
    one, other = checkpoint.load(whole), checkpoint.load(halves)
    assert one.data == other.data and (one.data.spec, one.data.channels, one.data.image_size) == ("swissroll", 2, [1, 1])
    torch.testing.assert_close((one.model, one.ema), (other.model, other.ema), rtol=0, atol=0)


@pytest.mark.parametrize("command, argv, words", [
    *((train, f"--model {model} --data {spec}", f"--model {model} --data {spec}") for model, spec in (
        ("mlp", "mnist"), *((model, "swissroll") for model in ("dit", "uvit", "unet", "vit", "vae")))),
    *((train, f"--data swissroll {flag}", flag.split()[0]) for flag in (
        "--vae vae.pt", "--flip", "--shift 1", "--image-size 32", "--eval-every 10", "--skip-bad", "--checkpointing", "--size B/4",
        "--variance learned", "--conditioning adaln")),
    (sample, "--ckpt {roll} --out folder/", "plot.py swissroll"), (sample, "--ckpt {roll} --trajectory a.gif", "plot.py swissroll"),
    (sample, "--ckpt {roll} --classes 3", "without labels"), (sample, "--ckpt {roll} --cfg-scale 2", "no unconditional input"),
    (evaluate, "--ckpt {roll}", "study.py roll"), (evaluate, "--ckpt {roll} --reference mnist", "points"),
    (evaluate, "--samples mnist --reference swissroll", "points"), (evaluate, "--samples swissroll --reference mnist", "points"),
])
def test_what_does_not_go_with_points_is_refused_before_the_work(tmp_path, roll_run, monkeypatch, capsys, command, argv,
                                                                 words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command.main(argv.format(roll=roll_run).split())
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and words in said, said
    assert not list(tmp_path.iterdir())


def test_points_have_no_image_size_and_sets_of_unequal_size_no_distance():
    refusal(lambda: data.load("swissroll", 32), "--image-size")
    refusal(lambda: sliced_wasserstein(cloud(3), cloud(4)), "3 and 4 points")


def test_the_window_of_pictures_shows_all_of_the_roll():
    assert swiss_roll(20_000).abs().max() < pictures.WINDOW[1] == -pictures.WINDOW[0]
