"""Draw images from a trained run, or from released weights.

Report §4-5 (inference), §4-8, §4-9 (guidance). The defaults, DPM-Solver++ in 20 steps with guidance scale 1.5, suit what
train.py leaves. The drawing itself is sampling.py's.

    python sample.py --ckpt run.pt
    python sample.py --ckpt run.pt --n 100 --classes 3,5 --cfg-scale 3 --out digits/
    python sample.py --ckpt run.pt --prompt "a large green triangle"
    python sample.py --ckpt DiT-XL-2-256x256.pt --vae sd-vae-ft-mse.safetensors --classes 207,360 --cfg-scale 4
    python sample.py --ckpt run.pt --inpaint photo.png --mask hole.png                     (see restoration.py)
    torchrun --nproc-per-node 8 -- sample.py --ckpt run.pt --n 50000 --npz samples.npz     (-- keeps --n from torchrun)
"""
import argparse
import math
import sys
from pathlib import Path

import numpy as np

import restoration
from cascade import enlarge, load_upsampler
from cli import Parser, gathered, not_negative, one_line_errors, parent_of, positive, processes, progress_bar, share
from data import to_uint8
from sampling import (SCATTERED, add_sampling_flags, decode, decoder, draw, drawable, evaluations, guidance_scale, labels_of, parse_classes,
                     pixel_shape, read_prompts, unconditional)
from files import atomic_file
from pictures import grid, points_picture, save_image, write_gif
from points import MLP


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
    restoration.add_restoration_flags(parser)
    return parser


def write_outputs(args, images, frames, labels, columns, latent):
    """Write the grid, if the images are not in a folder already, the .npz and the trajectory -> the paths, as text.

    Latents have no grid: they are written as an .npz, named after --out if it has no name of its own.
    """
    written, npz = [], args.npz
    if latent:
        npz = npz or str(Path(args.out.rstrip("/")).with_suffix(".npz"))
        print(f"the network works on an autoencoder's latents: without --vae FILE they are written as they are, float32 NCHW, to "
              f"{npz}")
    elif is_folder(args.out):
        written.append(args.out)                         # image by image, while they were drawn
    else:
        shown = points_picture(images) if images.ndim == 2 else grid(images[:400], columns)          # more would be no picture
        save_image(args.out, shown)
        written.append(args.out)
    if npz:
        with atomic_file(npz) as file:
            np.savez(file, arr_0=images, **({} if labels is None else {"arr_1": labels.numpy()}))
        written.append(npz)
    if frames:
        write_gif(args.trajectory, frames)
        written.append(args.trajectory)
    return ", ".join(written)


def write_restored(args, task):
    """Write the image that --inpaint, --upscale or --denoise names, beside it what becomes of it; or, into a folder, only that."""
    described, network, diffusion = drawable(args.ckpt)
    classes = parse_classes(args.classes, described["data"].get("classes"), network.num_classes) if args.classes else None
    autoencoder = decoder(args.vae, described, network)
    restoration.check_task(args, task, network, bool(described["vae"]), autoencoder, classes)
    guidance_scale(network, args.cfg_scale)                    # refuses a scale that the network lacks the input for,
    evaluations(args.steps, args.sampler, diffusion)     # and more steps than the process has
    images, how = restoration.restore_image(args, task, network, diffusion, autoencoder, classes)
    if is_folder(args.out):
        Path(args.out).mkdir(exist_ok=True)
        for i, image in enumerate(images[1:]):
            save_image(Path(args.out) / f"{i:06d}.png", image)
    else:
        save_image(args.out, grid(images, len(images)))
    print(f"{how}: wrote {args.out}")


