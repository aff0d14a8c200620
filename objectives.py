"""What a training step draws and minimises: denoising, classification, or autoencoding.

Report §4-5: noise an image, tell the network the time and the class, let it predict the noise; Ho et al. 2020, algorithm 1.
§2-4: a ViT learns the labels. §2-5: an autoencoder learns to give images back. train.py's loop knows none of them. To it an
objective is

    groups, scores         names of the log's columns: the loss by group of samples, and what `report` and `evaluate` measure
    draw(step, images, labels, part) -> batch      all of a step's randomness, drawn for the whole batch and cut to `part`
    loss(model, *batch) -> losses (n,), and the group (n,) of each sample, 0 .. len(groups) - 1
    report(network, path) -> {score: value}        at intervals, with the averaged weights; leaves a picture at path
    evaluate(network) -> {score: value}            every --eval-every steps, by all processes together; a classifier has none
    process                what run.pt says of the diffusion, or None
    autoencoder(network)   what it says of an autoencoder, or None
    flags                  of sample.py, after which a run's name stands, if there is a diffusion
"""
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import data
from cascade import augmented, enlarge, shrink
from cli import first_in_turn
from ddpm import SCHEDULES, Diffusion, keyed_generator
from sampling import SCATTERED, decode, draw, draw_points, guidance_scale, unconditional
from evaluate import measure_reference, possible, score_network
from features import default_space, space_of
from pictures import grid, points_picture, save_image
from points import sliced_wasserstein
from unet import UPSAMPLERS
from vae import kl_divergence, sample_latent
from vit import divided

KL_WEIGHT = 1e-6                                         # Rombach et al. 2022, appendix G
TIME, NOISE, DROP, FLIP, SHIFT, DROPOUT, LATENT, LOW = range(8)  # what a generator draws, so that one use does not disturb another


def source(args, step, purpose, device):
    """The device, and the generator there of one use in one step, as torch.rand and its like take them."""
    return dict(device=device, generator=keyed_generator((args.seed, step, purpose), device))


def draw_images(step, images, part, args, device):
    """Images (n, H, W, C) uint8, this process's part of the batch -> (n, C, H, W) in [-1, 1], flipped and moved at random."""
    N, flip, offset = args.batch_size, None, None
    if args.flip:
        flip = (torch.rand(N, **source(args, step, FLIP, device)) < 0.5)[part]
    if args.shift:
        offset = torch.randint(-args.shift, args.shift + 1, (N, 2), **source(args, step, SHIFT, device))[part]
    return data.augment(data.to_float(images.to(device, non_blocking=True)), flip, offset)


def draw_latents(step, moments, part, args, device, scale):
    """Moments (n, F, 2, c, h, w) of `latents.Latents`, this process's part -> scaled latents (n, c, h, w), sampled afresh."""
    N, moments = args.batch_size, moments.to(device, non_blocking=True)
    chosen = moments[:, 0]                                                               # (n, 2, c, h, w)
    if args.flip:
        flip = (torch.rand(N, **source(args, step, FLIP, device)) < 0.5)[part]
        chosen = torch.where(flip.reshape(-1, 1, 1, 1, 1), moments[:, 1], chosen)        # of the mirror image
    mean, std = chosen.unbind(dim=1)                                                     # (n, c, h, w)
    eps = torch.randn((N, *mean.shape[1:]), **source(args, step, LATENT, device))[part]
    return scale * (mean + std * eps)


def held_out(args):
    """The held-out part of the data, which may lie in other files than the training part."""
    with first_in_turn():
        return data.load(args.data, args.image_size, "test", args.cache, args.skip_bad)


def save_rows(path, *sets):
    """Write a picture of sets of n images, uint8 (n, H, W, C), in rows of ten: below each row of the first set the others'."""
    n = len(sets[0]) // 10 * 10 or len(sets[0])          # whole rows
    rows = zip(*(images[:n].split(10) for images in sets))
    save_image(path, grid(torch.cat([row for group in rows for row in group]).numpy(), min(10, n)))


