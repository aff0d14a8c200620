"""Measure what the project claims: the quality of a run's samples, the speed of training, the designs side by side.

    python bench.py quality --ckpt run.pt              samples judged by their nearest training images
    python bench.py restore --ckpt run.pt              held-out digits inpainted, enlarged and denoised, beside simpler methods
    python bench.py compare                            DiT, U-ViT and U-Net of like Gflops, and DiTs of rising Gflops: an hour
    python bench.py swissroll --ckpt run.pt            samples of a run on points: how far from the data
    python bench.py evaluate                           the Fréchet distance, precision and recall, Inception
    python bench.py text                               a small U-ViT learns to draw what captions say; how many it gets right
    python bench.py latents --vae vae.pt               a step on cached latents, beside random ones, and beside encoding each time
    python bench.py train --model uvit --size S/4      images/s and GFLOP/s, beside a large product or convolution in the same run

Times on shared machines drift by tens of percent: compare ratios within one run only.
"""
import interrupts                        # noqa: F401  first, for signals while PyTorch is imported
import math
import resource
import sys
import tempfile
import time
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

import data
import ddpm
import inception
import points
import restoration
import shapes
import train
from checkpoint import load, load_autoencoder
from cli import Parser, add_overwrite_flag, at_least, natural, one_line_errors, positive, processes, rule_of
from features import JUDGE, default_space, full_precision, space_of
from files import check_output, csv_rows, output_file, read_text
from gflops import count, inputs_of
from latents import encode
from metrics import Statistics, distance, nearest, precision_recall, psnr, unique_share, vote
from models import MODELS
from objectives import Classification, Denoising
from pictures import grid, save_image
from reports import now
from sampling import (SCATTERED, STEPS, draw_images, draw_points, drawable, guidance_scale, labels_of, read_prompts, text_reader,
                      training_data, unconditional)
from scoring import METRICS, measure_reference, measure_samples, possible, score_network, scores
from settings import DEFAULT_SIZE

COMPARED = (("dit", "Ti/4"), ("uvit", "Nano/4"), ("unet", "Nano"), ("dit", "Ti/8"), ("dit", "Ti/16"))    # alike, then cheaper
ROW = ("model", "size", "seed", "steps", "minutes", "parameters", "gflops", "n", "features_sha256", *METRICS)
DATA_SETS = 25                                   # as many distances of points to the data, of which the median counts
FEATURES, TIMED_IMAGES = 2048, 64                # made up to time the evaluator: numbers a row, and images of 64 x 64
ROUND, UNTIMED = 10, 5                            # steps of one kind in a row; the first of them read what loaders have ahead


def first_of(dataset, n=None):
    """The first n images of a data set, all by default, uint8 (n, H, W, C), and their labels (n,)."""
    return dataset.batch(np.arange(len(dataset))[:n])


def quality(args):
    """Print how many samples of a run are recognised, beside real held-out images, and how many are no copies of each other."""
    run, network, diffusion = drawable(args.ckpt)
    if network.num_classes is None or run.vae or not run.data.spec:
        raise ValueError(f"{args.ckpt}: quality needs a class-conditional run of train.py on pixels")
    device, config, spec = processes(args.device)[0], run.config, training_data(run)
    (images, labels), (test_images, test_labels) = (
        first_of(data.load(spec, config.get("image_size"), split, skip_bad=bool(config.get("skip_bad"))))
        for split in ("train", "test"))
    classes, scale = list(range(network.num_classes)), guidance_scale(network)
    drawn = draw_images(network.to(device), diffusion, range(args.n), classes, args.seed)
    neighbours = nearest(torch.cat([x.cpu() for _, x in drawn]), images)
    right = (vote(labels, neighbours) == labels_of(range(args.n), classes)).float().mean().item()
    real_right = (vote(labels, nearest(test_images, images)) == test_labels).float().mean().item()
    print(f"{args.n} samples of {args.ckpt} (step {run.step}), seed {args.seed}, dpm++ {STEPS} steps, guidance {scale:g}")
    print(f"samples recognised as their class   {right:6.1%}   by 3 nearest neighbours among {len(images)} training images")
    print(f"real held-out images, likewise      {real_right:6.1%}   of {len(test_images)}")
    print(f"samples whose nearest training image is no other's {unique_share(neighbours[:, 0]):.1%}")


