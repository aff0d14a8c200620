"""Restoration: hidden, shrunk or noisy images made whole by any trained model, as it is.

Report §1-2, §2-1 (what diffusion models are used for). Papers: Wang et al. 2023 (DDNM); Lugmayr et al. 2022 (RePaint). What is
known of an image is a linear measurement y = A x: the visible pixels, or the means of squares of pixels. `ddpm.restore` keeps it
in every predicted x0; here are the operators, with their pseudo-inverses A+, and what sample.py does with image files. Noise is
what a diffusion model is trained to remove: a noisy image is the x_t of some step, and the reverse process goes on from there.

Measuring pixels is no linear function of latents. So each predicted x0 is decoded, corrected and encoded again, and the decoded
result is corrected once more: it keeps the measurement too, and each step takes a pass through the autoencoder besides. (Forty
digits with a hole, filled in so, had a PSNR of 15.2 dB; 13.8 dB, in a quarter of the time, where the latents of the visible part
were kept instead.) White noise on pixels is not white on latents: models of latents do not remove it.

Images are (N, C, H, W) in [-1, 1].
"""
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
import ddpm
from cli import not_negative, positive, processes
from image_files import center_crop, open_image
from vae import in_pieces

STEPS, REPEATS = 20, 5           # 100 evaluations an image; as many digits stay what they were with 50 steps repeated twice


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


def masked(hidden):
    """A and A+ of inpainting: both set to 0 what hidden (1, 1, H, W), of zeros and ones, says."""
    def A(x):
        return x * (1 - hidden)
    return A, A


def pooled(factor):
    """A and A+ of super-resolution: means of squares of `factor` pixels a side; and each mean repeated over its square."""
    def A_plus(y):
        return y.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    return lambda x: F.avg_pool2d(x, factor), A_plus


@torch.no_grad()
def restore_latents(diffusion, model, autoencoder, y, degrade, condition=None, sampler="ddpm", **options):
    """As `ddpm.restore`, for a model on an autoencoder's latents: degrade and y are of pixels, so is what is returned."""
    correct = ddpm.consistent(y, degrade, clip=True)

    def decode(z):
        return autoencoder.decode(z / autoencoder.scale)

    def encode(x):
        return autoencoder.encode(x)[0] * autoencoder.scale
    shape = (len(y), *encode(degrade[1](y[:1])).shape[1:])
    z = ddpm.sample(diffusion, model, shape, condition, sampler, clip=lambda z: encode(correct(decode(z))), **options)
    return correct(decode(z))


def noised_until(diffusion, sigma):
    """The process up to the step whose x_t is, but for its scale, an image with noise of deviation sigma.

    ValueError if sigma is beyond the first or the last step's.
    """
    levels = np.sqrt(1 / diffusion.alpha_bars - 1)       # of x_t / sqrt(alpha_bar), by Eq. 2-3
    if not levels[0] <= sigma <= levels[-1]:
        raise ValueError(f"sigma {sigma:g} is beyond the schedule, which knows noise of deviation {levels[0]:.2g} to "
                         f"{levels[-1]:.3g}")
    steps = 1 + int(np.abs(np.log(levels / sigma)).argmin())
    return ddpm.Diffusion(diffusion.betas[:steps], diffusion.prediction, diffusion.variance, diffusion.timesteps[:steps])


def denoise(diffusion, model, y, sigma, condition=None, sampler="dpm++", steps=1, **options):
    """The image of y (N, C, H, W), which has white noise of deviation sigma: the posterior mean E[x0 | y], by one evaluation.

    A stochastic sampler with more steps, as "ddpm", draws from p(x0 | y) instead. Options are `ddpm.sample`'s.
    """
    process = noised_until(diffusion, sigma)
    return ddpm.sample(process, model, y.shape, condition, sampler, min(steps, process.T),
                       noise=process.alpha_bars[-1] ** 0.5 * y, **options)


# The command: what sample.py does with image files

