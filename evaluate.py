"""Score samples against real images: FID, sFID, Inception score, precision, recall, and the accuracy of their classes.

Report §4-6, §4-10, Fig. 5-2. The scores are metrics.py's, in a named space of features.py: `FID` is printed for FID's Inception
and nothing else, `FD[vit-mnist]` for a ViT that train.py taught the digits. Reference batches of ADM (Dhariwal & Nichol 2021)
are read as they are, and written so that ADM's evaluator reads them. Under torchrun each process takes its share.

    python evaluate.py --ckpt run.pt                                      draws samples first; a restart goes on with them
    python evaluate.py --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py --reference photos/ --image-size 256 --save-reference photos.npz
"""
import csv
import hashlib
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
from cli import Parser, first_in_turn, one_line_errors, parent_of, positive, processes, progress_bar, share
from sampling import (add_sampling_flags, decode, decoder, draw, draw_once, drawable, evaluations, guidance_scale, labels_of, parse_classes,
                     pixel_shape, reader, unconditional)
from features import (Measured, default_space, full_precision, measure, measure_dataset, read_tables, save_statistics,
                      space_named_in, space_of, with_statistics)
from files import sha256_of
from image_files import side_of
from latents import embeddings
from metrics import distance, frechet_distance, inception_score, precision_recall    # noqa: F401  public names of this module
from points import MLP

FULL, QUICK = 50_000, 2_000            # samples of a run: what papers take for FID; enough for the 64 features of the judge
REFERENCE_IMAGES = 10_000              # of a reference for precision and recall, and in a file of one: as ADM
METRICS = ("IS", "FD", "sFD", "precision", "recall", "accuracy")         # in the order in which ADM prints them
COLUMNS = ("samples", "step", "n", "reference", "reference_n", "features", "features_sha256", *METRICS, "FD_floor", "classes",
           "cfg_scale", "sampler", "steps", "seed", "torch", "numpy")    # of results.csv


class Reference(NamedTuple):
    """Real images, measured."""

    name: str
    measured: Measured
    floor: dict                        # {"FD": …, "sFD": …} between two halves of them: what real images score themselves
    order: np.ndarray | None = None    # of the images, in which they were measured; None of a file without images


# Scores

def number_of(n):
    """A number of images, as text."""
    return f"{n:,}" if math.isfinite(n) else "an unknown number"


def obstacles(space, classes, real_lacks=(), fake_lacks=(), fewest=math.inf):
    """{metric: why it cannot be had, or None} of samples of classes (their names, or None) in a space.

    real_lacks, fake_lacks: what the reference and the samples come without, see `lacks`. fewest: images of the side that has
    fewer.
    """
    spatial = space.classes is not None or "spatial" in real_lacks or "spatial" in fake_lacks        # a classifier has none
    pairs = ("the reference is statistics without images" if "images" in real_lacks else
             "the samples are statistics without images" if "images" in fake_lacks else
             f"it needs 4 images on both sides, and there are {fewest}" if fewest < 4 else None)
    return {
        "IS": "the samples are statistics without images" if "images" in fake_lacks else None,
        "FD": None,
        "sFD": "it needs spatial features on both sides" if spatial else None,
        "precision": pairs, "recall": pairs,
        "accuracy": None if space.knows(classes) and "images" not in fake_lacks else
        "it needs samples with labels, and the features of a classifier that knows these",
    }


def possible(space, classes):
    """The scores that images of classes (their names, or None) can have in a space."""
    return [metric for metric, obstacle in obstacles(space, classes).items() if obstacle is None]


def scores(fake, real, wanted):
    """{metric: score} of samples against real images, both Measured in one space, for the metrics wanted.

    ValueError on features that are not finite, or of too few images.
    """
    found = {}
    if "IS" in wanted:
        found["IS"] = inception_score(fake.probabilities)
    if "FD" in wanted:
        found["FD"] = distance(fake.pool, real.pool)
    if "sFD" in wanted:
        found["sFD"] = distance(fake.spatial, real.spatial)
    if "precision" in wanted or "recall" in wanted:
        with full_precision():
            found["precision"], found["recall"] = precision_recall(real.rows, fake.rows)
    if "accuracy" in wanted:
        found["accuracy"] = (fake.probabilities.argmax(dim=1).cpu() == fake.labels).double().mean().item()
    return {metric: found[metric] for metric in METRICS if metric in wanted}


