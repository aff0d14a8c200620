"""evaluate.py: a row of scores says what was measured and how, and depends on nothing else.

Samples are drawn once and found again; the same images have the same scores however they come; real digits score as real ones
do, noise as noise. What cannot be scored stands in test_bad_input.py.
"""
import csv
import io
import os
import shutil
import subprocess
import sys
import zlib
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
import scoring
from files import cache_folder
from pictures import save_image

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
    run.data.spec = "real.npz"
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


def compared(samples, reference="real.npz", *argv):
    """The row of samples against a reference, by the judge."""
    return evaluated("--samples", samples, "--reference", reference, "--features", JUDGE, *argv)


def scores_of(row, but=()):
    return {metric: row[metric] for metric in (*evaluate.METRICS, "FD_floor") if row[metric] != "" and metric not in but}


def cached(name):
    """A file, by its name, of the only samples in the cache."""
    found, = Path("cache").glob(f"run-samples-*/{name}.npy")
    return found


def pixels(n):
    """The samples in the cache, all n of them."""
    return np.load(cached("images")).reshape(n, 32, 32, 1)


def put(images):
    """Other pixels for some samples in the cache, by their numbers, as if these had been drawn."""
    table, record = (np.load(cached(name), mmap_mode="r+") for name in ("images", "crc32"))
    for i, image in images.items():
        table[i] = image
        record[i] = zlib.crc32(table[i])


def drop(numbers):
    """Have samples in the cache be black, and not be there."""
    for name in ("images", "crc32"):
        np.load(cached(name), mmap_mode="r+")[numbers] = 0


@pytest.fixture
def digit(files):
    """A real one."""
    with np.load(files / "real.npz") as archive:
        return archive["arr_0"][0]


# Samples of a run

def test_a_run_is_scored_against_its_training_part_in_a_table_and_a_row(here, capsys):
    row = evaluated(*DRAW, "--n", "12", "--seed", "3")
    read_as, *text = capsys.readouterr().out.splitlines()
    assert "real.npz: 180 images, 32x32 pixels, grey, levels 0 to 255; 10 classes: " in read_as
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
    assert np.load(cached("crc32")).astype(bool).tolist() == [True] * 9 and (pixels(9)[6:] == now[6:]).all()


def test_a_killed_drawing_goes_on_with_what_is_missing(here, digit):
    first, before = evaluated(*DRAW, "--n", "8", "--batch-size", "1"), pixels(8)
    drop([1, 4, 7])
    put({3: digit})
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
    cached("crc32").unlink()
    assert evaluated(*DRAW, "--n", "4", "--batch-size", "1") == first


def test_released_weights_with_classes_but_no_names_are_scored(here, capsys):
    torch.manual_seed(0)
    torch.save(dit.DiT(32, 8, 1, dim=64, depth=1, heads=1, num_classes=10).state_dict(), "released.pt")
    row = evaluated("--ckpt", "released.pt", "--reference", "real.npz", "--features", JUDGE, "--n", "5", "--steps", "2")
    assert row["FD"] > 0 and row["accuracy"] == row["step"] == "" and "5 of released.pt, dpm++" in capsys.readouterr().out


def test_samples_drawn_otherwise_are_other_samples(here):
    changes = [[], ["--seed", "1"], ["--cfg-scale", "1"], ["--steps", "3"], ["--sampler", "ddim"], ["--classes", "3"],
               ["--precision", "bf16"]]
    for count, argv in enumerate(changes, 1):
        evaluated(*DRAW, "--n", "4", "--metrics", "IS", *argv)
        assert len(list(Path("cache").glob("run-samples-*/images.npy"))) == count, argv
    run = checkpoint.load("run.pt")
    next(iter(run.ema.values())).add_(1)
    checkpoint.save("run.pt", run)
    evaluated(*DRAW, "--n", "4", "--metrics", "IS", "--batch-size", "2")
    files = list(Path("cache").glob("run-samples-*/images.npy"))
    assert len(files) == len(changes) + 1 == len({path.read_bytes() for path in files})


