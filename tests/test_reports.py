"""reports.py: the log counts each loss once and training's time alone; pictures and held-out scores are those of the network."""
import csv
import math
import re
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import data
import reports
import train
from features import JUDGE
from objectives import Denoising
from reports import Log, accuracy_report, reconstruction_report

CPU = torch.device("cpu")
ARGS = Namespace(batch_size=8, steps=200, lr=1.0, warmup=0, decay="none")
NAMES, ROW = "step,images,loss,loss_q1,loss_q2,loss_q3,loss_q4,grad_norm,lr,images_per_s", ",1,1,1,1,1,1,1,1,1"


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# The log

def test_resuming_drops_rows_beyond_the_checkpoint_and_half_a_row(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text(f"{NAMES}\n50{ROW}\n100{ROW}\n150{ROW}\n200,1,1")
    Log(path, ARGS, Denoising.groups, (), 120, 0)
    assert path.read_text() == f"{NAMES}\n50{ROW}\n100{ROW}\n"


def test_scores_that_are_new_or_given_up_on_resuming_leave_their_columns_empty(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text("step,images,loss,FD[old],grad_norm,lr,images_per_s\n50,400,1,7,2,3,4\n")
    log = Log(path, ARGS, (), ("accuracy",), 50, 0)
    log.scores["accuracy"] = 0.75
    log.write(torch.tensor([[0.5], [1]]), 100, torch.tensor(2.0))
    first, second = rows_of(path)
    assert (first["FD[old]"], first["accuracy"], first["loss"]) == ("7", "", "1")
    assert (second["FD[old]"], second["accuracy"], float(second["loss"])) == ("", "0.75", 0.5)


def test_a_quarter_of_t_without_samples_is_left_empty_and_a_skipped_one_does_not_spread(tmp_path):
    log = Log(tmp_path / "run.csv", ARGS, Denoising.groups, (), 0, 0)
    state = train.State(torch.nn.Linear(1, 1), Namespace(lr=1.0, weight_decay=0.0), Denoising.groups, CPU)
    state.add_losses(torch.tensor([1.0, math.nan, 3.0]), torch.tensor([0, 1, 0]))
    log.write(state.sums, 1, torch.tensor(2.0))
    row = rows_of(tmp_path / "run.csv")[0]
    assert float(row["loss_q1"]) == 2.0 and all(math.isnan(float(row[f"loss_q{k}"])) for k in (2, 3, 4))


def test_rates_and_minutes_left_are_those_of_steps_without_pictures_scores_and_saves(tmp_path, monkeypatch, capsys):
    clock = [100.0]

    def lasting(seconds, function):
        def timed(*arguments):
            clock[0] += seconds
            return function(*arguments)
        return timed

    def step(state, *_):
        state.add_losses(torch.ones(12), torch.arange(12) % 4)
        state.taken += 1                                 # else there is nothing to save
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(train, "train_step", lasting(6, step))
    monkeypatch.setattr(checkpoint.Saves, "begin", lasting(500, checkpoint.Saves.begin))
    monkeypatch.setattr(train, "sample_report", lasting(7000, lambda *_: {}))
    monkeypatch.setattr(train, "sample_scores", lasting(90_000, lambda *_: {}))
    images, labels = data.load().batch(np.arange(60))
    np.savez(tmp_path / "digits.npz", arr_0=images, arr_1=labels)
    train.main(["--data", str(tmp_path / "digits.npz"), "--size", "Ti/16", "--batch-size", "12", "--device", "cpu", "--steps", "20",
                "--sample-every", "7", "--save-every", "3", "--eval-every", "4", "--eval-n", "4", "--features", str(JUDGE), "--out",
                str(tmp_path / "run.pt")])
    rows = rows_of(tmp_path / "run.csv")
    assert [int(row["step"]) for row in rows] == [4, 7, 8, 12, 14, 16, 20] and {row["images_per_s"] for row in rows} == {"2.0"}
    said = re.findall(r"([\d.]+) minutes (left|to go)", capsys.readouterr().out)
    left = {("%.1f" % (6 * (20 - int(row["step"])) / 60), "left") for row in rows}
    assert set(said) == left | {("1.0", "to go")}        # of ten steps


# Held-out scores and pictures

def labelled(n=200):
    """Digits' worth of images whose first pixel is 25 times their label, and whose others are random."""
    images = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 1), dtype=np.uint8)
    images[:, 0, 0, 0] = 25 * (np.arange(n) % 10)
    return data.Dataset("", images, np.arange(n) % 10, list("0123456789"))