def measure_reference(dataset, space, name, file=None):
    """The Reference of a data set, read in a fixed random order, half by half, with a file's statistics if it has some.

    Without a data set: of the file's statistics alone.
    """
    if dataset is None:
        return Reference(name, with_statistics(None, file, space), {})
    order = np.random.default_rng(0).permutation(len(dataset))
    half = len(order) // 2
    with progress_bar("measuring the reference", len(order)) as progress:
        first, second = (measure_dataset(dataset, rows, space, max(0, REFERENCE_IMAGES - before), progress)
                         for rows, before in ((order[:half], 0), (order[half:], half)))
    floor = {}
    if min(first.pool.n, second.pool.n) > 1:             # on the first process, of at least four images
        floor["FD"] = distance(first.pool, second.pool)
        if first.spatial:
            floor["sFD"] = distance(first.spatial, second.spatial)
    return Reference(name, with_statistics(first.merge(second), file, space), floor, order)


def measure_samples(dataset, n, space, file=None):
    """The Measured of the first n samples of a data set; of all if n is None, then with a file's statistics if it has some.

    Without a data set: of the file's statistics alone.
    """
    if dataset is None:
        return with_statistics(None, file, space)
    order = np.arange(len(dataset))
    if file and Path(file).is_dir():                     # sorted by class perhaps, which the Inception score's chunks must not be
        order = np.random.default_rng(0).permutation(len(dataset))
    with progress_bar("measuring the samples", n or len(dataset)) as progress:
        measured = measure_dataset(dataset, order[:n], space, bar=progress)
    return measured if n else with_statistics(measured, file, space)


def score_network(network, diffusion, real, space, n, classes=None, seed=0, scale=None, autoencoder=None, contexts=None,
                  y_null=None):
    """The scores of n samples, drawn by `sample.py`'s defaults, against real, Measured; each process draws its share.

    classes: their names, which the samples take in turn, or None. contexts: of captions, which the samples of a text network take
    in turn; y_null: of the empty caption. autoencoder: decodes a latent network's samples. Only the first process gets the
    scores, the others {}.
    """
    numbers = None if classes is None else list(range(len(classes)))
    drawn = draw(network, diffusion, share(n), numbers if contexts is None else contexts, seed, clip=autoencoder is None,
                 cfg_scale=guidance_scale(network, scale, y_null), y_null=y_null)
    fake = measure((data.to_uint8(x if autoencoder is None else decode(autoencoder, x)) for _, x in drawn), space)
    if not fake.n:
        return {}
    fake.labels = labels_of(range(n), numbers)
    return scores(fake, real, possible(space, classes))


# What is scored, and against what

def in_files(spec):
    """Whether a --samples or --reference is a folder or an .npz, whose images count all, and no data set by name."""
    return spec.endswith(".npz") or Path(spec).is_dir()


def lacks(images, file):
    """What a side lacks: "images" if it is statistics alone, "spatial" ones if its file has only pooled ones."""
    tables = read_tables(file) if file and file.endswith(".npz") else None
    return ({"images"} if images is None else set()) | ({"spatial"} if tables and "mu_s" not in tables else set())


def images_of(spec, split, args):
    """The data set of --samples or --reference; None if it is an .npz of statistics without images."""
    tables = read_tables(spec) if spec.endswith(".npz") and Path(spec).is_file() else None
    if tables and not tables["images"]:
        return None
    with first_in_turn():
        side = args.image_size or (side_of(spec) if Path(spec).is_dir() else None)
        return data.load(spec, side, "all" if in_files(spec) else split, args.cache)


def read_images(args, described, shape):
    """The data sets of the reference and of --samples, each None if there is none.  ValueError on what cannot be compared.

    described: the run of --ckpt, whose training part is the reference if none is given; shape: (H, W, C) of what it draws.
    """
    if args.reference:
        real = images_of(args.reference, "train", args)
    else:
        config = described["config"]
        with first_in_turn():
            real = data.load(described["data"]["spec"], config["image_size"], "train", args.cache or config["cache"],
                             config["skip_bad"])
    if args.save_reference and real is None:
        raise ValueError(f"--save-reference: {args.reference} holds no images, which the file should show")
    fake = images_of(args.samples, "test", args) if args.samples else None
    there = len(fake) if fake else 0
    if args.samples and (args.n or 0) > there:
        raise ValueError(f"--n {args.n}: {args.samples} has {there} images")
    shape = fake.images.shape[1:] if fake else shape
    if real and shape and tuple(real.image_size) != tuple(shape[:2]):
        raise ValueError("images of unequal sizes: the samples have {}x{} pixels, the reference {}x{}".format(
            *shape[:2], *real.image_size))
    return real, fake


