"""What commands write: nothing that a user has is replaced by a command that was not told to, whatever it is and whichever flag
names it; what an earlier call wrote for the same purpose is.

Two tables: OUTPUTS, every flag that names an output, and THERE, what may stand at its place.
"""
import itertools
import os
import shutil
import stat
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import companion
import dit
import evaluate
import features
import files
import plot
import reports
import sample
import sampling
import train
from files import PURPOSES, check_output, known, mark
from pictures import grid, points_picture, save_image, write_gif
from refusals import refusal
from test_train import SMALLER

DRAWN = ["--ckpt", "run.pt", "--n", "2", "--steps", "1", "--device", "cpu"]
TINY = ["--size", "Ti/16", "--steps", "2", "--batch-size", "2", "--device", "cpu"]

OUTPUTS = {                            # the file: its purpose, and the command that would write it
    "drawn.png": ("samples", sample, [*DRAWN, "--out", "drawn.png"]),
    "restored.png": ("samples", sample, [*DRAWN, "--upscale", "digit.png", "--factor", "2", "--out", "restored.png"]),
    "drawn.npz": ("images", sample, [*DRAWN, "--npz", "drawn.npz"]),
    "way.gif": ("trajectory", sample, [*DRAWN, "--trajectory", "way.gif"]),
    "saved.npz": ("reference", evaluate, ["--reference", "real.npz", "--save-reference", "saved.npz"]),
    "scores.csv": ("scores", evaluate, ["--samples", "real.npz", "--reference", "real.npz", "--results", "scores.csv"]),
    **{f"{name}-figure.png": (f"figure {name}", plot, [name, *more, "--out", f"{name}-figure.png"]) for name, more in (
        ("curves", ["run.csv"]), ("schedules", []), ("noising", []), ("guidance", []), ("swissroll", []))},
    "roll.gif": ("way", plot, ["swissroll", "--gif", "roll.gif"]),
    "slim.pt": ("slim run", checkpoint, ["run.pt", "--slim", "slim.pt"]),
    "page.html": ("page", companion, ["--report", "REPORT.md", "--out", "page.html"]),
    "cats.pt": ("run", train, [*TINY, "--out", "cats.pt"]),
    "dogs.csv": ("new log", train, [*TINY, "--out", "dogs.pt"]),
    "cows.png": ("picture", train, [*TINY, "--out", "cows.pt"]),
}
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 1), dtype=np.uint8)
LABELS = np.arange(6) % 3


def npz(path, comment=b"", **arrays):
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = comment


def text(content):
    return lambda path: Path(path).write_text(content)


def linked(path):
    Path("letter.txt").write_text("a letter")
    os.symlink(Path("letter.txt").absolute(), path)


def run_like(path):
    """A small checkpoint with AdamW's moments."""
    torch.save(dict(version=1, optimizer=dict(state={0: dict(exp_avg=torch.zeros(2))})), path)


def user_png(path):
    Image.fromarray(IMAGES[0, ..., 0]).resize((200, 200)).save(path, "PNG")


THERE = {                              # what is at the place of an output, and how it is made
    "nothing but bytes": lambda path: Path(path).write_bytes(b"\x00\xff\x89PNG"),
    "an empty file": lambda path: Path(path).touch(),
    "a text": text("a letter\n"),
    "a table": text("file,label\na.png,cat\n"),
    "a log with rows": text("step,images,loss,grad_norm,lr,images_per_s\n50,1600,0.5,1,0.002,\n"),
    "a picture": user_png,
    "a grey picture": lambda path: Image.new("L", (64, 64), 128).save(path, "PNG"),
    "a white picture": lambda path: Image.new("RGB", (900, 560), "white").save(path, "PNG"),
    "a film": lambda path: Image.new("L", (9, 9)).save(path, "GIF"),
    "a data set": lambda path: npz(path, images=IMAGES, labels=LABELS),
    "a nameless data set": lambda path: npz(path, arr_0=IMAGES, arr_1=np.sort(LABELS)),
    "ADM's reference": lambda path: npz(path, arr_0=IMAGES, mu=np.zeros(2), sigma=np.eye(2), mu_s=np.zeros(2), sigma_s=np.eye(2)),
    "a run": run_like,
    "a link": linked,
    "a folder": lambda path: (os.mkdir(path), Path(path, "letter.txt").write_text("a letter")),
    "a FIFO": os.mkfifo,
    "a device": lambda path: os.symlink("/dev/null", path),
    "itself": lambda path: os.symlink(Path(path).name, path),
}