def check_pictures(args, points, on_latents, decoded):
    """ValueError where pictures are asked for of what is none: points, or latents, decoded perhaps once they are drawn."""
    if points and (args.trajectory or is_folder(args.out)):
        raise ValueError(f"--out and --trajectory: points are drawn in one .png; python plot.py swissroll --ckpt {args.ckpt} --gif "
                         "FILE shows their way")
    if on_latents and args.trajectory:
        raise ValueError("--trajectory: the network works on latents, which are no pictures")
    if on_latents and not decoded and args.cascade:
        raise ValueError("--cascade: the network works on an autoencoder's latents; --vae FILE makes them images first")


def draw_and_write(args):
    """Draw what the flags ask for and write it; under torchrun each process draws its share."""
    for path in filter(None, (args.out.rstrip("/"), args.npz, args.trajectory)):
        parent_of(path)
    task = restoration.task_of(args)
    if task:
        return write_restored(args, task)
    args.sampler = args.sampler or "dpm++"
    described, network, diffusion = drawable(args.ckpt)
    classes = parse_classes(args.classes, described["data"].get("classes"), network.num_classes)
    contexts = read_prompts(args.prompt, args.clip, described, network)
    y_null = unconditional(network, described["text"], described["config"])
    scale = guidance_scale(network, args.cfg_scale, y_null)
    steps = evaluations(args.steps, args.sampler, diffusion)
    autoencoder = decoder(args.vae, described, network)
    points, on_latents = isinstance(network, MLP), bool(described["vae"])
    check_pictures(args, points, on_latents, autoencoder)
    latent = on_latents and autoencoder is None          # is what is written
    upsampler, upsampling = (load_upsampler(args.cascade, described, network.num_classes, pixel_shape(network, autoencoder))
                             if args.cascade else (None, None))
    kinds = len(classes or args.prompt or ())
    few = (2 if args.prompt else 1) <= kinds <= 16       # then each has a column
    n = args.n or (SCATTERED if points else 4 * kinds if few else 16)
    columns = kinds if few else math.ceil(math.sqrt(min(n, 64)))

    device, rank, _ = processes(args.device)
    network, autoencoder, upsampler = (part and part.to(device) for part in (network, autoencoder, upsampler))
    one_by_one = is_folder(args.out) and not latent
    if one_by_one:
        Path(args.out).mkdir(exist_ok=True)
    frames, images = {}, []

    def keep_frame(t, x, x0):
        if rank == 0 and not images:                     # of the first batch; a smaller try after a full memory replaces them
            frames[t] = grid(to_uint8(x[:4 * columns]).cpu().numpy(), columns)

    with progress_bar("drawing", n) as bar:
        for part, x in draw(network, diffusion, share(n), classes if contexts is None else contexts, args.seed, args.batch_size,
                            sampler=args.sampler, steps=steps, eta=args.eta, cfg_scale=scale, cfg_channels=args.cfg_channels,
                            cfg_interval=args.cfg_interval, y_null=y_null, clip=not (on_latents or points),
                            callback=keep_frame if args.trajectory else None):
            bar.update(len(part))
            x = decode(autoencoder, x) if autoencoder else x
            x = enlarge(upsampler, upsampling, x, labels_of(part, classes), args.seed, part) if upsampler else x
            images.append((x.flatten(1) if points else x if latent else to_uint8(x)).cpu().numpy())
            if one_by_one:
                for i, image in zip(part, images[-1]):
                    save_image(Path(args.out) / f"{i:06d}.png", image)
    everyones = gathered(images) if args.npz or not one_by_one else []   # else they are on disk already
    if rank == 0:
        images = np.concatenate([batch for batches in everyones for batch in batches]) if everyones else None
        written = write_outputs(args, images, list(frames.values()), labels_of(range(n), classes), columns, latent)
        print(f"{n} images, {args.sampler}, {steps} steps, guidance {scale:g}, seed {args.seed}: wrote {written}")


def main(argv=None):
    """The command: parse, run, report errors in one line."""
    args = flags().parse_args(argv)
    with one_line_errors("sample.py"):
        draw_and_write(args)


if __name__ == "__main__":
    sys.exit(main())