def captioned(images, tokenizer, encoder, n, cache):
    """The contexts of n captions of the reference, in a fixed random order, for a text network to draw, and a hash of what they
    depend on besides n (of a larger n, the first n are the same).

    tokenizer, encoder: `sampling.reader`'s. ValueError if there are no captions.
    """
    if images is None or images.captions is None:
        raise ValueError("--reference: the network draws what captions say, and there are none: give a data set that has some")
    captions = [caption for row in images.rows for caption in images.captions[row]]
    chosen = [captions[i] for i in np.resize(np.random.default_rng(0).permutation(len(captions)), n)]
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
    parser.add_argument("--save-reference", metavar="FILE", help="write the reference, measured, as an .npz in ADM's layout")
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
    if args.features not in (None, "inception") and not Path(args.features).is_file():
        raise ValueError(f"--features {args.features}: there is no such file")
    for name in ("vae", "clip", "classes"):
        if getattr(args, name) and not args.ckpt:
            raise ValueError(f"--{name} says how the samples of --ckpt are drawn")
    for path in filter(None, (args.results, args.save_reference)):
        parent_of(path)
    if args.save_reference and not args.save_reference.endswith(".npz"):
        raise ValueError(f"--save-reference {args.save_reference}: its name must end in .npz")
    results = Path(args.results)
    if results.exists():
        with open(results, newline="") as file:
            if next(csv.reader(file), None) not in (None, list(COLUMNS)):
                raise ValueError(f"--results {results} has other columns: choose another file")
    return wanted


def suited(args, images):
    """--features where it is not given: those that the reference's statistics are of, or that suit the images."""
    named = space_named_in(args.reference) if args.reference else None
    return named or (default_space(images.spec, images.images.shape[1:]) if images else "inception")


def open_run(args):
    """The description, network, process and autoencoder of --ckpt.  ValueError if its samples cannot be scored."""
    described, network, diffusion = drawable(args.ckpt)
    if isinstance(network, MLP):
        raise ValueError(f"{args.ckpt} draws points, which have no features: python bench.py swissroll --ckpt {args.ckpt} measures "
                         "them")
    if not args.reference and not described["data"]["spec"]:
        raise ValueError(f"--reference: {args.ckpt} does not say what it was trained on; give real images to compare with")
    autoencoder = decoder(args.vae, described, network)
    if described["vae"] and autoencoder is None:
        raise ValueError(f"{args.ckpt} draws an autoencoder's latents: --vae FILE names the one that decodes them")
    if args.clip and network.context_dim is None:
        raise ValueError("--clip: the network was not trained with texts")
    return described, network, diffusion, autoencoder


def agreed(wanted, against, space):
    """The metrics wanted, or all that nothing stands against.  ValueError on one that is wanted and cannot be had."""
    for metric in wanted:
        if against[metric]:
            raise ValueError(f"{space.title(metric)} cannot be had: {against[metric]}")
    return wanted or [metric for metric in METRICS if not against[metric]]