def restoration_quality(args):
    """Print how many held-out digits a run keeps when it fills in their centre or enlarges them, how well it removes noise, and
    what simpler methods reach; and write a picture of ten."""
    check_output(args.out, "restored", **rule_of(args))
    run, network, diffusion = drawable(args.ckpt)
    if run.vae or run.data.spec != "mnist" or network.null_label is None or tuple(network.image_size) != (32, 32):
        raise ValueError(f"{args.ckpt}: restore needs a run of train.py on the digits' 32x32 pixels with a null class")
    device, sigma = processes(args.device)[0], 0.5
    space, network = space_of(str(JUDGE), device), network.to(device)
    real, real_labels = first_of(data.load(split="train"))
    images, labels = first_of(data.load(split="test"), args.n)
    real, images, labels = data.to_float(real).to(device), data.to_float(images).to(device), labels.to(device)
    keys = [(args.seed, i) for i in range(len(images))]

    def kept(x):
        with torch.no_grad():
            return (space.extract(data.to_uint8(x))["probabilities"].argmax(dim=1) == labels).float().mean().item()

    print(f"{len(images)} held-out digits, {args.ckpt} (step {run.step}), seed {args.seed}, ddpm, {args.steps} steps repeated "
          f"{args.repeats} times, no guidance")
    print(f"digits kept, as {JUDGE.name} says, which recognises {kept(images):.1%} of the originals\n"
          f"{'':28}{'label given':>12}{'without':>12}{'nearest neighbour':>20}")
    rows, hidden = [], torch.zeros(1, 1, 32, 32, device=device)
    hidden[..., 9:23, 9:23] = 1
    for name, degrade in (("centre 14x14 filled in", restoration.masked(hidden)), ("4 times enlarged", restoration.pooled(4))):
        A, A_plus = degrade
        with_label, without = (restoration.restore(
            diffusion, network, A(images), degrade, y, steps=args.steps, repeats=args.repeats, seeds=keys, clip=True)
            for y in (labels, None))
        neighbours = nearest(A(images).cpu(), A(real).cpu(), k=1)[:, 0]
        alike = (real_labels[neighbours] == labels.cpu()).float().mean()
        print(f"{name:28}{kept(with_label):12.1%}{kept(without):12.1%}{alike:20.1%}")
        rows += [A_plus(A(images)), with_label]
    noise = torch.stack([torch.randn(images.shape[1:], generator=ddpm.keyed_generator(key)) for key in keys]).to(device)
    noisy = images + sigma * noise
    with_label, without = (restoration.denoise(diffusion, network, noisy, sigma, y, clip=True) for y in (labels, None))
    blur = max(psnr(restoration.blurred(noisy, deviation), images) for deviation in np.arange(0.5, 2, 0.05))
    print(f"noise of deviation {sigma} removed: {psnr(without, images):.1f} dB, with the label {psnr(with_label, images):.1f}; "
          f"noisy {psnr(noisy, images):.1f}, best Gaussian blur {blur:.1f}, best linear filter "
          f"{psnr(restoration.linear_filter(noisy, real, sigma), images):.1f}")
    shown = [int((labels == digit).nonzero()[0]) for digit in labels.unique()]
    picture = torch.cat([row[shown] for row in (*rows, noisy, without, images)])
    save_image(args.out, grid(data.to_uint8(picture).cpu().numpy(), len(shown)), "restored", **rule_of(args))
    print(f"wrote {args.out}: given and restored, three times, and the originals")


def trained(out, steps, argv):
    """The run at `out`, which train.py makes, or goes on with, up to a step.  ValueError if it is stopped before that."""
    if not out.exists() or (load(out).step or 0) < steps:             # released weights have none, and are no run to resume
        train.main([*argv, "--steps", str(steps), "--out", str(out)] + ["--resume"] * out.exists())
    run = load(out)
    if run.step < steps:
        raise ValueError(f"{out} was stopped before its end: the same command goes on with it")
    return run