@pytest.fixture(scope="module", autouse=True)
def smaller(tiny_run):
    """What is trained is of a hundredth of the usual size, and its samples take two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dit.SIZES, "Ti", SMALLER)
        patch.setattr(sampling, "STEPS", 2)
        yield


@pytest.fixture
def folder(tmp_path, tiny_run, monkeypatch):
    """The current folder, where the inputs of all commands are."""
    monkeypatch.chdir(tmp_path)
    os.link(tiny_run, "run.pt")
    shutil.copy(tiny_run.with_suffix(".csv"), "run.csv")
    Image.fromarray(IMAGES[0, :16, :16, 0]).save("digit.png")
    npz("real.npz", arr_0=IMAGES)
    Path("REPORT.md").write_text("# Title\n\nA paragraph.\n")
    os.mkdir("compare")
    return tmp_path


def state(folder):
    """All that is in a folder: what kind of thing, its mode, when it was changed, what it holds."""
    def content(path):
        large = path.is_file() and path.stat().st_size > 2 ** 20         # the fixture's run: by its place on the disk
        return (os.readlink(path) if path.is_symlink() else path.stat().st_ino if large else
                path.read_bytes() if path.is_file() else None)
    return {path: (path.lstat().st_mode, path.lstat().st_mtime_ns, content(path)) for path in folder.rglob("*")
            if not path.is_dir()}


def refused(command, argv, capsys):
    """The one line that a command says which is refused."""
    with pytest.raises(SystemExit) as stop:
        command.main(argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "Traceback" not in said, said
    return said


def make_ours(path, purpose):
    """A file as this project writes it for a purpose."""
    ending = PURPOSES[purpose].ending
    if ending == ".png":
        save_image(path, grid(IMAGES, 3), purpose)
    elif ending == ".gif":
        write_gif(path, [grid(IMAGES[:3], 3), grid(IMAGES[3:], 3)], purpose)
    else:
        npz(path, mark(purpose).encode(), arr_0=IMAGES)


# Nothing that is not ours is replaced

@pytest.mark.parametrize("out", OUTPUTS)
def test_no_command_changes_what_it_did_not_write(folder, capsys, out):
    _, command, argv = OUTPUTS[out]
    for kind, make in THERE.items():
        if (out, kind) == ("scores.csv", "an empty file"):               # a row is added, as to any table of scores
            continue
        make(out)
        before = state(folder)
        said = refused(command, argv, capsys)
        assert out in said and state(folder) == before, (kind, said)
        shutil.rmtree(out) if kind == "a folder" else os.unlink(out)


@pytest.mark.parametrize("ending", [".png", ".gif"])
def test_what_was_written_for_one_purpose_is_not_replaced_for_another(tmp_path, ending):
    purposes = [purpose for purpose, (_, own, ours) in PURPOSES.items() if own == ending and ours]
    for written, wanted in itertools.product(purposes, repeat=2):
        path = tmp_path / f"{written} {wanted}{ending}"
        make_ours(path, written)
        assert known(path, wanted) == (written == wanted)


def test_what_a_command_reads_it_does_not_replace(folder, capsys):
    make_ours("seen.png", "samples")
    make_ours("mask.png", "samples")
    os.link("seen.png", "again.png")
    os.symlink("seen.png", "linked.png")
    evaluate.main(["--reference", "real.npz", "--save-reference", "ours.npz", "--features", str(features.JUDGE)])
    before, overwrite = state(folder), ["--overwrite"]
    restored = ["--inpaint", "seen.png", "--mask", "mask.png"]
    for command, argv in (
            *[(sample, [*DRAWN, *restored, "--out", out])
              for out in ("seen.png", "mask.png", "again.png", "linked.png", "./seen.png")],
            (sample, [*DRAWN, "--upscale", "seen.png", "--factor", "2", "--out", "seen.png"]),
            (sample, [*DRAWN, "--denoise", "seen.png", "--sigma", "0.5", "--out", "seen.png"]),
            *[(evaluate, ["--reference", reference, "--samples", samples, "--save-reference", "ours.npz"])
              for reference, samples in (("ours.npz", "real.npz"), ("real.npz", "ours.npz"))],
            (plot, ["curves", "seen.png", "--out", "seen.png"]),
            (checkpoint, ["run.pt", "--slim", "run.pt"]),
            (checkpoint, ["run.pt", "--slim", "./run.pt"])):
        for told in ([], overwrite):
            assert "is read by this command, which would replace it" in refused(command, [*argv, *told], capsys)
    assert state(folder) == before


@pytest.mark.parametrize("flag, names", [
    ("--out", ("drawn.jpg", "drawn.xyz", "run.pt", "run.csv", "drawn.png.txt")), ("--npz", ("drawn.png", "drawn", "run.pt")),
    ("--trajectory", ("way.png", "run.pt"))])
def test_an_ending_that_does_not_fit_is_refused(folder, capsys, flag, names):
    before = state(folder)
    for name in names:
        said = refused(sample, [*DRAWN, flag, name, "--overwrite"], capsys)
        assert f"{name}: the name of " in said and "must end in" in said
    assert state(folder) == before


def test_a_name_without_an_ending_or_a_slash_is_refused_with_both_remedies(folder, capsys):
    said = refused(sample, [*DRAWN, "--out", "samples"], capsys)
    assert "samples.png" in said and "samples/" in said and not Path("samples").exists()


def test_a_file_that_appears_during_the_work_stays(folder, capsys, monkeypatch):
    def slow(args):
        Path("figure.png").write_text("a letter")
        return np.zeros((9, 9, 3), np.uint8), "a claim"
    monkeypatch.setitem(plot.COMMANDS, "schedules", slow)
    assert "figure.png exists, and is not" in refused(plot, ["schedules", "--out", "figure.png"], capsys)
    assert Path("figure.png").read_text() == "a letter" and not list(folder.glob(".*.tmp"))


def test_latents_do_not_replace_an_npz_that_no_flag_names(folder, capsys, monkeypatch):
    run = checkpoint.load("run.pt")
    run.vae = checkpoint.Autoencoder(1.0)                # as of released weights, which name none
    os.unlink("run.pt")                                  # a hard link of the fixture's
    checkpoint.save("run.pt", run)
    npz("drawn.npz", images=IMAGES)
    before = state(folder)
    assert "drawn.npz exists" in refused(sample, [*DRAWN, "--out", "drawn.png"], capsys)
    assert state(folder) == before


# Folders of samples

@pytest.mark.parametrize("there", ["000000.png", "letter.txt", "1.png", "more"])
def test_samples_are_not_mixed_with_what_a_folder_holds(folder, capsys, there):
    os.mkdir("many")
    os.mkdir("many/more") if there == "more" else Path("many", there).write_text("a letter")
    before = state(folder)
    assert f"holds {there}" in refused(sample, [*DRAWN, "--out", "many/"], capsys)
    assert there == "000000.png" or f"holds {there}" in refused(sample, [*DRAWN, "--out", "many", "--overwrite"], capsys)
    assert state(folder) == before


@pytest.mark.parametrize("make", [text("a letter"), os.mkfifo, lambda path: os.symlink("/dev/null", path)])
def test_what_is_no_folder_is_not_taken_for_one(folder, capsys, make):
    make("many")
    before = state(folder)
    assert "many/ is no folder" in refused(sample, [*DRAWN, "--out", "many/", "--overwrite"], capsys)
    assert state(folder) == before


def test_a_folder_that_is_empty_is_filled_and_overwrite_removes_earlier_samples(folder):
    os.mkdir("many")
    Path("many/.hidden").touch()
    sample.main([*DRAWN, "--n", "3", "--out", "many"])
    sample.main([*DRAWN, "--n", "2", "--out", "many/", "--overwrite"])
    assert sorted(os.listdir("many")) == [".hidden", "000000.png", "000001.png"]


# What is ours is replaced

def test_what_an_earlier_call_wrote_is_replaced_and_its_pixels_and_arrays_are_as_ever(folder):
    for seed in ("0", "1"):
        sample.main([*DRAWN, "--seed", seed, "--out", "drawn.png", "--npz", "drawn.npz", "--trajectory", "way.gif"])
        evaluate.main(["--reference", "real.npz", "--save-reference", "saved.npz", "--features", str(features.JUDGE)])
        plot.main(["schedules"])
        companion.main([])
    with np.load("drawn.npz") as archive:
        assert archive.files == ["arr_0", "arr_1"]
        assert np.array_equal(np.asarray(Image.open("drawn.png")), grid(archive["arr_0"], 10)[..., 0])


def without_mark(path, ending):
    """A file as earlier versions wrote it."""
    frames = [Image.fromarray(grid(images, 3)[..., 0]) for images in (IMAGES[:3], IMAGES[3:])]
    if ending == ".png":
        frames[0].save(path)
    elif ending == ".gif":
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=[100, 2000], loop=0)
    else:
        npz(path, arr_0=IMAGES, arr_1=LABELS)


@pytest.mark.parametrize("purpose", [purpose for purpose, (_, ending, ours) in PURPOSES.items()
                                     if ending in (".png", ".gif", ".npz") and ours not in (None, files.own_reference)])
def test_files_of_earlier_versions_are_known_by_their_content(tmp_path, purpose):
    path = tmp_path / f"old{PURPOSES[purpose].ending}"
    without_mark(path, path.suffix)
    check_output(path, purpose)


def test_charts_of_earlier_versions_are_known_by_their_content(tmp_path):
    points = np.random.default_rng(0).uniform(-2, 2, (50, 2))
    for name, picture in (("points", points_picture(points)), ("schedules", plot.schedules(None)[0])):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
        check_output(tmp_path / f"{name}.png", "samples")


def test_a_link_is_written_through_and_the_mode_of_its_target_stays(folder):
    make_ours("there.png", "figure schedules")
    os.chmod("there.png", 0o604)
    os.mkdir("other")
    os.symlink(folder / "there.png", "other/figure.png")
    os.symlink("new.png", "other/dangling.png")
    for name in ("figure.png", "dangling.png"):
        plot.main(["schedules", "--out", f"other/{name}"])
    assert stat.S_IMODE(os.stat("there.png").st_mode) == 0o604 and Image.open("there.png").size == (1440, 460)
    assert os.readlink("other/figure.png") == str(folder / "there.png") and os.readlink("other/dangling.png") == "new.png"
    assert sorted(os.listdir("other")) == ["dangling.png", "figure.png", "new.png"]


# --overwrite

FLAGGED = [out for out, (_, command, argv) in OUTPUTS.items() if command != train and argv[0] != "compare" and out != "scores.csv"]


@pytest.mark.parametrize("out", FLAGGED)
def test_overwrite_is_offered_and_replaces_any_regular_file_but_a_run(folder, capsys, monkeypatch, out):
    purpose, command, argv = OUTPUTS[out]
    Path(out).write_text("a letter")
    assert "--overwrite replaces it" in refused(command, argv, capsys)
    rules = []
    monkeypatch.setattr(files, "parent_of", lambda path: rules.append(path))         # of each check
    check_output(out, purpose, overwrite=True)
    run_like(out)
    for told in (dict(), dict(overwrite=True)):
        refusal(lambda: check_output(out, purpose, **told), out)
    assert len(rules) == 3
    assert "holds a run of train.py" in refused(command, [*argv, "--overwrite"], capsys)


def test_overwrite_replaces_a_users_file(folder):
    user_png("figure.png")
    plot.main(["schedules", "--out", "figure.png", "--overwrite"])
    assert known("figure.png", "figure schedules")
    Path("slim.pt").write_text("a letter")
    for _ in range(2):                                   # the second time, a slim run
        checkpoint.main(["run.pt", "--slim", "slim.pt", "--overwrite"])
    assert checkpoint.load("slim.pt").optimizer is None and files.holds_run("run.pt") and not files.holds_run("slim.pt")


# Training

def test_training_leaves_what_lies_beside_a_run_alone(folder):
    for name in ("cats.lock", "cats.pt.lock", "cats.txt"):
        Path(name).write_text("a letter")
    before = state(folder)
    train.main([*TINY, "--out", "cats.pt"])
    after = state(folder)
    assert {path: after[path] for path in before} == before
    assert {path.name for path in after.keys() - before.keys()} == {"cats.pt", "cats.csv", "cats.png"}


@pytest.mark.parametrize("make", [text("a letter"), os.mkfifo, os.mkdir, lambda path: os.symlink("letter.txt", path)])
def test_what_has_the_name_of_a_lock_is_not_taken_for_one(folder, capsys, make):
    Path("letter.txt").touch()
    make(".cats.pt.lock")
    before = state(folder)
    assert ".cats.pt.lock" in refused(train, [*TINY, "--out", "cats.pt"], capsys)
    assert state(folder) == before


def test_a_run_has_one_lock_whatever_link_it_goes_by(folder):
    os.symlink("run.pt", "link.pt")
    with files.sole_writer("run.pt"):
        refusal(lambda: files.sole_writer("link.pt").__enter__(), "another run")
    assert not Path(".run.pt.lock").exists()


def test_the_log_of_a_run_that_is_gone_is_refused_and_one_without_rows_replaced(folder, capsys):
    shutil.copy("run.csv", "new.csv")
    before = state(folder)
    said = refused(train, [*TINY, "--out", "new.pt"], capsys)
    assert "new.csv exists" in said and "move it away" in said and state(folder) == before
    Path("new.csv").write_text(Path("new.csv").read_text().partition("\n")[0] + "\n")
    train.main([*TINY, "--out", "new.pt"])
    assert Path("new.csv").read_text().count("\n") == 2


def test_no_log_has_a_row_of_a_run_that_is_not_there(folder, monkeypatch):
    write, save, there = reports.Log.write, checkpoint.save, []
    monkeypatch.setattr(reports.Log, "write", lambda log, *row: (there.append(Path("new.pt").exists()), write(log, *row)))
    monkeypatch.setattr(checkpoint, "save", lambda path, run: (time.sleep(0.2), save(path, run)))        # in the background
    monkeypatch.setattr(train, "sample_report", lambda *_: {})
    train.main([*TINY, "--out", "new.pt", "--sample-every", "1", "--save-every", "100"])
    assert there == [True, True]


def test_a_run_that_appears_before_the_first_save_stays(folder, capsys, monkeypatch):
    step = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *batch: (step(*batch), Path("new.pt").write_text("a letter")))
    assert "new.pt exists" in refused(train, [*TINY, "--out", "new.pt"], capsys)
    assert Path("new.pt").read_text() == "a letter"


def test_a_resumed_run_replaces_its_own_picture_also_of_an_earlier_version_and_not_a_users(folder, capsys):
    train.main([*TINY, "--out", "new.pt"])
    without_mark("new.png", ".png")
    train.main(["--resume", "--steps", "3", "--out", "new.pt"])
    assert known(Path("new.png"), "picture")
    user_png("new.png")
    before = state(folder)
    assert "new.png exists" in refused(train, ["--resume", "--steps", "4", "--out", "new.pt"], capsys)
    assert state(folder) == before


# The disk

def test_a_place_that_may_not_be_written_is_refused_before_the_work(folder, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)          # which root never sees by itself
    monkeypatch.setattr(sample, "drawable", None)
    for argv, name in ((["--out", "new.png"], "new.png"), (["--out", "new/"], "new/")):
        said = refused(sample, [*DRAWN, *argv], capsys)
        assert f"cannot write {name}" in said and "choose a folder in which you may write" in said


def test_a_place_that_turns_out_not_to_be_writable_is_named(tmp_path, monkeypatch):
    def denied(path, *rest, **more):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr("builtins.open", denied)
    path = tmp_path / "new.png"
    refusal(lambda: save_image(path, IMAGES[0], "samples"), f"cannot write {path}: Permission denied", "choose a folder",
            kind=OSError)


def test_a_long_name_that_the_disk_takes_is_written(tmp_path):
    save_image(tmp_path / f"{'a' * 251}.png", IMAGES[0], "samples")
    assert len(os.listdir(tmp_path)) == 1
