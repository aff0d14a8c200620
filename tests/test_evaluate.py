"""evaluate.py: a row of scores says what was measured and how, and depends on nothing else.

Samples are drawn once and found again; the same images have the same scores however they come; real digits score as real ones
do, noise as noise; and what cannot be scored ends in one line and exit status 2.
"""
import csv
import io
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import data
import dit
import evaluate
import features
import inception
import sample
import vit
from files import cache_folder

ROOT = Path(__file__).parents[1]
JUDGE = str(features.JUDGE)
HERE = ["--device", "cpu", "--cache", "cache"]
DRAW = ["--ckpt", "run.pt", "--features", JUDGE, "--steps", "2"]


@pytest.fixture(scope="module")
def judge():
    return features.space_of(JUDGE, torch.device("cpu"))


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_run, judge):
    """real.npz, 200 digits; fake.npz, 80 held-out ones; noise.npz; stats.npz, of real.npz alone; run.pt, taught real.npz."""
    folder = tmp_path_factory.mktemp("files")
    real, fake = (data.load(split=split).batch(np.arange(n)) for split, n in (("train", 200), ("test", 80)))
    for name, (images, labels) in (("real", real), ("fake", fake)):
        np.savez(folder / f"{name}.npz", arr_0=images.numpy(), arr_1=labels.numpy())
    np.savez(folder / "noise.npz", arr_0=np.random.default_rng(0).integers(0, 256, (80, 32, 32, 1), dtype=np.uint8))
    features.save_statistics(folder / "stats.npz", features.measure(real[0].split(64), judge), real[0], judge)
    without_images(folder / "stats.npz")
    run = checkpoint.slim(checkpoint.load(tiny_run))
    run["data"]["spec"] = "real.npz"
    checkpoint.save(folder / "run.pt", run)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, files):
    """A folder of these files to work in."""
    for path in files.glob("*.npz"):
        shutil.copy(path, tmp_path)
    os.link(files / "run.pt", tmp_path / "run.pt")       # large; checkpoint.save would replace the link
    monkeypatch.chdir(tmp_path)
    return tmp_path


def without_images(path):
    with np.load(path) as archive:
        tables = {key: archive[key] for key in archive if not key.startswith("arr_")}
    np.savez(path, **tables)


def rows(path="results.csv"):
    """The rows of a results file, numbers as numbers."""
    def value(text):
        try:
            return float(text)
        except ValueError:
            return text
    with open(path, newline="") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def evaluated(*argv):
    """The row that a command adds."""
    evaluate.main([*argv, *HERE])
    return rows()[-1]


def scores_of(row, but=()):
    return {metric: row[metric] for metric in (*evaluate.METRICS, "FD_floor") if row[metric] != "" and metric not in but}


def cached(name):
    """A file, by its name, of the only samples in the cache."""
    found, = Path("cache").glob(f"run-samples-*/{name}.npy")
    return found


def pixels(n):
    """The samples in the cache, all n of them."""
    return np.load(cached("images")).reshape(n, 32, 32, 1)


def put(images, name="images"):
    """Other pixels for some samples in the cache, or another record of which are there, by their numbers."""
    table = np.load(cached(name), mmap_mode="r+")
    for i, image in images.items():
        table[i] = image


@pytest.fixture
def digit(files):
    """A real one."""
    with np.load(files / "real.npz") as archive:
        return archive["arr_0"][0]


# Samples of a run

def test_a_run_is_scored_against_its_training_part_in_a_table_and_a_row(here, capsys):
    row = evaluated(*DRAW, "--n", "12", "--seed", "3")
    text = capsys.readouterr().out.splitlines()
    assert text[0] == "samples     12 of run.pt at step 4, dpm++, 2 steps, guidance 1.5, seed 3"
    assert text[1] == "reference   180 of real.npz, training part"
    assert text[2] == f"features    vit-mnist, weights {features.sha256_of(JUDGE)[:8]}"
    names = [line.split()[0] for line in text[4:]]
    assert names == [f"{metric}[vit-mnist]" for metric in ("IS", "FD", "precision", "recall", "accuracy")]
    assert text[5].endswith(f"   two halves of the reference, 90 images each: {row['FD_floor']:.3f}")
    assert text[5].split()[1] == f"{row['FD']:.3f}" and row["FD"] > row["FD_floor"] > 0
    assert 1 <= row["IS"] <= 10 and all(0 <= row[metric] <= 1 for metric in ("precision", "recall", "accuracy"))
    expected = dict(samples="run.pt", step=4, n=12, reference="real.npz", reference_n=180, features="vit-mnist", sFD="",
                    features_sha256=features.sha256_of(JUDGE), cfg_scale=1.5, sampler="dpm++", steps=2, seed=3,
                    torch=torch.__version__, numpy=np.__version__)
    assert {key: row[key] for key in expected} == expected
    assert list(row) == list(evaluate.COLUMNS)
    assert evaluated(*DRAW, "--n", "12", "--seed", "3") == row and rows() == [row, row]  # under one header