def add_restoration_flags(parser):
    """The flags of sample.py that name an image to restore."""
    parser = parser.add_argument_group("restoring an image", "where --sampler is ddpm and --cfg-scale 1 by default")
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--inpaint", metavar="IMAGE", help="fill in what --mask hides of an image, in 4 ways or --n; without "
                        "--classes the run is told no class")
    images.add_argument("--upscale", metavar="IMAGE", help="draw 4 images, or --n, whose means over squares of --factor pixels "
                        "are this one")
    images.add_argument("--denoise", metavar="IMAGE", help="remove white noise (which a file cuts off at black and white): the "
                        "mean of all possible originals; --n 2 or more draws some of them")
    parser.add_argument("--mask", metavar="IMAGE", help="white is hidden, black is kept; as large as the image of --inpaint")
    parser.add_argument("--factor", type=int, choices=(2, 4), help="of --upscale")
    parser.add_argument("--sigma", type=not_negative, help="the noise's deviation, where black is -1 and white 1")
    parser.add_argument("--repeats", type=positive, help="of each step of --inpaint and --upscale: what is drawn agrees more with "
                        f"what is known (default: {REPEATS})")


def task_of(args):
    """The task, "inpaint", "upscale" or "denoise"; None if none is asked for.  ValueError on flags that do not go together."""
    task = next((name for name in ("inpaint", "upscale", "denoise") if getattr(args, name)), None)
    for name, setting in (("inpaint", "mask"), ("upscale", "factor"), ("denoise", "sigma")):
        if task == name and getattr(args, setting) is None:
            raise ValueError(f"--{name} needs --{setting}")
        if task != name and getattr(args, setting) is not None:
            raise ValueError(f"--{setting} belongs to --{name}")
    if args.repeats and task not in ("inpaint", "upscale"):
        raise ValueError("--repeats belongs to --inpaint and --upscale")
    for name in ("npz", "trajectory", "eta", "cfg_interval", "cfg_channels", "prompt", "clip", "cascade") if task else ():
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} does not go with --{task}")
    if task == "denoise" and args.sampler not in (None, "ddpm"):
        raise ValueError(f"--denoise draws with ddpm: with {args.sampler} every image would be the same")
    if task == "denoise" and args.n in (None, 1) and args.steps:
        raise ValueError("--denoise: the mean of all possible originals takes no --steps; --n 2 or more draws some of them")
    return task


def fitted(image, path, size):
    """A Pillow image of the size (H, W): cropped and scaled if it has another one, which is said.  ValueError if it cannot be."""
    if (image.height, image.width) == tuple(size):
        return image
    long, short = max(image.size), min(image.size)
    if size[0] != size[1] or max(size) ** 2 * long > Image.MAX_IMAGE_PIXELS * short:
        raise ValueError(f"{path} has {image.width}x{image.height} pixels, where {size[1]}x{size[0]} are needed: scale it")
    print(f"{path}: {image.width}x{image.height} pixels, cropped and scaled to {size[1]}x{size[0]}")
    return center_crop(image, size[0])


def pixels_of(path, size, channels):
    """An image file as (1, C, H, W) for the size (H, W): what is changed to make it fit is said.  ValueError, OSError."""
    image = fitted(open_image(path), path, size)
    mode = {1: "L", 3: "RGB"}[channels]
    if image.mode != mode:
        print(f"{path}: " + ("made grey, as the run's images are" if channels == 1 else "grey, repeated in all three colours"))
    pixels = np.array(image.convert(mode)).reshape(1, *size, channels)
    return data.to_float(torch.from_numpy(pixels))


def hidden_of(path, image_path, size):
    """A mask's file as zeros and ones (1, 1, H, W): 1 where it is white.  ValueError if it is not as large as the image."""
    mask, image = open_image(path).convert("L"), open_image(image_path)
    if mask.size != image.size:
        raise ValueError(f"--mask {path} has {mask.width}x{mask.height} pixels, --inpaint {image_path} "
                         f"{image.width}x{image.height}: they must be of one size")
    return torch.from_numpy(np.array(fitted(mask, path, size)) >= 128).float()[None, None]