class Denoising:
    """Predict the noise, or what --prediction says (§4-5). The loss is logged by quarter of t; the picture shows samples."""

    groups, scores = ("loss_q1", "loss_q2", "loss_q3", "loss_q4"), ()
    flags = "--ckpt"                                     # of sample.py, before a run's name

    def __init__(self, args, dataset, network, device):
        self.args, self.dataset, self.device = args, dataset, device
        self.y_null = unconditional(network, dataset.text, vars(args))
        if torch.is_tensor(self.y_null):                 # the empty caption
            self.y_null = self.y_null.to(device)
        self.vae = getattr(dataset, "autoencoder", None)
        self.diffusion = Diffusion(SCHEDULES[args.schedule](), args.prediction, args.variance)
        self.process = dict(schedule=args.schedule, T=self.diffusion.T, prediction=args.prediction, variance=args.variance)
        if args.eval_every:
            if min(args.eval_n, len(dataset)) < 4:
                raise ValueError(f"--eval-every: precision and recall need at least 4 samples and images, not {args.eval_n} and "
                                 f"{len(dataset)}")
            with first_in_turn():
                self.space = space_of(args.features or default_space(args.data, dataset.images.shape[1:]), device, args.cache)
            self.real = measure_reference(dataset if self.vae is None else dataset.pixels, self.space, args.data).measured
            self.scores = tuple(map(self.space.title, possible(self.space, None if args.text else dataset.classes)))

    def autoencoder(self, network):
        """Where the autoencoder comes from, see `checkpoint.load_autoencoder`, and the scale of its latents; None on pixels."""
        return None if self.vae is None else {**self.vae.origin, "scale": self.vae.scale}

    def draw(self, step, images, labels, part):
        """x0 (n, C, H, W), t (n,), y, eps like x0: n of the batch's N samples.  y: labels (n,), a text's ids (n, L, W) or context
        (n, L, D), or None."""
        args, device, N = self.args, self.device, self.args.batch_size
        x0 = (draw_images(step, images, part, args, device) if self.vae is None
              else draw_latents(step, images, part, args, device, self.vae.scale))
        t = torch.randint(self.diffusion.T, (N,), **source(args, step, TIME, device))[part]
        eps = torch.randn((N, *x0.shape[1:]), **source(args, step, NOISE, device))[part]
        if labels is None:
            return x0, t, None, eps
        y = labels.to(device, non_blocking=True)
        y = y.float() if y.is_floating_point() else y                    # contexts are kept in half precision
        if self.y_null is not None:                      # guidance (§3) needs both, Ho & Salimans 2022, algorithm 1
            dropped = (torch.rand(N, **source(args, step, DROP, device)) < args.cfg_drop)[part]
            y = torch.where(dropped.reshape(-1, *(1,) * (y.ndim - 1)), self.y_null, y)
        return x0, t, y, eps

    def loss(self, model, x0, t, y, eps):
        """Losses (n,), and the quarter of 0 .. T-1 in which each t lies."""
        return self.diffusion.losses(model, x0, t, y, eps)["loss"], t * 4 // self.diffusion.T

    def report(self, network, path):
        """Samples in eight rows; one column a class, for the first ten classes, or a caption."""
        contexts = self.dataset.contexts
        columns = min((self.dataset.num_classes if contexts is None else len(contexts)) or 8, 10)
        shown = list(range(columns)) if self.dataset.num_classes else None
        if contexts is not None:
            rows = np.linspace(0, len(contexts) - 1, columns, dtype=int)
            shown = contexts[rows]
            print("captions of the picture's columns: " + "; ".join(self.dataset.distinct[row] for row in rows), flush=True)
        batches = draw(network, self.diffusion, range(8 * columns), shown, self.args.seed, clip=self.vae is None,
                       cfg_scale=guidance_scale(network, y_null=self.y_null), y_null=self.y_null)
        images = [data.to_uint8(x if self.vae is None else decode(self.vae, x)).cpu() for _, x in batches]
        save_image(path, grid(torch.cat(images).numpy(), columns))
        return {}

    def evaluate(self, network):
        """The scores of --eval-n samples against the training data, drawn with guidance as `sample.py` does."""
        n = self.args.eval_n
        contexts = None if self.dataset.contexts is None else self.dataset.contexts_of(n)
        found = score_network(network, self.diffusion, self.real, self.space, n, self.dataset.classes if contexts is None else None,
                              self.args.seed, autoencoder=self.vae, contexts=contexts, y_null=self.y_null)
        return {self.space.title(metric): value for metric, value in found.items()}


class SuperResolution(Denoising):
    """Denoise beside the same image of a quarter of the sides, made noisy (§3, see cascade.py).  The picture shows held-out
    images: small, below them what is drawn of those, below that the originals."""

    flags = "--ckpt BASE.pt --cascade"

    def __init__(self, args, dataset, network, device):
        super().__init__(args, dataset, network, device)
        self.low_size = divided(dataset.image_size, network.factor, "the upsampler's factor")
        self.held_out = held_out(args)

    def draw(self, step, images, labels, part):
        """As of `Denoising`, and low (n, C, H / 4, W / 4)."""
        x0, t, y, eps = super().draw(step, images, labels, part)
        N, low = self.args.batch_size, source(self.args, step, LOW, self.device)
        sigma = torch.rand(N, **low)[part]
        noise = torch.randn((N, x0.shape[1], *self.low_size), **low)[part]
        return x0, t, y, eps, augmented(shrink(x0), sigma, noise)

    def loss(self, model, x0, t, y, eps, low):
        """Losses (n,), and the quarter of 0 .. T-1 in which each t lies."""
        return super().loss(partial(model, low=low), x0, t, y, eps)

    def report(self, network, path):
        """For every ten of up to 30 held-out images three rows: small, what is drawn of those, and the originals."""
        n = min(30, len(self.held_out))
        images, labels = self.held_out.batch(np.arange(n))
        low = shrink(data.to_float(images.to(self.device)))
        drawn = data.to_uint8(enlarge(network, self.diffusion, low, labels, self.args.seed, range(n))).cpu()
        small = data.to_uint8(low).cpu().repeat_interleave(network.factor, dim=1).repeat_interleave(network.factor, dim=2)
        save_rows(path, small, drawn, images)
        return {}


