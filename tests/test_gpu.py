"""What only a GPU can show: it trains as the CPU does, in every precision, and does not wait where it need not.

`python -m pytest -q tests/test_gpu.py` runs this file; where all tests run, the GPU is hidden. float32 sums round in other orders
on another device, in other kernels and in other processes, and Adam makes steps of them: CLOSE is of the norm of a matrix.
"""
import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import checkpoint
import cli
import data
import features
import models
import sample
import settings
import train
from objectives import train_step

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
ROOT = Path(__file__).parents[1]
CLOSE = 1e-3
TINY = f"--batch-size 8 --device {DEVICE} --precision fp32 --steps 6 --save-every 3 --sample-every 1000 --warmup 0 --lr 0.001".split()
TRAINED = {                                              # flags of train.py
    **{f"dit {name}": f"--size Ti/16 --conditioning {name}" for name in ("adaln-zero", "adaln", "cross-attention", "in-context")},
    "uvit": "--model uvit --size Nano/16", "unet": "--model unet --size Nano", "upsampler": "--model unet --size Ti-up",
    "vit": "--model vit --size Nano/16", "vit hybrid": "--model vit --size Nano/16 --hybrid", "vae": "--model vae --size Ti",
    "points": "--data swissroll", "text": "--model uvit --size Nano/16 --data shapes --text",
}
DRAWING = {name: models.describe(*arguments, 32, 1, 10) for name, arguments in
           {"dit": ("dit", "Ti/8"), "uvit": ("uvit", "Ti/8"), "unet": ("unet", "Ti")}.items()}
every_network = pytest.mark.parametrize("name", TRAINED)


def trained(out, *argv):
    train.main([*TINY, *argv, "--out", str(out), "--cache", str(out.parent)])
    return out


def assert_alike(a, b, tolerance=CLOSE):
    """Each matrix of two runs' weights is alike; a key's bias has no gradient but rounding, which Adam makes full steps of."""
    first, second = checkpoint.load(a).model, checkpoint.load(b).model
    for name, value in first.items():
        if value.ndim > 1:
            assert (value - second[name]).norm() <= tolerance * value.norm(), name


def last_row(run):
    with open(run.with_suffix(".csv"), newline="") as file:
        return {name: float(value) for name, value in list(csv.DictReader(file))[-1].items() if value}


def test_a_run_goes_on_as_if_it_had_never_stopped(tmp_path):
    cut, whole = trained(tmp_path / "cut.pt", "--decay", "none"), trained(tmp_path / "whole.pt", "--decay", "none", "--steps", "9")
    train.main(["--resume", "--steps", "9", "--out", str(cut)])
    assert_alike(cut, whole)


def test_the_gpu_trains_as_the_cpu_does(tmp_path):
    there, here = trained(tmp_path / "gpu.pt"), trained(tmp_path / "cpu.pt", "--device", "cpu")
    assert_alike(there, here)
    assert last_row(there)["loss"] == pytest.approx(last_row(here)["loss"], rel=CLOSE)


def test_two_processes_train_as_one(tmp_path):
    if torch.cuda.device_count() < 2 and DEVICE == "cuda":
        pytest.skip("needs two GPUs")
    one, two = trained(tmp_path / "one.pt"), tmp_path / "two.pt"
    command = f"-m torch.distributed.run --standalone --nproc-per-node 2 {ROOT / 'train.py'}".split()
    subprocess.run([sys.executable, *command, *TINY, "--out", str(two)], check=True)
    assert_alike(one, two)


@pytest.mark.parametrize("name", ["dit adaln-zero", "uvit"])
def test_a_compiled_network_trains_as_it_is(tmp_path, name):
    plain, compiled = (trained(tmp_path / f"{len(flags)}.pt", *TRAINED[name].split(), *flags) for flags in ([], ["--compile"]))
    assert_alike(plain, compiled)


@every_network
def test_half_precision_trains_every_network_about_as_well(tmp_path, name):
    full, half = (trained(tmp_path / f"{precision}.pt", *TRAINED[name].split(), "--precision", precision)
                  for precision in ("fp32", "bf16"))
    assert last_row(half)["loss"] == pytest.approx(last_row(full)["loss"], rel=0.05)     # bfloat16 has 8 bits: 0.4 % a product


@every_network
def test_a_step_does_not_wait_for_the_gpu(tmp_path, name):
    args, _ = settings.read_settings([*TINY, *TRAINED[name].split(), "--out", str(tmp_path / "run.pt"), "--cache", str(tmp_path)])
    args.precision = "bf16"
    training = train.Training(args, None, torch.device(DEVICE), 0, 1)
    batches = data.Batches(training.dataset, args.batch_size, args.seed)
    try:
        for step in range(2):                            # the first moves tables, and makes AdamW's moments
            read = [z if z is None or DEVICE == "cpu" else z.pin_memory() for z in batches[step]]
            if step and DEVICE == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            train_step(training.state, training.model, training.objective, read, step, args, 0, 1)
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert training.state.norm.isfinite()


def nudged(described):
    """A network whose every weight counts, also those that start at zero."""
    torch.manual_seed(0)
    network = models.build(described).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    return network


@pytest.mark.parametrize("name", DRAWING)
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 0.15)])       # of the output's deviation, the largest
def test_a_network_puts_out_what_it_does_on_the_cpu(name, precision, tolerance):
    network, x = nudged(DRAWING[name]), torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([0, 10, 500, 999]), torch.tensor([0, 3, 9, 10])
    expected = network(x, t, y)
    with features.full_precision():
        network, *inputs = (z.to(DEVICE) for z in (network, x, t, y))
        with cli.autocast(torch.device(DEVICE), precision):
            found = network(*inputs).float().cpu()
    assert_close(found, expected, rtol=0, atol=tolerance * expected.std().item())


def test_statistics_of_features_are_those_of_the_cpu():
    images, _ = data.load().batch(list(range(200)))
    here, there = (features.measure(images.to(device).split(64), features.vit_space(features.JUDGE, torch.device(device)))
                   for device in ("cpu", DEVICE))
    for name in ("mu", "sigma"):
        expected = getattr(here.pool, name)
        assert_close(getattr(there.pool, name).cpu(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_the_default_run_learns_and_draws(tmp_path):
    train.main(["--steps", "60", "--precision", "bf16", "--device", DEVICE, "--out", str(tmp_path / "run.pt")])
    assert last_row(tmp_path / "run.pt")["loss"] < 0.9
    sample.main(["--ckpt", str(tmp_path / "run.pt"), "--n", "10", "--out", str(tmp_path / "samples.png")])
