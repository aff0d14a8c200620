"""Nothing is lost: kills, signals, full disks, flipped bits, and data or logs that changed between two starts of one run.

Faults are real: signals to processes, bits in files, limits of the kernel. Commands run in forks of this process, which have all
modules already, or where `slow` has time for it in processes of their own. Networks are of a hundredth of the usual size.
"""
import importlib
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo       # which AdamW imports: here once, not in each fork
from PIL import Image, ImageSequence

import checkpoint
import data
import dit
import features
import files
import image_files
import reports
import tensor_files
import train
import unet
import uvit
import vit
import tables
from tables import Table
from refusals import refusal
from test_train import ROOT, SMALLER, assert_same_run, rows_of, saved_autoencoder

FORK = multiprocessing.get_context("fork")
slow = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def smaller():
    """Networks of a hundredth of the size, which write a row every three steps."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (dit, uvit, vit):
            patch.setitem(module.SIZES, "Ti", SMALLER)
        patch.setitem(unet.SIZES, "Nano", {**unet.SIZES["Nano"], "dropout": 0.5})
        patch.setattr(reports, "LOG_EVERY", 3)
        yield


def started(call, *argv, log=os.devnull):
    """A process of a session of its own that calls a command's main(argv), and prints into a file."""
    def run():
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)         # which this process may ignore
        with open(log, "a", buffering=1) as sys.stderr:
            sys.stdout = sys.stderr
            call(list(map(str, argv)))
    process = FORK.Process(target=run)
    process.start()
    return process


def ended(process, seconds=60):
    """The exit status of a process, negative of one that a signal ended."""
    process.join(seconds)
    return process.exitcode


# Kills while a run is trained

