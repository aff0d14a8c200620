"""Nothing is lost: kills, signals, full disks, flipped bits, and data or logs that changed between two starts of one run.

Faults are real: signals to processes, bits in files, limits of the kernel. Commands run in forks of this process, which have all
modules already, or where `slow` has time for it in processes of their own. Networks are of a hundredth of the usual size.
"""
import csv
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo       # which AdamW imports: here once, not in each fork
from PIL import Image

import checkpoint
import data
import dit
import features
import files
import image_files
import reports
import sample
import train
import unet
import uvit
import vit
from refusals import refusal
from test_train import ROOT, SMALLER, TWO_PROCESSES, assert_same_run, rows_of, saved_autoencoder

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
TORCHRUN = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split()]


def family(pid):
    """The processes that a process started, and those that they started, and so on."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return found + [pid for child in found for pid in family(child)]


def trained_under_kills(folder, argv, kills, random, launch):
    """Train until nobody kills it any more: `kills` times at random moments, and from the start again wherever it is complete.

    launch: (argv, seconds or None after which it is killed) -> the exit status. Each complete run must be the undisturbed one.
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
            status = launch([*resume, "--out", "cut.pt"], random.uniform(0, lasts) if killed < kills else None)
            killed += status < 0
            complete = status == 0 or status == 2 and checkpoint.load("cut.pt").step == 12       # killed at its very end
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
        process = subprocess.Popen([*TORCHRUN, "--", "two.py", "none", *argv], stdout=log, stderr=log,
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
    Path("two.py").write_text(TWO_PROCESSES.replace("LOG_EVERY, honest = 2", "LOG_EVERY, honest = 3"))
    launch = torchrun_training if name == "two processes" else forked_training
    argv = [*CONFIGURATIONS[name].split(), *STEPS, *([] if name == "points" else ["--cache", "cache"])]
    killed, runs = trained_under_kills(folder, argv, kills, np.random.default_rng(len(name)), launch)
    print(f"{name}: {killed} kills in {runs} runs")
