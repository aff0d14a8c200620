"""Measure what the project claims: the quality of a run's samples, the speed of training.

    python bench.py quality --ckpt run.pt              samples judged by their nearest training images
    python bench.py train --model uvit --size S/4      images/s and GFLOP/s, beside a large product or convolution in the same run

Times on shared machines drift by tens of percent: compare ratios within one run only.
"""
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import train
from checkpoint import build, load
from cli import Parser, one_line_errors, positive, processes
from gflops import count, inputs_of
from models import MODELS
from objectives import objective_of
from sample import CFG_SCALE, STEPS, draw, labels_of


def nearest(queries, reference, k=3):
    """Indices (n, k) of the nearest reference images by pixel distance; both uint8 (n, H, W, C)."""
    queries, reference = (torch.as_tensor(images).float().flatten(1) for images in (queries, reference))
    return torch.cat([torch.cdist(part, reference).topk(k, largest=False).indices for part in queries.split(512)])


def vote(labels, neighbours):
    """The majority label of each row's neighbours; the nearest one's where all differ.  labels (M,), neighbours (n, 3)."""
    first, second, third = labels[neighbours].unbind(dim=1)
    return torch.where(second == third, second, first)


def unique_share(nearest):
    """The share of samples whose nearest image, nearest (n,), is no other sample's nearest."""
    counts = nearest.unique(return_counts=True)[1]
    return (counts == 1).sum().item() / len(nearest)


def quality(args):
    """Print how many samples of a run are recognised, beside real held-out images, and how many are no copies of each other."""
    run = load(args.ckpt)
    network, diffusion = build(run)
    if diffusion is None or network.num_classes is None or run["vae"] or not run["data"]["spec"]:
        raise ValueError(f"{args.ckpt}: quality needs a class-conditional run of train.py on pixels")
    device, _, _ = processes(args.device)
    config = run["config"]
    real, held_out = (data.load(run["data"]["spec"], config["image_size"], split, config["cache"], config["skip_bad"])
                      for split in ("train", "test"))
    images, labels = real.batch(np.arange(len(real)))
    test_images, test_labels = held_out.batch(np.arange(len(held_out)))

    classes = list(range(network.num_classes))
    scale = CFG_SCALE if network.null_label is not None else 1.0
    samples = [data.to_uint8(x).cpu() for _, x in draw(network.to(device), diffusion, range(args.n), classes, args.seed,
                                                       clip=True, cfg_scale=scale)]
    neighbours = nearest(torch.cat(samples), images)
    right = (vote(labels, neighbours) == labels_of(range(args.n), classes)).float().mean().item()
    real_right = (vote(labels, nearest(test_images, images)) == test_labels).float().mean().item()
    print(f"{args.n} samples of {args.ckpt} (step {run['step']}), seed {args.seed}, dpm++ {STEPS} steps, guidance {scale:g}")
    print(f"samples recognised as their class   {right:6.1%}   by 3 nearest neighbours among {len(real)} training images")
    print(f"real held-out images, likewise      {real_right:6.1%}   of {len(held_out)}")
    print(f"samples whose nearest training image is no other's {unique_share(neighbours[:, 0]):.1%}")


def rate_of(operation, flops, device):
    """FLOP/s of an operation of so many FLOP, over half a second."""
    operation()
    _synchronize(device)
    began, times = time.perf_counter(), 0
    while time.perf_counter() - began < 0.5:
        for _ in range(8):
            operation()
        _synchronize(device)
        times += 8
    return times * flops / (time.perf_counter() - began)


def _random(device, *shape):
    """Normal numbers, float32 on the CPU and bfloat16 on CUDA, as training computes."""
    return torch.randn(shape, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)


def product_rate(device, side=2048):
    """FLOP/s of a large square matrix product."""
    a, b = _random(device, side, side), _random(device, side, side)
    return rate_of(lambda: a @ b, 2 * side ** 3, device)


def convolution_rate(device, channels=256, side=32, n=8):
    """FLOP/s of a large 3 x 3 convolution, channels last."""
    images, kernels = (_random(device, *shape).to(memory_format=torch.channels_last)
                       for shape in ((n, channels, side, side), (channels, channels, 3, 3)))
    with torch.no_grad():
        return rate_of(lambda: F.conv2d(images, kernels, padding=1), 2 * n * 9 * channels ** 2 * side ** 2, device)


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