STEPS = ["--steps", "12", "--save-every", "2", "--sample-every", "6", "--device", "cpu", "--batch-size", "8"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with small data sets, an autoencoder and a cache."""
    folder = tmp_path_factory.mktemp("inputs")
    random = np.random.default_rng(0)
    np.savez(folder / "images.npz", arr_0=random.integers(0, 256, (24, 8, 8, 1), dtype=np.uint8), arr_1=np.arange(24) % 3)
    images, labels = data.load().batch(np.arange(60))
    np.savez(folder / "digits.npz", arr_0=images, arr_1=labels)
    (folder / "photos").mkdir()
    for i in range(12):
        Image.fromarray(random.integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(folder / "photos" / f"{i}.png")
        (folder / "photos" / f"{i}.txt").write_text(f"picture number {i}\nthe {i}th")
    saved_autoencoder(folder / "vae.pt")
    return folder


CONFIGURATIONS = {                     # of train.py, in the folder of inputs
    "classifier": "--model vit --size Ti/4 --data images.npz",
    "scored": f"--size Ti/8 --data digits.npz --eval-every 2 --eval-n 8 --features {features.JUDGE}",
    "accumulated": "--size Ti/4 --data images.npz --accumulate 4 --clip-grad 0.1",
    "dropout": "--model unet --size Nano --data images.npz --variance learned",
    "text": "--model uvit --size Ti/4 --data photos --image-size 8 --text",
    "autoencoder": "--model vae --size Ti --data images.npz",
    "latents": "--size Ti/2 --data images.npz --vae vae.pt --flip",
    "points": "--data swissroll",
    "two processes": "--size Ti/4 --data images.npz",
}
TWO_PROCESSES = """
import sys
import dit
import reports
import train
dit.SIZES["Ti"] = dict(dim=64, depth=2, heads=2)
reports.LOG_EVERY = 3
train.main(sys.argv[1:])
"""
TORCHRUN = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split()]


def family(pid):
    """The processes that a process started, and those that they started, and so on."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return found + [pid for child in found for pid in family(child)]


def trained_under_kills(folder, argv, kills, random, launch, idle):
    """Train until nobody kills it any more: `kills` times at random moments, and from the start again wherever it is complete.

    launch: (argv, seconds or None after which it is killed) -> the exit status; idle: the share of its time that goes by before
    anything is written. Each complete run must be the undisturbed one.
    """
    began = time.monotonic()
    assert launch([*argv, "--out", "whole.pt"], None) == 0
    lasts, killed, runs = time.monotonic() - began, 0, 0
    while killed < kills:
        for left in folder.glob("cut.*"):
            left.unlink()
        complete, runs = False, runs + 1
        while not complete:
            resume = ["--resume"] if Path("cut.pt").exists() else argv
            status = launch([*resume, "--out", "cut.pt"], random.uniform(idle * lasts, lasts) if killed < kills else None)
            killed += status < 0
            complete = status == 0 or status > 0 and checkpoint.load("cut.pt").step == 12        # killed at its very end
            assert complete or status < 0, status
        assert_same_run("whole.pt", "cut.pt")
        assert not list(folder.glob(".cut*")), "a lock or a temporary file is left"
    return killed, runs


def forked_training(argv, seconds):
    process = started(train.main, *argv, log="log")
    if seconds is not None:
        process.join(seconds)
        process.kill()
    return ended(process)


def torchrun_training(argv, seconds):
    """Kills one of two processes, of which torchrun then ends the other, or all at once."""
    with open("log", "a") as log:
        process = subprocess.Popen([*TORCHRUN, "--", "two.py", *argv], stdout=log, stderr=log,
                                   env={**os.environ, "PYTHONPATH": str(ROOT)})
        if seconds is None:
            return process.wait()
        time.sleep(seconds)
        workers = family(process.pid)
        for pid in workers[-1:] if len(workers) == 2 and int(seconds * 1000) % 2 else [process.pid, *workers]:
            os.kill(pid, signal.SIGKILL)
        return -abs(process.wait())


@pytest.mark.parametrize("name, kills", [("classifier", 3), *(pytest.param(name, 17, marks=slow) for name in CONFIGURATIONS)])
def test_a_run_killed_at_random_moments_and_resumed_is_the_undisturbed_one(inputs, tmp_path, monkeypatch, name, kills):
    folder = shutil.copytree(inputs, tmp_path / "work")
    monkeypatch.chdir(folder)
    Path("two.py").write_text(TWO_PROCESSES)
    launch, idle = (torchrun_training, 0.5) if name == "two processes" else (forked_training, 0.3)
    argv = [*CONFIGURATIONS[name].split(), *STEPS, *([] if name == "points" else ["--cache", "cache"])]
    killed, runs = trained_under_kills(folder, argv, kills, np.random.default_rng(len(name)), launch, idle)
    print(f"{name}: {killed} kills in {runs} runs")


# Other data

@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    """A folder of three classes of five images, a run of two steps on it, and the cache."""
    folder = tmp_path_factory.mktemp("animals")
    for k, name in enumerate(("ant", "bee", "cat")):
        (folder / "data" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (8, 8), (50 * k + i, 0, 0)).save(folder / "data" / name / f"{i}.png")
    train.main([*"--size Ti/4 --image-size 8 --steps 2 --batch-size 4 --device cpu --data".split(), str(folder / "data"), "--cache",
                str(folder / "cache"), "--out", str(folder / "run.pt")])
    return folder


@pytest.fixture
def here(animals, tmp_path, monkeypatch):
    """A copy of the animals, at another place than they had, to work in."""
    folder = shutil.copytree(animals, tmp_path / "work")
    monkeypatch.chdir(folder)
    return folder


def resumed(*argv):
    """Go on with run.pt, on the data beside it."""
    train.main(["--resume", "--steps", "4", "--data", "data", "--cache", "cache", *argv])


def refused(capsys, call):
    """The one line of a command that ends, and those that it said before."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("train.py: ") == 1 and "Traceback" not in error, error
    return error


def rename(old, new):
    Path("data", old).rename(Path("data", new))


def swap():
    rename("ant/0.png", "kept")
    rename("bee/0.png", "ant/0.png")
    rename("kept", "bee/0.png")


CHANGES = {                            # of the data, and what the line says that differs
    "a class is renamed, the order with it": (lambda: rename("ant", "zebra"), ["ant", "zebra", "its classes differ"]),
    "a class is renamed, the order stays": (lambda: rename("bee", "beetle"), ["bee", "beetle"]),
    "a class is gone": (lambda: shutil.rmtree("data/cat"), ["its classes differ"]),
    "an image is gone": (lambda: Path("data/ant/3.png").unlink(), ["14 images", "13"]),
    "an image is new": (lambda: shutil.copy("data/ant/3.png", "data/ant/7.png"), ["14 images", "15"]),
    "an image is another": (lambda: Image.new("RGB", (8, 8), (9, 9, 9)).save("data/ant/3.png"), ["other images"]),
    "an image moved to another class": (lambda: rename("ant/3.png", "bee/9.png"), ["other images, labels"]),
    "two images changed places": (swap, ["other images"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_does_not_go_on_with_other_data_and_says_what_differs(here, capsys, change):
    make, words = CHANGES[change]
    make()
    before = Path("run.pt").read_bytes(), Path("run.csv").read_bytes()
    said = refused(capsys, resumed)
    assert all(word in said for word in ("run.pt", *words)), said
    assert (Path("run.pt").read_bytes(), Path("run.csv").read_bytes()) == before


def test_one_pixel_of_many_images_tells_data_sets_apart():
    images = np.zeros((3000, 4, 4, 1), np.uint8)
    before = data.fingerprint(data.Dataset("many", images))
    images[1234, 3, 2] = 1
    assert data.fingerprint(data.Dataset("moved", images)) != before


@pytest.mark.parametrize("spec", ["data", "data/", "./data/../data", "elsewhere"])
def test_a_run_goes_on_with_its_data_wherever_they_lie(here, spec):
    if spec == "elsewhere":
        Path("data").rename("elsewhere")
    resumed("--data", spec)
    run = checkpoint.load("run.pt")
    assert run.step == 4 and run.config["data"] == spec and run.data.classes == ["ant", "bee", "cat"]


def test_an_older_run_goes_on_with_a_line_and_then_has_a_fingerprint(here, capsys):
    run = checkpoint.load("run.pt")
    run.data.images = run.data.fingerprint = None
    run.config["data"] = "data"
    checkpoint.save("run.pt", run)
    resumed()
    assert "not known" in capsys.readouterr().out and checkpoint.load("run.pt").step == 4
    rename("ant", "zebra")
    assert "zebra" in refused(capsys, lambda: resumed("--steps", "6"))


# The log after a spreadsheet

@pytest.mark.parametrize("change", [lambda text: text.replace(",", ";").replace(".", ","), lambda text: text.replace("\n", ",,\n")],
                         ids=["semicolons and decimal commas", "more columns"])
def test_a_log_that_a_spreadsheet_saved_keeps_its_rows(here, change):
    before = rows_of("run.pt")
    Path("run.csv").write_text(change(Path("run.csv").read_text()))
    resumed()
    rows = rows_of("run.pt")
    assert [row["step"] for row in rows] == ["2", "3", "4"]
    assert [str(float(rows[0][name])) for name in before[0]] == [str(float(value)) for value in before[0].values()]
    assert not list(here.glob("run-*"))


def test_a_log_that_cannot_be_read_row_by_row_is_kept_beside_the_new_one(here, capsys):
    names, row = (line + "\n" for line in Path("run.csv").read_text().splitlines())
    damaged = (names + "two" + row[1:] + row).encode()
    for i, content in enumerate((b"my,own,table\n1,2,3\n", b"\x00\xff\xfe no text", damaged), 1):
        Path("run.csv").write_bytes(content)
        resumed("--steps", str(2 + 2 * i))
        assert Path(f"run-{i}.csv").read_bytes() == content and f"run-{i}.csv" in capsys.readouterr().out
        assert rows_of("run.pt")[-1]["step"] == str(2 + 2 * i)


# Bits

def flip(path, place, bit):
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0] ^ 1 << bit
        file.seek(place)
        file.write(bytes([byte]))


def places(path):
    """The bytes of tensors in a run.pt, as ranges."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for entry in archive.infolist():
            if "/data/" in entry.filename and entry.file_size:
                file.seek(entry.header_offset + 26)
                name, extra = file.read(2), file.read(2)
                start = entry.header_offset + 30 + int.from_bytes(name, "little") + int.from_bytes(extra, "little")
                yield range(start, start + entry.file_size)


many_bits = pytest.mark.parametrize("flips", [60, pytest.param(200, marks=slow)])


@many_bits
def test_one_flipped_bit_in_the_tensors_of_a_run_is_noticed(here, flips):
    parts, random = list(places("run.pt")), np.random.default_rng(flips)
    sizes = np.array([len(part) for part in parts])
    assert sizes.sum() > 0.9 * os.path.getsize("run.pt") and checkpoint.load("run.pt").step == 2
    for _ in range(flips):
        part = parts[random.choice(len(parts), p=sizes / sizes.sum())]
        place, bit = int(part[random.integers(len(part))]), int(random.integers(8))
        flip("run.pt", place, bit)
        refusal(lambda: checkpoint.load("run.pt"), "run.pt", "damaged")
        flip("run.pt", place, bit)
    assert checkpoint.load("run.pt").step == 2


def test_one_process_of_a_machine_compares_checksums_and_the_others_map_the_file(here, monkeypatch):
    flip("run.pt", next(places("run.pt")).start, 0)
    refusal(lambda: checkpoint.load("run.pt"), "run.pt", "damaged")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert checkpoint.load("run.pt").step == 2           # the first process ends the command


@many_bits
def test_one_flipped_bit_in_a_cache_is_noticed_and_the_row_alone_is_computed_again(here, monkeypatch, flips):
    def loaded():
        return data.load("data", 8, "all", "cache")
    right, random, decode, again = np.array(loaded().images), np.random.default_rng(flips), image_files._decode, []
    monkeypatch.setattr(image_files, "_decode", lambda path, size: (again.append(path), decode(path, size))[1])
    columns = [max(Path("cache").glob(f"data-*/{name}.npy"), key=os.path.getmtime) for name in ("images", "channels", "crc32")]
    for i in range(flips):
        column = columns[i % 3]
        size = (os.path.getsize(column) - 128) // 15     # of a row
        row, byte, bit = (int(random.integers(n)) for n in (15, size, 8))
        again.clear()
        flip(column, 128 + row * size + byte, bit)
        assert np.array_equal(loaded().images, right) and len(again) == 1
        assert np.array_equal(loaded().images, right) and len(again) == 1        # and is there from then on


def test_of_a_large_cache_each_start_compares_other_rows(tmp_path, monkeypatch):
    def opened():
        return Table("table", 0, 64, {"a": ((4,), np.uint8)}, tmp_path)
    with opened() as table:
        table.write(range(64), [np.arange(256).reshape(64, 4)])
    monkeypatch.setattr(tables, "BLOCK", 32)              # 8 rows
    monkeypatch.setattr(tables, "CHECKED", 64)            # bytes of 256: two blocks of eight
    path = table.folder / "a.npy"
    for row in range(64):
        flip(path, 128 + 4 * row, 0)
    seen = set()
    for start in range(40):
        with opened() as table:
            now = set(table.missing().tolist())
        assert len(now - seen) in (0, 16)
        seen |= now
    assert seen == set(range(64))


def test_damage_in_a_cache_that_may_not_be_written_is_one_line(tmp_path, monkeypatch):
    def opened():
        return Table("table", 0, 2, {"a": ((4,), np.uint8)}, tmp_path)
    with opened() as table:
        table.write(range(2), [7])
    flip(table.folder / "a.npy", 130, 3)
    monkeypatch.setattr(os, "access", lambda path, mode: False)          # which root never sees by itself
    refusal(opened, table.folder, "1 rows", "--cache", kind=OSError)


def test_an_older_file_without_checksums_must_hold_finite_numbers(tmp_path):
    for value, good in ((1.0, True), (float("nan"), False), (float("-inf"), False)):
        tensors = dict(state_dict=dict(a=torch.tensor([0.0, value])), n=3)
        torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        if good:
            assert tensor_files.read(tmp_path / "old.pth")["state_dict"]["a"].tolist() == [0, 1]
        else:
            refusal(lambda: tensor_files.read(tmp_path / "old.pth"), "old.pth", "damaged")


# A run that diverged

def test_a_run_that_diverged_keeps_finite_weights_and_goes_on_by_its_own_advice(here, capsys):
    said = refused(capsys, lambda: resumed(*"--steps 40 --lr 1e30 --clip-grad 0 --warmup 0 --save-every 4".split()))
    assert "--lr" in said and "--clip-grad" in said
    run = checkpoint.load("run.pt")
    assert run.step == 2 and all(value.abs().max() < 1e3 for value in (*run.model.values(), *run.ema.values()))
    resumed("--steps", "6", "--lr", "1e-3", "--clip-grad", "0.5", "--decay", "none", "--warmup", "3")
    assert "from step 2 on, --clip-grad is 0.5, not 1.0" in capsys.readouterr().err
    assert checkpoint.load("run.pt").step == 6 and [row["lr"] for row in rows_of("run.pt")][-1] == "0.001"


def test_a_run_that_diverges_before_its_first_save_can_be_started_again(here, capsys):
    argv = "--size Ti/4 --image-size 8 --batch-size 4 --device cpu --data data --cache cache --out new.pt".split()
    refused(capsys, lambda: train.main([*argv, *"--steps 40 --lr 1e30 --clip-grad 0 --warmup 0 --sample-every 4".split()]))
    train.main([*argv, "--steps", "3"])
    assert checkpoint.load("new.pt").step == 3 and len(rows_of("new.pt")) == 1


# Signals while images are decoded

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 1,000 images that take a minute: links of a large one."""
    folder = tmp_path_factory.mktemp("photos") / "data"
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), dtype=np.uint8)).save(folder / "0.jpg")
    for i in range(1, 1000):
        os.link(folder / "0.jpg", folder / f"{i}.jpg")
    return folder


def living(session):
    """The processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def decoding(pid):
    """The worker processes of a command."""
    def works(child):
        try:
            return b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return False
    return list(filter(works, family(pid)))


SIGNALS = {                            # the signal, the exit status, and what the line says
    "Ctrl-C": (signal.SIGINT, 130, "stopped by Ctrl-C"), "SIGTERM": (signal.SIGTERM, 143, "stopped by SIGTERM"),
    "SIGKILL": (signal.SIGKILL, -9, None), "SIGKILL of a worker": (signal.SIGKILL, 2, "was killed")}


def assert_ends(kind, pid, wait, folder):
    """Send a signal to a command that decodes: within 5 s it has ended in one line, and left neither a process nor a file."""
    number, status, said = SIGNALS[kind]
    if kind == "Ctrl-C":
        os.killpg(pid, number)                           # as a terminal sends it: to all
    else:
        os.kill(decoding(pid)[0] if "worker" in kind else pid, number)
    began = time.monotonic()
    found = wait(5)
    while living(pid) and time.monotonic() - began < 5:
        time.sleep(0.02)
    left, log = living(pid), (folder / "log").read_text()
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert found == status and not left, (found, left, log)
    if said:                                             # after a SIGKILL workers may complain; the next start removes what it left
        assert log.count("\n") == 1 and said in log, log
        assert not [*(folder / "temporary").iterdir(), *(folder / "cache").rglob("*.tmp")]


@pytest.mark.parametrize("number, said", [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_while_a_command_imports_pytorch_is_one_line(number, said):
    with subprocess.Popen([sys.executable, ROOT / "gflops.py"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as command:    # ignored in a background
        caught = 0
        while not caught >> signal.SIGTERM - 1 & 1:      # until its first module has its handlers, a second before PyTorch is there
            caught = int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{command.pid}/status").read_text())[1], 16)
        command.send_signal(number)
        assert command.stderr.read().decode() == f"gflops.py: stopped by {said}\n" and command.wait() == 128 + number


@pytest.mark.parametrize("kind", SIGNALS)
def test_a_signal_while_a_folder_is_decoded_ends_it_at_once(tmp_path, photos, monkeypatch, kind):
    stand_in = tmp_path / "stand_in" / "torch"           # of PyTorch: workers do not use it, and it takes them seconds to import
    stand_in.mkdir(parents=True)
    for name in ("__init__", "distributed"):
        (stand_in / f"{name}.py").touch()
    (tmp_path / "temporary").mkdir()
    monkeypatch.syspath_prepend(stand_in.parent)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    process = started(train.main, "--data", photos, "--image-size", 8, "--cache", tmp_path / "cache", "--out", tmp_path / "run.pt",
                      log=tmp_path / "log")
    while process.is_alive() and len(decoding(process.pid)) < 2:
        time.sleep(0.02)
    for worker in decoding(process.pid):                 # while they start
        blocked, = re.findall(r"SigBlk:\s*(\w+)", Path(f"/proc/{worker}/status").read_text())
        assert int(blocked, 16) & 1 << signal.SIGINT - 1, "Ctrl-C would end a worker by a traceback"
    time.sleep(0.5)
    assert_ends(kind, process.pid, lambda seconds: ended(process, seconds), tmp_path)


@slow
@pytest.mark.parametrize("moment", range(6))
@pytest.mark.parametrize("kind", SIGNALS)
def test_a_signal_at_any_moment_of_a_command_that_decodes_ends_it_at_once(tmp_path, photos, kind, moment):
    for name in ("temporary", "cache"):
        (tmp_path / name).mkdir()
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([sys.executable, ROOT / "train.py", "--data", photos, "--image-size", "8", "--cache",
                                    tmp_path / "cache", "--out", tmp_path / "run.pt"], stdout=log, stderr=log,
                                   start_new_session=True, env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while process.poll() is None and len(decoding(process.pid)) < 2:
        time.sleep(0.02)
    time.sleep(moment * 0.7)                             # while the workers start, and later
    assert_ends(kind, process.pid, process.wait, tmp_path)


# Full disks

WRITES = {                             # a command, and the largest of the files that it writes
    "a run": ("train.py --size Ti/4 --data images.npz --steps 3 --batch-size 8 --device cpu --out new.pt", "new.pt"),
    "a resumed run": ("train.py --resume --steps 6 --out run.pt", "run.pt"),
    "a run of points": ("train.py --data swissroll --steps 1 --batch-size 8 --device cpu --out new.pt", "new.pt"),
    "latents": ("train.py --size Ti/2 --data images.npz --vae vae.pt --steps 1 --batch-size 8 --cache new --out new.pt", "new.pt"),
    "decoded images": ("train.py --size Ti/4 --data photos --image-size 8 --steps 1 --batch-size 8 --cache new --out new.pt",
                       "images.npy"),
    "samples": ("sample.py --ckpt run.pt --n 9 --steps 2 --out new.png", "new.png"),
    "a folder of samples": ("sample.py --ckpt run.pt --n 9 --steps 2 --out many/", "000003.png"),
    "an archive": ("sample.py --ckpt run.pt --n 200 --steps 2 --out new.png --npz new.npz", "new.npz"),
    "a film": ("sample.py --ckpt run.pt --n 9 --steps 5 --out new.png --trajectory new.gif", "new.gif"),
    "a slim run": ("checkpoint.py run.pt --slim new.pt", "new.pt"),
    "a reference": (f"evaluate.py --reference digits.npz --features {features.JUDGE} --save-reference new.npz --cache new", "new.npz"),
    "a chart": ("plot.py schedules --out new.png", "new.png"),
}
READERS = {".pt": tensor_files.read, ".npz": lambda path: [np.load(path)[key] for key in np.load(path)],
           ".png": lambda path: Image.open(path).load(), ".gif": lambda path: list(ImageSequence.all_frames(Image.open(path)))}


def run_within(limit, command, what=resource.RLIMIT_FSIZE):
    """Run a command whose files, or its memory, can have `limit` bytes at most -> what it prints, and its exit status."""
    program, *argv = command.split()
    main = importlib.import_module(program.removesuffix(".py")).main
    end, log = os.pipe()

    def limited(argv):
        resource.setrlimit(what, (limit, resource.RLIM_INFINITY))
        main(argv)
    process = started(limited, *argv, log=f"/dev/fd/{log}")
    os.close(log)
    with open(end) as said:
        return said.read(), ended(process)


@pytest.fixture(scope="module")
def filled(inputs, tmp_path_factory):
    """The inputs, and a run of three steps on them."""
    folder = shutil.copytree(inputs, tmp_path_factory.mktemp("filled") / "work")
    train.main([*"--size Ti/4 --steps 3 --batch-size 8 --device cpu --data".split(), str(folder / "images.npz"), "--out",
                str(folder / "run.pt")])
    return folder


@pytest.mark.parametrize("write, trials", [
    *((write, 1) for write in ("a run", "decoded images", "samples", "an archive", "a film", "a reference")),
    *(pytest.param(write, 10, marks=slow) for write in WRITES)])       # the others write by the same functions
def test_a_full_disk_leaves_no_torn_file_and_one_line_that_names_the_file(filled, tmp_path, monkeypatch, write, trials):
    (command, largest), random = WRITES[write], np.random.default_rng(len(write))
    shutil.copytree(filled, tmp_path / "whole")
    monkeypatch.chdir(tmp_path / "whole")
    assert run_within(resource.RLIM_INFINITY, command)[1] == 0
    size, = (path.stat().st_size for path in Path().rglob(largest))
    for trial in range(trials):
        folder = shutil.copytree(filled, tmp_path / str(trial))
        os.chdir(folder)
        before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
        said, status = run_within(int(random.integers(size)) if trial else size - 1, command)
        line = said.splitlines()[-1]
        assert status == 2 and "Traceback" not in said and "cannot write" in line and "make room" in line, said
        for path in filter(Path.is_file, Path().rglob("*")):
            assert path.read_bytes() == before.get(path) or path.suffix in (".csv", ".npy", ".json") or READERS[path.suffix](path)
        assert not [path for path in Path().rglob(".*") if path.is_file()]
        assert run_within(resource.RLIM_INFINITY, command.replace("many/", "again/"))[1] == 0


def test_rows_that_a_disk_does_not_take_whole_are_not_in_the_table(tmp_path):
    (tmp_path / "run.csv").write_text("step,loss\n1,2\n")

    def limited(argv):
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, resource.RLIM_INFINITY))      # two bytes more than there are
        refusal(lambda: files.append(tmp_path / "run.csv", "2,1.5\n"), "run.csv", "make room", kind=OSError)
    assert ended(started(limited)) == 0
    assert (tmp_path / "run.csv").read_text() == "step,loss\n1,2\n"


# Memory

def test_host_memory_that_runs_out_is_one_line(filled, tmp_path, monkeypatch):
    command = "train.py --size Ti/4 --data images.npz --batch-size 200000 --device cpu --out new.pt"
    monkeypatch.chdir(shutil.copytree(filled, tmp_path / "work"))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    said, status = run_within(used + 2 ** 28, command, resource.RLIMIT_AS)
    assert status == 2 and "memory is full" in said and "Traceback" not in said, said
