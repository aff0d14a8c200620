"""Draw images from a trained run, or from released weights.

Report §4-5 (inference), §4-8, §4-9 (guidance). The defaults, DPM-Solver++ in 20 steps with guidance scale 1.5, suit what
train.py leaves. An image depends on the seed and its number alone, whatever the batch size or the number of processes.

    python sample.py --ckpt run.pt
    python sample.py --ckpt run.pt --n 100 --classes 3,5 --cfg-scale 3 --out digits/
    python sample.py --ckpt DiT-XL-2-256x256.pt --vae sd-vae-ft-mse.safetensors --classes 207,360 --cfg-scale 4
    python sample.py --ckpt run.pt --inpaint photo.png --mask hole.png                     (see restoration.py)
    torchrun --nproc-per-node 8 -- sample.py --ckpt run.pt --n 50000 --npz samples.npz     (-- keeps --n from torchrun)
"""
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import ddpm
import restoration
from checkpoint import build, load, load_autoencoder
from cli import (Parser, first_in_turn, grid, not_negative, one_line_errors, positive, processes, progress_bar, save_image, share,
                 to_image)
from data import Dataset, atomic_file, cache_folder, sha256_of, to_uint8
from vae import in_pieces

CFG_SCALE = 1.5                  # where the network knows an unconditional input
STEPS = 20                       # of DPM-Solver++; more barely change the picture


def labels_of(indices, classes):
    """The label of each image of a run: classes in turn, or None without classes."""
    return None if classes is None else torch.tensor([classes[i % len(classes)] for i in indices])


def draw(network, diffusion, indices, classes=None, seed=0, batch_size=None, bar=None, **options):
    """Yield (indices, x (n, C, H, W) on the network's device) for images number `indices`, batch by batch.

    options are `ddpm.sample`'s. The batch is halved where the device's memory does not hold it.
    """
    parameter = next(network.parameters())
    batch_size = batch_size or (256 if parameter.is_cuda else 64)
    options = {"sampler": "dpm++", "steps": STEPS, **options}
    start = 0
    while start < len(indices):
        part = indices[start:start + batch_size]
        y = labels_of(part, classes)
        y = None if y is None else y.to(parameter.device)
        try:
            x = ddpm.sample(diffusion, network, (len(part), network.channels, *network.image_size), y,
                            seeds=[(seed, i) for i in part], **options)
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
            batch_size = len(part) // 2
            torch.cuda.empty_cache()
            continue
        start += len(part)
        if bar is not None:
            bar.update(len(part))
        yield part, x


def drawable(path):
    """A checkpoint's description, network and process.  ValueError if there is nothing that can be sampled from it."""
    described = load(path)
    network, diffusion = build(described)
    if diffusion is None:
        kind = described["network"]["class"]
        raise ValueError(f"{path} holds a {kind}, which " + {
            "ViT": "classifies: there is nothing to sample",
            "AutoencoderKL": "encodes and decodes: a network trained on its latents samples",
            "SuperResUNet": "enlarges images: it needs small ones to start from",
        }.get(kind, "was trained in continuous time: it can be loaded, but not sampled here"))
    if network.context_dim is not None:
        raise ValueError(f"{path} is told a text, or LDM's class as a token, which nothing here encodes yet: it can be loaded "
                         "and counted, but not sampled")
    return described, network, diffusion


def decoder(path, described, network):
    """The autoencoder that decodes a network's latents: that of --vae, or the run's own, in it or where it was; None without.

    ValueError if it does not fit, or is another than the run was trained with.
    """
    kept = described["vae"]
    if kept is None:
        if path is not None:
            raise ValueError("--vae: the network works on pixels, there is nothing to decode")
        return None
    if path is None and "model" in kept:
        autoencoder, _ = build({**described, **kept, "diffusion": None}, "model")
    elif path is None and not Path(kept.get("path", "")).is_file():
        return None
    else:
        autoencoder = load_autoencoder(path or kept["path"])
        if kept.get("sha256", autoencoder.origin["sha256"]) != autoencoder.origin["sha256"]:
            raise ValueError(f"{path or kept['path']} is another autoencoder than the network was trained with: its SHA-256 is "
                             f"{autoencoder.origin['sha256']}, not {kept['sha256']}")
    if autoencoder.latent_channels != network.channels:
        raise ValueError(f"--vae {path}: its latents have {autoencoder.latent_channels} channels, those of the network "
                         f"{network.channels}")
    autoencoder.scale = kept["scale"]
    return autoencoder


