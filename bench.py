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
import csv
import math
import resource
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

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
from checkpoint import build, load
from cli import Parser, natural, one_line_errors, parent_of, positive, processes
from sampling import SCATTERED, STEPS, draw, draw_points, drawable, guidance_scale, labels_of, read_prompts, unconditional
from evaluate import METRICS, measure_reference, measure_samples, possible, score_network, scores
from features import JUDGE, default_space, full_precision, space_of
from files import atomic_file
from gflops import count, inputs_of
from latents import encode
from metrics import Statistics, frechet_distance, precision_recall
from models import MODELS
from objectives import objective_of
from pictures import grid, save_image


def nearest(queries, reference, k=3):
    """Indices (n, k) of the nearest reference images by pixel distance, for n queries of the same shape."""
    queries, reference = (torch.as_tensor(images).float().flatten(1) for images in (queries, reference))
    return torch.cat([torch.cdist(part, reference).topk(k, largest=False).indices for part in queries.split(512)])


def vote(labels, neighbours):
    """The majority label of each row's neighbours; the nearest one's where all differ.  labels (M,), neighbours (n, 3)."""
    first, second, third = labels[neighbours].unbind(dim=1)
    return torch.where(second == third, second, first)


def unique_share(neighbours):
    """The share of samples whose nearest image, neighbours (n,), is no other sample's nearest."""
    counts = neighbours.unique(return_counts=True)[1]
    return (counts == 1).sum().item() / len(neighbours)


def first_of(dataset, n=None):
    """The first n images of a data set, all by default, uint8 (n, H, W, C), and their labels (n,)."""
    return dataset.batch(np.arange(len(dataset))[:n])


def quality(args):
    """Print how many samples of a run are recognised, beside real held-out images, and how many are no copies of each other."""
    run, network, diffusion = drawable(args.ckpt)
    if network.num_classes is None or run["vae"] or not run["data"]["spec"]:
        raise ValueError(f"{args.ckpt}: quality needs a class-conditional run of train.py on pixels")
    device, config = processes(args.device)[0], run["config"]
    (images, labels), (test_images, test_labels) = (
        first_of(data.load(run["data"]["spec"], config["image_size"], split, config["cache"], config["skip_bad"]))
        for split in ("train", "test"))

    classes = list(range(network.num_classes))
    scale = guidance_scale(network)
    samples = [data.to_uint8(x).cpu() for _, x in draw(network.to(device), diffusion, range(args.n), classes, args.seed,
                                                       clip=True, cfg_scale=scale)]
    neighbours = nearest(torch.cat(samples), images)
    right = (vote(labels, neighbours) == labels_of(range(args.n), classes)).float().mean().item()
    real_right = (vote(labels, nearest(test_images, images)) == test_labels).float().mean().item()
    print(f"{args.n} samples of {args.ckpt} (step {run['step']}), seed {args.seed}, dpm++ {STEPS} steps, guidance {scale:g}")
    print(f"samples recognised as their class   {right:6.1%}   by 3 nearest neighbours among {len(images)} training images")
    print(f"real held-out images, likewise      {real_right:6.1%}   of {len(test_images)}")
    print(f"samples whose nearest training image is no other's {unique_share(neighbours[:, 0]):.1%}")


def psnr(x, real):
    """The peak signal-to-noise ratio in dB of images in [-1, 1]."""
    return 10 * math.log10(4 / (x - real).square().mean().item())


def blurred(x, deviation):
    """Images (N, 1, H, W) in a Gaussian blur of a deviation in pixels."""
    place = torch.arange(-8.0, 9.0, device=x.device)
    kernel = torch.exp(-place ** 2 / (2 * deviation ** 2))
    kernel = kernel / kernel.sum()
    x = F.conv2d(F.pad(x, (8, 8, 8, 8), mode="replicate"), kernel.reshape(1, 1, 1, -1))
    return F.conv2d(x, kernel.reshape(1, 1, -1, 1))


