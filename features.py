"""Feature spaces: from images to the numbers that scores are made of.

Report §4-6. A score means something only together with the space that it was measured in, so a space has a name: `inception`,
whose scores papers print, or that of a ViT classifier of train.py, as `vit-mnist`, for data that Inception knows nothing of.
`measure` reads images batch by batch and keeps statistics, and the rows that precision and recall need; under torchrun each
process measures its share.
"""
import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
import inception
from checkpoint import load
from cli import gathered, place, share
from files import atomic_file, open_npz, readable, sha256_of
from metrics import Statistics
from tensor_files import read

JUDGE = data.ASSETS / "vit-mnist.pt"   # a ViT that knows the embedded digits: scores without a download
BATCH = 64                             # images at once


class Space(NamedTuple):
    """A feature space."""

    name: str
    sha256: str                        # of the file of its weights
    extract: callable                  # images (n, H, W, C) uint8 -> dict: pool (n, D), perhaps spatial (n, S), probabilities
    classes: list | None               # the names of the K classes; None for Inception, of whose 1008 nobody asks
    device: torch.device

    def knows(self, classes):
        """Whether the space's network tells these classes, by their names, apart."""
        return classes is not None and self.classes is not None and {*classes} <= {*self.classes}

    def numbers(self, labels, classes):
        """Labels (n,), numbers of classes that it knows, as its own numbers of these."""
        return torch.tensor([self.classes.index(name) for name in classes])[torch.as_tensor(labels).long()]

    def title(self, metric):
        """What a score is called here: FID, sFID, IS … of Inception, and FD[vit-mnist], IS[vit-mnist] … of another space."""
        if self.name == "inception":
            return {"FD": "FID", "sFD": "sFID"}.get(metric, metric)
        return f"{metric}[{self.name}]"


def inception_space(network, device, tf1_resize=True):
    """The space of FID's Inception, by TensorFlow 1's resize (the published one) or PyTorch's (that of pytorch-fid)."""
    network = network.to(device)

    def extract(images):
        found = network.features(images, tf1_resize)
        return dict(pool=found["pool"], spatial=found["spatial"], probabilities=found["logits"].softmax(dim=1))
    return Space("inception" if tf1_resize else "inception-pytorch-resize", inception.SHA256, extract, None, device)


def vit_space(path, device):
    """The space of a ViT that train.py made: its class token after the last norm.  ValueError if the file holds another network."""
    run = load(path)
    if run.network.get("class") != "ViT":
        raise ValueError(f"--features {path} holds a {run.network.get('class')}: features are those of a ViT classifier or of "
                         "FID's Inception")
    network = run.build()[0].to(device)
    expected = (*network.image_size, network.channels)

    def extract(images):
        if tuple(images.shape[1:]) != expected:
            raise ValueError(f"images of {' x '.join(map(str, images.shape[1:]))}, where the ViT in {path} was taught ones of "
                             f"{' x '.join(map(str, expected))}")
        token = network.tokens(data.to_float(images))[:, 0]                              # (n, D)
        return dict(pool=token, probabilities=network.head(token).softmax(dim=1))
    return Space(f"vit-{Path(str(run.data.spec)).stem}", sha256_of(path), extract, run.data.classes, device)


def space_of(spec, device, cache=None, tf1_resize=True):
    """The space that --features names: "inception", or a file with its weights or a ViT's.

    OSError if weights cannot be downloaded, ValueError on those of another network or an Inception that is not FID's.
    """
    if spec == "inception":
        return inception_space(inception.load(read(inception.weights_file(cache=cache))), device, tf1_resize)
    content = read(spec)
    if isinstance(content, dict) and "Mixed_5b.branch1x1.conv.weight" in content:
        return inception_space(inception.load(read(inception.weights_file(spec))), device, tf1_resize)
    return vit_space(spec, device)


def default_space(data_spec, shape):
    """--features for a data set with images of shape (H, W, C): the shipped judge for the digits, Inception for all else."""
    return str(JUDGE) if data_spec == "mnist" and tuple(shape) == (32, 32, 1) else "inception"