def test_samples_are_those_of_sample_py(here):
    drawing = ["--ckpt", "run.pt", "--steps", "2", "--n", "5", "--classes", "3,7", "--cfg-scale", "2", "--sampler", "ddim",
               "--seed", "1", "--batch-size", "2", "--device", "cpu"]
    row = evaluated(*drawing, "--features", JUDGE)
    sample.main([*drawing, "--npz", "drawn.npz"])
    with np.load("drawn.npz") as archive:
        assert (pixels(5) == archive["arr_0"]).all() and archive["arr_0"].any(axis=(1, 2, 3)).all()
    assert (row["cfg_scale"], row["sampler"], row["steps"], row["seed"]) == (2, "ddim", 2, 1)


def test_what_was_drawn_is_not_drawn_again_and_more_is_added_to_it(here, digit):
    first, before = evaluated(*DRAW, "--n", "6"), pixels(6)
    put({2: digit})                                      # a mark
    assert evaluated(*DRAW, "--n", "6")["FD"] != first["FD"] and (pixels(6)[2] == digit).all()       # it was scored, and stayed
    more, now = evaluated(*DRAW, "--n", "9"), pixels(9)
    assert more["n"] == 9 and (now[2] == digit).all() and now[8].any()
    assert (np.delete(now[:6], 2, 0) == np.delete(before, 2, 0)).all()
    put({2: before[2]})
    assert evaluated(*DRAW, "--n", "6") == first         # a smaller n takes the first
    assert np.load(cached("done")).tolist() == [1] * 9 and (pixels(9)[6:] == now[6:]).all()


def test_a_killed_drawing_goes_on_with_what_is_missing(here, digit):
    first, before = evaluated(*DRAW, "--n", "8", "--batch-size", "1"), pixels(8)
    put({1: 0, 4: 0, 7: 0}, "done")
    put({1: 0 * digit, 4: 0 * digit, 7: 0 * digit, 3: digit})
    evaluated(*DRAW, "--n", "8", "--batch-size", "1")
    assert (pixels(8)[3] == digit).all()                 # of those that are there none was drawn again
    put({3: before[3]})
    assert (pixels(8) == before).all() and evaluated(*DRAW, "--n", "8") == first


def test_samples_that_were_deleted_are_drawn_again(here):
    first, before = evaluated(*DRAW, "--n", "4", "--batch-size", "1"), pixels(4)
    for left in (0, 2 * 1024 + 5, None):                 # bytes; None: the file is gone
        if left is None:
            cached("images").unlink()
        else:
            os.truncate(cached("images"), 128 + left)    # after the header
        assert evaluated(*DRAW, "--n", "4", "--batch-size", "1") == first and (pixels(4) == before).all()
    cached("done").unlink()
    assert evaluated(*DRAW, "--n", "4", "--batch-size", "1") == first


def test_released_weights_with_classes_but_no_names_are_scored(here, capsys):
    torch.manual_seed(0)
    torch.save(dit.DiT(32, 8, 1, dim=64, depth=1, heads=1, num_classes=10).state_dict(), "released.pt")
    row = evaluated("--ckpt", "released.pt", "--reference", "real.npz", "--features", JUDGE, "--n", "5", "--steps", "2")
    assert row["FD"] > 0 and row["accuracy"] == row["step"] == "" and "5 of released.pt, dpm++" in capsys.readouterr().out