def linear_filter(noisy, real, sigma):
    """The best linear estimate of images with white noise, by the mean and covariance of real ones: Wiener's."""
    mean, S = real.flatten(1).mean(dim=0), torch.cov(real.flatten(1).T)
    gain = torch.linalg.solve(S + sigma ** 2 * torch.eye(len(S), device=S.device), S)    # (S + sigma^2 I)^-1 S; the factors commute
    return (mean + (noisy.flatten(1) - mean) @ gain).reshape(noisy.shape)


def restoration_quality(args):
    """Print how many held-out digits a run keeps when it fills in their centre or enlarges them, how well it removes noise, and
    what simpler methods reach; and write a picture of ten."""
    parent_of(args.out)
    run, network, diffusion = drawable(args.ckpt)
    if run["vae"] or run["data"]["spec"] != "mnist" or network.null_label is None or tuple(network.image_size) != (32, 32):
        raise ValueError(f"{args.ckpt}: restore needs a run of train.py on the digits' 32x32 pixels with a null class")
    device, sigma = processes(args.device)[0], 0.5
    space, network = space_of(str(JUDGE), device), network.to(device)
    real, real_labels = first_of(data.load(split="train"))
    images, labels = first_of(data.load(split="test"), args.n)
    real, images, labels = data.to_float(real).to(device), data.to_float(images).to(device), labels.to(device)
    null = torch.full_like(labels, network.null_label)
    keys = [(args.seed, i) for i in range(len(images))]

    def kept(x):
        with torch.no_grad():
            return (space.extract(data.to_uint8(x))["probabilities"].argmax(dim=1) == labels).float().mean().item()

    print(f"{len(images)} held-out digits, {args.ckpt} (step {run['step']}), seed {args.seed}, ddpm, {args.steps} steps repeated "
          f"{args.repeats} times, no guidance")
    print(f"digits kept, as {JUDGE.name} says, which recognises {kept(images):.1%} of the originals")
    print(f"{'':28}{'label given':>12}{'without':>12}{'nearest neighbour':>20}")
    hidden = torch.zeros(1, 1, 32, 32, device=device)
    hidden[..., 9:23, 9:23] = 1
    rows = []
    for name, degrade in (("centre 14x14 filled in", restoration.masked(hidden)), ("4 times enlarged", restoration.pooled(4))):
        A, A_plus = degrade
        with_label, without = (restoration.restore(
            diffusion, network, A(images), degrade, y, steps=args.steps, repeats=args.repeats, seeds=keys, clip=True)
            for y in (labels, null))
        neighbours = nearest(A(images).cpu(), A(real).cpu(), k=1)[:, 0]
        alike = (real_labels[neighbours] == labels.cpu()).float().mean()
        print(f"{name:28}{kept(with_label):12.1%}{kept(without):12.1%}{alike:20.1%}")
        rows += [A_plus(A(images)), with_label]
    noise = torch.stack([torch.randn(images.shape[1:], generator=ddpm.keyed_generator(key)) for key in keys]).to(device)
    noisy = images + sigma * noise
    with_label, without = (restoration.denoise(diffusion, network, noisy, sigma, y, clip=True) for y in (labels, null))
    blur = max(psnr(blurred(noisy, deviation), images) for deviation in np.arange(0.5, 2, 0.05))
    print(f"noise of deviation {sigma} removed: {psnr(without, images):.1f} dB, with the label {psnr(with_label, images):.1f}; "
          f"noisy {psnr(noisy, images):.1f}, best Gaussian blur {blur:.1f}, best linear filter "
          f"{psnr(linear_filter(noisy, real, sigma), images):.1f}")
    shown = [int((labels == digit).nonzero()[0]) for digit in labels.unique()]
    picture = torch.cat([row[shown] for row in (*rows, noisy, without, images)])
    save_image(args.out, grid(data.to_uint8(picture).cpu().numpy(), len(shown)))
    print(f"wrote {args.out}: given and restored, three times, and the originals")