@contextmanager
def full_precision():
    """float32 products in full, where autocast would round their factors to the 8 bits of bfloat16, or CUDA to TF32's 10."""
    old, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    torch.set_float32_matmul_precision("highest")
    try:
        with (torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False),
              cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False)):
            yield
    finally:
        torch.set_float32_matmul_precision(old)


class Moments(NamedTuple):
    """Statistics of n rows that a file holds; n is infinite where it does not say."""

    n: float
    mu: torch.Tensor                   # (D,)
    sigma: torch.Tensor                # (D, D)


@dataclass
class Measured:
    """What scores need of a set of n images."""

    n: float = 0                                         # infinite as that of its Moments
    pool: Statistics | Moments = field(default_factory=Statistics)       # of the pooled features
    spatial: Statistics | Moments | None = None                          # of the spatial ones, if the space has some
    rows: torch.Tensor | None = None                     # (m, D) pooled features of the first images
    probabilities: torch.Tensor | None = None            # (n, K)
    labels: torch.Tensor | None = None                   # (n,) the classes that were asked for

    def merge(self, other):
        """Add another's images behind these; returns self."""
        self.n += other.n
        self.pool.merge(other.pool)
        if other.spatial:
            self.spatial = (self.spatial or Statistics()).merge(other.spatial)
        self.rows, self.probabilities = (new if old is None else old if new is None else torch.cat([old, new]) for old, new in
                                         ((self.rows, other.rows), (self.probabilities, other.probabilities)))
        return self


@torch.no_grad()
def measure(batches, space, keep=None):
    """The Measured of batches of images (n, H, W, C) uint8 on the space's device, of all processes in the order of their ranks.

    keep: how many of this process's first rows to keep; None keeps all, and the probabilities too. Only the first process gets
    the whole. Nothing waits for the device, unless processes have to join what they measured.
    """
    measured, rows, probabilities = Measured(), [], []
    for images in batches:
        with full_precision():                           # not while the next batch is drawn
            found = space.extract(images)
        if keep is None:
            rows.append(found["pool"])
            probabilities.append(found["probabilities"])
        elif measured.n < keep:
            rows.append(found["pool"][:keep - measured.n].clone())       # a view would keep the whole batch
        measured.n += len(images)
        measured.pool.add(found["pool"])
        if "spatial" in found:
            measured.spatial = (measured.spatial or Statistics()).add(found["spatial"])
    measured.rows, measured.probabilities = (torch.cat(parts) if parts else None for parts in (rows, probabilities))
    if place()[1] == 1:
        return measured
    whole = Measured()
    for part in gathered(_moved(measured, "cpu")):
        whole.merge(_moved(part, space.device))
    return whole


def _moved(measured, device):
    """Move a Measured to another device, in place: what crosses processes does so from the CPU. Returns it."""
    for statistics in filter(None, (measured.pool, measured.spatial)):
        if statistics.n:
            statistics.mu, statistics.scatter = statistics.mu.to(device), statistics.scatter.to(device)
    measured.rows, measured.probabilities = (None if value is None else value.to(device)
                                             for value in (measured.rows, measured.probabilities))
    return measured


def measure_dataset(dataset, indices, space, keep=None, bar=None):
    """The Measured of some images of a data set, by their indices, with their labels; rows of the first `keep` are kept."""
    mine = share(len(indices))

    def read(start):
        return dataset.batch(indices[start:min(start + BATCH, mine.stop)])

    def batches():
        for images, _ in data.ahead(read, range(mine.start, mine.stop, BATCH), space.device):
            yield images.to(space.device, non_blocking=True)
            if bar is not None:
                bar.update(len(images))
    measured = measure(batches(), space, None if keep is None else keep - mine.start)
    if space.knows(dataset.classes):
        measured.labels = space.numbers(dataset.labels[dataset.rows[indices]], dataset.classes)
    return measured