@torch.no_grad()
def decode(autoencoder, x, batch_size=16):
    """Images (n, C, f H, f W) of latents x (n, c, H, W), which are scaled; a few at a time, fewer if the memory is full."""
    return in_pieces(lambda z: autoencoder.decode(z / autoencoder.scale), x, batch_size)


def guidance(network, scale=None):
    """The guidance scale: the one asked for, or what suits the network.  ValueError if it needs what the network lacks."""
    if scale is None:
        return CFG_SCALE if network.null_label is not None else 1.0
    if scale != 1 and network.null_label is None:
        raise ValueError(f"--cfg-scale {scale:g}: the network has no unconditional input, which guidance needs")
    return scale


def evaluations(steps, sampler, diffusion):
    """The number of steps: the one asked for, or what suits the sampler.  ValueError if the process has fewer."""
    steps = steps or (min(250, diffusion.T) if sampler == "ddpm" else STEPS)
    if steps > diffusion.T:
        raise ValueError(f"--steps {steps}: the process has {diffusion.T}")
    return steps


def parse_classes(text, names, num_classes):
    """Class numbers of a comma-separated list of numbers or names.  ValueError on one that the run does not have."""
    if num_classes is None:
        if text:
            raise ValueError("--classes: the run was trained without labels")
        return None
    if not text:
        return list(range(num_classes))
    classes = []
    for word in text.split(","):
        if names and word in names:
            classes.append(names.index(word))
        elif word.strip().isdigit() and int(word) < num_classes:
            classes.append(int(word))
        else:
            raise ValueError(f"--classes: {word!r} is not a class of the run, which has 0 to {num_classes - 1}")
    return classes


def pixel_shape(network, autoencoder=None):
    """(H, W, C) of the images that a network draws, through an autoencoder or by itself."""
    if autoencoder is None:
        return (*network.image_size, network.channels)
    return (*(side * autoencoder.factor for side in network.image_size), autoencoder.channels)


def draw_once(path, network, diffusion, n, how, names=None, cache=None, batch_size=None, autoencoder=None):
    """The first n samples of a checkpoint, as a data set in the cache: a file that is filled as they are drawn.

    how: classes, cfg_scale, sampler, steps, seed, plain values, and what else tells samples of the checkpoint apart; names: of all
    classes, if the samples shall have labels; autoencoder: decodes the network's latents. What an earlier, perhaps killed, call
    with the same checkpoint and the same `how` drew is there already; a larger n adds to it.
    """
    classes, shape = how["classes"], pixel_shape(network, autoencoder)
    key = hashlib.sha256(json.dumps([sha256_of(path), how]).encode()).hexdigest()[:16]
    pixels = cache_folder(cache) / f"{Path(path).stem}-samples-{key}.uint8"
    done = pixels.with_suffix(".done")                   # a byte an image: 1 once its pixels are on the disk
    size = math.prod(shape)
    with first_in_turn():
        there = pixels.stat().st_size // size if pixels.exists() else 0
        for file_path, kept, length in ((pixels, there * size, n * size), (done, there, n)):
            with open(file_path, "ab") as file:
                end = file.tell()
                file.truncate(min(kept, end))                            # no claim on pixels that were deleted
                file.truncate(max(length, end))                          # what is added reads as zeros
    missing = np.flatnonzero(np.fromfile(done, np.uint8, n) == 0)
    if dist.is_initialized():
        dist.barrier()                                   # all have looked before the first one draws
    mine = share(len(missing))
    with progress_bar("drawing", len(missing)) as progress, open(pixels, "r+b") as pixels_file, open(done, "r+b") as done_file:
        for indices, x in draw(network, diffusion, missing[mine.start:mine.stop].tolist(), classes, how["seed"], batch_size,
                               progress, sampler=how["sampler"], steps=how["steps"], cfg_scale=how["cfg_scale"],
                               clip=autoencoder is None):
            x = x if autoencoder is None else decode(autoencoder, x)
            for i, image in zip(indices, to_uint8(x).cpu().numpy()):
                pixels_file.seek(i * size)
                pixels_file.write(image.tobytes())
            pixels_file.flush()
            os.fsync(pixels_file.fileno())
            for i in indices:
                done_file.seek(i)
                done_file.write(b"\1")
            done_file.flush()
    if dist.is_initialized():
        dist.barrier()
    if not np.fromfile(done, np.uint8, n).all():
        raise ValueError(f"{pixels} is not complete: all processes need one cache, --cache DIR")
    labels = None if names is None else labels_of(range(n), classes).numpy()             # released weights have no names
    return Dataset(path, np.memmap(pixels, np.uint8, "r", shape=(n, *shape)), labels, names)