def compare(args):
    """Train the networks of COMPARED on the same images and noise, seed by seed, and print their scores."""
    device, folder = processes(args.device)[0], Path(args.out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is no folder: choose another name")
    folder.mkdir(exist_ok=True)
    table = folder / "compare.csv"
    check_output(table, "comparison")
    columns, rows = csv_rows(read_text(table), table) if table.exists() else ((), [])
    if other := [name for name in columns if name not in ROW]:
        raise ValueError(f"{table} has a column {other[0]}, which would be lost: move it away, or choose another --out")
    dataset, held_out = (data.load(split=split) for split in ("train", "test"))
    space = space_of(default_space(dataset.spec, dataset.images.shape[1:]), device)
    reference = measure_reference(dataset, space, dataset.spec)
    ours = scores(measure_samples(held_out, None, space), reference.measured, possible(space, held_out.classes))
    wanted = dict(steps=str(args.steps), n=str(args.n), features_sha256=space.sha256)
    there = {(row["model"], row["size"], int(row["seed"])): row for row in rows if wanted.items() <= row.items()}
    for seed, (model, size) in product(range(args.seeds), COMPARED):
        if (model, size, seed) in there:
            continue
        out = folder / f"{model}-{size.replace('/', '-')}-{args.steps}-{seed}.pt"
        began, resumed = time.perf_counter(), out.exists()
        run = trained(out, args.steps, ["--model", model, "--size", size, "--seed", str(seed), "--sample-every", str(args.steps),
                                        "--device", args.device])
        minutes = "" if resumed else (time.perf_counter() - began) / 60  # of an interrupted run nobody knows them
        network, diffusion = run.build()
        parameters, multiply_adds = count(network, *inputs_of(network))
        found = score_network(network.to(device), diffusion, reference.measured, space, args.n, dataset.classes, seed, scale=1.0)
        row = dict(wanted, model=model, size=size, seed=seed, minutes=minutes, parameters=parameters, gflops=multiply_adds / 1e9,
                   **found)
        there[model, size, seed] = {column: str(value) for column, value in row.items()}
        rows.append(there[model, size, seed])
        lines = [ROW, *([row.get(column) or "" for column in ROW] for row in rows)]
        with output_file(table, "comparison") as file:
            file.write("".join(",".join(line) + "\n" for line in lines).encode())
    print(f"{args.n} samples a run, guidance 1, {STEPS} steps of dpm++; {args.steps} steps of training; features {space.name}, "
          f"weights {space.sha256[:8]}; a range is that of {args.seeds} seeds")
    print(f"{'':14}{'Mparams':>8}{'Gflops':>8}{'minutes':>9}" + "".join(f"{metric:>18}" for metric in ours))
    for model, size in COMPARED:
        found = [there[model, size, seed] for seed in range(args.seeds)]
        minutes = [float(row["minutes"]) for row in found if row["minutes"]]
        line = (f"{model + ' ' + size:14}{int(found[0]['parameters']) / 1e6:8.2f}{float(found[0]['gflops']):8.3f}"
                f"{np.mean(minutes) if minutes else math.nan:9.1f}")
        for metric in ours:
            values = [float(row[metric]) for row in found]
            line += f"{f'{min(values):.3f} – {max(values):.3f}':>18}"
        print(line)
    print(f"{f'{len(held_out):,} held-out digits':39}" + "".join(f"{value:18.3f}" for value in ours.values()) +
          f"\ntwo halves of the training digits: FD {reference.floor['FD']:.3f}")


def points_quality(args):
    """Print how far samples of a run on points are from the data, beside how far two sets of the data are from each other."""
    _, network, diffusion = drawable(args.ckpt)
    if not isinstance(network, points.MLP):
        raise ValueError(f"{args.ckpt} draws no points: python train.py --data swissroll makes a run that does")
    device, n = processes(args.device)[0], args.n
    samples = draw_points(network.to(device), diffusion, n, args.seed)
    real = [points.swiss_roll(n, seed) for seed in range(1, 2 * DATA_SETS + 1)]      # seed 0 is the training set's
    ours = np.median([points.sliced_wasserstein(samples, other) for other in real[:DATA_SETS]])
    floor = np.median([points.sliced_wasserstein(*pair) for pair in zip(real[:DATA_SETS], real[DATA_SETS:])])
    print(f"sliced Wasserstein distance of {n} points, 128 directions, median of {DATA_SETS} data sets; seed {args.seed}, dpm++ "
          f"{STEPS} steps")
    print(f"samples of {args.ckpt} to the data   {ours:.4f}   {ours / floor:.2f} times\nthe data to the data   {floor:.4f}")


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


def prompt_quality(args):
    """Train on shapes and their captions, or take up that run, and count the prompts that its images fulfil."""
    out = Path(args.out)
    picture = out.with_name(f"{out.stem}-prompts.png")
    check_output(picture, "prompts", **rule_of(args))
    trained(out, args.steps, ["--model", args.model, "--size", "Ti/8", "--data", args.data, "--text", "--seed", str(args.seed),
                              "--device", args.device])
    run, network, diffusion = drawable(out)
    config = run.config
    model, spec, seed = (config.get(key) for key in ("model", "data", "seed"))
    if (model, spec, seed) != (args.model, args.data, args.seed):
        raise ValueError(f"{out} is a run of --model {model} --data {spec} --seed {seed}: ask for that, or make another with --out "
                         "NAME.pt")
    network = network.to(processes(args.device)[0])
    kinds = {"one object, colour and shape": [f"a {name}" for name in shapes.CLASSES],
             "one object, with its size": [f"a {size} {name}" for size in shapes.SIZES for name in shapes.CLASSES]}
    if args.data == "shapes":
        captions = shapes.captions(data.SHAPES)
        kinds |= {"two or three": [text for text in captions if text.startswith(("two", "three"))],
                  "two in a relation": [text for text in captions if any(f" {word} a " in text for word in shapes.RELATIONS)]}
    reader, pictures = text_reader(run, network), []
    y_null = unconditional(network, reader, config.get("cfg_drop"))
    print(f"{args.n} images a row of {out} (step {run.step}), seed {args.sample_seed}, dpm++ {STEPS} steps, guidance "
          f"{guidance_scale(network, y_null=y_null):g}; right: all that the prompt names is there as it says, and nothing else")
    for kind, prompts in kinds.items():
        prompts = [prompts[i % len(prompts)] for i in range(args.n)]
        contexts = read_prompts(prompts, reader, network)
        drawn = draw_images(network, diffusion, range(args.n), contexts, args.sample_seed, y_null=y_null)
        images = torch.cat([x.cpu() for _, x in drawn]).numpy()
        colour = np.mean([{thing[0] for thing in shapes.parse(prompt)[0]} == {thing[0] for thing in found}
                          for prompt, found in zip(prompts, shapes.look(images))])
        print(f"{kind:30}{shapes.matches(prompts, images).mean():7.1%} right, {colour:6.1%} in colour; as \"{prompts[0]}\"")
        pictures.append(images[:len(shapes.CLASSES)])
    save_image(picture, grid(np.concatenate(pictures), len(shapes.CLASSES) // 2), "prompts", **rule_of(args))


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


def speed(args):
    """Time train.py's own loop: its forward pass, backward pass and optimizer."""
    size, warm, device = args.size or DEFAULT_SIZE[args.model], 3, processes(args.device)[0]
    ruler = "convolution" if args.model == "unet" else "product"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32   # of training's products
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


MEASUREMENTS = {"quality": quality, "restore": restoration_quality, "swissroll": points_quality, "compare": compare,
                "text": prompt_quality, "train": speed, "latents": latent_steps, "evaluate": evaluation}


def flags():
    """The command line: one subcommand a measurement."""
    parser = Parser(prog="bench.py", description="Measure the quality of a run's samples, or the speed of training.")
    subparsers = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    commands = {name: subparsers.add_parser(name, help=function.__doc__) for name, function in MEASUREMENTS.items()}
    def add(names, flag, default, help, **options):
        for name in names.split():
            commands[name].add_argument(flag, default=default, help=f"{help} (default: {default})", **options)
    for name, n, of in (("quality", 200, "samples"), ("restore", 500, "digits"), ("swissroll", SCATTERED, "points"),
                        ("compare", 2000, "samples to score"), ("text", 200, "prompts of each kind"),
                        ("evaluate", 10_000, "rows on each side")):
        add(name, "--n", n, of, type=positive)
    add("train latents", "--steps", 40, "to time", type=at_least(2, int))
    for name, steps, of in (("restore", restoration.STEPS, "of sampling"), ("compare", 1400, "of training: 5 minutes on 2 cores"),
                            ("text", 6000, "of training: 12 minutes on 2 cores")):
        add(name, "--steps", steps, of, type=positive)
    add("restore", "--repeats", restoration.REPEATS, "of each step", type=positive)
    add("restore", "--out", "restored.png", "a picture of one of each digit")
    add("train", "--model", "dit", "what to train", choices=MODELS)
    commands["train"].add_argument("--size", help="as for train.py (default: its own)")
    commands["train"].add_argument("--compile", action="store_true")
    add("compare", "--seeds", 2, "runs of each network", type=positive)
    add("compare", "--out", "compare", "folder of the runs and of compare.csv; what is there is not made again")
    add("text", "--model", "uvit", "of size Ti/8", choices=("uvit", "dit"))
    add("text", "--data", "shapes:one", "single objects, or all kinds of scenes", choices=("shapes:one", "shapes"))
    add("text", "--seed", 0, "of training", type=natural)
    add("text", "--sample-seed", 0, "of the samples", type=natural)
    add("text", "--out", "text.pt", "the run; trained to its end if it is not there yet")
    commands["latents"].add_argument("--vae", required=True, help="an autoencoder of train.py or a released one")
    add("latents", "--size", "Ti/2", "of a DiT")
    add("quality restore swissroll", "--ckpt", "run.pt", "the run")
    add("quality restore swissroll", "--seed", 0, "of the samples", type=natural)
    add("train latents", "--data", "mnist", "as for train.py")
    add("train latents", "--batch-size", 32, "images a step", type=positive)
    for name in ("restore", "text"):                     # compare adds to what is there
        add_overwrite_flag(commands[name])
    add(" ".join(MEASUREMENTS), "--device", "auto", "where to compute", choices=("auto", "cpu", "cuda"))
    return parser


def main(argv=None):
    """The command: measure."""
    args = flags().parse_args(argv)
    with one_line_errors("bench.py"):
        MEASUREMENTS[args.command](args)


if __name__ == "__main__":
    sys.exit(main())