def test_samples_drawn_otherwise_are_other_samples(here):
    changes = [[], ["--seed", "1"], ["--cfg-scale", "1"], ["--steps", "3"], ["--sampler", "ddim"], ["--classes", "3"]]
    for count, argv in enumerate(changes, 1):
        evaluated(*DRAW, "--n", "4", "--metrics", "IS", *argv)
        assert len(list(Path("cache").glob("run-samples-*/images.npy"))) == count, argv
    run = checkpoint.load("run.pt")
    next(iter(run["ema"].values())).add_(1)
    checkpoint.save("run.pt", run)
    evaluated(*DRAW, "--n", "4", "--metrics", "IS", "--batch-size", "2")
    files = list(Path("cache").glob("run-samples-*/images.npy"))
    assert len(files) == len(changes) + 1 == len({path.read_bytes() for path in files})


def test_drawn_samples_a_folder_of_them_and_an_npz_of_them_score_the_same(here):
    drawn = evaluated(*DRAW, "--n", "12", "--reference", "real.npz")
    sample.main(["--ckpt", "run.pt", "--n", "12", "--steps", "2", "--out", "many/", "--npz", "many.npz", "--device", "cpu"])
    for spec, lacking in (("many.npz", ()), ("many", ("accuracy",))):    # a folder without sub-folders has no labels
        row = evaluated("--samples", spec, "--reference", "real.npz", "--features", JUDGE)
        assert scores_of(row, lacking) == pytest.approx(scores_of(drawn, lacking), rel=1e-6)     # a folder is read in another order
        assert (row["samples"], row["n"], row["reference_n"], row["seed"], row["step"]) == (spec, 12, 200, "", "")
    assert row["accuracy"] == ""


def test_scores_during_training_are_those_of_the_command(here, judge, monkeypatch):
    row = evaluated("--ckpt", "run.pt", "--features", JUDGE, "--n", "20")
    network, diffusion = checkpoint.build(checkpoint.load("run.pt"))
    real = data.load("real.npz")
    measured = features.measure_dataset(real, np.random.default_rng(0).permutation(180), judge)
    for batch in (64, 7):                                # another batch may round a pixel by one grey level
        monkeypatch.setattr(evaluate, "draw", partial(sample.draw, batch_size=batch))
        found = evaluate.score_network(network, diffusion, measured, judge, 20, real.classes)
        assert found == pytest.approx({metric: row[metric] for metric in found}, rel=1e-3)
        assert list(found) == ["IS", "FD", "precision", "recall", "accuracy"] == evaluate.possible(judge, real.classes)
    assert evaluate.possible(judge, None) == ["IS", "FD", "precision", "recall"]


