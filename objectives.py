"""What a training step draws and minimises: denoising, or classification.

Report §4-5: noise an image, tell the network the time and the class, let it predict the noise; Ho et al. 2020, algorithm 1.
§2-4: a ViT learns the labels. train.py's loop knows neither. To it an objective is

    groups, scores         names of the log's columns: the loss by group of samples, and what `report` measures
    draw(step, images, labels, part) -> batch      all of a step's randomness, drawn for the whole batch and cut to `part`
    loss(model, *batch) -> losses (n,), and the group (n,) of each sample, 0 .. len(groups) - 1
    report(network, path) -> {score: value}        at intervals, with the averaged weights; leaves a picture at path
    evaluate(network) -> {score: value}            every --eval-every steps, by all processes together; a classifier has none
    description()          what run.pt says of the diffusion, or None

What a step draws depends on (seed, step) alone, so that a run resumes exactly and one process or eight train alike.
"""
import numpy as np
import torch
import torch.nn.functional as F

import data
from cli import first_in_turn, grid, save_image
from ddpm import SCHEDULES, Diffusion, keyed_generator
from evaluate import measure_reference, possible, score_network
from features import default_space, space_of
from sample import draw, guidance

TIME, NOISE, DROP, FLIP, SHIFT, DROPOUT = range(6)       # what a generator draws, so that one use does not disturb another


def generators(args, step, device):
    """A function that makes the random generator of one use in one step."""
    return lambda purpose: keyed_generator((args.seed, step, purpose), device)


def draw_images(step, images, part, args, device):
    """Images (n, H, W, C) uint8, this process's part of the batch -> (n, C, H, W) in [-1, 1], flipped and moved at random."""
    N, generator, flip, offset = args.batch_size, generators(args, step, device), None, None
    if args.flip:
        flip = (torch.rand(N, generator=generator(FLIP), device=device) < 0.5)[part]
    if args.shift:
        offset = torch.randint(-args.shift, args.shift + 1, (N, 2), generator=generator(SHIFT), device=device)[part]
    return data.augment(data.to_float(images.to(device, non_blocking=True)), flip, offset)


class Denoising:
    """Predict the noise, or what --prediction says (§4-5). The loss is logged by quarter of t; the picture shows samples."""

    groups, scores = ("loss_q1", "loss_q2", "loss_q3", "loss_q4"), ()

    def __init__(self, args, dataset, network, device):
        self.args, self.dataset, self.null_label, self.device = args, dataset, network.null_label, device
        self.diffusion = Diffusion(SCHEDULES[args.schedule](), args.prediction, args.variance)
        if args.eval_every:
            if min(args.eval_n, len(dataset)) < 4:
                raise ValueError(f"--eval-every: precision and recall need at least 4 samples and images, not {args.eval_n} and "
                                 f"{len(dataset)}")
            with first_in_turn():
                self.space = space_of(args.features or default_space(args.data, dataset.images.shape[1:]), device, args.cache)
            self.real = measure_reference(dataset, self.space, args.data).measured
            self.scores = tuple(map(self.space.title, possible(self.space, dataset.classes)))

    def description(self):
        """The process, for run.pt."""
        args = self.args
        return dict(schedule=args.schedule, T=self.diffusion.T, prediction=args.prediction, variance=args.variance)

    def draw(self, step, images, labels, part):
        """x0 (n, C, H, W), t (n,), y (n,) or None, eps like x0: n of the batch's N samples."""
        args, device, N = self.args, self.device, self.args.batch_size
        generator = generators(args, step, device)
        x0 = draw_images(step, images, part, args, device)
        t = torch.randint(self.diffusion.T, (N,), generator=generator(TIME), device=device)[part]
        eps = torch.randn((N, *x0.shape[1:]), generator=generator(NOISE), device=device)[part]
        if labels is None:
            return x0, t, None, eps
        y = labels.to(device, non_blocking=True)
        if self.null_label is not None:                  # guidance (§3) needs both, Ho & Salimans 2022, algorithm 1
            dropped = (torch.rand(N, generator=generator(DROP), device=device) < args.cfg_drop)[part]
            y = torch.where(dropped, self.null_label, y)
        return x0, t, y, eps

    def loss(self, model, x0, t, y, eps):
        """Losses (n,), and the quarter of 0 .. T-1 in which each t lies."""
        return self.diffusion.losses(model, x0, t, y, eps)["loss"], t * 4 // self.diffusion.T

    def report(self, network, path):
        """Samples in eight rows; one column a class, for the first ten classes."""
        columns = min(self.dataset.num_classes or 8, 10)
        scale = guidance(network)
        classes = list(range(columns)) if self.dataset.num_classes else None
        batches = draw(network, self.diffusion, range(8 * columns), classes, self.args.seed, clip=True, cfg_scale=scale)
        save_image(path, grid(torch.cat([data.to_uint8(x).cpu() for _, x in batches]).numpy(), columns))
        return {}

    def evaluate(self, network):
        """The scores of --eval-n samples against the training data, drawn with guidance as `sample.py` does."""
        found = score_network(network, self.diffusion, self.real, self.space, self.args.eval_n, self.dataset.classes,
                              self.args.seed)
        return {self.space.title(metric): value for metric, value in found.items()}


class Classification:
    """Cross-entropy of the labels (§2-4). The score is the accuracy on held-out images; the picture shows what is mistaken."""

    groups, scores = (), ("accuracy",)

    def __init__(self, args, dataset, network, device):
        self.args, self.device = args, device
        self.held_out = data.load(args.data, args.image_size, "test", args.cache, args.skip_bad)

    def description(self):
        """No diffusion."""

    def draw(self, step, images, labels, part):
        """x (n, C, H, W), y (n,)."""
        return draw_images(step, images, part, self.args, self.device), labels.to(self.device, non_blocking=True)

    def loss(self, model, x, y):
        """Losses (n,), in nats; all samples are of one group."""
        return F.cross_entropy(model(x).float(), y, reduction="none"), torch.zeros_like(y)

    @torch.no_grad()
    def report(self, network, path):
        """The accuracy; as picture, what is taken for each of the first ten classes, a column each, mistakes on top."""
        images, labels = self.held_out.batch(np.arange(len(self.held_out)))
        taken = torch.cat([network(data.to_float(some.to(self.device))).argmax(dim=1).cpu() for some in images.split(256)])
        wrong = taken != labels
        columns = min(self.held_out.num_classes, 10)
        picture = torch.full((8, columns, *images.shape[1:]), 128, dtype=torch.uint8)
        for k in range(columns):
            rows = torch.cat([(wrong & (taken == k)).nonzero(), (~wrong & (taken == k)).nonzero()]).flatten()[:8]
            picture[:len(rows), k] = images[rows]
        save_image(path, grid(picture.flatten(0, 1).numpy(), columns))
        return {"accuracy": 1 - wrong.double().mean().item()}


def objective_of(model):
    """The objective of a --model."""
    return Classification if model == "vit" else Denoising
