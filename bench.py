"""Measure speed: of training, of reading data, of the evaluator, and of our networks beside plain ones.

    python bench.py train --model uvit --size S/4      images/s and GFLOP/s, beside a large product or convolution in the same run
    python bench.py latents --vae vae.pt               a step on cached latents, beside random ones, and beside encoding each time
    python bench.py data                               what reads batches, beside what train.py takes
    python bench.py evaluate                           the Fréchet distance, precision and recall, Inception
    python bench.py peers                              our networks in turn with those of peers.py, and how much faster they are
    python bench.py options                            a step with --precision bf16, --compile or halves, in turn with one without

Times on shared machines drift by tens of percent: compare ratios within one run only.
"""
import interrupts                        # noqa: F401  first, for signals while PyTorch is imported
import copy
import math
import resource
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
import inception
import objectives
import peers
import text
import train
from checkpoint import load, load_autoencoder
from cli import Parser, at_least, autocast, one_line_errors, positive, precision_on, processes
from ddpm import sample
from features import full_precision
from gflops import count, inputs_of
from latents import encode, latents
from metrics import Statistics, distance, precision_recall
from models import MODELS, build, describe
from objectives import Classification, Denoising, train_step
from reports import now
from sampling import draw
from settings import DEFAULT_SIZE, read_settings

FEATURES, TIMED_IMAGES = 2048, 64                # made up to time the evaluator: numbers a row, and images of 64 x 64
WARM = 10                                                # steps before those that are timed
ROUND, UNTIMED = 10, 5                            # steps of one kind in a row; the first of them read what loaders have ahead


def seconds_of(operation):
    """Seconds that an operation takes."""
    began = now()
    operation()
    return now() - began


def ruler_rate(ruler, device, dtype):
    """FLOP/s, over half a second, of a large "product" of square matrices or a large 3 x 3 "convolution", channels last."""
    if ruler == "product":
        side = 8192 if device.type == "cuda" else 2048   # a GPU reaches its rate on more work
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        operation, flops = lambda: a @ b, 2 * side ** 3
    else:
        N, C, side = 256 if device.type == "cuda" else 8, 256, 32
        images, kernels = (torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
                           for shape in ((N, C, side, side), (C, C, 3, 3)))
        operation, flops = lambda: F.conv2d(images, kernels, padding=1), 2 * N * 9 * C ** 2 * side ** 2
    taken, times = 0.0, 0
    operation()                                          # the first call loads libraries
    while taken < 0.5:
        taken += seconds_of(lambda: [operation() for _ in range(8)])
        times += 8
    return times * flops / taken


@contextmanager
def ruled(ruler, device, dtype):
    """A list of a ruler's rates in FLOP/s: that before the context, and once it has ended that after it."""
    rates = [ruler_rate(ruler, device, dtype)]
    yield rates
    rates.append(ruler_rate(ruler, device, dtype))


def beside_ruler(flops, seconds, rates, ruler):
    """In words, how fast so many FLOP in so many seconds are, beside the mean of a ruler's rates, in FLOP/s."""
    rate, measure = flops / seconds, np.mean(rates)
    return f"{rate / 1e9:.0f} GFLOP/s, {rate / measure:.0%} of a large {ruler}'s {measure / 1e9:.0f}"


def evaluation(args):
    """Time the parts of evaluate.py on made features: the Fréchet distance, precision and recall, Inception."""
    device, D, n = processes(args.device)[0], FEATURES, args.n
    generator = torch.Generator(device).manual_seed(0)
    real, fake = (torch.randn(n, D, generator=generator, device=device) + shift for shift in (0.0, 0.1))
    one, other = Statistics().add(real), Statistics().add(fake)
    _, taken = (seconds_of(lambda: distance(one, other)) for _ in range(2))              # the first call loads libraries
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads; random weights and features")
    print(f"Fréchet distance, {D} features, from statistics: {taken:.2f} s")

    with full_precision(), ruled("product", device, torch.float32) as rates:
        taken = seconds_of(lambda: precision_recall(real, fake))
    work = 3 * 2 * n ** 2 * D                            # each set with itself, and both with each other
    print(f"precision and recall, {n} x {n}: {taken:.2f} s, {beside_ruler(work, taken, rates, 'float32 product')}")

    network = inception.Inception().to(device)
    images = torch.randint(256, (TIMED_IMAGES, 64, 64, 3), dtype=torch.uint8, generator=generator, device=device)
    multiply_adds = count(network, images[:1])[1]
    with torch.no_grad(), full_precision(), ruled("convolution", device, torch.float32) as rates:
        network.features(images)
        taken, resizing = (min(seconds_of(lambda: part(images)) for _ in range(3))
                           for part in (network.features, network.preprocess))
    work = 2 * len(images) * multiply_adds
    print(f"Inception: {len(images) / taken:.1f} images/s, {beside_ruler(work, taken, rates, 'float32 convolution')}; "
          f"{resizing / taken:.1%} of it enlarges the images")
    unit = 1 if sys.platform == "darwin" else 1024       # of what the system reports
    print(f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30:.1f} GiB")