class Stopwatch:
    """Seconds spent inside some methods while the real training loop runs, and when each call began."""

    def __init__(self, device):
        self.device, self.seconds, self.starts = device, {}, {}

    def wrap(self, owner, name):
        original = getattr(owner, name)
        self.seconds[name], self.starts[name] = [], []

        def timed(*args, **kwargs):
            _synchronize(self.device)
            began = time.perf_counter()
            result = original(*args, **kwargs)
            _synchronize(self.device)
            self.seconds[name].append(time.perf_counter() - began)
            self.starts[name].append(began)
            return result
        setattr(owner, name, timed)
        return lambda: setattr(owner, name, original)


def speed(args):
    """Run train.py's own loop with a stopwatch around forward, backward and optimizer."""
    if args.steps < 2:
        raise ValueError("--steps: time at least 2")
    size = args.size or train.DEFAULT_SIZE[args.model]
    warm, device = 3, processes(args.device)[0]
    measure, ruler = (convolution_rate, "convolution") if args.model == "unet" else (product_rate, "product")
    watch = Stopwatch(device)
    undo = [watch.wrap(*method) for method in ((objective_of(args.model), "loss"), (torch.Tensor, "backward"),
                                               (torch.optim.AdamW, "step"))]
    with tempfile.TemporaryDirectory() as folder:
        never = str(10 ** 9)
        rates = [measure(device)]
        try:
            train.main(["--model", args.model, "--size", size, "--batch-size", str(args.batch_size), "--steps",
                        str(warm + args.steps), "--data", args.data, "--out", str(Path(folder) / "run.pt"), "--save-every", never,
                        "--sample-every", never, "--device", args.device] + (["--compile"] if args.compile else []))
        finally:
            for put_back in undo:
                put_back()
        rates.append(measure(device))
        network, _ = build(load(Path(folder) / "run.pt"))
    starts = watch.starts["loss"]
    whole = (starts[-1] - starts[warm]) / (len(starts) - 1 - warm)                   # seconds a step, all included
    inside = {name: np.mean(seconds[warm:-1]) for name, seconds in watch.seconds.items()}
    work = 3 * 2 * args.batch_size * count(network, *inputs_of(network))[1]          # backward: twice forward; two FLOP each
    rate = np.mean(rates)
    print(f"{args.model} {size}, batch {args.batch_size}, {device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{args.batch_size / whole:.1f} images/s, {work / whole / 1e9:.1f} GFLOP/s: {work / whole / rate:.1%} of a large "
          f"{ruler}'s {rate / 1e9:.1f}")
    print(", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in inside.items()) +
          f", the rest of the loop {1 - sum(inside.values()) / whole:.1%} of a step's {whole * 1e3:.1f} ms")


def main(argv=None):
    """The command: one subcommand a measurement."""
    parser = Parser(prog="bench.py", description="Measure the quality of a run's samples, or the speed of training.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    command = commands.add_parser("quality", help="score samples by their nearest training images")
    command.add_argument("--ckpt", default="run.pt", help="default: run.pt")
    command.add_argument("--n", type=positive, default=200, help="default: 200")
    command.add_argument("--seed", type=int, default=0, help="default: 0")
    command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    command.set_defaults(run=quality)
    command = commands.add_parser("train", help="time the training loop")
    command.add_argument("--model", default="dit", choices=MODELS, help="default: dit")
    command.add_argument("--size", help="as for train.py (default: its own)")
    command.add_argument("--batch-size", type=positive, default=32, help="default: 32")
    command.add_argument("--steps", type=positive, default=20, help="timed steps (default: 20)")
    command.add_argument("--data", default="mnist", help="default: mnist")
    command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    command.add_argument("--compile", action="store_true")
    command.set_defaults(run=speed)
    args = parser.parse_args(argv)
    with one_line_errors("bench.py"):
        args.run(args)


if __name__ == "__main__":
    sys.exit(main())