class PointDenoising(Denoising):
    """The same of points in the plane (Fig. 2-1). The score is the samples' sliced Wasserstein distance to the points held out; the
    picture shows as many of both."""

    scores = ("distance",)

    def report(self, network, path):
        """The distance; as picture, the samples beside the data."""
        held_out, _ = data.load(self.args.data, split="test").batch(np.arange(SCATTERED))
        samples = draw_points(network, self.diffusion, SCATTERED, self.args.seed)
        save_image(path, points_picture(samples))
        return {"distance": sliced_wasserstein(samples, held_out.flatten(1))}


class Classification:
    """Cross-entropy of the labels (§2-4). The score is the accuracy on held-out images; the picture shows what is mistaken."""

    groups, scores, process = (), ("accuracy",), None

    def __init__(self, args, dataset, network, device):
        self.args, self.device = args, device
        self.held_out = held_out(args)

    def autoencoder(self, network):
        """No autoencoder."""

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


class Autoencoding:
    """Give images back through a small latent (§2-5): L1, and the KL divergence with a weight of 1e-6, both per number of the
    image. Rombach et al. 2022, appendix G; its perceptual and adversarial terms need other trained networks and are left out.
    The score is the held-out PSNR in dB; the picture shows held-out images above what becomes of them."""

    groups, scores, process = (), ("psnr",), None

    def __init__(self, args, dataset, network, device):
        self.args, self.dataset, self.device = args, dataset, device
        self.latent_shape = (network.latent_channels, *divided(dataset.image_size, network.factor, "the autoencoder's factor"))
        self.held_out = held_out(args)

    @torch.no_grad()
    def autoencoder(self, network):
        """The scale that gives the training latents a standard deviation of 1, from at most 1,024 of them."""
        images, _ = self.dataset.batch(np.linspace(0, len(self.dataset) - 1, min(1024, len(self.dataset)), dtype=int))
        generator, latents = torch.Generator().manual_seed(0), []
        for some in images.split(64):
            mean, log_variance = network.encode(data.to_float(some.to(self.device)))
            latents.append(sample_latent(mean, log_variance, torch.randn(mean.shape, generator=generator).to(self.device)))
        return {"scale": 1 / torch.cat(latents).std().item()}

    def draw(self, step, images, labels, part):
        """x (n, C, H, W), noise (n, c, H / f, W / f)."""
        shape = (self.args.batch_size, *self.latent_shape)
        noise = torch.randn(shape, **source(self.args, step, NOISE, self.device))[part]
        return draw_images(step, images, part, self.args, self.device), noise

    def loss(self, model, x, noise):
        """Losses (n,); all samples are of one group."""
        image, mean, log_variance = model(x, noise)
        reconstruction = (image.float() - x).abs().flatten(1).mean(dim=1)
        divergence = kl_divergence(mean.float(), log_variance.float()) / x[0].numel()
        return reconstruction + KL_WEIGHT * divergence, torch.zeros_like(divergence, dtype=torch.long)

    @torch.no_grad()
    def report(self, network, path):
        """PSNR = 10 log10(2^2 / mean square error), of means decoded; 40 images as picture."""
        images, _ = self.held_out.batch(np.arange(len(self.held_out)))
        error, shown = 0.0, []
        for some in images.split(64):
            x = data.to_float(some.to(self.device))
            decoded = network.decode(network.encode(x)[0]).clamp(-1, 1)
            error += (decoded - x).double().square().flatten(1).mean(dim=1).sum().item()
            shown.append(data.to_uint8(decoded).cpu())
        save_rows(path, images[:40], torch.cat(shown)[:40])
        return {"psnr": 10 * math.log10(4 * len(images) / error) if error else math.inf}


def objective_of(model, size=None):
    """The objective of a --model, and of its --size where that is an upsampler's."""
    if size in UPSAMPLERS:
        return SuperResolution
    return {"vit": Classification, "vae": Autoencoding, "mlp": PointDenoising}.get(model, Denoising)
