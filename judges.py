"""Judges of runs: what digits, restored digits, images of prompts and points are worth, each as numbers by name.

Report §4-6, §1-2, §4-1, Fig. 2-1. study.py tries the report's claims by them. A judge takes the file of a run and a seed of its
samples, and draws with `sample.py`'s defaults where nothing else is said.
"""
import time
from functools import cache

import numpy as np
import torch

import data
import ddpm
import points
import restoration
import shapes
from features import JUDGE, measure, space_of
from gflops import count, inputs_of
from metrics import authentic_share, nearest, psnr, unique_share, vote
from pictures import grid, points_picture
from sampling import (SCATTERED, STEPS, decoder, draw_images, draw_points, drawable, labels_of, read_prompts, text_reader,
                      unconditional)
from scoring import measure_reference, possible, scores

SAMPLES, PROMPTS, DIGITS = 2000, 200, 500                # that scores are of
DATA_SETS = 25                                           # as many distances of points to the data, of which the median counts
CPU = torch.device("cpu")

@cache
def digits():
    """The training digits uint8 (M, H, W, 1), their labels, the judge's space, and the digits measured in it."""
    dataset, space = data.load(), space_of(str(JUDGE), CPU)
    images, labels = dataset.batch(np.arange(len(dataset)))
    return images, labels, space, measure_reference(dataset, space, "mnist").measured


def digit_scores(path, seed, scale=1.0, sampler="dpm++", steps=STEPS):
    """The scores of samples of a run on digits, in pixels or latents.

    A model that memorised its data would win all of them but `authentic`.
    """
    run, network, diffusion = drawable(path)
    real, labels, space, reference = digits()
    classes, began = list(range(network.num_classes)), time.perf_counter()
    drawn = [images for _, images in draw_images(network, diffusion, range(SAMPLES), classes, seed, decoder(None, run, network),
                                                 scale, sampler=sampler, steps=steps)]
    rate = SAMPLES / (time.perf_counter() - began)
    fake = measure(drawn, space)
    fake.labels = labels_of(range(SAMPLES), classes)
    neighbours = nearest(torch.cat(drawn), real)
    return dict(scores(fake, reference, possible(space, run.data.classes)), images_per_s=rate,
                recognised=(vote(labels, neighbours) == fake.labels).double().mean().item(),
                unique=unique_share(neighbours[:, 0]), authentic=authentic_share(torch.cat(drawn), real, neighbours[:, 0]))


def held_out_digits():
    """The first held-out digits, in [-1, 1], and their labels."""
    images, labels = data.load(split="test").batch(np.arange(DIGITS))
    return data.to_float(images), labels


