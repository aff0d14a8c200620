"""Draw images from a trained run, or from released weights.

Report §4-5 (inference), §4-8, §4-9 (guidance), §1-2 (restoration). The defaults, DPM-Solver++ in 20 steps with guidance scale
1.5, suit what train.py leaves. Batches, conditions and decoding are sampling.py's; how an image is restored, restoration.py's.

    python sample.py --ckpt run.pt
    python sample.py --ckpt run.pt --n 100 --classes 3,5 --cfg-scale 3 --out digits/
    python sample.py --ckpt run.pt --prompt "a large green triangle"
    python sample.py --ckpt DiT-XL-2-256x256.pt --vae sd-vae-ft-mse.safetensors --classes 207,360 --cfg-scale 4
    python sample.py --ckpt run.pt --inpaint photo.png --mask hole.png
    torchrun --nproc-per-node 8 -- sample.py --ckpt run.pt --n 50000 --npz samples.npz     (-- keeps --n from torchrun)
"""
import interrupts                        # noqa: F401  first, for signals while PyTorch is imported
import argparse
import math
import os
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import restoration
from cascade import enlarge
from cli import (Parser, add_overwrite_flag, autocast, first_in_turn, gathered, not_negative, one_line_errors, parent_of, positive,
                 processes, progress_bar, rule_of, share)
from data import to_float, to_uint8
from files import check_access, check_output, mark, output_file, writing
from image_files import MAX_PIXELS_HELP, allow_pixels, center_crop, is_grey, open_image
from models import compile_blocks
from pictures import grid, points_picture, save_image, write_gif
from points import MLP
from sampling import (SCATTERED, add_sampling_flags, decode, decoder, draw, drawable, evaluations, guidance_scale, labels_of,
                      load_upsampler, parse_classes, pixel_shape, read_prompts, text_reader, unconditional)
from vae import in_pieces


def interval(text):
    """argparse type: (low, high) of "LOW,HIGH", steps of 0 .. T-1."""
    try:
        low, high = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not two steps as LOW,HIGH") from None
    if low > high:
        raise argparse.ArgumentTypeError(f"{text}: the first step is after the last")
    return low, high


def is_folder(out):
    """Whether --out names a folder: by a slash at its end, or because it is one."""
    return out.endswith("/") or Path(out).is_dir()


def check_outputs(args):
    """ValueError or OSError, before any work, on a file or folder that may not be written."""
    rule, out = rule_of(args), Path(args.out)
    if is_folder(args.out):
        check_folder(args.out, **rule)
    elif not out.suffix:
        raise ValueError(f"--out {out}: {out}.png is one picture of all samples, {out}/ a folder with a file each: say which")
    else:
        check_output(args.out, "samples", **rule)
    for path, purpose in ((args.npz, "images"), (args.trajectory, "trajectory")):
        if path:
            check_output(path, purpose, **rule)