def moment():
    """Now: seconds on the clock, or on CUDA an event, for which nothing waits: it is recorded when the work so far is done."""
    on_cuda = torch.cuda.is_initialized()
    return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True)) if on_cuda else time.perf_counter()


@contextmanager
def stopwatch(owner, name):
    """A list that fills, while the context lasts, with the moments (begin, end) of each call of a method."""
    original, calls = getattr(owner, name), []

    def timed(*args, **kwargs):
        began = moment()
        result = original(*args, **kwargs)
        calls.append((began, moment()))
        return result
    with patch.object(owner, name, timed):
        yield calls


def seconds_from(first, calls):
    """Moments (begin, end) of n calls, all over by now, as an array (n, 2) of seconds since a first moment."""
    return np.array([[m - first if isinstance(m, float) else first.elapsed_time(m) / 1000 for m in pair] for pair in calls])


def train_timed(args, size, steps, *more):
    """Run train.py's own loop, which saves and draws at its end only, with the flags of a measurement and more -> the network."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.pt"
        train.main(["--size", size, "--batch-size", str(args.batch_size), "--steps", str(steps), "--data", args.data, "--device",
                    args.device, "--out", str(out), "--save-every", str(10 ** 9), "--sample-every", str(10 ** 9), *more])
        return load(out).build()[0]


def latent_steps(args):
    """Time train.py's steps on cached latents, on random ones of their shape, and with the encoder run in each, by turns."""
    device = processes(args.device)[0]
    autoencoder = load_autoencoder(args.vae).to(device)
    read, draw_batch = data.Batches.__getitem__, Denoising.draw
    CACHED, RANDOM, ENCODED = range(3)
    kinds = np.arange(math.ceil(args.steps / (ROUND - UNTIMED)) * 3 * ROUND) // ROUND % 3           # of each step

    def read_kind(batches, step):
        dataset, indices = batches.dataset, batches.indices(step)
        if kinds[step] == CACHED:
            return read(batches, step)
        if kinds[step] == ENCODED:
            return dataset.pixels.batch(indices)
        return torch.ones(len(indices), 1, 2, dataset.channels, *dataset.image_size), dataset.condition(indices)

    def draw_kind(objective, step, images, labels):
        if kinds[step] == ENCODED:
            with autocast(device):
                images = torch.from_numpy(np.stack(encode(autoencoder, images), axis=1))[:, None]    # (n, 1, 2, c, h, w), as cached
        return draw_batch(objective, step, images, labels)

    with (tempfile.TemporaryDirectory() as cache, patch.object(data.Batches, "__getitem__", read_kind),
          patch.object(Denoising, "draw", draw_kind), stopwatch(torch.optim.AdamW, "step") as calls):
        network = train_timed(args, args.size, len(kinds), "--vae", args.vae, "--cache", cache)
    seconds = np.diff(seconds_from(calls[0][0], calls)[:, 1], prepend=math.nan)      # from one update's end to the next one's
    timed = np.arange(len(kinds)) % ROUND >= UNTIMED
    a, b, c = (np.median(seconds[timed & (kinds == kind)][:args.steps]) for kind in (CACHED, RANDOM, ENCODED))
    shape = "x".join(map(str, (network.channels, *network.image_size)))
    print(f"dit {args.size} on {shape} latents of {args.data}, batch {args.batch_size}, {device}, "
          f"{torch.get_num_threads()} threads; medians of {args.steps} steps, in turn")
    print(f"cached latents {a * 1e3:.1f} ms a step, random ones {b * 1e3:.1f} ms: {a / b - 1:+.1%}; encoding each time "
          f"{c * 1e3:.1f} ms, {c / a:.2f} times a step on cached ones")


