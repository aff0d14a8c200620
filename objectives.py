"""A training step: what it draws and minimises, which is its objective, and how the weights follow.

Report §4-5: noise an image, give the network the time and the class, let it predict the noise; Ho et al. 2020, algorithm 1.
§2-4: a ViT learns the labels. §2-5: an autoencoder learns to give images back. train.py's loop knows none of them. To it an
objective is

    groups                 names of the log's columns: the loss by group of samples
    draw(step, images, labels) -> batch            all that is random in a step, of n of the batch's N samples
    loss(model, *batch) -> losses (n,), and the group (n,) of each sample, 0 .. len(groups) - 1

What is random depends on (seed, step) and its purpose alone. It is drawn for the whole batch, of which each process takes its
part: so a run resumes exactly, and one process or eight train alike.

The weights follow by AdamW (Loshchilov & Hutter 2019), at a learning rate that is a function of the step. An exponential moving
average of them is what draws (Ho et al. 2020, appendix B). Nothing here waits for the device.
"""
import contextlib
import copy
import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

import data
from cascade import augmented, shrink
from cli import autocast, side_by_side, threads_for
from ddpm import key_seed, keyed_generator
from vae import kl_divergence

MAX_BAD_STEPS = 10                                       # non-finite gradients in a row that end a run
KL_WEIGHT = 1e-6                                         # Rombach et al. 2022, appendix G
TIME, NOISE, DROP, FLIP, SHIFT, DROPOUT, LATENT, LOW = range(8)  # purposes, so that one use of randomness does not disturb another


class Randomness(NamedTuple):
    """What is random in training, drawn for a batch of N samples and cut to this process's part of it."""

    seed: int
    batch_size: int
    part: slice
    device: torch.device

    def generator(self, step, purpose):
        """A generator on the device of one use in one step."""
        return keyed_generator((self.seed, step, purpose), self.device)

    def uniform(self, generator, *shape):
        """Numbers (n, *shape) in [0, 1)."""
        return torch.rand(self.batch_size, *shape, generator=generator, device=self.device)[self.part]

    def normal(self, generator, *shape):
        """Standard normal numbers (n, *shape)."""
        return torch.randn(self.batch_size, *shape, generator=generator, device=self.device)[self.part]

    def whole(self, generator, low, high, *shape):
        """Whole numbers (n, *shape) from low to high - 1."""
        return torch.randint(low, high, (self.batch_size, *shape), generator=generator, device=self.device)[self.part]


class Pixels(NamedTuple):
    """What a network sees of images: their pixels, flipped and moved at random."""

    random: Randomness
    flip: bool
    shift: int

    def __call__(self, step, images):
        """Images (n, H, W, C) uint8 -> (n, C, H, W) in [-1, 1]."""
        flip = offset = None
        if self.flip:
            flip = self.random.uniform(self.random.generator(step, FLIP)) < 0.5                                  # (n,)
        if self.shift:
            offset = self.random.whole(self.random.generator(step, SHIFT), -self.shift, self.shift + 1, 2)       # (n, 2)
        return data.augment(data.to_float(images.to(self.random.device, non_blocking=True)), flip, offset)


class LatentSamples(NamedTuple):
    """What a network sees of images that were encoded: scaled latents, sampled afresh, of the image or its mirror image."""

    random: Randomness
    flip: bool
    scale: float

    def __call__(self, step, moments):
        """Moments (n, F, 2, c, h, w) of `latents.Latents` -> scale z (n, c, h, w)."""
        moments = moments.to(self.random.device, non_blocking=True)
        chosen = moments[:, 0]                                                           # (n, 2, c, h, w)
        if self.flip:
            flip = self.random.uniform(self.random.generator(step, FLIP)) < 0.5
            chosen = torch.where(flip.reshape(-1, 1, 1, 1, 1), moments[:, 1], chosen)    # of the mirror image
        mean, std = chosen.unbind(dim=1)                                                 # (n, c, h, w)
        eps = self.random.normal(self.random.generator(step, LATENT), *mean.shape[1:])
        return self.scale * (mean + std * eps)


