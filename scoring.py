"""Scores: what samples can be compared by, the reference that they are compared with, and the scores of a network in training.

Report §4-6, §4-10, Fig. 5-2. metrics.py defines the scores, features.py the spaces in which they are measured. evaluate.py is the
command; train.py's --eval-every and judges.py score through here as well.
"""
import hashlib
import json
import math
import sys
from typing import NamedTuple

import numpy as np
import torch

import data
from cli import place, progress_bar, share, total
from features import (Measured, full_precision, measure, measure_dataset, read_statistics, read_tables, save_statistics,
                      with_statistics)
from files import cache_folder, open_npz
from metrics import distance, inception_score, precision_recall
from sampling import draw_images, labels_of

REFERENCE_IMAGES = 10_000              # of a reference for precision and recall, and in a file of one: as ADM
METRICS = ("IS", "FD", "sFD", "precision", "recall", "accuracy")         # in the order in which ADM prints them


class Reference(NamedTuple):
    """Real images, measured."""

    name: str
    measured: Measured
    floor: dict                        # {"FD": …, "sFD": …} between two halves of them: what real images score themselves
    order: np.ndarray | None = None    # of the images, in which they were measured; None of a file without images


def lacks(images, file):
    """What a side lacks: "images" if it is statistics alone, "spatial" ones if its file has only pooled ones."""
    tables = read_tables(file)
    return ({"images"} if images is None else set()) | ({"spatial"} if tables and "mu_s" not in tables else set())


def possible(space, classes, real_lacks=(), fake_lacks=(), fewest=math.inf, wanted=()):
    """The metrics wanted, or all that samples of classes (their names, or None) can have in a space.

    real_lacks, fake_lacks: what the reference and the samples come without, see `lacks`. fewest: images of the side that has
    fewer. ValueError on a metric that is wanted and cannot be had.
    """
    spatial = space.classes is not None or "spatial" in real_lacks or "spatial" in fake_lacks        # a classifier has none
    pairs = ("the reference is statistics without images" if "images" in real_lacks else
             "the samples are statistics without images" if "images" in fake_lacks else
             f"it needs 4 images on both sides, and there are {fewest}" if fewest < 4 else None)
    against = {
        "IS": "the samples are statistics without images" if "images" in fake_lacks else None,
        "FD": None,
        "sFD": "it needs spatial features on both sides" if spatial else None,
        "precision": pairs, "recall": pairs,
        "accuracy": None if space.knows(classes) and "images" not in fake_lacks else
        "it needs samples with labels, and the features of a classifier that knows these",
    }
    for metric in wanted:
        if against[metric]:
            raise ValueError(f"{space.title(metric)} cannot be had: {against[metric]}")
    return wanted or [metric for metric in METRICS if not against[metric]]


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


def warn_of_few(metrics, n, real, prefix=""):
    """Say on stderr, on the first process, of each Fréchet distance among the metrics that n samples are too few for it."""
    for metric, side in (("FD", real.pool), ("sFD", real.spatial)) if place()[0] == 0 else ():   # on the others real may be empty
        if metric in metrics and min(n, side.n) <= len(side.mu):
            print(f"{prefix}warning: {min(n, side.n)} samples of {len(side.mu)} features have a singular covariance: the Fréchet "
                  "distance is far above that of more samples", file=sys.stderr, flush=True)


def kept_reference(path, space):
    """The Measured and the floor that `measure_reference` keeps in a file of the cache; None if there is none that can be read."""
    try:
        measured = read_statistics(path, space)
        with open_npz(path) as archive:
            measured.rows = torch.from_numpy(archive["rows"]).to(space.device)
            if measured.rows.shape[1:] != measured.pool.mu.shape or not measured.rows.isfinite().all():
                return None
            floor = {name[6:]: float(archive[name]) for name in archive.files if name.startswith("floor_")}
        return measured, floor
    except Exception:                                    # zipfile and numpy raise anything at all on a damaged file
        return None