def data_path(args):
    """Time what reads batches, from memory, from a folder decoded before, and from cached latents; beside train.py's loop."""
    device, drawn = processes(args.device)[0], np.random.default_rng(0).integers(256, size=(500, 64, 64, 3), dtype=np.uint8)
    with stopwatch(torch.optim.AdamW, "step") as steps:
        train_timed(args, args.size, WARM + args.steps)
    whole = np.diff(seconds_from(steps[0][0], steps)[WARM:, 1]).mean()               # seconds a step
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        for i, image in enumerate(drawn):
            Image.fromarray(image).save(Path(folder) / f"{i:03}.png")
        decoded, autoencoder = data.load(folder, 64, "all", cache), build(describe("vae", "Ti", None, 3))
        for what, dataset in {f"{args.data}, as train.py has it": data.load(args.data), "a decoded folder, mapped": decoded,
                              "cached latents": latents(decoded, autoencoder, "made up", cache=cache)}.items():
            batches = data.Batches(dataset, args.batch_size, 0)
            batches[0]                                   # the first makes the epoch's order
            taken = seconds_of(lambda: [None for _ in data.ahead(batches.__getitem__, range(args.steps), device)]) / args.steps
            print(f"{what}, {'x'.join(map(str, (*dataset.image_size, dataset.channels)))}: {args.batch_size / taken:,.0f} images/s, "
                  f"{taken / whole:.1%} of a step of dit {args.size}")
    print(f"train.py, dit {args.size}, batch {args.batch_size}, {device}: {args.batch_size / whole:,.0f} images/s")


def speed(args):
    """Time train.py's own loop: its forward pass, backward pass and optimizer."""
    size, device = args.size or DEFAULT_SIZE[args.model], processes(args.device)[0]
    warm = 10 if device.type == "cuda" else 3            # up to step 10 the log waits for a GPU, to say how long training takes
    ruler = "convolution" if args.model == "unet" else "product"
    dtype = torch.bfloat16 if precision_on(device) == "bf16" else torch.float32     # of training's products
    with (ruled(ruler, device, dtype) as rates, stopwatch(Classification if args.model == "vit" else Denoising, "loss") as losses,
          stopwatch(torch.Tensor, "backward") as backwards, stopwatch(torch.optim.AdamW, "step") as steps):
        network = train_timed(args, size, warm + args.steps, "--model", args.model, *["--compile"] * args.compile)
    losses, backwards, steps = (seconds_from(losses[0][0], calls)[warm:] for calls in (losses, backwards, steps))    # (steps, 2)
    whole = np.diff(losses[:, 0]).mean()                                             # seconds a step, all included
    inside = {name: np.diff(calls[:-1]).mean() for name, calls in (("loss", losses), ("backward", backwards), ("step", steps))}
    work = 3 * 2 * args.batch_size * count(network, *inputs_of(network))[1]          # backward: twice forward; two FLOP each
    print(f"{args.model} {size}, batch {args.batch_size}, {device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{args.batch_size / whole:.1f} images/s, {beside_ruler(work, whole, rates, ruler)}")
    print(", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in inside.items()) +
          f", the rest of the loop {1 - sum(inside.values()) / whole:.1%} of a step's {whole * 1e3:.1f} ms; before them, the first "
          f"{warm} steps{' and compiling' * args.compile} took {losses[0, 0]:.1f} s")


def in_turn(ours, theirs, pairs):
    """Seconds (pairs, 2) of two operations, each repeated for half a second, in turn; every second pair begins with theirs."""
    operations, seconds = (ours, theirs), np.empty((pairs, 2))
    for operation in operations:
        operation()                                      # warms up
    times = [math.ceil(0.5 / seconds_of(operation)) for operation in operations]
    for pair in range(pairs):
        for i in ((0, 1), (1, 0))[pair % 2]:
            seconds[pair, i] = seconds_of(lambda: [operations[i]() for _ in range(times[i])]) / times[i]
    return seconds


def step_of(training, batch_size):
    """train.py's step, again and again on the same images."""
    args, objective = training.args, training.objective
    batch = data.Batches(training.dataset, batch_size, 0, training.part)[0]
    return lambda: train_step(training.state, training.model, objective, batch, 0, args, 0, 1)