class Denoising:
    """Predict the noise, or what the Diffusion's prediction says (§4-5).  The loss is logged by quarter of t.

    inputs: Pixels or LatentSamples. y_null: the unconditional input, which takes the condition's place in a share cfg_drop of the
    samples; None if it is not learned. max_weight: see `Diffusion.losses`.
    """

    groups = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")

    def __init__(self, diffusion, inputs, y_null=None, cfg_drop=0.0, max_weight=1.0):
        self.diffusion, self.inputs, self.random, self.cfg_drop = diffusion, inputs, inputs.random, cfg_drop
        self.max_weight = max_weight
        self.y_null = y_null.to(self.random.device) if torch.is_tensor(y_null) else y_null           # a caption's, or a label

    def draw(self, step, images, labels):
        """x0 (n, C, H, W), t (n,), y, eps like x0.  y: labels (n,), a text's ids (n, L, W) or context (n, L, D), or None."""
        random = self.random
        x0 = self.inputs(step, images)
        t = random.whole(random.generator(step, TIME), 0, self.diffusion.T)
        eps = random.normal(random.generator(step, NOISE), *x0.shape[1:])
        if labels is None:
            return x0, t, None, eps
        y = labels.to(random.device, non_blocking=True)
        y = y.float() if y.is_floating_point() else y                    # contexts are kept in half precision
        if self.y_null is not None:                      # guidance (§3) needs both, Ho & Salimans 2022, algorithm 1
            dropped = random.uniform(random.generator(step, DROP)) < self.cfg_drop
            y = torch.where(dropped.reshape(-1, *(1,) * (y.ndim - 1)), self.y_null, y)
        return x0, t, y, eps

    def loss(self, model, x0, t, y, eps):
        """Losses (n,), and the quarter of 0 .. T-1 in which each t lies."""
        return self.diffusion.losses(model, x0, t, y, eps, self.max_weight)["loss"], t * 4 // self.diffusion.T


class SuperResolution(Denoising):
    """Denoise beside the same image of a quarter of the sides, made noisy (§3, see cascade.py)."""

    def draw(self, step, images, labels):
        """As of `Denoising`, and low (n, C, H / 4, W / 4)."""
        x0, t, y, eps = super().draw(step, images, labels)
        low, generator = shrink(x0), self.random.generator(step, LOW)
        sigma = self.random.uniform(generator)
        return x0, t, y, eps, augmented(low, sigma, self.random.normal(generator, *low.shape[1:]))

    def loss(self, model, x0, t, y, eps, low):
        """Losses (n,), and the quarter of 0 .. T-1 in which each t lies."""
        return super().loss(partial(model, low=low), x0, t, y, eps)


class Classification:
    """Cross-entropy of the labels (§2-4)."""

    groups = ()

    def __init__(self, inputs):
        self.inputs = inputs

    def draw(self, step, images, labels):
        """x (n, C, H, W), y (n,)."""
        return self.inputs(step, images), labels.to(self.inputs.random.device, non_blocking=True)

    def loss(self, model, x, y):
        """Losses (n,), in nats; all samples are of one group."""
        return F.cross_entropy(model(x).float(), y, reduction="none"), torch.zeros_like(y)


class Autoencoding:
    """Give images back through a small latent (§2-5): L1, and the KL divergence with a weight of 1e-6, both per number of the
    image. Rombach et al. 2022, appendix G; its perceptual and adversarial terms need other trained networks and are left out.

    latent_shape: (c, h, w).
    """

    groups = ()

    def __init__(self, inputs, latent_shape):
        self.inputs, self.latent_shape = inputs, latent_shape

    def draw(self, step, images, labels):
        """x (n, C, H, W), noise (n, c, h, w)."""
        random = self.inputs.random
        return self.inputs(step, images), random.normal(random.generator(step, NOISE), *self.latent_shape)

    def loss(self, model, x, noise):
        """Losses (n,); all samples are of one group."""
        image, mean, log_variance = model(x, noise)
        reconstruction = (image - x).abs().flatten(1).mean(dim=1)
        divergence = kl_divergence(mean, log_variance) / x[0].numel()
        return reconstruction + KL_WEIGHT * divergence, torch.zeros_like(divergence, dtype=torch.long)


# The weights

class State:
    """What training changes: the network, its average, the optimizer, and the losses since the last row of the log."""

    def __init__(self, network, args, groups, device):
        self.network = network.to(device).train()
        self.ema = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
        self.bad_steps = torch.zeros((), device=device)                  # non-finite gradients in a row
        self.taken = torch.zeros((), device=device)                      # steps since the last save that were not skipped
        self.norm = torch.full((), math.nan, device=device)              # of the last gradient
        self.sums = torch.zeros(2, max(1, len(groups)), dtype=torch.float64, device=device)  # of losses, and how many, by group

    def restore(self, run):
        """Go on from a Run.  ValueError if it does not fit."""
        try:
            self.network.load_state_dict(run.model)
            self.ema.load_state_dict(run.ema)
            self.optimizer.load_state_dict(run.optimizer)
            self.bad_steps += run.bad_steps
            self.norm.fill_(run.norm)
            self.sums += run.log.to(self.sums.device)
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"--resume: the run is damaged: {error}") from None

    def worth_saving(self, last):
        """Whether a step was taken since the last save, all weights and averages are finite, and the last gradient was, too.

        last: whether training ends here: then a few bad steps before it do not matter.
        """
        if not self.taken or self.bad_steps > (MAX_BAD_STEPS - 1) * last:
            return False
        tensors = [z for network in (self.network, self.ema) for z in network.state_dict().values() if z.is_floating_point()]
        return bool(torch.stack(torch._foreach_norm(tensors, float("inf"))).isfinite().all())

    def add_losses(self, losses, groups):
        """Sum losses (n,) of samples that belong to groups (n,), on the device."""
        masks = groups == torch.arange(self.sums.shape[1], device=groups.device).unsqueeze(1)    # (G, n)
        self.sums[0] += torch.where(masks, losses.detach().double(), 0.0).sum(dim=1)
        self.sums[1] += masks.sum(dim=1)