def read_tables(path):
    """What an .npz of statistics holds: mu, sigma, perhaps mu_s, sigma_s, float64 tensors; n, features, features_sha256; and
    images, whether it has some.

    ADM's files lack n and what follows it and are of Inception; so do pytorch-fid's, which have no mu_s either and are of
    Inception by PyTorch's resize. None if there is no mu, or the path, perhaps None, is not that of an .npz. ValueError if the
    file is damaged or its tables do not fit.
    """
    if not str(path).endswith(".npz") or not Path(path).exists():
        return None
    readable(path)
    try:
        with open_npz(path) as archive:
            if "mu" not in archive:
                return None
            found = {key: torch.from_numpy(archive[key].astype(np.float64)) for key in ("mu", "sigma", "mu_s", "sigma_s")
                     if key in archive}
            for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
                if (mu in found) != (sigma in found):
                    raise ValueError(f"it has {mu} or {sigma}, but not both")
                if mu in found and found[mu].shape * 2 != found[sigma].shape:
                    raise ValueError(f"{mu} and {sigma} of shapes {tuple(found[mu].shape)} and {tuple(found[sigma].shape)} do not "
                                     "belong together")
            n = int(archive["n"]) if "n" in archive else math.inf
            if n < 2:
                raise ValueError(f"{n} samples: a covariance needs at least two")
            unnamed = "inception" if "mu_s" in found else "inception-pytorch-resize"
            return dict(found, n=n, images="arr_0" in archive or "images" in archive,
                        features=str(archive["features"]) if "features" in archive else unnamed,
                        features_sha256=str(archive["features_sha256"]) if "features_sha256" in archive else inception.SHA256)
    except Exception as error:                           # zipfile and numpy raise anything at all on a damaged file
        raise ValueError(f"cannot use {path}: {error}") from None


def read_statistics(path, space):
    """The Measured, without images, of the statistics in an .npz; None if it has none.  ValueError if they are of another space."""
    found = read_tables(path)
    if found is None:
        return None
    if (found["features"], found["features_sha256"]) != (space.name, space.sha256):
        theirs, ours = (f"{name} (weights {sha256[:8]})" for name, sha256 in
                        ((found["features"], found["features_sha256"]), (space.name, space.sha256)))
        raise ValueError(f"{path} holds statistics of {theirs}, the features asked for are {ours}: they cannot be compared")

    def moments(mu, sigma):
        return Moments(found["n"], found[mu].to(space.device), found[sigma].to(space.device)) if mu in found else None
    return Measured(found["n"], moments("mu", "sigma"), moments("mu_s", "sigma_s"))


def save_statistics(path, measured, images, space, **tables):
    """Write an .npz in the layout of ADM's reference batches: arr_0, images (n, H, W, C) uint8 to show and to take precision and
    recall from, or None; mu, sigma, mu_s, sigma_s; and n, features, features_sha256 and other tables, which ADM's evaluator does
    not read."""
    if images is not None:                               # ADM's graph takes colour only
        tables["arr_0"] = images.expand(-1, -1, -1, 3) if space.name.startswith("inception") else images
    tables |= dict(mu=measured.pool.mu.cpu(), sigma=measured.pool.sigma.cpu(), features=space.name, features_sha256=space.sha256)
    if measured.spatial:
        tables |= dict(mu_s=measured.spatial.mu.cpu(), sigma_s=measured.spatial.sigma.cpu())
    if math.isfinite(measured.n):
        tables["n"] = measured.n
    with atomic_file(path) as file:
        np.savez(file, **tables)


def space_named_in(path):
    """--features for an .npz whose statistics are of the shipped judge or of Inception; None if it has none.

    ValueError if they are of another space, whose file is not known.
    """
    given = read_tables(path)
    if given is None:
        return None
    if given["features"].startswith("inception"):        # by either resize: that of another --resize is refused later
        return "inception"
    if given["features_sha256"] == sha256_of(JUDGE):
        return str(JUDGE)
    raise ValueError(f"{path} holds statistics of {given['features']}: name that file with --features")


def with_statistics(measured, path, space):
    """A Measured (None: there are no images) with the statistics that its .npz holds, if it does, in place of its own: they are
    of more images than the file shows."""
    given = read_statistics(path, space)
    if given and measured:
        measured.n, measured.pool, measured.spatial = given.n, given.pool, given.spatial
    return measured or given