def measure_halves(dataset, order, space):
    """The Measured of a data set in an order, half by half, and the distances between both halves."""
    half = len(order) // 2
    with progress_bar("measuring the reference", len(order)) as progress:
        first, second = (measure_dataset(dataset, rows, space, max(0, REFERENCE_IMAGES - before), progress)
                         for rows, before in ((order[:half], 0), (order[half:], half)))
    halves = {"FD": (first.pool, second.pool), "sFD": (first.spatial, second.spatial)}
    floor = {metric: distance(*pair) for metric, pair in halves.items() if all(pair) and min(side.n for side in pair) > 1}
    return first.merge(second), floor


def measure_reference(dataset, space, name, file=None, cache=None):
    """The Reference of a data set, read in a fixed random order, with a file's statistics if it has some.

    What was measured is kept in the cache, and read from there the next time. Without a data set: of the file's statistics alone.
    Only the first process gets the whole.
    """
    if dataset is None:
        return Reference(name, with_statistics(None, file, space), {})
    order = np.random.default_rng(0).permutation(len(dataset))
    rank, world = place()
    about = json.dumps([data.fingerprint(dataset), space.name, space.sha256, REFERENCE_IMAGES])
    path = cache_folder(cache) / f"reference-{hashlib.sha256(about.encode()).hexdigest()[:16]}.npz"
    kept = kept_reference(path, space) if rank == 0 and path.exists() else None
    if total(torch.tensor(float(kept is not None)), world):
        measured, floor = kept or (Measured(), {})
    else:
        measured, floor = measure_halves(dataset, order, space)
        if rank == 0:
            floors = {f"floor_{metric}": value for metric, value in floor.items()}
            save_statistics(path, measured, None, space, rows=measured.rows.cpu(), **floors)
    return Reference(name, with_statistics(measured, file, space), floor, order)


def measure_samples(dataset, n, space, file=None):
    """The Measured of the first n samples of a data set; of all if n is None, then with a file's statistics if it has some.

    Without a data set: of the file's statistics alone.
    """
    if dataset is None:
        return with_statistics(None, file, space)
    order = np.arange(len(dataset))
    if dataset.checksums is not None:                    # a folder: perhaps sorted by class, as the Inception score's chunks must not be
        order = np.random.default_rng(0).permutation(len(dataset))
    with progress_bar("measuring the samples", n or len(dataset)) as progress:
        measured = measure_dataset(dataset, order[:n], space, bar=progress)
    return measured if n else with_statistics(measured, file, space)


def score_network(network, diffusion, real, space, n, classes=None, seed=0, scale=None, autoencoder=None, contexts=None,
                  y_null=None, wanted=None):
    """The scores of n samples, drawn by `sample.py`'s defaults, against real, Measured; each process draws its share.

    classes: their names, which the samples take in turn, or None. contexts: of captions, which the samples of a text network take
    in turn; y_null: of the empty caption. autoencoder: decodes a latent network's samples. wanted: the metrics, all that are
    possible by default. Only the first process gets the scores, the others {}.
    """
    numbers = None if classes is None else list(range(len(classes)))
    conditions = numbers if contexts is None else contexts
    drawn = draw_images(network, diffusion, share(n), conditions, seed, autoencoder, scale, y_null)
    fake = measure((images for _, images in drawn), space)
    if not fake.n:
        return {}
    if space.knows(classes):
        fake.labels = space.numbers(labels_of(range(n), numbers), classes)
    return scores(fake, real, possible(space, classes) if wanted is None else wanted)


def sample_scores(dataset, diffusion, real, space, wanted, n, seed, y_null, network):
    """The scores {column: score} of a network that is trained on a data set, see `score_network`.

    The samples take the data set's classes or its captions in turn. Only the first process gets the scores, the others {}.
    """
    contexts = None if dataset.contexts is None else dataset.contexts_of(n)
    found = score_network(network, diffusion, real, space, n, dataset.classes if contexts is None else None, seed,
                          autoencoder=dataset.autoencoder, contexts=contexts, y_null=y_null, wanted=wanted)
    return {space.title(metric): value for metric, value in found.items()}
