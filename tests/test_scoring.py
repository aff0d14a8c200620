"""scoring.py: scores in training are those of evaluate.py; a reference is measured once, then read from the cache bit for bit."""
import csv
from functools import partial

import numpy as np
import pytest
import torch

import checkpoint
import data
import dit
import evaluate
import features
import sampling
import scoring
import train
from metrics import Statistics
from test_train import SMALLER

CPU = torch.device("cpu")
JUDGE = str(features.JUDGE)


def extract(images):
    """Features that are a few pixels: five pooled ones, three spatial ones, and two probabilities."""
    pixels = images.flatten(1).float() / 255
    return dict(pool=pixels[:, 400:405], spatial=pixels[:, 500:503], probabilities=pixels[:, 400:402].softmax(dim=1))


SPACE = features.Space("pixels", 64 * "a", extract, None, CPU)
UNUSED = SPACE._replace(extract=None)                    # measuring in it is an error


def digits(n=40):
    """n held-out digits whose `reads` lists how many images each call of batch has read."""
    dataset = data.load(split="test")
    dataset.rows, dataset.reads, batch = dataset.rows[:n], [], dataset.batch
    dataset.batch = lambda indices: dataset.reads.append(len(indices)) or batch(indices)
    return dataset


def same(one, other):
    """Whether two References are equal bit for bit."""
    a, b = one.measured, other.measured
    pairs = [(a.rows, b.rows), *((getattr(x, name), getattr(y, name)) for x, y in ((a.pool, b.pool), (a.spatial, b.spatial))
                                 for name in ("mu", "sigma"))]
    return (a.n == b.n and one.floor == other.floor and one.floor.keys() == {"FD", "sFD"} and (one.order == other.order).all()
            and all(torch.equal(x, y) and x.dtype == y.dtype for x, y in pairs))


# The reference

def test_a_reference_is_measured_once_and_then_read_from_the_cache_bit_for_bit(tmp_path):
    dataset = digits()
    first = scoring.measure_reference(dataset, SPACE, "digits", cache=tmp_path)
    reads = len(dataset.reads)
    second = scoring.measure_reference(dataset, UNUSED, "digits", cache=tmp_path)
    assert same(first, second) and len(dataset.reads) == reads           # no image is read again
    assert first.measured.n == 40 and torch.equal(first.measured.rows, extract(dataset.batch(first.order)[0])["pool"])