def test_scores_do_not_depend_on_the_batch_size(here, monkeypatch):
    found = []
    for batch in (64, 7):
        monkeypatch.setattr(features, "BATCH", batch)
        found.append(scores_of(evaluated("--samples", "fake.npz", "--reference", "real.npz", "--features", JUDGE)))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_two_processes_draw_what_is_missing_and_score_as_one(here):
    """Of real digits laid where a run's samples are kept, so that their order shows; the last three are missing."""
    argv = [*DRAW, "--n", "33", "--batch-size", "1"]
    evaluated(*argv)
    real = data.load(split="test")
    put({i: real.images[real.rows[np.flatnonzero(real.labels[real.rows] == i % 10)[i // 10]]] for i in range(30)})
    row, before = evaluated(*argv), pixels(33)
    assert row["accuracy"] > 0.8 and row["recall"] > 0
    put({i: 0 for i in range(30, 33)})
    put({i: 0 for i in range(30, 33)}, "done")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--",
                           str(ROOT / "evaluate.py"), *argv, *HERE, "--results", "two.csv", "--save-reference", "two.npz"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two, = rows("two.csv")
    numbers = {key for key, value in row.items() if isinstance(value, float)}
    assert {key: two[key] for key in numbers} == pytest.approx({key: row[key] for key in numbers}, rel=1e-6)
    assert {key: two[key] for key in set(row) - numbers} == {key: row[key] for key in set(row) - numbers}
    assert (pixels(33) == before).all() and np.load(cached("done")).tolist() == [1] * 33
    assert done.stdout.count("FD[vit-mnist]") == done.stdout.count("wrote two.npz: 180 ") == 1


# Samples and references

@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """The held-out digits as samples, the training digits as reference, saved with 500 of its images: row, stdout, stderr, file."""
    folder = tmp_path_factory.mktemp("held_out")
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(evaluate, "REFERENCE_IMAGES", 500)
        row = evaluated("--samples", "mnist", "--reference", "mnist", "--save-reference", "saved.npz")
    return row, out.getvalue(), err.getvalue(), folder / "saved.npz"


def test_held_out_digits_score_as_real_ones(held_out):
    row, out, err, _ = held_out
    assert row["accuracy"] >= 0.96 and 0 < row["FD_floor"] < row["FD"] < 1 and row["IS"] > 9
    assert row["precision"] > 0.8 and row["recall"] > 0.5 and row["features"] == "vit-mnist"         # the judge by default
    assert "samples     1,000 of mnist, held-out part\nreference   9,000 of mnist, training part\n" in out
    assert "two halves of the reference, 4,500 images each" in out and not err


def test_a_saved_reference_stands_for_its_data_set(held_out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, saved = held_out[0], held_out[-1]
    row = evaluated("--samples", "mnist", "--reference", str(saved))     # of 9,000 images, of which it shows 500
    for metric in ("FD", "precision", "recall", "IS", "accuracy"):
        assert row[metric] == pytest.approx(first[metric], rel=1e-9), metric
    assert row["reference_n"] == 9000 and row["features"] == "vit-mnist"
    with np.load(saved) as archive:
        assert archive["arr_0"].shape == (500, 32, 32, 1) and archive["n"] == 9000
        real = data.load()
        order = np.random.default_rng(0).permutation(9000)[:500]
        assert (archive["arr_0"] == real.batch(order)[0].numpy()).all()


def test_statistics_without_images_give_the_same_distance_and_no_precision(held_out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(held_out[-1], "bare.npz")
    without_images("bare.npz")
    row = evaluated("--samples", "mnist", "--reference", "bare.npz")
    assert {metric for metric in evaluate.METRICS if row[metric] != ""} == {"IS", "FD", "accuracy"}
    for metric in ("IS", "FD", "accuracy"):
        assert row[metric] == pytest.approx(held_out[0][metric], rel=1e-9)
    assert row["FD_floor"] == "" and "reference   9,000 of bare.npz\n" in capsys.readouterr().out
    row = evaluated("--samples", "bare.npz", "--reference", "bare.npz")  # and as samples
    assert {metric for metric in evaluate.METRICS if row[metric] != ""} == {"FD"} and abs(row["FD"]) < 1e-6


def test_a_reference_is_measured_and_saved_without_samples(here, capsys):
    evaluate.main(["--reference", "real.npz", "--save-reference", "saved.npz", "--features", JUDGE, *HERE])
    out = capsys.readouterr().out
    assert out.startswith("wrote saved.npz: 200 ") and out.endswith("of real.npz, features vit-mnist\n") and out.count("\n") == 1
    assert not Path("results.csv").exists()
    with np.load("saved.npz") as saved, np.load("stats.npz") as stats:
        np.testing.assert_allclose(saved["mu"], stats["mu"], rtol=1e-5)
        np.testing.assert_allclose(saved["sigma"], stats["sigma"], rtol=1e-3, atol=1e-5)
        assert saved["arr_0"].shape == (200, 32, 32, 1)


def test_a_file_that_does_not_say_of_how_many_images_is_taken_as_it_is(here, capsys):
    with np.load("stats.npz") as archive, np.load("real.npz") as real:
        np.savez("adm.npz", arr_0=real["arr_0"][:20], **{key: archive[key] for key in archive if key != "n"})
    row = evaluated("--samples", "fake.npz", "--reference", "adm.npz", "--save-reference", "saved.npz")
    out = capsys.readouterr().out
    assert out.count("an unknown number of adm.npz") == 2 and row["FD"] == evaluated(*STATS.split())["FD"]
    again = evaluated("--samples", "fake.npz", "--reference", "saved.npz")
    assert scores_of(again, ["FD_floor", "recall"]) == pytest.approx(scores_of(row, ["FD_floor", "recall"]))
    assert row["reference_n"] == again["reference_n"] == ""
    whole, shown = (evaluated("--samples", "adm.npz", "--reference", "stats.npz", *argv) for argv in ([], ["--n", "20"]))
    assert abs(whole["FD"]) < 1e-6 and shown["FD"] > 1   # the file's statistics are of all its images, not of some


def test_noise_is_far_from_digits_from_either_side(here):
    noise = evaluated("--samples", "noise.npz", "--reference", "real.npz", "--features", JUDGE)
    digits = evaluated("--samples", "fake.npz", "--reference", "real.npz", "--features", JUDGE)
    other = evaluated("--samples", "fake.npz", "--reference", "noise.npz", "--features", JUDGE)
    assert min(noise["FD"], other["FD"]) > 10 * digits["FD"] and noise["precision"] < 0.1 < 0.7 < digits["precision"]
    assert noise["IS"] < 2 < digits["IS"] and noise["accuracy"] == "" and other["accuracy"] == digits["accuracy"] > 0.95


def test_digits_left_out_of_the_samples_lower_recall_and_those_left_out_of_the_reference_precision(here):
    for name in ("fake", "real"):
        with np.load(f"{name}.npz") as archive:
            np.savez(f"few-{name}.npz", arr_0=archive["arr_0"][archive["arr_1"] < 3])
    samples, reference = (evaluated("--samples", fake, "--reference", real, "--features", JUDGE) for fake, real in (
        ("few-fake.npz", "real.npz"), ("fake.npz", "few-real.npz")))
    assert samples["recall"] < 0.5 < 0.7 < samples["precision"], samples
    assert reference["precision"] < 0.5 < 0.7 < reference["recall"], reference


def test_accuracy_counts_the_classes_that_the_samples_say_they_are_of(here):
    with np.load("fake.npz") as archive:
        np.savez("wrong.npz", arr_0=archive["arr_0"], arr_1=(archive["arr_1"] + 1) % 10)
        np.savez("half.npz", arr_0=archive["arr_0"], arr_1=(archive["arr_1"] + (np.arange(80) < 40)) % 10)
    right, wrong, half = (evaluated("--samples", f"{name}.npz", "--reference", "real.npz", "--features", JUDGE, "--metrics",
                                    "accuracy")["accuracy"] for name in ("fake", "wrong", "half"))
    assert right > 0.95 and wrong < 0.05 and abs(half - right / 2) < 0.05


def test_accuracy_of_a_run_counts_the_classes_that_were_asked_for(here):
    with np.load("real.npz") as archive:
        digits = [archive["arr_0"][archive["arr_1"] == label][:2] for label in (7, 3)]
    argv = [*DRAW, "--n", "4", "--classes", "7,3", "--metrics", "accuracy"]
    evaluated(*argv)
    for order, accuracy in ((digits, 1), (digits[::-1], 0)):             # laid where the samples are kept
        put({2 * i + j: order[j][i] for i in range(2) for j in range(2)})
        assert evaluated(*argv)["accuracy"] == accuracy


def test_n_takes_the_first_samples(here):
    with np.load("fake.npz") as archive:
        np.savez("first.npz", arr_0=archive["arr_0"][:30], arr_1=archive["arr_1"][:30])
    some, first = (evaluated("--samples", *argv, "--reference", "real.npz", "--features", JUDGE) for argv in (
        ["fake.npz", "--n", "30"], ["first.npz"]))
    assert scores_of(some) == scores_of(first) and some["n"] == 30


def test_metrics_are_those_asked_for_in_the_order_of_all(here, capsys):
    row = evaluated("--samples", "fake.npz", "--reference", "real.npz", "--features", JUDGE, "--metrics", "recall,FD")
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[4:]]
    assert names == ["FD[vit-mnist]", "recall[vit-mnist]"]
    assert {metric for metric in evaluate.METRICS if row[metric] != ""} == {"FD", "recall"}


def test_a_warning_of_few_samples_is_one_line_on_stderr(here, capsys):
    evaluated("--samples", "fake.npz", "--n", "64", "--reference", "real.npz", "--features", JUDGE)
    err = capsys.readouterr().err
    assert err.startswith("evaluate.py: warning: 64 samples of 64 features have a singular covariance") and err.count("\n") == 1
    evaluated("--samples", "fake.npz", "--n", "65", "--reference", "real.npz", "--features", JUDGE)
    evaluated("--samples", "fake.npz", "--n", "40", "--reference", "real.npz", "--features", JUDGE, "--metrics", "IS")
    assert capsys.readouterr().err == ""
    with np.load("real.npz") as archive:
        np.savez("few.npz", arr_0=archive["arr_0"][:60], arr_1=archive["arr_1"][:60])
    evaluated("--samples", "fake.npz", "--n", "65", "--reference", "few.npz", "--features", JUDGE)
    assert "warning: 60 samples of 64 features" in capsys.readouterr().err


def test_images_of_a_folder_are_scaled_on_demand(here):
    with np.load("fake.npz") as archive:
        for i, image in enumerate(archive["arr_0"][:8, ..., 0]):
            Path("big").mkdir(exist_ok=True)
            sample.save_image(f"big/{i}.png", image.repeat(2, 0).repeat(2, 1)[..., None])
        np.savez("small.npz", arr_0=archive["arr_0"][:8])
    big, small = (evaluated("--samples", *argv, "--reference", "real.npz", "--features", JUDGE) for argv in (
        ["big", "--image-size", "32"], ["small.npz"]))
    assert scores_of(big) == pytest.approx(scores_of(small), rel=1e-6)


def test_samples_sorted_by_class_in_folders_have_the_inception_score_of_shuffled_ones(here, monkeypatch):
    monkeypatch.setattr(evaluate, "inception_score", partial(evaluate.inception_score, split=20))
    with np.load("real.npz") as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
        shuffled = np.random.default_rng(1).permutation(len(images))
        np.savez("shuffled.npz", arr_0=images[shuffled])
    for i, (image, label) in enumerate(zip(images, labels)):
        Path(f"sorted/{label}").mkdir(parents=True, exist_ok=True)
        sample.save_image(f"sorted/{label}/{i}.png", image)
    one, other = (evaluated("--samples", spec, "--reference", "real.npz", "--features", JUDGE)["IS"]
                  for spec in ("sorted", "shuffled.npz"))
    assert one == pytest.approx(other, rel=0.1) and one > 5              # chunks of one class would score about 1


def test_fid_is_printed_for_inception_with_its_canonical_weights(here, capsys, monkeypatch):
    """Weights drawn at random, called canonical, where a download would be kept."""
    torch.manual_seed(0)
    weights = cache_folder("cache") / inception.URL.rsplit("/", 1)[-1]
    torch.save(inception.Inception().state_dict(), weights)
    monkeypatch.setattr(inception, "SHA256", features.sha256_of(weights))
    with np.load("fake.npz") as archive:                 # three images: 2048 features of more make the floor too, for seconds
        np.savez("three.npz", arr_0=archive["arr_0"][:3])
    evaluate.main(["--reference", "three.npz", "--save-reference", "adm.npz", *HERE])
    with np.load("adm.npz") as archive:
        assert archive["arr_0"].shape == (3, 32, 32, 3) and archive["sigma_s"].shape == (2023, 2023)
    capsys.readouterr()
    row = evaluated("--samples", "three.npz", "--reference", "adm.npz", "--metrics", "FD,IS")
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[4:]] == ["IS", "FID"] and "features    inception, weights" in out
    assert row["features"] == "inception" and row["features_sha256"] == inception.SHA256 and abs(row["FD"]) < 1e-6
    evaluated("--samples", "three.npz", "--reference", "three.npz", "--metrics", "IS", "--resize", "pytorch")
    assert "IS[inception-pytorch-resize]" in capsys.readouterr().out


# What cannot be scored

def npz(name, **arrays):
    return lambda: np.savez(name, **arrays)


def digits(n, *shape):
    return np.zeros((n, *shape), np.uint8)


def statistics_of(features, **changes):
    """stats.npz, said to be of other features or otherwise changed."""
    def make():
        with np.load("stats.npz") as archive:
            tables = dict(archive, features=features) | changes
        np.savez("stats.npz", **tables)
    return make


def adms_statistics():
    np.savez("adm.npz", mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(3), sigma_s=np.eye(3))


def cut_off(name):
    def make():
        content = Path(name).read_bytes()
        Path(name).write_bytes(content[:len(content) // 2])
    return make


def broken_judge():
    run = checkpoint.load(JUDGE)
    next(iter(run["ema"].values())).fill_(float("nan"))
    checkpoint.save("nan.pt", run)


def classifiers_run():
    network = dict(image_size=32, patch_size=8, channels=1, dim=16, depth=1, heads=2, num_classes=10)
    state = vit.ViT(**network).state_dict()
    run = checkpoint.load("run.pt") | dict(network={"class": "ViT", "arguments": network}, diffusion=None, model=state, ema=state)
    checkpoint.save("vit.pt", run)


def run_of_unknown_data():
    run = checkpoint.load("run.pt")
    run["data"]["spec"] = None
    checkpoint.save("unknown.pt", run)


def nothing():
    """No file but those of the fixture."""


WEIGHTS = features.sha256_of(JUDGE)[:8]
PAIR = f"--samples fake.npz --reference real.npz --features {JUDGE}"
STATS = f"--samples fake.npz --reference stats.npz --features {JUDGE}"
RUN = f"--ckpt run.pt --features {JUDGE} --steps 2 --n 4"
CASES = [
    # name, files, flags, words of the line
    ("nothing to do", nothing, "", "--ckpt or --samples"),
    ("a run and samples", nothing, "--ckpt run.pt --samples fake.npz", "not allowed with"),
    ("one sample", nothing, f"{PAIR} --n 1", "at least two"),
    ("one sample for the distance", nothing, f"{PAIR} --n 1 --metrics FD", "at least two"),
    ("one real image", npz("one.npz", arr_0=digits(1, 32, 32, 1)), f"--samples fake.npz --reference one.npz --features {JUDGE}",
     "at least two"),
    ("one sample of a run", nothing, f"{RUN} --n 1", "at least two"),
    ("too few samples for neighbours", nothing, f"{PAIR} --n 3 --metrics recall", "needs 4 images on both sides, and there are 3"),
    ("images of unequal sizes", npz("small.npz", arr_0=digits(9, 28, 28, 1)), "--samples small.npz --reference real.npz",
     "unequal sizes: the samples have 28x28 pixels, the reference 32x32"),
    ("a run's samples of another size", npz("small.npz", arr_0=digits(9, 28, 28, 1)), f"{RUN} --reference small.npz",
     "unequal sizes"),
    ("an empty folder of samples", lambda: os.mkdir("none"), "--samples none --reference real.npz", "none holds no image"),
    ("an empty folder as reference", lambda: os.mkdir("none"), "--samples fake.npz --reference none", "none holds no image"),
    ("features that are not finite", broken_judge, "--samples fake.npz --reference real.npz --features nan.pt", "NaN or infinite"),
    ("statistics of another ViT", statistics_of("vit-pets"), STATS,
     f"statistics of vit-pets (weights {WEIGHTS}), the features asked for are vit-mnist (weights {WEIGHTS})"),
    ("statistics of an unknown ViT", statistics_of("vit-pets", features_sha256="a"), "--samples fake.npz --reference stats.npz",
     "name that file with --features"),
    ("ADM's statistics and a ViT", adms_statistics, f"--samples fake.npz --reference adm.npz --features {JUDGE}",
     f"statistics of inception (weights {inception.SHA256[:8]}), the features asked for are vit-mnist (weights {WEIGHTS})"),
    ("samples' statistics of another ViT", statistics_of("vit-pets"),
     f"--samples stats.npz --reference real.npz --features {JUDGE}", "cannot be compared"),
    ("a weights file with another hash", lambda: torch.save({"Mixed_5b.branch1x1.conv.weight": torch.zeros(2)}, "w.pth"),
     "--samples fake.npz --reference real.npz --features w.pth", f"expected {inception.SHA256}"),
    ("precision without real images", nothing, f"{STATS} --metrics FD,precision",
     "precision[vit-mnist] cannot be had: the reference is statistics without images"),
    ("recall of statistics", nothing, f"--samples stats.npz --reference real.npz --features {JUDGE} --metrics recall",
     "the samples are statistics without images"),
    ("accuracy without labels", nothing, f"--samples noise.npz --reference real.npz --features {JUDGE} --metrics accuracy",
     "samples with labels"),
    ("spatial features of a ViT", nothing, f"{PAIR} --metrics sFD", "sFD[vit-mnist] cannot be had: it needs spatial features"),
    ("an unknown metric", nothing, f"{PAIR} --metrics FD,KID", "'KID' is none of IS, FD, sFD, precision, recall, accuracy"),
    ("results with other columns", lambda: Path("results.csv").write_text("step,loss\n1,2\n"), PAIR, "other columns"),
    ("results in a folder that does not exist", nothing, f"{PAIR} --results no/where.csv", "does not exist"),
    ("a reference into a folder that does not exist", nothing, f"{PAIR} --save-reference no/where.npz", "does not exist"),
    ("a reference that would replace its images", nothing, f"{PAIR} --save-reference ./real.npz", "would replace"),
    ("a reference that would replace the samples", nothing, f"{PAIR} --save-reference fake.npz", "would replace"),
    ("a reference that could not be read again", nothing, f"{PAIR} --save-reference saved", ".npz"),
    ("a reference without images to save", nothing, f"--reference stats.npz --features {JUDGE} --save-reference new.npz",
     "stats.npz holds no images"),
    ("more samples than there are", nothing, f"{PAIR} --n 81", "--n 81: fake.npz has 80 images"),
    ("some samples of statistics", nothing, f"--samples stats.npz --reference real.npz --features {JUDGE} --n 9", "--n 9"),
    ("no samples", nothing, f"{PAIR} --n 0", "from 1 on"),
    ("images of a size that the ViT was not taught", npz("small.npz", arr_0=digits(9, 28, 28, 1)),
     f"--samples small.npz --reference small.npz --features {JUDGE}", "28 x 28 x 1, where the ViT in"),
    ("colour for a ViT of grey images", npz("colour.npz", arr_0=digits(9, 32, 32, 3)),
     f"--samples colour.npz --reference real.npz --features {JUDGE}", "taught ones of 32 x 32 x 1"),
    ("features of a DiT", nothing, "--samples fake.npz --reference real.npz --features run.pt", "holds a DiT"),
    ("features that do not exist", nothing, "--samples fake.npz --reference real.npz --features none.pt", "none.pt"),
    ("features of no checkpoint", lambda: Path("t.pt").write_text("hello"),
     "--samples fake.npz --reference real.npz --features t.pt", "t.pt is not a checkpoint"),
    ("damaged samples", cut_off("fake.npz"), PAIR, "cannot use fake.npz"),
    ("a damaged reference", cut_off("real.npz"), PAIR, "cannot use real.npz"),
    ("damaged statistics", cut_off("stats.npz"), STATS, "cannot use stats.npz"),
    ("tables that do not fit", statistics_of("vit-mnist", sigma=np.eye(3)), STATS,
     "do not belong together"),
    ("statistics of a single image", statistics_of("vit-mnist", n=1), STATS, "at least two"),
    ("statistics that are not finite", statistics_of("vit-mnist", mu=np.full(64, np.nan)),
     STATS, "NaN or infinite"),
    ("statistics of fewer features", statistics_of("vit-mnist", mu=np.zeros(3), sigma=np.eye(3)),
     STATS, "of one feature space"),
    ("samples of a ViT", classifiers_run, f"--ckpt vit.pt --features {JUDGE}", "a ViT, which classifies"),
    ("a missing reference", nothing, f"--samples fake.npz --features {JUDGE}", "--reference"),
    ("a reference that does not exist", nothing, "--samples fake.npz --reference none.npz", "none.npz does not exist"),
    ("samples that do not exist", nothing, "--samples photos --reference real.npz", "no data set 'photos'"),
    ("a run of unknown data", run_of_unknown_data, f"--ckpt unknown.pt --features {JUDGE}", "does not say what it was trained on"),
    ("a missing run", nothing, "--ckpt none.pt", "no checkpoint none.pt"),
    ("a negative seed", nothing, f"{RUN} --seed -1", "--seed"),
    ("more steps than there are", nothing, f"{RUN} --steps 1001", "--steps 1001"),
    ("a class that the run lacks", nothing, f"{RUN} --classes 3,10", "'10' is not a class"),
    ("folders of unequal images", lambda: (os.mkdir("two"), [sample.save_image(f"two/{n}.png", digits(n, n, 1)) for n in (8, 9)]),
     "--samples two --reference real.npz", "squares of one size"),
]


def contents():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and "cache" not in path.parts}


@pytest.mark.parametrize("make, command, words", [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_cannot_be_scored_gets_one_line_and_status_2_and_leaves_no_row(here, capfd, make, command, words):
    make()
    before = contents()
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*command.split(), *HERE])
    err = capfd.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and words in err, err
    assert contents() == before