def training_steps(training, peer, batch_size):
    """train.py's step, and a plain one: PyTorch's default AdamW, `peers.average_each`, no clipping, nothing logged."""
    args, objective = training.args, training.objective
    batch = data.Batches(training.dataset, batch_size, 0, training.part)[0]
    ema, optimizer = copy.deepcopy(peer), torch.optim.AdamW(peer.parameters(), lr=args.lr, weight_decay=args.weight_decay)

    def theirs():
        losses, _ = objective.loss(peer, *objective.draw(0, *batch))
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        peers.average_each(ema, peer, args.ema)
    return step_of(training, batch_size), theirs


def forward_passes(training, peer, batch_size):
    """Both networks' forward passes."""
    shape = (batch_size, training.dataset.channels, *training.dataset.image_size)
    inputs = torch.randn(shape), torch.arange(batch_size), torch.arange(batch_size) % 10
    return lambda: training.state.ema(*inputs), lambda: peer(*inputs)


def samplings(training, peer, batch_size):
    """Twice as many images as a batch, drawn as sample.py does; and by our sampler around the peer, all at once.  With guidance."""
    n, diffusion = 2 * batch_size, training.objective.diffusion
    shape = (n, training.dataset.channels, *training.dataset.image_size)
    how = dict(sampler="dpm++", steps=5, cfg_scale=1.5, clip=True)
    return (lambda: list(draw(training.state.ema, diffusion, range(n), range(10), **how)),
            lambda: sample(diffusion, peer, shape, torch.arange(n) % 10, y_null=10, seeds=range(n), **how))


PARTS = {"training": training_steps, "forward": forward_passes, "sampling": samplings}


def training_of(name, batch_size, *more):
    """train.py's training of a model and size, on the CPU, as it is for the digits or with more flags."""
    model, size = name.split()
    with tempfile.TemporaryDirectory() as folder:
        settings, _ = read_settings(["--model", model, "--size", size, "--batch-size", str(batch_size), "--device", "cpu",
                                     "--out", str(Path(folder) / "run.pt"), *more])
        return train.Training(settings, None, torch.device("cpu"), 0, 1)


def denoisers(part, name, batch_size):
    """A part of our network's work and its peer's, of a model and size as train.py makes them for the digits."""
    training = training_of(name, batch_size)
    return PARTS[part](training, peers.peer(training.described, training.state.network.state_dict()), batch_size)