def parse_interval(text):
    """(low, high) of "LOW,HIGH", steps of 0 .. T-1."""
    try:
        low, high = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--cfg-interval {text!r}: give two steps as LOW,HIGH") from None
    if low > high:
        raise ValueError(f"--cfg-interval {text}: the first step is after the last")
    return low, high


def write_gif(path, frames):
    """Write uint8 frames (H, W, C) as a GIF, atomically: ten a second, the last one held for two."""
    images = [to_image(frame) for frame in frames]
    with atomic_file(path) as file:
        images[0].save(file, format="GIF", save_all=True, append_images=images[1:],
                       duration=[100] * (len(images) - 1) + [2000], loop=0)


def parent_of(path):
    """ValueError, before the work and not after it, if a file's folder does not exist."""
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{path}: the folder {Path(path).absolute().parent} does not exist")


def is_folder(out):
    """Whether --out names a folder: by a slash at its end, or because it is one."""
    return out.endswith("/") or Path(out).is_dir()


def flags():
    """The command line."""
    parser = Parser(prog="sample.py", description="Draw images from a trained run or from released weights.")
    parser.add_argument("--ckpt", required=True, help="run.pt of train.py, or released weights")
    parser.add_argument("--n", type=positive, help="images in all (default: four of each class if they are few, else 16)")
    parser.add_argument("--out", default="samples.png", help="a .png for one grid, or a folder, with a slash at its end")
    parser.add_argument("--vae", help="the autoencoder of a latent model, as sd-vae-ft-mse's .safetensors: decodes what it draws")
    parser.add_argument("--npz", help="also write ADM's .npz: arr_0 uint8 NHWC, arr_1 labels")
    parser.add_argument("--trajectory", help="also write a .gif of the way from noise to image")
    parser.add_argument("--classes", help="numbers or names, as 3,5; the images cycle through them (default: all)")
    parser.add_argument("--cfg-scale", type=not_negative, help="guidance; 1 is none (default: 1.5 if the run has a null class, "
                        "but 1 to restore)")
    parser.add_argument("--cfg-channels", type=positive, help="guide the first channels only; 3 repeats DiT's published numbers")
    parser.add_argument("--cfg-interval", help="LOW,HIGH: guide between these steps of 0 … T-1 only")
    parser.add_argument("--sampler", choices=ddpm.SAMPLERS, help="default: dpm++; ddpm to restore")
    parser.add_argument("--steps", type=positive, help="evaluations along the trajectory (default: 20; 250 for ddpm)")
    parser.add_argument("--eta", type=not_negative, default=0.0, help="ddim's noise: 0 is none, 1 is DDPM's (default: 0)")
    parser.add_argument("--batch-size", type=positive, help="images at once in each process (default: what memory holds)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    restoration.add_flags(parser)
    return parser


def gather(parts, world):
    """Rank 0's list of every process's arrays, concatenated in the order of the ranks; None elsewhere."""
    own = np.concatenate(parts) if parts else None
    if world == 1:
        return own
    everyone = [None] * world if dist.get_rank() == 0 else None
    dist.gather_object(own, everyone)
    return np.concatenate([part for part in everyone if part is not None]) if everyone else None


def write(args, images, frames, labels, columns, latent):
    """Write what rank 0 has: the grid or the .npz (latents have no grid), and the trajectory -> the paths, as text."""
    written, npz = [], args.npz
    if latent:
        npz = npz or str(Path(args.out.rstrip("/")).with_suffix(".npz"))
        print(f"the network works on an autoencoder's latents: without --vae FILE they are written as they are, float32 NCHW, to "
              f"{npz}")
    elif is_folder(args.out):
        written.append(args.out)                         # image by image, while they were drawn
    else:
        save_image(args.out, grid(images[:400], columns))                # more would be no picture
        written.append(args.out)
    if npz:
        with atomic_file(npz) as file:
            np.savez(file, arr_0=images, **({} if labels is None else {"arr_1": labels.numpy()}))
        written.append(npz)
    if frames:
        write_gif(args.trajectory, frames)
        written.append(args.trajectory)
    return ", ".join(written)


def restore(args, task):
    """Write the image that --inpaint, --upscale or --denoise names, beside it what becomes of it; or, into a folder, only that."""
    described, network, diffusion = drawable(args.ckpt)
    classes = parse_classes(args.classes, described["data"].get("classes"), network.num_classes) if args.classes else None
    autoencoder = decoder(args.vae, described, network)
    restoration.check(args, task, network, bool(described["vae"]), autoencoder, classes)
    guidance(network, args.cfg_scale)
    evaluations(args.steps, args.sampler, diffusion)
    images, how = restoration.restore_image(args, task, network, diffusion, autoencoder, classes)
    if is_folder(args.out):
        Path(args.out).mkdir(exist_ok=True)
        for i, image in enumerate(images[1:]):
            save_image(Path(args.out) / f"{i:06d}.png", image)
    else:
        save_image(args.out, grid(images, len(images)))
    print(f"{how}: wrote {args.out}")


def run(args):
    """Draw what the flags ask for and write it; under torchrun each process draws its share."""
    for path in filter(None, (args.out.rstrip("/"), args.npz, args.trajectory)):
        parent_of(path)
    if args.seed < 0:
        raise ValueError("--seed must be 0 or more")
    task = restoration.task_of(args)
    if task:
        return restore(args, task)
    args.sampler = args.sampler or "dpm++"
    interval = parse_interval(args.cfg_interval) if args.cfg_interval else None
    described, network, diffusion = drawable(args.ckpt)
    classes = parse_classes(args.classes, described["data"].get("classes"), network.num_classes)
    few = bool(classes) and len(classes) <= 16
    n = args.n or (4 * len(classes) if few else 16)
    scale = guidance(network, args.cfg_scale)
    steps = evaluations(args.steps, args.sampler, diffusion)
    autoencoder = decoder(args.vae, described, network)
    clip = not described["vae"]                          # latents have no range
    latent = bool(described["vae"]) and autoencoder is None
    if not clip and args.trajectory:
        raise ValueError("--trajectory: the network works on latents, which are no pictures")

    device, rank, world = processes(args.device)
    network, autoencoder = network.to(device), autoencoder and autoencoder.to(device)
    one_by_one = is_folder(args.out) and not latent
    if one_by_one:
        Path(args.out).mkdir(exist_ok=True)
    mine = share(n)
    columns = len(classes) if few else math.ceil(math.sqrt(min(n, 64)))
    frames, images = {}, []

    def keep_frame(t, x, x0):
        if rank == 0 and not images:                     # of the first batch; a smaller try after a full memory replaces them
            frames[t] = grid(to_uint8(x[:4 * columns]).cpu().numpy(), columns)

    with progress_bar("drawing", n) as bar:
        for part, x in draw(network, diffusion, mine, classes, args.seed, args.batch_size, bar, sampler=args.sampler,
                            steps=steps, eta=args.eta, cfg_scale=scale, cfg_channels=args.cfg_channels, cfg_interval=interval,
                            clip=clip, callback=keep_frame if args.trajectory else None):
            x = decode(autoencoder, x) if autoencoder else x
            images.append((x if latent else to_uint8(x)).cpu().numpy())
            for i, image in zip(part, images[-1] if one_by_one else ()):
                save_image(Path(args.out) / f"{i:06d}.png", image)
    if args.npz or not one_by_one:                       # else they are on disk already
        images = gather(images, world)
    if rank == 0:
        written = write(args, images, list(frames.values()), labels_of(range(n), classes), columns, latent)
        print(f"{n} images, {args.sampler}, {steps} steps, guidance {scale:g}, seed {args.seed}: wrote {written}")


def main(argv=None):
    """The command: parse, run, report errors in one line."""
    args = flags().parse_args(argv)
    with one_line_errors("sample.py"):
        run(args)


if __name__ == "__main__":
    sys.exit(main())