def by_first_pixel(x):
    """Logits of the label that the first pixel says; but every seven is taken for a one."""
    label = data.to_uint8(x)[:, 0, 0, 0].long() // 25
    return torch.nn.functional.one_hot(torch.where(label == 7, 1, label), 10).float()


class Offset:
    """An autoencoder that gives images back with `error` added."""

    def __init__(self, error=0.0):
        self.error = error

    def encode(self, x):
        return x, torch.zeros_like(x)

    def decode(self, z):
        return z + self.error


def smooth(n=20, low=-0.7, high=0.7):
    """Grey images of one level each, from low to high."""
    return data.Dataset("", data.to_uint8(torch.linspace(low, high, n).reshape(n, 1, 1, 1).expand(-1, 1, 8, 8)).numpy())


def test_the_accuracy_is_the_share_of_right_guesses_and_the_picture_has_a_column_for_each_guess_mistakes_on_top(tmp_path):
    dataset = labelled()
    assert accuracy_report(dataset, CPU, by_first_pixel, tmp_path / "run.png") == {"accuracy": pytest.approx(0.9)}
    picture = np.asarray(Image.open(tmp_path / "run.png")).astype(int)
    tiles = [[picture[2 + 66 * i:66 + 66 * i:8, 2 + 66 * k:66 + 66 * k:8] for k in range(10)] for i in range(8)]     # 8 x 8 pixels
    said = [[tiles[i][k][0, 0] / 25 for k in range(10)] for i in range(8)]
    assert said[0] == [0, 7, 2, 3, 4, 5, 6, 128 / 25, 8, 9]              # ones that are sevens; nothing is taken for a seven
    images = [image[..., 0] for image in dataset.images[7::10]]          # the sevens
    assert all(any(np.array_equal(row[1], image) for image in images) and (row[7] == 128).all() for row in tiles)


def test_the_psnr_is_that_of_the_mean_square_error_over_all_held_out_images(tmp_path):
    error = torch.linspace(0.01, 0.2, 20).reshape(20, 1, 1, 1)           # pixels reach 0.9: nothing is clamped

    def score(error):
        return reconstruction_report(smooth(), CPU, Offset(error), tmp_path / "run.png")["psnr"]
    assert score(error) == pytest.approx(10 * np.log10(4 / error.square().mean().item()), rel=1e-5)
    assert score(error / 10) == pytest.approx(score(error) + 20, rel=1e-5) and score(0.0) == np.inf


def test_what_lies_outside_the_range_is_scored_as_it_is_shown(tmp_path):
    brighter, black = (reconstruction_report(smooth(low=1.0, high=1.0), CPU, Offset(error), tmp_path / "run.png")["psnr"]
                       for error in (5.0, -5.0))
    assert brighter == np.inf and black == pytest.approx(0.0, abs=1e-6)  # for white


def test_the_picture_shows_held_out_images_above_what_becomes_of_them(tmp_path):
    dataset = smooth()
    reconstruction_report(dataset, CPU, Offset(0.2), tmp_path / "run.png")
    picture = np.asarray(Image.open(tmp_path / "run.png"))
    assert picture.shape == (4 * 66 + 2, 10 * 66 + 2)                    # 20 images in rows of ten, magnified eight times
    changed = data.to_uint8(data.to_float(torch.from_numpy(dataset.images)) + 0.2).numpy()
    for i in range(20):
        row, column = i // 10 * 2, i % 10
        for shown, expected in ((row, dataset.images[i]), (row + 1, changed[i])):
            tile = picture[2 + 66 * shown:66 + 66 * shown:8, 2 + 66 * column:66 + 66 * column:8]
            assert np.array_equal(tile, expected[..., 0])


@pytest.mark.parametrize("report, dataset, network", [(accuracy_report, labelled(), by_first_pixel),
                                                      (reconstruction_report, smooth(200), Offset(0.1))])
def test_held_out_images_are_read_in_batches_that_are_halved_where_memory_is_full(tmp_path, monkeypatch, report, dataset, network):
    plain, asked, tried, batch = report(dataset, CPU, network, tmp_path / "a.png"), [], [], dataset.batch

    def small(function):
        def computed(x):
            tried.append(len(x))
            if len(x) > 10:
                raise torch.OutOfMemoryError("full")
            return function(x)
        return computed
    monkeypatch.setattr(dataset, "batch", lambda rows: asked.append(len(rows)) or batch(rows))
    network = small(network) if callable(network) else Namespace(encode=small(network.encode), decode=network.decode)
    assert report(dataset, CPU, network, tmp_path / "b.png") == pytest.approx(plain)
    assert max(asked) == reports.BATCH and tried[:5] == [64, 32, 16, 8, 8]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
