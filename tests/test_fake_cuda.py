"""CUDA where there is none: training, sampling and scoring mix no devices, and do not wait for the device where they need not.

fake_cuda.py runs the project's code on faked CUDA tensors, once for all tests, in a process of its own, which conftest.py starts
before the first test: it takes half a minute of another core.
"""
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import pytest
import torch

TESTS = Path(__file__).parent
LIBRARIES = Path(torch.__file__).parent / "lib"
STEPS = ("dit adaln-zero", "dit adaln", "dit cross-attention", "dit in-context",
         "dit flips, shifts, two micro-batches, checkpointing", "dit latents", "dit text", "uvit", "uvit text", "unet",
         "upsampler", "vae", "vit", "vit hybrid", "points")
DRAWN = ("drawn by ddpm", "drawn by ddim", "drawn by dpm++", "latents drawn and decoded", "points drawn", "restored",
         "latents restored", "a cascade", "images encoded")
MEASURED = ("measured by Inception", "measured by a judge")
SCORES = ("scores of Inception", "scores of a judge")


def guard(folder):
    """The compiled guard of the device, from one folder for all runs of a PyTorch.  Skips where it cannot be had."""
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this PyTorch has a guard of CUDA's own, which wants a GPU: see test_gpu.py")
    made = folder / f"guard-{torch.__version__}.so"
    if not made.exists():
        part = Path(f"{made}.{os.getpid()}")             # test runs may start at the same time
        command = ["c++", "-O0", "-shared", "-fPIC", "-std=c++20", str(TESTS / "fake_cuda_guard.cpp"), "-o", str(part),
                   f"-I{LIBRARIES.parent}/include", f"-L{LIBRARIES}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{LIBRARIES}"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no C++ compiler that makes the guard: {getattr(error, 'stderr', '') or error}")
        part.replace(made)
    return made


@contextmanager
def begun(cache):
    """The run of all cases, in the background: (process, what it says, what else it prints), or why there is none, a text."""
    try:
        made = guard(cache.mkdir("fake-cuda"))
    except pytest.skip.Exception as why:
        yield str(why)
        return
    with TemporaryFile("w+") as said, TemporaryFile("w+") as printed:
        process = subprocess.Popen([sys.executable, TESTS / "fake_cuda.py", made], stdout=said, stderr=printed)
        try:
            yield process, said, printed
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def seen(fake_cuda):
    """What was seen of all cases, by their names."""
    if isinstance(fake_cuda, str):
        pytest.skip(fake_cuda)
    process, said, printed = fake_cuda
    status = process.wait(600)
    for file in (said, printed):
        file.seek(0)
    assert status == 0, printed.read()[-3000:]
    return json.load(said)


def faults(case, allowed=()):
    """Lines that wait for the device, or copy to it, and what else is wrong but for the kinds that are allowed."""
    found = [f"{kind}, {n} times: {place}" for kind, place, n in case["faults"] if kind not in allowed]
    return found + ([case["error"]] if case["error"] else [])


@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_copies_only_its_batch_and_waits_for_nothing(seen, name):
    assert faults(seen[name]) == []


@pytest.mark.parametrize("name", DRAWN)
def test_drawing_mixes_no_devices_and_waits_only_for_what_it_returns(seen, name):
    case = seen[name]                                    # each image has a generator on the CPU: its noise is copied
    assert faults(case, ("copies to the device", "waits for the device")) == []
    assert sum(n for kind, _, n in case["faults"] if kind == "waits for the device") <= 1
    assert all(".to(" in place for kind, place, _ in case["faults"] if kind == "copies to the device")       # none unasked


@pytest.mark.parametrize("name", MEASURED)
def test_measuring_waits_for_no_batch(seen, name):
    assert faults(seen[name]) == []


@pytest.mark.parametrize("name", SCORES)
def test_scores_mix_no_devices(seen, name):
    assert faults(seen[name], ("waits for the device",)) == []


def test_a_step_takes_few_kernels(seen):
    assert 0 < seen["dit adaln-zero"]["kernels"] <= 720


def test_all_that_was_seen_is_judged(seen):
    assert sorted(seen) == sorted((*STEPS, *DRAWN, *MEASURED, *SCORES))