COMPARED = (("dit", "Ti/4"), ("uvit", "Nano/4"), ("unet", "Nano"), ("dit", "Ti/8"), ("dit", "Ti/16"))    # alike, then cheaper
ROW = ("model", "size", "seed", "steps", "minutes", "parameters", "gflops", "n", "features_sha256", *METRICS)


def compare_one(args, model, size, seed, device, space, real, dataset):
    """Train one network, or take up its run where it stands, and score its samples -> a row of compare.csv."""
    out = Path(args.out) / f"{model}-{size.replace('/', '-')}-{args.steps}-{seed}.pt"
    began, step = time.perf_counter(), load(out)["step"] if out.exists() else 0
    if step < args.steps:
        train.main(["--model", model, "--size", size, "--steps", str(args.steps), "--seed", str(seed), "--out", str(out),
                    "--sample-every", str(args.steps), "--device", args.device] + ["--resume"] * out.exists())
    if load(out)["step"] < args.steps:
        raise ValueError(f"{out} was stopped before its end: the same command goes on with it")
    minutes = (time.perf_counter() - began) / 60 if step == 0 else ""    # a run that was interrupted has no time to tell
    network, diffusion = build(load(out))
    parameters, multiply_adds = count(network, *inputs_of(network))
    found = score_network(network.to(device), diffusion, real, space, args.n, dataset.classes, seed, scale=1.0)
    return dict(model=model, size=size, seed=seed, steps=args.steps, minutes=minutes, parameters=parameters,
                gflops=multiply_adds / 1e9, n=args.n, features_sha256=space.sha256, **found)


def compare(args):
    """Train the networks of COMPARED on the same images and noise, seed by seed, and print their scores."""
    device, folder = processes(args.device)[0], Path(args.out)
    folder.mkdir(exist_ok=True)
    dataset, held_out = (data.load(split=split) for split in ("train", "test"))
    space = space_of(default_space(dataset.spec, dataset.images.shape[1:]), device)
    reference = measure_reference(dataset, space, dataset.spec)
    ours = scores(measure_samples(held_out, None, space), reference.measured, possible(space, held_out.classes))
    table = folder / "compare.csv"
    rows = list(csv.DictReader(table.read_text().splitlines())) if table.exists() else []

    def runs(model, size):
        """The rows {seed: row} of a network that were made with the settings asked for."""
        wanted = dict(model=model, size=size, steps=args.steps, n=args.n, features_sha256=space.sha256)
        return {int(row["seed"]): row for row in rows if all(row.get(key) == str(value) for key, value in wanted.items())}

    for seed in range(args.seeds):
        for model, size in COMPARED:
            if seed not in runs(model, size):
                row = compare_one(args, model, size, seed, device, space, reference.measured, dataset)
                rows.append({key: str(value) for key, value in row.items()})
                lines = [ROW, *([row.get(key) or "" for key in ROW] for row in rows)]
                with atomic_file(table) as file:
                    file.write("".join(",".join(line) + "\n" for line in lines).encode())
    print(f"{args.n} samples a run, guidance 1, {STEPS} steps of dpm++; {args.steps} steps of training; features {space.name}, "
          f"weights {space.sha256[:8]}; a range is that of {args.seeds} seeds")
    print(f"{'':14}{'Mparams':>8}{'Gflops':>8}{'minutes':>9}" + "".join(f"{metric:>18}" for metric in ours))
    for model, size in COMPARED:
        found = [row for seed, row in runs(model, size).items() if seed < args.seeds]
        minutes = [float(row["minutes"]) for row in found if row["minutes"]]
        line = f"{model + ' ' + size:14}{int(found[0]['parameters']) / 1e6:8.2f}{float(found[0]['gflops']):8.3f}"
        line += f"{np.mean(minutes) if minutes else math.nan:9.1f}"
        for metric in ours:
            values = [float(row[metric]) for row in found]
            line += f"{f'{min(values):.3f} – {max(values):.3f}':>18}"
        print(line)
    print(f"{f'{len(held_out):,} held-out digits':39}" + "".join(f"{value:18.3f}" for value in ours.values()))
    print(f"two halves of the training digits: FD {reference.floor['FD']:.3f}")