@pytest.mark.parametrize("damage", [
    lambda whole: b"", lambda whole: b"hello", lambda whole: whole[:len(whole) // 2], lambda whole: whole[:-1],
    lambda whole: whole[:300] + bytes([whole[300] ^ 1]) + whole[301:]],
    ids=["empty", "text", "cut off", "a byte less", "a flipped bit"])
def test_a_damaged_reference_in_the_cache_is_measured_anew(tmp_path, damage):
    first = scoring.measure_reference(digits(), SPACE, "digits", cache=tmp_path)
    file, = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert same(scoring.measure_reference(digits(), SPACE, "digits", cache=tmp_path), first) and file.read_bytes() == whole


def test_other_images_another_space_or_another_number_is_another_reference(tmp_path, monkeypatch):
    changed = digits()
    changed.images = changed.images.copy()
    changed.images[changed.rows[7], 16, 16] ^= 1
    cases = [(digits(), SPACE), (changed, SPACE), (digits(39), SPACE), (digits(), SPACE._replace(name="other")),
             (digits(), SPACE._replace(sha256=64 * "b"))]
    for count, (dataset, space) in enumerate(cases, 1):
        assert scoring.measure_reference(dataset, space, "digits", cache=tmp_path).measured.n == len(dataset)
        assert len(list(tmp_path.iterdir())) == count
    monkeypatch.setattr(scoring, "REFERENCE_IMAGES", 10)                 # of which rows are kept
    few = scoring.measure_reference(digits(), SPACE, "digits", cache=tmp_path)
    assert len(few.measured.rows) == 10 and few.measured.n == 40


# Scores

def test_scores_of_a_network_are_those_of_the_command(tmp_path, monkeypatch, tiny_run):
    monkeypatch.chdir(tmp_path)
    images, labels = data.load().batch(np.arange(100))
    np.savez("real.npz", arr_0=images.numpy(), arr_1=labels.numpy())
    evaluate.main(["--ckpt", str(tiny_run), "--features", JUDGE, "--n", "20", "--reference", "real.npz", "--device", "cpu",
                   "--cache", "cache"])
    with open("results.csv", newline="") as file:
        row, = csv.DictReader(file)
    judge, real = features.space_of(JUDGE, CPU), data.load("real.npz", split="all")
    measured = scoring.measure_reference(real, judge, "real", cache="cache").measured
    for batch in (64, 7):                                # another batch may round a pixel by one grey level
        monkeypatch.setattr(scoring, "draw_images", partial(sampling.draw_images, batch_size=batch))
        found = scoring.score_network(*checkpoint.load(tiny_run).build(), measured, judge, 20, real.classes)
        assert found == pytest.approx({metric: float(row[metric]) for metric in found}, rel=1e-3)
        assert list(found) == ["IS", "FD", "precision", "recall", "accuracy"] == scoring.possible(judge, real.classes)
    assert scoring.possible(judge, None) == ["IS", "FD", "precision", "recall"]


@pytest.mark.parametrize("images", [True, False], ids=["with images", "statistics alone"])
def test_a_run_is_scored_against_the_file_that_evaluate_py_saved(tmp_path, monkeypatch, capsys, images):
    """The scores equal those against the data that the file was made of, which are not the training data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(dit.SIZES, "Ti", SMALLER)
    monkeypatch.setattr(sampling, "STEPS", 2)
    for name, split in (("learned", "train"), ("other", "test")):
        pixels, labels = data.load(split=split).batch(np.arange(60))
        np.savez(f"{name}.npz", arr_0=pixels.numpy(), arr_1=labels.numpy())
    evaluate.main(["--reference", "other.npz", "--save-reference", "saved.npz", "--features", JUDGE, "--cache", "cache"])
    if not images:
        with np.load("saved.npz") as archive:
            np.savez("saved.npz", **{key: archive[key] for key in archive if key != "arr_0"})
    train.main(["--data", "learned.npz", "--size", "Ti/16", "--steps", "2", "--batch-size", "8", "--device", "cpu", "--cache",
                "cache", "--eval-every", "2", "--eval-n", "8", "--features", JUDGE, "--reference", "saved.npz"])
    with open("run.csv", newline="") as file:
        *_, row = csv.DictReader(file)
    judge, other = features.space_of(JUDGE, CPU), data.load("other.npz", split="all")
    real = scoring.measure_reference(other, judge, "other", cache="cache").measured
    expected = scoring.score_network(*checkpoint.load("run.pt").build(), real, judge, 8, other.classes)
    if not images:
        del expected["precision"], expected["recall"]
    scored = {key: float(value) for key, value in row.items() if key.endswith("[vit-mnist]")}
    assert scored == pytest.approx({judge.title(metric): value for metric, value in expected.items()}, rel=1e-5)     # 8 digits
    assert "warning: 8 samples of 64 features have a singular covariance" in capsys.readouterr().err


# Too few samples

def warn(n, wanted=("IS", "FD", "sFD"), there=100):
    """What is said of n samples against as many real images as are there, in five pooled and three spatial features."""
    pool, spatial = (Statistics(there, torch.zeros(D), torch.eye(D)) for D in (5, 3))
    scoring.warn_of_few(wanted, n, features.Measured(there, pool, spatial))


@pytest.mark.parametrize("n, there, warned", [(3, 100, (5, 3)), (4, 100, (5,)), (5, 100, (5,)), (6, 100, ()), (100, 5, (5,))])
def test_scores_in_training_warn_of_each_distance_of_no_more_samples_than_features(capsys, n, there, warned):
    warn(n, there=there)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" have")[0] for line in lines] == [f"warning: {min(n, there)} samples of {D} features" for D in warned]


def test_scores_without_a_distance_warn_of_nothing(capsys):
    warn(3, ("IS", "precision"))
    assert capsys.readouterr().err == ""


def test_one_process_of_many_warns(capsys, monkeypatch):
    monkeypatch.setattr(scoring, "place", lambda: (1, 2))
    warn(3)                                              # a file's statistics are known to all of them
    assert capsys.readouterr().err == ""