def measured(args, task, size, channels, device):
    """What is known of the image in a file -> y, and A and A+; for --denoise y and None.  ValueError if it does not fit."""
    if task == "denoise":
        return pixels_of(args.denoise, size, channels).to(device), None
    if task == "upscale":
        if any(side % args.factor for side in size):
            raise ValueError(f"--factor {args.factor} does not divide the run's {size[1]}x{size[0]} pixels")
        low_size = [side // args.factor for side in size]
        return pixels_of(args.upscale, low_size, channels).to(device), pooled(args.factor)
    hidden, image = hidden_of(args.mask, args.inpaint, size), pixels_of(args.inpaint, size, channels)
    if hidden.min() == hidden.max():
        said = "everything: what is drawn has nothing to do with the image" if hidden.max() else "nothing: the image stays as it is"
        print(f"WARNING: --mask {args.mask} hides {said}", file=sys.stderr)
    A, A_plus = masked(hidden.to(device))
    return A(image.to(device)), (A, A_plus)


def check_task(args, task, network, latent, autoencoder, classes):
    """ValueError, before any work, where a run cannot do what is asked for."""
    if network.context_dim is not None:
        raise ValueError(f"{args.ckpt} is told a text: --{task} takes runs with classes, or without a condition")
    if latent and autoencoder is None:
        raise ValueError(f"--{task}: {args.ckpt} works on latents: --vae FILE names their autoencoder")
    if (autoencoder or network).channels not in (1, 3):
        raise ValueError(f"--{task}: what {args.ckpt} draws is neither grey nor in colour")
    if latent and task == "denoise":
        raise ValueError("--denoise: white noise on pixels is no white noise on latents: it needs a run on pixels")
    if classes is None and network.num_classes is not None and network.null_label is None:
        raise ValueError(f"--{task}: {args.ckpt} always wants a class: name it with --classes")
    if classes is None and args.cfg_scale not in (None, 1):
        raise ValueError("--cfg-scale guides towards a class: name it with --classes")


@torch.no_grad()
def restore_image(args, task, network, diffusion, autoencoder=None, classes=None):
    """What the command shows, uint8 (1 + n, H, W, C), what is known of the image and n restored ones; and how, in words.

    args: sample.py's; task: `task_of` them; classes: those that the images cycle through, None for the null class.
    """
    device, _, world = processes(args.device)
    if world > 1:
        raise ValueError(f"--{task} restores one image in one process: start it without torchrun")
    network, autoencoder = network.to(device), autoencoder and autoencoder.to(device)
    factor, channels = (autoencoder.factor, autoencoder.channels) if autoencoder else (1, network.channels)
    y, degrade = measured(args, task, [side * factor for side in network.image_size], channels, device)
    n, scale = args.n or (1 if task == "denoise" else 4), 1.0 if args.cfg_scale is None else args.cfg_scale
    sampler, steps = args.sampler or "ddpm", args.steps or min(STEPS, diffusion.T)
    repeats = args.repeats or (1 if task == "denoise" or sampler == "dpm++" else REPEATS)
    how = f"{n} images, {sampler}, {steps} steps" + f" repeated {repeats} times" * (repeats > 1) + f", seed {args.seed}"
    if task == "denoise" and n == 1:
        sampler, steps, how = "dpm++", 1, "the mean of all possible originals"

    def restored(rows):
        condition = None if classes is None else torch.tensor(classes, device=device)[rows % len(classes)]
        known = y.expand(len(rows), -1, -1, -1)
        options = dict(sampler=sampler, steps=steps, repeats=repeats, cfg_scale=scale,
                       seeds=[(args.seed, i) for i in rows.tolist()])
        if task == "denoise":
            return denoise(diffusion, network, known, args.sigma, condition, clip=True, **options)
        if autoencoder:
            return restore_latents(diffusion, network, autoencoder, known, degrade, condition, **options)
        return ddpm.restore(diffusion, network, known, degrade, condition, clip=True, **options)
    images = in_pieces(restored, torch.arange(n, device=device), args.batch_size or 64)
    shown = torch.cat([y if degrade is None else degrade[1](y), images])
    return data.to_uint8(shown).cpu().numpy(), f"{how}, guidance {scale:g}"