def flags():
    """The command line."""
    parser = Parser(prog="sample.py", description="Draw images from a trained run or from released weights.")
    parser.add_argument("--ckpt", required=True, help="run.pt of train.py, or released weights")
    parser.add_argument("--n", type=positive, help="images in all (default: four of each class if they are few, else 16; "
                        f"{SCATTERED} points)")
    parser.add_argument("--out", default="samples.png", help="a .png for one grid, or for points a scatter; or a folder, with a "
                        "slash at its end")
    add_sampling_flags(parser)
    parser.add_argument("--cascade", help="an upsampler of train.py or a released one: enlarges what --ckpt draws four times")
    parser.add_argument("--npz", help="also write ADM's .npz: arr_0 uint8 NHWC, arr_1 labels; points: arr_0 (N, 2)")
    parser.add_argument("--trajectory", help="also write a .gif of the way from noise to image")
    parser.add_argument("--prompt", nargs="+", help="what a text model shall draw; several prompts take turns")
    parser.add_argument("--cfg-channels", type=positive, help="guide the first channels only; 3 repeats DiT's published numbers")
    parser.add_argument("--cfg-interval", type=interval, help="LOW,HIGH: guide between these steps of 0 … T-1 only")
    parser.add_argument("--eta", type=not_negative, default=0.0, help="ddim's noise: 0 is none, 1 is DDPM's (default: 0)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add_overwrite_flag(parser)
    restoring = parser.add_argument_group("restoring an image", "where --sampler is ddpm and --cfg-scale 1 by default")
    images = restoring.add_mutually_exclusive_group()
    images.add_argument("--inpaint", metavar="IMAGE", help="fill in what --mask hides of an image, in 4 ways or --n; without "
                        "--classes the run gets no class")
    images.add_argument("--upscale", metavar="IMAGE", help="draw 4 images, or --n, whose means over squares of --factor pixels "
                        "are this one")
    images.add_argument("--denoise", metavar="IMAGE", help="remove white noise (which a file cuts off at black and white): the "
                        "mean of all possible originals; --n 2 or more draws some of them")
    restoring.add_argument("--mask", metavar="IMAGE", help="white is hidden, black is kept; as large as the image of --inpaint")
    restoring.add_argument("--factor", type=int, choices=(2, 4), help="of --upscale")
    restoring.add_argument("--sigma", type=not_negative, help="the noise's deviation, where black is -1 and white 1")
    restoring.add_argument("--max-pixels", type=positive, help=MAX_PIXELS_HELP)
    restoring.add_argument("--repeats", type=positive, help="of each step of --inpaint and --upscale: what is drawn agrees more "
                           f"with what is known (default: {restoration.REPEATS})")
    return parser


def check_folder(path, inputs=(), overwrite=None):
    """ValueError or OSError where numbered samples may not be written into a folder: it holds something else, or earlier ones,
    unless overwrite."""
    folder = Path(os.path.realpath(path))
    parent_of(folder)
    if not os.path.lexists(folder):
        return check_access(path, folder.parent)
    if not folder.is_dir():
        raise ValueError(f"{path} is no folder: choose another name")
    check_access(path, folder)
    for file in sorted(folder.iterdir()):
        sample = re.fullmatch(r"\d{6,}\.png", file.name)
        if sample and overwrite:
            check_output(file, "sample", inputs, overwrite)
        elif not file.name.startswith("."):
            remedy = ", or --overwrite replaces the samples" if sample and overwrite is False else ""
            raise ValueError(f"{path} holds {file.name}, with which samples are not mixed: choose a new folder{remedy}")


def make_folder(path, inputs=(), overwrite=None):
    """Make a folder for numbered samples, see `check_folder`; earlier ones are removed from it."""
    check_folder(path, inputs, overwrite)
    with writing(path):
        Path(os.path.realpath(path)).mkdir(exist_ok=True)
        for sample in Path(path).glob("[0-9]*.png"):
            sample.unlink()


def save_numbered(folder, numbers, images):
    """Write images uint8 (n, H, W, C) into a folder, each named by its number."""
    for i, image in zip(numbers, images):
        save_image(Path(folder) / f"{i:06d}.png", image)


# Drawing

def number_and_columns(args, classes, points):
    """How many images there shall be, and in how many columns of the grid they stand."""
    kinds = len(classes or args.prompt or ())
    few = (2 if args.prompt else 1) <= kinds <= 16       # then each has a column
    n = args.n or (SCATTERED if points else 4 * kinds if few else 16)
    return n, kinds if few else math.ceil(math.sqrt(min(n, 64)))


def write_outputs(args, images, frames, labels, columns, latent):
    """Write the grid, if the images are not in a folder already, the .npz and the trajectory -> the paths, as text."""
    written, rule = [], rule_of(args)
    if latent:                                           # which have no grid
        print(f"the network works on an autoencoder's latents: without --vae FILE they are written as they are, float32 NCHW, to "
              f"{args.npz}")
    elif is_folder(args.out):
        written.append(args.out)                         # image by image, while they were drawn
    else:
        shown = points_picture(images) if images.ndim == 2 else grid(images[:400], columns)          # more would be no picture
        save_image(args.out, shown, "samples", **rule)
        written.append(args.out)
    if args.npz:
        with output_file(args.npz, "images", **rule) as file:
            np.savez(file, arr_0=images, **({} if labels is None else {"arr_1": labels.numpy()}))
            with zipfile.ZipFile(file, "a") as archive:
                archive.comment = mark("images").encode()
        written.append(args.npz)
    if frames:
        write_gif(args.trajectory, frames, "trajectory", **rule)
        written.append(args.trajectory)
    return ", ".join(written)


def check_pictures(args, points, on_latents, decoded):
    """ValueError where pictures are asked for of what is none: points, or latents, decoded perhaps once they are drawn."""
    if points and (args.trajectory or is_folder(args.out)):
        raise ValueError(f"--out and --trajectory: points are drawn in one .png; python plot.py swissroll --ckpt {args.ckpt} --gif "
                         "FILE shows their way")
    if on_latents and args.trajectory:
        raise ValueError("--trajectory: the network works on latents, which are no pictures")
    if on_latents and not decoded and args.cascade:
        raise ValueError("--cascade: the network works on an autoencoder's latents; --vae FILE makes them images first")


def draw_share(args, network, diffusion, n, conditions, finished, folder, columns, **options):
    """Draw this process's share of n images -> a list of batches, as `finished` makes them, and the trajectory's frames.  Each
    image is written into the folder, if there is one, at once. conditions and options are `sampling.draw`'s."""
    images, frames = [], {}

    def keep_frame(t, x, x0):
        if not images:                                   # of the first batch; a smaller try after a full memory replaces them
            frames[t] = grid(to_uint8(x[:4 * columns]).cpu().numpy(), columns)

    with progress_bar("drawing", n) as bar:
        for part, x in draw(network, diffusion, share(n), conditions, args.seed, args.batch_size,
                            callback=keep_frame if args.trajectory else None, **options):
            bar.update(len(part))
            images.append(finished(part, x))
            if folder:
                save_numbered(folder, part, images[-1])
    return images, list(frames.values())


def draw_and_write(args):
    """Draw what the flags ask for and write it; under torchrun each process draws its share."""
    run, network, diffusion = drawable(args.ckpt)
    classes = parse_classes(args.classes, run.data.classes, network.num_classes)
    reader = text_reader(run, network, args.clip)
    contexts = read_prompts(args.prompt, reader, network)
    y_null = unconditional(network, reader, run.config.get("cfg_drop"))
    sampler, scale = args.sampler or "dpm++", guidance_scale(network, args.cfg_scale, y_null)
    steps = evaluations(args.steps, sampler, diffusion)
    autoencoder = decoder(args.vae, run, network)
    points, on_latents = isinstance(network, MLP), bool(run.vae)
    check_pictures(args, points, on_latents, autoencoder)
    latent = on_latents and autoencoder is None          # is what is written, named after --out if it has no name of its own
    if latent and not args.npz:
        args.npz = str(Path(args.out.rstrip("/")).with_suffix(".npz"))
        check_output(args.npz, "images", **rule_of(args))
    upsampler, upsampling = (load_upsampler(args.cascade, run, network.num_classes, pixel_shape(network, autoencoder))
                             if args.cascade else (None, None))
    n, columns = number_and_columns(args, classes, points)

    device, rank, _ = processes(args.device, args.compile, precision=args.precision)
    network, autoencoder, upsampler = (part and part.to(device) for part in (network, autoencoder, upsampler))
    if args.compile:
        compile_blocks(network)
    folder = args.out if is_folder(args.out) and not latent else None
    with first_in_turn():
        if folder and rank == 0:
            make_folder(folder, **rule_of(args))

    def finished(part, x):
        """What is written of images number `part`: points (n, 2), latents, or uint8 (n, H, W, C)."""
        x = decode(autoencoder, x) if autoencoder else x
        x = enlarge(upsampler, upsampling, x, labels_of(part, classes), args.seed, part) if upsampler else x
        return (x.flatten(1) if points else x if latent else to_uint8(x)).cpu().numpy()

    options = dict(sampler=sampler, steps=steps, eta=args.eta, cfg_scale=scale, cfg_channels=args.cfg_channels,
                   cfg_interval=args.cfg_interval, y_null=y_null, clip=not (on_latents or points))
    with autocast(device, args.precision):
        images, frames = draw_share(args, network, diffusion, n, classes if contexts is None else contexts, finished, folder,
                                    columns, **options)
    everyones = gathered(images) if args.npz or not folder else []       # else they are on disk already
    if rank == 0:
        images = np.concatenate([batch for batches in everyones for batch in batches]) if everyones else None
        written = write_outputs(args, images, frames, labels_of(range(n), classes), columns, latent)
        print(f"{n} images, {sampler}, {steps} steps, guidance {scale:g}, seed {args.seed}: wrote {written}")


# Restoring an image

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
    pixels = np.array(image.convert({1: "L", 3: "RGB"}[channels])).reshape(1, *size, channels)
    if channels == 1 and not is_grey(np.atleast_3d(image)):
        print(f"{path}: made grey, as the run's images are")
    if channels == 3 and image.mode == "L":
        print(f"{path}: grey, repeated in all three colours")
    return to_float(torch.from_numpy(pixels))


def hidden_of(path, image_path, size):
    """A mask's file as zeros and ones (1, 1, H, W): 1 where it is white, and not transparent.  ValueError if it is not as large
    as the image, or neither black nor white anywhere."""
    mask, image = open_image(path, "black").convert("L"), open_image(image_path)
    if mask.size != image.size:
        raise ValueError(f"--mask {path} has {mask.width}x{mask.height} pixels, --inpaint {image_path} "
                         f"{image.width}x{image.height}: they must be of one size")
    brightest = mask.getextrema()[1]
    if 0 < brightest < 128:                              # a mask of zeros and ones, perhaps
        raise ValueError(f"--mask {path} hides nothing: its brightest pixel is {brightest}, where white is 255")
    return torch.from_numpy(np.array(fitted(mask, path, size)) >= 128).float()[None, None]


def measured(args, task, size, channels, device):
    """What is known of the image in a file -> y, and A and A+; for --denoise y and None.  ValueError if it does not fit."""
    if task == "denoise":
        return pixels_of(args.denoise, size, channels).to(device), None
    if task == "upscale":
        if any(side % args.factor for side in size):
            raise ValueError(f"--factor {args.factor} does not divide the run's {size[1]}x{size[0]} pixels")
        low_size = [side // args.factor for side in size]
        return pixels_of(args.upscale, low_size, channels).to(device), restoration.pooled(args.factor)
    hidden, image = hidden_of(args.mask, args.inpaint, size), pixels_of(args.inpaint, size, channels)
    if hidden.min() == hidden.max():
        said = "everything: what is drawn has nothing to do with the image" if hidden.max() else "nothing: the image stays as it is"
        print(f"WARNING: --mask {args.mask} hides {said}", file=sys.stderr)
    A, A_plus = restoration.masked(hidden.to(device))
    return A(image.to(device)), (A, A_plus)


def check_task(args, task, network, latent, autoencoder, classes):
    """ValueError, before any work, where a run cannot do what is asked for."""
    if network.context_dim is not None:
        raise ValueError(f"{args.ckpt} takes a text: --{task} takes runs with classes, or without a condition")
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
def restore_images(args, task, network, diffusion, autoencoder, classes):
    """What is known of the image, and n restored ones, as uint8 (1 + n, H, W, C); and how they were made, in words.  classes:
    those that the images cycle through, None for the null class."""
    scale = guidance_scale(network, 1.0 if args.cfg_scale is None else args.cfg_scale)
    n, sampler = args.n or (1 if task == "denoise" else 4), args.sampler or "ddpm"
    steps = evaluations(args.steps or min(restoration.STEPS, diffusion.T), sampler, diffusion)
    device, _, world = processes(args.device, args.compile, precision=args.precision)
    if world > 1:
        raise ValueError(f"--{task} restores one image in one process: start it without torchrun")
    network, autoencoder = network.to(device), autoencoder and autoencoder.to(device)
    if args.compile:
        compile_blocks(network)
    *size, channels = pixel_shape(network, autoencoder)
    y, degrade = measured(args, task, size, channels, device)
    repeats = args.repeats or (1 if task == "denoise" or sampler == "dpm++" else restoration.REPEATS)
    how = f"{n} images, {sampler}, {steps} steps" + f" repeated {repeats} times" * (repeats > 1) + f", seed {args.seed}"
    if task == "denoise" and n == 1:
        sampler, steps, how = "dpm++", 1, "the mean of all possible originals"

    def restored(rows):
        known = y.expand(len(rows), -1, -1, -1)
        condition = None if classes is None else torch.tensor(classes, device=device)[rows % len(classes)]
        options = dict(condition=condition, sampler=sampler, steps=steps, cfg_scale=scale,
                       seeds=[(args.seed, i) for i in rows.tolist()])
        if task == "denoise":
            return restoration.denoise(diffusion, network, known, args.sigma, clip=True, **options)
        if autoencoder:
            return restoration.restore_latents(diffusion, network, autoencoder, known, degrade, repeats=repeats, **options)
        return restoration.restore(diffusion, network, known, degrade, repeats=repeats, clip=True, **options)
    with autocast(device, args.precision):
        images = in_pieces(restored, torch.arange(n, device=device), args.batch_size or 64)
    shown = torch.cat([y if degrade is None else degrade[1](y), images])
    return to_uint8(shown).cpu().numpy(), f"{how}, guidance {scale:g}"


def restore_and_write(args, task):
    """Write the image that --inpaint, --upscale or --denoise names, beside it what becomes of it; or, into a folder, only that."""
    run, network, diffusion = drawable(args.ckpt)
    classes = parse_classes(args.classes, run.data.classes, network.num_classes) if args.classes else None
    autoencoder = decoder(args.vae, run, network)
    check_task(args, task, network, bool(run.vae), autoencoder, classes)
    images, how = restore_images(args, task, network, diffusion, autoencoder, classes)
    if is_folder(args.out):
        make_folder(args.out, **rule_of(args))
        save_numbered(args.out, range(len(images) - 1), images[1:])
    else:
        save_image(args.out, grid(images, len(images)), "samples", **rule_of(args))
    print(f"{how}: wrote {args.out}")


def main(argv=None):
    """The command: parse, run, report errors in one line."""
    args = flags().parse_args(argv)
    with one_line_errors("sample.py"):
        task = task_of(args)
        allow_pixels(args.max_pixels)
        check_outputs(args)
        if task:
            restore_and_write(args, task)
        else:
            draw_and_write(args)


if __name__ == "__main__":
    sys.exit(main())