DATA_SETS = 25                                           # as many distances to the data, of which the median counts


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
    print(f"samples of {args.ckpt} to the data   {ours:.4f}   {ours / floor:.2f} times")
    print(f"the data to the data   {floor:.4f}")


def now(device):
    """Seconds on the clock, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def rate_of(operation, flops, device):
    """FLOP/s of an operation of so many FLOP, over half a second."""
    operation()                                          # the first call loads libraries
    began, taken, times = now(device), 0.0, 0
    while taken < 0.5:
        for _ in range(8):
            operation()
        taken, times = now(device) - began, times + 8
    return times * flops / taken


def beside_ruler(flops, seconds, rates, ruler):
    """In words, how fast so many FLOP in so many seconds are, beside the mean of a ruler's rates, in FLOP/s."""
    rate, measure = flops / seconds, np.mean(rates)
    return f"{rate / 1e9:.0f} GFLOP/s, {rate / measure:.0%} of a large {ruler}'s {measure / 1e9:.0f}"


def training_type(device):
    """The type in which training computes its products by default."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def product_rate(device, dtype):
    """FLOP/s of a large square matrix product."""
    side = 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return rate_of(lambda: a @ b, 2 * side ** 3, device)


def convolution_rate(device, dtype):
    """FLOP/s of a large 3 x 3 convolution, channels last."""
    N, C, side = 8, 256, 32
    images, kernels = (torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
                       for shape in ((N, C, side, side), (C, C, 3, 3)))
    with torch.no_grad():
        return rate_of(lambda: F.conv2d(images, kernels, padding=1), 2 * N * 9 * C ** 2 * side ** 2, device)


def evaluation(args):
    """Time the parts of evaluate.py on made features: the Fréchet distance, precision and recall, Inception."""
    device, D, n = processes(args.device)[0], 2048, args.n
    generator = torch.Generator(device).manual_seed(0)
    real, fake = (torch.randn(n, D, generator=generator, device=device) + shift for shift in (0.0, 0.1))
    one, other = Statistics().add(real), Statistics().add(fake)

    def seconds(operation):
        began = now(device)
        operation()
        return now(device) - began

    def distance():
        frechet_distance(one.mu, one.sigma, other.mu, other.sigma)

    seconds(distance)                                    # the first call loads libraries
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads; random weights and features")
    print(f"Fréchet distance, {D} features, from statistics: {seconds(distance):.2f} s")

    with full_precision():
        rates = [product_rate(device, torch.float32)]
        taken = seconds(lambda: precision_recall(real, fake))
        rates.append(product_rate(device, torch.float32))
    work = 3 * 2 * n ** 2 * D                            # each set with itself, and both with each other
    print(f"precision and recall, {n} x {n}: {taken:.2f} s, {beside_ruler(work, taken, rates, 'float32 product')}")

    network = inception.Inception().to(device)
    images = torch.randint(256, (64, 64, 64, 3), dtype=torch.uint8, generator=generator, device=device)
    multiply_adds = count(network, images[:1])[1]
    with torch.no_grad(), full_precision():
        rates = [convolution_rate(device, torch.float32)]
        network.features(images)
        taken, resizing = (min(seconds(lambda: part(images)) for _ in range(3)) for part in (network.features, network.preprocess))
        rates.append(convolution_rate(device, torch.float32))
    work = 2 * len(images) * multiply_adds
    print(f"Inception: {len(images) / taken:.1f} images/s, {beside_ruler(work, taken, rates, 'float32 convolution')}; "
          f"{resizing / taken:.1%} of it enlarges the images")
    unit = 1 if sys.platform == "darwin" else 1024       # of what the system reports
    print(f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30:.1f} GiB")


def text(args):
    """Train on shapes and their captions, or take up that run, and count the prompts that its images fulfil."""
    out = Path(args.out)
    if not out.exists() or (load(out)["step"] or 0) < args.steps:        # released weights have none, and are no run to resume
        train.main(["--model", args.model, "--size", "Ti/8", "--data", args.data, "--text", "--seed", str(args.seed), "--out",
                    str(out), "--steps", str(args.steps), "--device", args.device] + ["--resume"] * out.exists())
    if load(out)["step"] < args.steps:
        raise ValueError(f"{out} was stopped before its end: the same command goes on with it")
    described, network, diffusion = drawable(out)
    config = described["config"]
    if (config["model"], config["data"], config["seed"]) != (args.model, args.data, args.seed):
        raise ValueError(f"{out} is a run of --model {config['model']} --data {config['data']} --seed {config['seed']}: ask for "
                         "that, or make another with --out NAME.pt")
    network = network.to(processes(args.device)[0])
    kinds = {"one object, colour and shape": [f"a {name}" for name in shapes.CLASSES],
             "one object, with its size": [f"a {size} {name}" for size in shapes.SIZES for name in shapes.CLASSES]}
    if args.data == "shapes":
        captions = shapes.captions(data.SHAPES)
        kinds |= {"two or three": [text for text in captions if text.startswith(("two", "three"))],
                  "two in a relation": [text for text in captions if any(f" {word} a " in text for word in shapes.RELATIONS)]}
    y_null = unconditional(network, described["text"], described["config"])
    scale = guidance_scale(network, y_null=y_null)
    print(f"{args.n} images a row of {out} (step {described['step']}), seed {args.sample_seed}, dpm++ {STEPS} steps, guidance "
          f"{scale:g}; right: all that the prompt names is there as it says, and nothing else")
    pictures = []
    for kind, prompts in kinds.items():
        prompts = [prompts[i % len(prompts)] for i in range(args.n)]
        contexts = read_prompts(prompts, None, described, network)
        drawn = draw(network, diffusion, range(args.n), contexts, args.sample_seed, clip=True, cfg_scale=scale, y_null=y_null)
        images = torch.cat([data.to_uint8(x).cpu() for _, x in drawn]).numpy()
        wanted = [shapes.parse(prompt)[0] for prompt in prompts]
        colour = np.mean([{thing[0] for thing in named} == {thing[0] for thing in found}
                          for named, found in zip(wanted, shapes.look(images))])
        print(f"{kind:30}{shapes.matches(prompts, images).mean():7.1%} right, {colour:6.1%} in colour; as \"{prompts[0]}\"")
        pictures.append(images[:len(shapes.CLASSES)])
    save_image(out.with_name(f"{out.stem}-prompts.png"), grid(np.concatenate(pictures), len(shapes.CLASSES) // 2))


def latent_steps(args):
    """Time a training step on cached latents, on random ones of their shape, and with the encoder run in it, in turn."""
    with tempfile.TemporaryDirectory() as cache:
        settings, _ = train.settings(["--size", args.size, "--vae", args.vae, "--data", args.data, "--cache", cache, "--out",
                                      str(Path(cache) / "run.pt"), "--batch-size", str(args.batch_size), "--device", args.device])
        device = processes(args.device)[0]
        dataset = train.load_data(settings, None, device)
        network, _ = train.build_network(settings, dataset, {})
        network, autoencoder = network.to(device).train(), dataset.autoencoder
        objective = objective_of("dit")(settings, dataset, network, device)
        parameters = list(network.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        batches, all_of_it = data.Batches(dataset, args.batch_size, 0), slice(0, args.batch_size)
        images = data.Batches(dataset.pixels, args.batch_size, 0)
        shape = (dataset.channels, *dataset.image_size)

        def cached(step):
            return objective.draw(step, *batches[step], all_of_it)

        def random(step):                                # latents of mean and deviation 1; all else is drawn as well
            labels = None if dataset.num_classes is None else torch.zeros(args.batch_size, dtype=torch.long)
            return objective.draw(step, torch.ones(args.batch_size, 1, 2, *shape), labels, all_of_it)

        def encoded(step):
            pixels, labels = images[step]
            mean, std = encode(autoencoder, pixels)
            return objective.draw(step, torch.from_numpy(np.stack([mean, std], axis=1))[:, None], labels, all_of_it)

        seconds = {make: [] for make in (cached, random, encoded)}
        for step in range(args.steps + 2):
            for make in seconds:
                began = now(device)
                batch = make(step)
                with torch.autocast(device.type, training_type(device), enabled=device.type == "cuda"):
                    losses, _ = objective.loss(network, *batch)
                losses.mean().backward()
                train.guarded_step(optimizer, parameters, 1.0)
                seconds[make].append(now(device) - began)
    a, b, c = (np.median(times[2:]) for times in seconds.values())       # the first two warm up
    print(f"dit {args.size} on {'x'.join(map(str, shape))} latents of {args.data}, batch {args.batch_size}, {device}, "
          f"{torch.get_num_threads()} threads; medians of {args.steps} steps, in turn")
    print(f"cached latents {a * 1e3:.1f} ms a step, random ones {b * 1e3:.1f} ms: {a / b - 1:+.1%}; encoding each time "
          f"{c * 1e3:.1f} ms, {c / a:.2f} times a step on cached ones")


@contextmanager
def stopwatch(owner, name, device):
    """A list that fills, while the context lasts, with (begin, end) in seconds of each call of a method."""
    original, calls = getattr(owner, name), []

    def timed(*args, **kwargs):
        began = now(device)
        result = original(*args, **kwargs)
        calls.append((began, now(device)))
        return result
    setattr(owner, name, timed)
    try:
        yield calls
    finally:
        setattr(owner, name, original)


def speed(args):
    """Run train.py's own loop with a stopwatch around forward, backward and optimizer."""
    if args.steps < 2:
        raise ValueError("--steps: time at least 2")
    size = args.size or train.DEFAULT_SIZE[args.model]
    warm, device, never = 3, processes(args.device)[0], str(10 ** 9)
    measure, ruler = (convolution_rate, "convolution") if args.model == "unet" else (product_rate, "product")
    rates = [measure(device, training_type(device))]
    with (tempfile.TemporaryDirectory() as folder, stopwatch(objective_of(args.model, size), "loss", device) as losses,
          stopwatch(torch.Tensor, "backward", device) as backwards, stopwatch(torch.optim.AdamW, "step", device) as steps):
        train.main(["--model", args.model, "--size", size, "--batch-size", str(args.batch_size), "--steps",
                    str(warm + args.steps), "--data", args.data, "--out", str(Path(folder) / "run.pt"), "--save-every", never,
                    "--sample-every", never, "--device", args.device] + ["--compile"] * args.compile)
        network, _ = build(load(Path(folder) / "run.pt"))
    rates.append(measure(device, training_type(device)))
    losses, backwards, steps = (np.array(calls)[warm:] for calls in (losses, backwards, steps))      # (steps, 2)
    whole = np.diff(losses[:, 0]).mean()                                             # seconds a step, all included
    inside = {name: np.diff(calls[:-1]).mean() for name, calls in (("loss", losses), ("backward", backwards), ("step", steps))}
    work = 3 * 2 * args.batch_size * count(network, *inputs_of(network))[1]          # backward: twice forward; two FLOP each
    print(f"{args.model} {size}, batch {args.batch_size}, {device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{args.batch_size / whole:.1f} images/s, {beside_ruler(work, whole, rates, ruler)}")
    print(", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in inside.items()) +
          f", the rest of the loop {1 - sum(inside.values()) / whole:.1%} of a step's {whole * 1e3:.1f} ms")


