"""Score samples against real images: FID, sFID, Inception score, precision, recall, and the accuracy of their classes.

Report §4-6, §4-10, Fig. 5-2. The scores are metrics.py's, in a named space of features.py: `FID` is printed for FID's Inception
and nothing else, `FD[vit-mnist]` for a ViT that train.py taught the digits. Reference batches of ADM (Dhariwal & Nichol 2021)
are read as they are, and written so that ADM's evaluator reads them. Under torchrun each process takes its share.

    python evaluate.py --ckpt run.pt                                      draws samples first; a restart goes on with them
    python evaluate.py --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py --reference photos/ --image-size 256 --save-reference photos.npz
"""
import interrupts                        # noqa: F401  first, for signals while PyTorch is imported
import csv
import hashlib
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

import data
from cli import (Parser, add_overwrite_flag, autocast, first_in_turn, one_line_errors, positive, precision_on, processes,
                 rule_of)
from features import default_space, measure, read_tables, save_statistics, space_named_in, space_of
from files import append, check_output, header_of, readable, sha256_of, writing
from folders import side_of
from image_files import MAX_PIXELS_HELP, allow_pixels
from latents import embeddings
from metrics import frechet_distance, inception_score, precision_recall      # noqa: F401  public names of this module
from models import compile_blocks
from points import MLP
from sampling import (add_sampling_flags, decoder, draw_once, drawable, evaluations, guidance_scale, parse_classes, pixel_shape,
                      text_reader, training_data, unconditional)
from scoring import METRICS, REFERENCE_IMAGES, lacks, measure_reference, measure_samples, possible, scores, warn_of_few

FULL, QUICK = 50_000, 2_000            # samples of a run: what papers take for FID; enough for the 64 features of the judge
COLUMNS = ("samples", "step", "n", "reference", "reference_n", "features", "features_sha256", *METRICS, "FD_floor", "classes",
           "cfg_scale", "sampler", "steps", "seed", "torch", "numpy")    # of results.csv


# What is scored, and against what

def in_files(spec):
    """Whether a --samples or --reference is a folder or an .npz, whose images count all, and no data set by name."""
    return spec.endswith(".npz") or spec not in data.OWN_SETS and Path(spec).is_dir()


def images_of(spec, split, args):
    """The data set of --samples or --reference; None if it is an .npz of statistics without images."""
    tables = read_tables(spec)
    if tables and not tables["images"]:
        return None
    with first_in_turn():
        side = args.image_size or (side_of(spec) if in_files(spec) and not spec.endswith(".npz") else None)
        return data.load(spec, side, "all" if in_files(spec) else split, args.cache)


def read_images(args, run, shape):
    """The data sets of the reference and of --samples, each None if there is none.  ValueError if they have too few images.

    run: that of --ckpt, whose training part is the reference if none is given; shape: (H, W, C) of what it draws.
    """
    if args.reference:
        real = images_of(args.reference, "train", args)
    else:
        side = args.image_size or (shape[0] if shape[0] == shape[1] else None)           # oblong ones are as they are
        with first_in_turn():
            real = data.load(training_data(run), side, "train", args.cache, bool(run.config.get("skip_bad")))
    if args.save_reference and real is None:
        raise ValueError(f"--save-reference: {args.reference} holds no images, which the file should show")
    fake = images_of(args.samples, "test", args) if args.samples else None
    there = len(fake) if fake else 0
    if args.samples and (args.n or 0) > there:
        raise ValueError(f"--n {args.n}: {args.samples} has {there} images")
    return real, fake


def captioned(images, reader, n, cache):
    """The conditions of n captions of the reference, in a fixed random order, for a text network to draw, and a hash of what they
    depend on besides n (of a larger n, the first n are the same).

    reader: the network's TextReader. ValueError if there are no captions.
    """
    if images is None or images.captions is None:
        raise ValueError("--reference: the network draws what captions say, and there are none: give a data set that has some")
    captions = [caption for row in images.rows for caption in images.captions[row]]
    chosen = [captions[i] for i in np.resize(np.random.default_rng(0).permutation(len(captions)), n)]
    encoder, tokenizer = reader.encoder, reader.tokenizer
    contexts = tokenizer.tokenize(chosen).numpy() if encoder is None else embeddings(chosen, encoder, tokenizer, cache)
    about = json.dumps([captions, encoder and encoder.origin["sha256"]])
    return contexts, hashlib.sha256(about.encode()).hexdigest()


# The command