def autoencoders(part, name, batch_size):
    """Encoding images of 64 x 64 by our autoencoder of a size and by its peer, or decoding them."""
    described = describe("vae", name.split()[1], None, 3)
    ours = build(described).eval()
    theirs, factor = peers.peer(described, ours.state_dict()).eval(), ours.factor
    x = torch.randn(batch_size, 3, 64, 64) if part == "encode" else torch.randn(batch_size, 4, 64 // factor, 64 // factor)
    return lambda: getattr(ours, part)(x), lambda: getattr(theirs, part)(x)


def text_encoders(part, name, batch_size):
    """Encoding captions of 77 tokens by CLIP ViT-L/14's text encoder, ours and a peer."""
    ours, ids = text.CLIPTextEncoder().eval(), torch.randint(49408, (batch_size, 77))
    theirs = peers.with_plain_blocks(copy.deepcopy(ours))
    return lambda: ours(ids), lambda: theirs(ids)


def evaluators(part, name, batch_size):
    """Measuring images of 32 x 32 by FID's Inception, ours and a peer, whose batch norms are not folded."""
    ours, images = inception.Inception(), torch.randint(256, (batch_size, 32, 32, 3), dtype=torch.uint8)
    theirs = peers.with_plain_blocks(copy.deepcopy(ours))
    return lambda: ours(images), lambda: theirs(images)


PEERS = {**{name: (denoisers, PARTS) for name in ("dit XS/16", "dit Ti/8", "dit S/8", "dit S/4", "uvit Ti/8", "uvit S/4",
                                                       "unet Ti")},
         "vae Ti": (autoencoders, ("encode", "decode")), "clip L/14": (text_encoders, ("forward",)),
         "inception": (evaluators, ("forward",))}        # network: makers, parts


def print_in_turn(rows, args, *columns):
    """Print a table of names, what was done and two operations, which are timed in turn, with the ratio of their times."""
    print(f"batch {args.batch_size}, torch {torch.__version__}, {torch.get_num_threads()} threads; medians of {args.pairs} pairs, "
          f"and of their ratios with the range\n\n| network | | {' | '.join(columns)} | times as fast |\n|---|---|---|---|---|")
    for name, what, make in rows:
        with torch.set_grad_enabled("training" in what):
            seconds = in_turn(*make(), args.pairs)
        one, other, ratios = *np.median(seconds, axis=0), seconds[:, 1] / seconds[:, 0]
        print(f"| {name} | {what} | {one * 1e3:.1f} ms | {other * 1e3:.1f} ms | {np.median(ratios):.2f} "
              f"({ratios.min():.2f} – {ratios.max():.2f}) |", flush=True)


def beside_peers(args):
    """Time our networks and the same networks in their authors' style, with the same weights, in turn, on the CPU."""
    print_in_turn([(name, part, partial(PEERS[name][0], part, name, args.batch_size)) for name in args.networks or PEERS
                   for part in PEERS[name][1] if part in (args.parts or PEERS[name][1])], args, "ours", "theirs")


OPTIONS = ("bf16", "compiled", "halves")


def options(args):
    """Time train.py's step in bf16, compiled or by halves, in turn with one that is not, on the CPU."""
    chosen = args.parts or OPTIONS
    processes("cpu", compiles="compiled" in chosen)      # or the first compiled step would end in a hundred lines

    def step(name, *flags):
        return step_of(training_of(name, args.batch_size, *flags), args.batch_size)

    def shared(step):
        with patch.object(objectives, "halves", lambda *_: False):
            return step()

    def pair(option, name):
        one = step(name, *{"bf16": ("--precision", "bf16"), "compiled": ("--compile",), "halves": ()}[option])
        return one, partial(shared, one) if option == "halves" else step(name)
    print_in_turn([(name, f"training, {option}", partial(pair, option, name)) for name in args.networks for option in chosen],
                  args, "with it", "without")


MEASUREMENTS = {"train": speed, "latents": latent_steps, "data": data_path, "evaluate": evaluation, "peers": beside_peers,
                "options": options}


def flags():
    """The command line: one subcommand a measurement."""
    parser = Parser(prog="bench.py", description="Measure speed, on the CPU or CUDA.")
    subparsers = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    commands = {name: subparsers.add_parser(name, help=function.__doc__) for name, function in MEASUREMENTS.items()}

    def add(names, flag, default, help, **options):
        for name in names.split():
            commands[name].add_argument(flag, default=default, help=f"{help} (default: {default})", **options)
    add("evaluate", "--n", 10_000, "rows on each side", type=positive)
    add("train latents data", "--steps", 40, "to time", type=at_least(2, int))
    add("train", "--model", "dit", "what to train", choices=MODELS)
    commands["train"].add_argument("--size", help="as for train.py (default: its own)")
    commands["train"].add_argument("--compile", action="store_true")
    commands["latents"].add_argument("--vae", required=True, help="an autoencoder of train.py or a released one")
    add("latents", "--size", "Ti/2", "of a DiT")
    add("data", "--size", DEFAULT_SIZE["dit"], "of a DiT")
    add("train latents data", "--data", "mnist", "as for train.py")
    add("train latents data peers options", "--batch-size", 32, "images a step", type=positive)
    commands["peers"].add_argument("--parts", nargs="+", choices=dict.fromkeys(part for _, parts in PEERS.values() for part in parts),
                                   help="what to time (default: all)")
    commands["options"].add_argument("--parts", nargs="+", choices=OPTIONS, help="what to time (default: all)")
    commands["peers"].add_argument("--networks", nargs="+", choices=PEERS, help="of which (default: all)")
    networks = [name for name, (make, _) in PEERS.items() if make is denoisers]
    add("options", "--networks", networks, "of which", nargs="+", choices=networks)
    add("peers options", "--pairs", 7, "of measurements", type=positive)
    add("train latents data evaluate", "--device", "auto", "where to compute", choices=("auto", "cpu", "cuda"))
    return parser


def main(argv=None):
    """The command: measure."""
    args = flags().parse_args(argv)
    with one_line_errors("bench.py"):
        MEASUREMENTS[args.command](args)


if __name__ == "__main__":
    sys.exit(main())