def flags():
    """The command line: one subcommand a measurement."""
    parser = Parser(prog="bench.py", description="Measure the quality of a run's samples, or the speed of training.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    command = commands.add_parser("quality", help="score samples by their nearest training images")
    command.add_argument("--n", type=positive, default=200, help="samples (default: 200)")
    command.set_defaults(run=quality)
    command = commands.add_parser("restore", help="inpaint, enlarge and denoise held-out digits")
    command.add_argument("--n", type=positive, default=500, help="digits (default: 500)")
    command.add_argument("--steps", type=positive, default=restoration.STEPS, help=f"default: {restoration.STEPS}")
    command.add_argument("--repeats", type=positive, default=restoration.REPEATS, help=f"default: {restoration.REPEATS}")
    command.add_argument("--out", default="restored.png", help="a picture of one of each digit (default: restored.png)")
    command.set_defaults(run=restoration_quality)
    command = commands.add_parser("train", help="time the training loop")
    command.add_argument("--model", default="dit", choices=MODELS, help="default: dit")
    command.add_argument("--size", help="as for train.py (default: its own)")
    command.add_argument("--steps", type=positive, default=20, help="timed steps (default: 20)")
    command.add_argument("--compile", action="store_true")
    command.set_defaults(run=speed)
    command = commands.add_parser("evaluate", help="time the evaluator's parts on made features")
    command.add_argument("--n", type=positive, default=10_000, help="rows on each side (default: 10000)")
    command.set_defaults(run=evaluation)
    command = commands.add_parser("compare", help="train DiT, U-ViT and U-Net of like Gflops, and score their samples")
    command.add_argument("--steps", type=positive, default=1400, help="of training (default: 1400, five minutes on 2 cores)")
    command.add_argument("--seeds", type=positive, default=2, help="runs of each network (default: 2)")
    command.add_argument("--n", type=positive, default=2000, help="samples to score (default: 2000)")
    command.add_argument("--out", default="compare", help="folder of the runs and of compare.csv; what is there is not made again")
    command.set_defaults(run=compare)
    command = commands.add_parser("text", help="train on shapes and their captions, and judge what prompts give")
    command.add_argument("--model", default="uvit", choices=("uvit", "dit"), help="of size Ti/8 (default: uvit)")
    command.add_argument("--data", default="shapes:one", choices=("shapes:one", "shapes"), help="single objects, or all kinds of "
                         "scenes (default: shapes:one)")
    command.add_argument("--steps", type=positive, default=6000, help="of training (default: 6000, 12 minutes on 2 cores)")
    command.add_argument("--seed", type=natural, default=0, help="of training (default: 0)")
    command.add_argument("--sample-seed", type=natural, default=0, help="default: 0")
    command.add_argument("--n", type=positive, default=200, help="prompts of each kind (default: 200)")
    command.add_argument("--out", default="text.pt", help="the run; trained to its end if it is not there yet (default: text.pt)")
    command.set_defaults(run=text)
    command = commands.add_parser("latents", help="time steps on cached latents")
    command.add_argument("--vae", required=True, help="an autoencoder of train.py or a released one")
    command.add_argument("--size", default="Ti/2", help="of a DiT (default: Ti/2)")
    command.add_argument("--steps", type=positive, default=40, help="timed steps (default: 40)")
    command.set_defaults(run=latent_steps)
    command = commands.add_parser("swissroll", help="how far samples of a run on points are from the data")
    command.add_argument("--n", type=positive, default=SCATTERED, help=f"points (default: {SCATTERED})")
    command.set_defaults(run=points_quality)
    for name, command in commands.choices.items():
        if name in ("quality", "restore", "swissroll"):
            command.add_argument("--ckpt", default="run.pt", help="default: run.pt")
            command.add_argument("--seed", type=natural, default=0, help="of the samples (default: 0)")
        if name in ("train", "latents"):
            command.add_argument("--data", default="mnist", help="default: mnist")
            command.add_argument("--batch-size", type=positive, default=32, help="default: 32")
        command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return parser


def main(argv=None):
    """The command: measure."""
    args = flags().parse_args(argv)
    with one_line_errors("bench.py"):
        args.run(args)


if __name__ == "__main__":
    sys.exit(main())