@torch.no_grad()
def held_out_loss(path, seed):
    """The loss that a run minimised, on held-out digits at 10 times t each, evenly spread; the noise is that of the seed."""
    run, network, diffusion = drawable(path)
    (x0, y), autoencoder = held_out_digits(), decoder(None, run, network)
    if autoencoder:
        x0 = autoencoder.scale * autoencoder.encode(x0)[0]               # (n, c, h, w): the mean
    t, n, losses = torch.arange(DIGITS) * diffusion.T // DIGITS, 10, []
    for i in range(n):
        eps = torch.stack([torch.randn(x0.shape[1:], generator=ddpm.keyed_generator((seed, i, j))) for j in range(DIGITS)])
        losses.append(diffusion.losses(network, x0, t.roll(i * DIGITS // n), y, eps, run.config["max_weight"])["loss"])
    return {"held-out loss": torch.cat(losses).mean().item()}


def loss_and_scores(path, seed):
    """The held-out loss of a run, the scores of its samples, and what its training cost, three forward passes an image.

    Ten steps of dpm++ reach the distance of 250 ancestral ones (study `samplers`).
    """
    run, network, _ = drawable(path)
    flops = 2 * 3 * count(network, *inputs_of(network))[1] * run.step * run.config["batch_size"]
    return {**held_out_loss(path, seed), **digit_scores(path, seed, steps=10), "training TFLOP": flops / 1e12}


HOLE = torch.zeros(1, 1, 32, 32)
HOLE[..., 9:23, 9:23] = 1
HOW = dict(steps=restoration.STEPS, repeats=restoration.REPEATS, clip=True)      # as sample.py restores
SIGMA = 0.5                                              # of the noise that is removed
TASKS = {"centre 14x14 filled in": restoration.masked(HOLE), "4 times enlarged": restoration.pooled(4)}


def restored_share(path, seed, task, label):
    """The share of held-out digits that stay what they are when a run restores them, or the nearest training digit does."""
    _, network, diffusion = drawable(path)
    real, real_labels, space, _ = digits()
    (images, labels), (A, _) = held_out_digits(), TASKS[task]
    x = restoration.restore(diffusion, network, A(images), TASKS[task], labels if label == "given" else None,
                            seeds=[(seed, i) for i in range(DIGITS)], **HOW)
    kept = space.extract(data.to_uint8(x))["probabilities"].argmax(dim=1) == labels
    neighbours = nearest(A(images), A(data.to_float(real)), k=1)[:, 0]
    return dict(kept=kept.double().mean().item(), nearest=(real_labels[neighbours] == labels).double().mean().item())


def with_noise(images, seed, numbers):
    """Images with noise of deviation SIGMA, each with that of its number."""
    noise = [torch.randn(images.shape[1:], generator=ddpm.keyed_generator((seed, i))) for i in numbers]
    return images + SIGMA * torch.stack(noise)


def denoised(path, seed):
    """The PSNR in dB of held-out digits with noise: as they are, and after a run, a blur or a linear filter removed it."""
    _, network, diffusion = drawable(path)
    images, labels = held_out_digits()
    noisy, real = with_noise(images, seed, range(DIGITS)), data.to_float(digits()[0])
    found = {name: restoration.denoise(diffusion, network, noisy, SIGMA, y, clip=True)
             for name, y in (("label given", labels), ("no label", None))}
    found |= {"linear filter": restoration.linear_filter(noisy, real, SIGMA), "noisy": noisy}
    return {**{name: psnr(x, images) for name, x in found.items()},
            "best blur": max(psnr(restoration.blurred(noisy, deviation), images) for deviation in np.arange(0.5, 2, 0.05))}


CAPTIONS = shapes.captions(data.SHAPES)
KINDS = {"a red disc": [f"a {name}" for name in shapes.CLASSES],         # prompts of each kind, by the first one
         "a small red disc": [f"a {size} {name}" for size in shapes.SIZES for name in shapes.CLASSES],
         "two red squares": [text for text in CAPTIONS if text.startswith(("two", "three"))],
         "a small blue triangle below a blue star": [text for text in CAPTIONS
                                                     if any(f" {word} a " in text for word in shapes.RELATIONS)]}


def drawn_prompts(path, seed, prompts):
    """Images uint8 (PROMPTS, H, W, 3) of a kind of prompts, in turn, and these."""
    run, network, diffusion = drawable(path)
    reader, prompts = text_reader(run, network), [KINDS[prompts][i % len(KINDS[prompts])] for i in range(PROMPTS)]
    drawn = draw_images(network, diffusion, range(PROMPTS), read_prompts(prompts, reader, network), seed,
                        decoder(None, run, network), y_null=unconditional(network, reader, run.config["cfg_drop"]))
    return torch.cat([images for _, images in drawn]).numpy(), prompts


def prompts_fulfilled(path, seed, prompts):
    """The share of images that show exactly the objects that their prompt names, and of those that are right in colour."""
    images, prompts = drawn_prompts(path, seed, prompts)
    named, seen = (shapes.parse(prompt)[0] for prompt in prompts), shapes.look(images)
    colours = [{thing[0] for thing in wanted} == {thing[0] for thing in found} for wanted, found in zip(named, seen)]
    return {"right": shapes.matches(prompts, images).mean(), "right in colour": np.mean(colours)}


def distance_to_roll(path, seed):
    """The sliced Wasserstein distance of a run's points to the data, and of the data to the data."""
    _, network, diffusion = drawable(path)
    samples = draw_points(network, diffusion, SCATTERED, seed)
    real = [points.swiss_roll(SCATTERED, number) for number in range(1, 2 * DATA_SETS + 1)]      # 0 is the training set's seed
    ours = np.median([points.sliced_wasserstein(samples, other) for other in real[:DATA_SETS]])
    floor = np.median([points.sliced_wasserstein(*pair) for pair in zip(real[:DATA_SETS], real[DATA_SETS:])])
    return {"distance": ours, "of data to data": floor}


# Pictures of what was judged, of the same samples; each uint8 (H, W, C)

def drawn_digits(path):
    """The first 80 samples of a run without guidance, a column a class."""
    run, network, diffusion = drawable(path)
    images = draw_images(network, diffusion, range(80), list(range(10)), 0, decoder(None, run, network), 1.0)
    return grid(torch.cat([part for _, part in images]).numpy(), 10)


def one_a_class():
    """One held-out digit of each class, its label and its number."""
    images, labels = held_out_digits()
    chosen = [int((labels == digit).nonzero()[0]) for digit in labels.unique()]
    return images[chosen], labels[chosen], chosen


def restored_digits(path):
    """What was known of a digit a class, and what a run with the label made of it, for each of the TASKS; and the originals."""
    _, network, diffusion = drawable(path)
    images, labels, chosen = one_a_class()
    rows = []
    for A, A_plus in TASKS.values():
        rows += [A_plus(A(images)), restoration.restore(diffusion, network, A(images), (A, A_plus), labels,
                                                        seeds=[(0, i) for i in chosen], **HOW)]
    return grid(data.to_uint8(torch.cat([*rows, images])).numpy(), len(chosen))


def denoised_digits(path):
    """A digit a class with noise, what a run made of it without the label and with it, and the originals."""
    _, network, diffusion = drawable(path)
    images, labels, chosen = one_a_class()
    noisy = with_noise(images, 0, chosen)
    rows = [restoration.denoise(diffusion, network, noisy, SIGMA, y, clip=True) for y in (None, labels)]
    return grid(data.to_uint8(torch.cat([noisy, *rows, images])).numpy(), len(chosen))


def prompts_drawn(path):
    """The first images of each kind of prompts, two rows each."""
    n = len(shapes.CLASSES)
    return grid(np.concatenate([drawn_prompts(path, 0, kind)[0][:n] for kind in KINDS]), n // 2)


def drawn_points(path):
    """Points of a run beside points of the data."""
    _, network, diffusion = drawable(path)
    return points_picture(draw_points(network, diffusion, SCATTERED))