def flags():
    """The command line."""
    parser = Parser(prog="evaluate.py", description="Score samples against real images.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--ckpt", help="a run or released weights: its samples are drawn first")
    what.add_argument("--samples", help="a folder, an .npz of images or of statistics, or a data set (of which the held-out part)")
    parser.add_argument("--reference", help="real images: as --samples, ADM's reference batches included, or a data set (of which "
                        "the training part). Default: the run's training data")
    parser.add_argument("--features", help="inception, or a file: its weights, or a ViT of train.py (default: the shipped ViT for "
                        "the embedded digits, else inception, downloaded once)")
    parser.add_argument("--resize", default="tf1", choices=("tf1", "pytorch"), help="how Inception enlarges images: as in "
                        "published numbers, or as pytorch-fid does (default: tf1)")
    parser.add_argument("--metrics", help=f"comma-separated, of {', '.join(METRICS)} (default: all that can be had)")
    parser.add_argument("--n", type=positive, help=f"samples (default: all of --samples; of a run {FULL} for Inception, else "
                        f"{QUICK})")
    parser.add_argument("--image-size", type=positive, help="crop and scale the images to this side (default: as they are)")
    parser.add_argument("--max-pixels", type=positive, help=MAX_PIXELS_HELP)
    parser.add_argument("--save-reference", metavar="FILE", help="write the reference, measured, as an .npz in ADM's layout")
    add_overwrite_flag(parser)
    parser.add_argument("--results", default="results.csv", help="a row is added to this file (default: results.csv)")
    add_sampling_flags(parser.add_argument_group("drawing the samples of --ckpt, as in sample.py",
                                        "(a text model draws what the reference's captions say)"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--cache", help="folder for samples, decoded images and downloads (default: the user's cache)")
    return parser


def validate(args):
    """The metrics asked for, [] for all.  ValueError, before any work, on flags that do not go together."""
    if not (args.ckpt or args.samples or args.save_reference):
        raise ValueError("give --ckpt or --samples, or --save-reference to measure a reference only")
    if not args.ckpt and not args.reference:
        raise ValueError("--reference: give real images to compare with")
    if "swissroll" in (args.samples, args.reference):
        raise ValueError("swissroll holds points, which have no features: give images")
    wanted = args.metrics.split(",") if args.metrics else []
    for metric in wanted:
        if metric not in METRICS:
            raise ValueError(f"--metrics: {metric!r} is none of {', '.join(METRICS)}; Inception's FD is FID")
    if args.features not in (None, "inception"):
        readable(args.features)
    for name in ("vae", "clip", "classes", "compile"):
        if getattr(args, name) and not args.ckpt:
            raise ValueError(f"--{name} says how the samples of --ckpt are drawn")
    results = Path(args.results)
    if results.is_file() and header_of(results) not in ([], list(COLUMNS)):
        raise ValueError(f"--results {results} has other columns: choose another file")
    check_output(results, "scores", rule_of(args)["inputs"])             # rows are added to it, it is never replaced
    return wanted


def open_run(args):
    """The Run, network, process, autoencoder and text reader of --ckpt.  ValueError if its samples cannot be scored."""
    run, network, diffusion = drawable(args.ckpt)
    if isinstance(network, MLP):
        raise ValueError(f"{args.ckpt} draws points, which have no features: study.py roll measures such runs")
    if not args.reference and not run.data.spec:
        raise ValueError(f"--reference: {args.ckpt} does not say what it was trained on; give real images to compare with")
    autoencoder = decoder(args.vae, run, network)
    if run.vae and autoencoder is None:
        raise ValueError(f"{args.ckpt} draws an autoencoder's latents: --vae FILE names the one that decodes them")
    return run, network, diffusion, autoencoder, text_reader(run, network, args.clip)


def number_of(n):
    """A number of images, as text."""
    return f"{n:,}" if math.isfinite(n) else "an unknown number"


def report(args, found, reference, fake, space, how):
    """Print the table and add the row; on stderr, that a distance is one of few samples.

    how: what --ckpt's samples were drawn with, a row's columns among it; {} for --samples.
    """
    real = reference.measured
    warn_of_few(found, fake.pool.n, real, "evaluate.py: ")
    drawn = "" if not how else (f" at step {how['step']}" * (how["step"] is not None) + f", {how['sampler']}, {how['steps']} "
                                f"steps, guidance {how['cfg_scale']:g}, seed {how['seed']}")
    held_out = ", held-out part" if args.samples and not in_files(args.samples) else ""
    training = "" if args.reference and in_files(args.reference) else ", training part"
    print(f"samples     {number_of(fake.n)} of {args.ckpt or args.samples}{held_out}{drawn}")
    print(f"reference   {number_of(real.n)} of {reference.name}{training}")
    print(f"features    {space.name}, weights {space.sha256[:8]}\n")
    for metric, value in found.items():
        line = f"{space.title(metric):24}" + (f"{value:z10.3f}" if metric in ("IS", "FD", "sFD") else f"{value:10.4f}")
        if metric in ("precision", "recall"):
            line += f"   {number_of(len(real.rows))} real images"
        if metric in reference.floor:
            half = number_of(len(reference.order) // 2)
            line += f"   two halves of the reference, {half} images each: {reference.floor[metric]:z.3f}"
        print(line)
    writer = csv.DictWriter(rows := io.StringIO(), COLUMNS, extrasaction="ignore")       # of what only tells samples apart
    if not (there := Path(args.results)).exists() or not there.stat().st_size:
        writer.writeheader()
    writer.writerow(dict(
        how, samples=args.ckpt or args.samples, n=fake.n, reference=reference.name,
        reference_n=real.n if math.isfinite(real.n) else None, features=space.name, features_sha256=space.sha256, **found,
        FD_floor=reference.floor.get("FD"), torch=torch.__version__, numpy=np.__version__, classes=args.classes))
    append(args.results, rows.getvalue())


def check_saving(args, spec):
    """ValueError or OSError if --save-reference may not be written; spec: of the reference, which it must not replace either."""
    if args.save_reference:
        check_output(args.save_reference, "reference", [*rule_of(args)["inputs"], spec], args.overwrite)


def score_samples(args):
    """Measure the reference and the samples, score, print a table and add a row."""
    wanted, how, run, reader = validate(args), {}, None, None
    names, shape, contexts = None, None, None            # of the samples
    if args.ckpt:
        run, network, diffusion, autoencoder, reader = open_run(args)
        y_null, sampler = unconditional(network, reader, run.config.get("cfg_drop")), args.sampler or "dpm++"
        names, shape = None if reader else run.data.classes, pixel_shape(network, autoencoder)   # what captions show is no class
        how = dict(vae=args.vae and sha256_of(args.vae), classes=parse_classes(args.classes, names, network.num_classes),
                   cfg_scale=guidance_scale(network, args.cfg_scale, y_null), sampler=sampler,
                   steps=evaluations(args.steps, sampler, diffusion), seed=args.seed)
    allow_pixels(args.max_pixels)
    name = args.reference or run.data.spec
    check_saving(args, name)
    device, rank, _ = processes(args.device, args.compile, precision=args.precision)
    args.precision = precision_on(device, args.precision)
    if how and args.precision != "fp32":                 # samples of float32 have no word for it, as ever
        how["precision"] = args.precision

    real_images, fake_images = read_images(args, run, shape)
    for images in (real_images, fake_images) if rank == 0 else ():
        if images:
            print(images.summary)
    if fake_images:
        names, shape = fake_images.classes, fake_images.images.shape[1:]
    if real_images and shape and tuple(real_images.image_size) != tuple(shape[:2]):
        raise ValueError("images of unequal sizes: the samples have {}x{} pixels, the reference {}x{}".format(
            *shape[:2], *real_images.image_size))
    images = real_images or fake_images
    suited = default_space(images.spec, images.images.shape[1:]) if images else "inception"
    with first_in_turn():
        space = space_of(args.features or space_named_in(args.reference) or suited, device, args.cache, args.resize == "tf1")
    n = args.n or (len(fake_images) if fake_images else FULL if space.name.startswith("inception") else QUICK)
    fewest = min(n if shape else math.inf, len(real_images) if real_images else math.inf)
    if fewest < 2:
        raise ValueError(f"{fewest} image on one side: at least two samples and two real images are needed")
    fake_lacks = () if how else lacks(fake_images, args.samples)
    wanted = possible(space, names, lacks(real_images, args.reference), fake_lacks, fewest, wanted)
    examples = [images.batch(np.arange(1))[0] for images in (real_images, fake_images) if images]
    if how:
        examples.append(torch.zeros(1, *shape, dtype=torch.uint8))
    for example in examples:                             # what the space does not take is refused before the work
        measure([example.to(device)], space)

    if reader:
        if reader.encoder:
            reader.encoder.to(device)
        contexts, how["captions"] = captioned(real_images, reader, n, args.cache)
    reference = measure_reference(real_images, space, name, args.reference, args.cache)
    if args.save_reference and rank == 0:
        images, _ = real_images.batch(reference.order[:REFERENCE_IMAGES])
        check_saving(args, name)                         # a file may have appeared since
        with writing(args.save_reference):
            save_statistics(args.save_reference, reference.measured, images, space)
        print(f"wrote {args.save_reference}: {number_of(reference.measured.n)} of {name}, features {space.name}")
    if how:
        if args.compile:
            compile_blocks(network)
        with autocast(device, args.precision):
            fake_images = draw_once(args.ckpt, network.to(device), diffusion, n, how, names, args.cache, args.batch_size,
                                    autoencoder and autoencoder.to(device), contexts, y_null)
        how["step"] = run.step                           # for the row alone: the cache knows the samples by the file's hash
    elif not args.samples:
        return
    fake = measure_samples(fake_images, args.n, space, args.samples)
    if rank == 0:
        report(args, scores(fake, reference.measured, wanted), reference, fake, space, how)


def main(argv=None):
    """The command: parse, run, report errors in one line."""
    args = flags().parse_args(argv)
    with one_line_errors("evaluate.py"):
        score_samples(args)


if __name__ == "__main__":
    sys.exit(main())