def report(args, found, reference, fake, space, how):
    """Print the table and add the row; on stderr, that a distance is one of few samples.

    how: what --ckpt's samples were drawn with, a row's columns among it; {} for --samples.
    """
    real = reference.measured
    for metric, a, b in (("FD", fake.pool, real.pool), ("sFD", fake.spatial, real.spatial)):
        if metric in found and min(a.n, b.n) <= len(a.mu):
            print(f"evaluate.py: warning: {min(a.n, b.n)} samples of {len(a.mu)} features have a singular covariance: the Fréchet "
                  "distance is far above that of more samples", file=sys.stderr)
    drawn = "" if not how else (f" at step {how['step']}" * (how["step"] is not None) + f", {how['sampler']}, {how['steps']} "
                                f"steps, guidance {how['cfg_scale']:g}, seed {how['seed']}")
    held_out = ", held-out part" if args.samples and not in_files(args.samples) else ""
    training = "" if args.reference and in_files(args.reference) else ", training part"
    print(f"samples     {number_of(fake.n)} of {args.ckpt or args.samples}{held_out}{drawn}")
    print(f"reference   {number_of(real.n)} of {reference.name}{training}")
    print(f"features    {space.name}, weights {space.sha256[:8]}\n")
    for metric, value in found.items():
        line = f"{space.title(metric):24}" + (f"{value:10.3f}" if metric in ("IS", "FD", "sFD") else f"{value:10.4f}")
        if metric in ("precision", "recall"):
            line += f"   {number_of(len(real.rows))} real images"
        if metric in reference.floor:
            line += f"   two halves of the reference, {number_of(len(reference.order) // 2)} images each: {reference.floor[metric]:.3f}"
        print(line)
    with open(args.results, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not file.tell():
            writer.writeheader()
        writer.writerow(dict(
            samples=args.ckpt or args.samples, n=fake.n, reference=reference.name,
            reference_n=real.n if math.isfinite(real.n) else None, features=space.name, features_sha256=space.sha256, **found,
            FD_floor=reference.floor.get("FD"), torch=torch.__version__, numpy=np.__version__, classes=args.classes,
            **{key: how[key] for key in ("step", "cfg_scale", "sampler", "steps", "seed") if how}))


def score_samples(args):
    """Measure the reference and the samples, score, print a table and add a row."""
    wanted, how, described = validate(args), {}, None
    names, shape, contexts = None, None, None            # of the samples
    if args.ckpt:
        described, network, diffusion, autoencoder = open_run(args)
        told = network.context_dim is not None                           # a text: what its samples show is no class
        tokenizer, encoder = reader(described, network, args.clip) if told else (None, None)
        y_null, sampler = unconditional(network, described["text"], described["config"]), args.sampler or "dpm++"
        names, shape = None if told else described["data"]["classes"], pixel_shape(network, autoencoder)
        how = dict(vae=args.vae and sha256_of(args.vae), classes=parse_classes(args.classes, names, network.num_classes),
                   cfg_scale=guidance_scale(network, args.cfg_scale, y_null), sampler=sampler,
                   steps=evaluations(args.steps, sampler, diffusion), seed=args.seed)
    name = args.reference or described["data"]["spec"]
    for path in filter(None, (args.ckpt, args.samples, name)):
        if args.save_reference and os.path.realpath(path) == os.path.realpath(args.save_reference):
            raise ValueError(f"--save-reference {args.save_reference} would replace what is measured")
    device, rank, _ = processes(args.device)

    real_images, fake_images = read_images(args, described, shape)
    if fake_images:
        names, shape = fake_images.classes, fake_images.images.shape[1:]
    with first_in_turn():
        space = space_of(args.features or suited(args, real_images or fake_images), device, args.cache, args.resize == "tf1")
    n = args.n or (len(fake_images) if fake_images else FULL if space.name.startswith("inception") else QUICK)
    fewest = min(n if shape else math.inf, len(real_images) if real_images else math.inf)
    if fewest < 2:
        raise ValueError(f"{fewest} image on one side: at least two samples and two real images are needed")
    against = obstacles(space, names, lacks(real_images, args.reference), () if how else lacks(fake_images, args.samples), fewest)
    wanted = agreed(wanted, against, space)
    examples = [images.batch(np.arange(1))[0] for images in (real_images, fake_images) if images]
    if how:
        examples.append(torch.zeros(1, *shape, dtype=torch.uint8))
    for example in examples:                             # what the space does not take is refused before the work
        measure([example.to(device)], space)

    if how and told:
        contexts, how["captions"] = captioned(real_images, tokenizer, encoder and encoder.to(device), n, args.cache)
    reference = measure_reference(real_images, space, name, args.reference)
    if args.save_reference and rank == 0:
        images, _ = real_images.batch(reference.order[:REFERENCE_IMAGES])
        save_statistics(args.save_reference, reference.measured, images, space)
        print(f"wrote {args.save_reference}: {number_of(reference.measured.n)} of {name}, features {space.name}")
    if how:
        fake_images = draw_once(args.ckpt, network.to(device), diffusion, n, how, names, args.cache, args.batch_size,
                                autoencoder and autoencoder.to(device), contexts, y_null)
        how["step"] = described["step"]                  # for the row alone: the cache knows the samples by the file's hash
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