def test_drawn_samples_a_folder_of_them_and_an_npz_of_them_score_the_same(here):
    drawn = evaluated(*DRAW, "--n", "12", "--reference", "real.npz")
    sample.main(["--ckpt", "run.pt", "--n", "12", "--steps", "2", "--out", "many/", "--npz", "many.npz", "--device", "cpu"])
    for spec, lacking in (("many.npz", ()), ("many", ("accuracy",))):    # a folder without sub-folders has no labels
        row = compared(spec)
        assert scores_of(row, lacking) == pytest.approx(scores_of(drawn, lacking), rel=1e-6)     # a folder is read in another order
        assert (row["samples"], row["n"], row["reference_n"], row["seed"], row["step"]) == (spec, 12, 200, "", "")
    assert row["accuracy"] == ""


@pytest.mark.slow
def test_two_processes_draw_what_is_missing_and_score_as_one(here):
    """Of real digits laid where a run's samples are kept, so that their order shows; the last three are missing."""
    argv = [*DRAW, "--n", "33", "--batch-size", "1"]
    evaluated(*argv)
    real = data.load(split="test")
    put({i: real.images[real.rows[np.flatnonzero(real.labels[real.rows] == i % 10)[i // 10]]] for i in range(30)})
    row, before = evaluated(*argv), pixels(33)
    assert row["accuracy"] > 0.8 and row["recall"] > 0
    drop(range(30, 33))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--",
                           str(ROOT / "evaluate.py"), *argv, *HERE, "--results", "two.csv", "--save-reference", "two.npz"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two, = rows("two.csv")
    numbers = {key for key, value in row.items() if isinstance(value, float)}
    assert {key: two[key] for key in numbers} == pytest.approx({key: row[key] for key in numbers}, rel=1e-6)
    assert {key: two[key] for key in set(row) - numbers} == {key: row[key] for key in set(row) - numbers}
    assert (pixels(33) == before).all() and np.load(cached("crc32")).astype(bool).tolist() == [True] * 33
    assert done.stdout.count("FD[vit-mnist]") == done.stdout.count("wrote two.npz: 180 ") == 1


# Samples and references

@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """The held-out digits as samples, the training digits as reference, saved with 500 of its images: row, stdout, stderr, file."""
    folder = tmp_path_factory.mktemp("held_out")
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        for module in (evaluate, scoring):
            patch.setattr(module, "REFERENCE_IMAGES", 500)
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
    assert out.endswith("\nwrote saved.npz: 200 of real.npz, features vit-mnist\n") and out.count("\n") == 2
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
    assert out.count("an unknown number of adm.npz") == 2 and row["FD"] == compared("fake.npz", "stats.npz")["FD"]
    again = compared("fake.npz", "saved.npz")
    assert scores_of(again, ["FD_floor", "recall"]) == pytest.approx(scores_of(row, ["FD_floor", "recall"]))
    assert row["reference_n"] == again["reference_n"] == ""
    whole, shown = compared("adm.npz", "stats.npz"), compared("adm.npz", "stats.npz", "--n", "20")
    assert abs(whole["FD"]) < 1e-6 and shown["FD"] > 1   # the file's statistics are of all its images, not of some


def test_noise_is_far_from_digits_from_either_side(here):
    noise, digits, other = compared("noise.npz"), compared("fake.npz"), compared("fake.npz", "noise.npz")
    assert min(noise["FD"], other["FD"]) > 10 * digits["FD"] and noise["precision"] < 0.1 < 0.7 < digits["precision"]
    assert noise["IS"] < 2 < digits["IS"] and noise["accuracy"] == "" and other["accuracy"] == digits["accuracy"] > 0.95


def test_digits_left_out_of_the_samples_lower_recall_and_those_left_out_of_the_reference_precision(here):
    for name in ("fake", "real"):
        with np.load(f"{name}.npz") as archive:
            np.savez(f"few-{name}.npz", arr_0=archive["arr_0"][archive["arr_1"] < 3])
    samples, reference = compared("few-fake.npz"), compared("fake.npz", "few-real.npz")
    assert samples["recall"] < 0.5 < 0.7 < samples["precision"], samples
    assert reference["precision"] < 0.5 < 0.7 < reference["recall"], reference


def test_accuracy_counts_the_classes_that_the_samples_say_they_are_of(here):
    with np.load("fake.npz") as archive:
        np.savez("wrong.npz", arr_0=archive["arr_0"], arr_1=(archive["arr_1"] + 1) % 10)
        np.savez("half.npz", arr_0=archive["arr_0"], arr_1=(archive["arr_1"] + (np.arange(80) < 40)) % 10)
    right, wrong, half = (compared(f"{name}.npz")["accuracy"] for name in ("fake", "wrong", "half"))
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
    some, first = compared("fake.npz", "real.npz", "--n", "30"), compared("first.npz")
    assert scores_of(some) == scores_of(first) and some["n"] == 30


def test_metrics_are_those_asked_for(here):
    row = compared("fake.npz", "real.npz", "--metrics", "recall,FD")
    assert scores_of(row, ["FD_floor"]).keys() == {"FD", "recall"}


def test_a_warning_of_few_samples_is_one_line_on_stderr(here, capsys):
    compared("fake.npz", "real.npz", "--n", "64")
    err = capsys.readouterr().err
    assert err.startswith("evaluate.py: warning: 64 samples of 64 features have a singular covariance") and err.count("\n") == 1


def test_images_of_a_folder_are_scaled_on_demand(here):
    with np.load("fake.npz") as archive:
        for i, image in enumerate(archive["arr_0"][:8, ..., 0]):
            Path("big").mkdir(exist_ok=True)
            save_image(f"big/{i}.png", image.repeat(2, 0).repeat(2, 1)[..., None])
        np.savez("small.npz", arr_0=archive["arr_0"][:8])
    big, small = compared("big", "real.npz", "--image-size", "32"), compared("small.npz")
    assert scores_of(big) == pytest.approx(scores_of(small), rel=1e-6)


def test_samples_sorted_by_class_in_folders_have_the_inception_score_of_shuffled_ones(here, monkeypatch):
    monkeypatch.setattr(scoring, "inception_score", partial(scoring.inception_score, split=20))
    with np.load("real.npz") as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
        shuffled = np.random.default_rng(1).permutation(len(images))
        np.savez("shuffled.npz", arr_0=images[shuffled])
    for i, (image, label) in enumerate(zip(images, labels)):
        Path(f"sorted/{label}").mkdir(parents=True, exist_ok=True)
        save_image(f"sorted/{label}/{i}.png", image)
    one, other = (compared(spec)["IS"] for spec in ("sorted", "shuffled.npz"))
    assert one == pytest.approx(other, rel=0.1) and one > 5              # chunks of one class would score about 1


def test_fid_is_printed_for_inception_with_its_canonical_weights(here, capsys, monkeypatch):
    """Weights drawn at random, called canonical, where a download would be kept."""
    torch.manual_seed(0)
    weights = cache_folder("cache") / inception.URL.rsplit("/", 1)[-1]
    torch.save(inception.Inception().state_dict(), weights)
    monkeypatch.setattr(inception, "SHA256", features.sha256_of(weights))
    with np.load("fake.npz") as archive:                 # two images: 2048 features of four make the floor too, for seconds
        np.savez("two.npz", arr_0=archive["arr_0"][:2])
    evaluate.main(["--reference", "two.npz", "--save-reference", "adm.npz", *HERE])
    with np.load("adm.npz") as archive:
        assert archive["arr_0"].shape == (2, 32, 32, 3) and archive["sigma_s"].shape == (2023, 2023)
    capsys.readouterr()
    row = evaluated("--samples", "two.npz", "--reference", "adm.npz", "--metrics", "FD,IS")
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[-2:]] == ["IS", "FID"] and "features    inception, weights" in out
    assert row["features"] == "inception" and row["features_sha256"] == inception.SHA256 and abs(row["FD"]) < 1e-6
    assert features.space_of("inception", torch.device("cpu"), "cache", False).title("IS") == "IS[inception-pytorch-resize]"