def learning_rate(step, args):
    """The learning rate of a step: a linear rise over --warmup, then constant, or a half cosine to 0 at --steps."""
    rise = min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
    fall = 0.5 * (1 + math.cos(math.pi * step / args.steps)) if args.decay == "cosine" else 1.0
    return args.lr * rise * fall


def shared_out(tensors, threads):
    """Tensors for so many threads: a list each, one after the other."""
    tensors = list(tensors)
    return [tensors[i * len(tensors) // threads:(i + 1) * len(tensors) // threads] for i in range(threads)]


@torch.no_grad()
def update_ema(ema, network, step, decay, threads=1):
    """ema <- d ema + (1 - d) network, d = min(decay, (1 + step) / (10 + step)), also after a skipped step."""
    d = min(decay, (1 + step) / (10 + step))
    averages, weights = shared_out(ema.parameters(), threads), shared_out(network.parameters(), threads)
    list(side_by_side(lambda i, _: torch._foreach_lerp_(averages[i], weights[i], 1 - d), range(threads), threads))
    for average, buffer in zip(ema.buffers(), network.buffers()):
        average.copy_(buffer)                            # tables and statistics are no weights: copied, not averaged


def guarded_step(optimizer, parameters, clip, threads=1):
    """Clip and take an optimizer step, unless a gradient is not finite: then weights and moments stay as they are.

    Decided on the device, without waiting for it -> the gradient's norm, and whether it is finite (1.0 or 0.0). The fused
    optimizer does both while it reads the gradients, through the two attributes that a GradScaler sets: what to divide them by,
    and whether to skip the step. Each of so many threads has its share of the parameters.
    """
    shares = shared_out(parameters, threads)
    norms = side_by_side(lambda share, _: torch._foreach_norm([parameter.grad for parameter in share]), shares, threads)
    norm = torch.stack([norm for some in norms for norm in some]).norm()
    finite, scale = norm.isfinite().float(), (norm / clip).clamp(min=1) if clip else None

    def follow(share, _):
        part, (group,) = copy.copy(optimizer), optimizer.param_groups    # the copy has the same moments
        part.param_groups = [{**group, "params": share}]
        part.grad_scale, part.found_inf = scale, 1 - finite
        part.step()
        part.zero_grad()
    list(side_by_side(follow, shares, threads))
    return norm, finite


def halves(network, args, n, world):
    """Whether two threads shall each compute half of n samples, and half of the weights, rather than share every operation.

    Threads that share wait for each other after each operation, which on a busy machine takes many times as long as it, and those
    of PyTorch go on spinning for a while after the last; halves wait four times a step. Two gradients have one sum, in
    whichever order they come: so a run still resumes exactly. Not with several processes or micro-batches, an odd number of
    threads, or dropout, for which threads have one generator; steps on points are too short.
    """
    return (world == args.accumulate == 1 and args.model != "mlp" and threads_for(network, n) > 1
            and torch.get_num_threads() % 2 == 0
            and not any(isinstance(module, torch.nn.Dropout) and module.p for module in network.modules()))


def train_step(state, model, objective, batch, step, args, rank, world):
    """One step on this process's part of a batch (images, labels): draw, forward and backward by parts, optimizer, average."""
    n = len(batch[0])
    threads = 2 if halves(state.network, args, n, world) else 1
    parts = threads * args.accumulate
    (drawn,) = side_by_side(lambda read, _: objective.draw(step, *read), [batch], threads)

    def gradient(i, _):
        """Add part i's gradient of the mean loss -> its losses and their groups."""
        torch.manual_seed(key_seed((args.seed, step, DROPOUT, i, rank)))         # of dropout, which draws globally
        last = world == 1 or i + 1 == parts
        with contextlib.nullcontext() if last else model.no_sync():              # exchange gradients once a step
            part = [None if z is None else z.tensor_split(parts)[i] for z in drawn]
            with autocast(drawn[0].device, args.precision):
                losses, groups = objective.loss(model, *part)            # of the part's samples (n / parts,), and their groups
            (losses.sum() / n).backward()
        return losses, groups
    for losses, groups in side_by_side(gradient, range(parts), threads):
        state.add_losses(losses, groups)
    for parameter_group in state.optimizer.param_groups:
        parameter_group["lr"] = learning_rate(step, args)
    state.norm, finite = guarded_step(state.optimizer, state.parameters, args.clip_grad, threads)
    state.bad_steps = (state.bad_steps + 1) * (1 - finite)
    state.taken += finite
    update_ema(state.ema, state.network, step, args.ema, threads)
