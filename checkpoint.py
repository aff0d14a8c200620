"""Files of a run: save and load run.pt, read official checkpoints and .safetensors, show what is inside.

Report §4-7 … §4-9 (released models). A `Run` lists all that run.pt holds: plain values and tensors, each field with its type.
Nothing else is ever unpickled: files are read with weights_only=True. Released files load by name, see models.py.

    python checkpoint.py run.pt
    python checkpoint.py run.pt --slim shared.pt
"""
import interrupts                        # noqa: F401  first, for signals while PyTorch is imported
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch

import models
import text
from cli import Parser, add_overwrite_flag, one_line_errors, rule_of
from ddpm import SCHEDULES, Diffusion
from files import atomic_file, check_output, read_text, sha256_of
from models import clip_encoder, released_autoencoder, released_run
from tensor_files import read

VERSION = 1
EMBEDDED = 32 * 2 ** 20                          # bytes of an autoencoder's weights below which a run carries them
CLIP_WEIGHTS = ("model.safetensors", "pytorch_model.bin")                # Hugging Face's names for them
MOST_STEPS = 10_000                              # of a diffusion process; published ones have 4,000
MISFIT = (LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError)         # of what a file says, when it is used


@dataclass
class Process:
    """What a denoiser was trained on, see `ddpm.Diffusion`."""

    schedule: str
    T: int
    prediction: str
    variance: str
    range: tuple | list = ()                     # the schedule's ends, where they are not its defaults
    time: tuple | list = (1, 0)                  # scale and offset of the times that the network gets


@dataclass
class Data:
    """What a run was trained on."""

    spec: str | None                             # as --data names it; None of released weights
    classes: list | None                         # names
    num_classes: int | None
    channels: int                                # of what the network sees
    image_size: int | tuple | list               # likewise
    images: int | None = None                    # how many it trains on
    fingerprint: str | None = None               # of these images, see `data.fingerprint`
    summary: str | None = None                   # what they were read as, see `data.Dataset.summary`


@dataclass
class Autoencoder:
    """The autoencoder of a run's latents, or what a run that trained one knows of it."""

    scale: float | int                           # what latents are multiplied by
    path: str | None = None
    sha256: str | None = None                    # of the file
    network: dict | None = None                  # its description and weights, where they are ours and small
    model: dict | None = None


@dataclass
class Clip:
    """The frozen text encoder of a run."""

    path: str
    sha256: str                                  # of the file of its weights
    empty: torch.Tensor                          # (L, D), the context of the empty caption


@dataclass
class Run:
    """What run.pt holds."""

    version: int
    step: int | None                             # None of released weights
    config: dict                                 # every flag of train.py
    network: dict                                # class, arguments, and those of a text encoder: `models.build` takes it
    diffusion: Process | None                    # None of a classifier and an autoencoder
    data: Data
    model: dict                                  # state dicts
    ema: dict
    optimizer: dict | None = None
    vae: Autoencoder | None = None               # None on pixels
    text: Clip | None = None                     # None without CLIP
    bad_steps: int = 0                           # steps in a row, up to this one, whose gradient was not finite
    log: torch.Tensor | None = None              # (2, G), losses since the last row of the log, and how many, by group
    norm: float = math.nan                       # of the last gradient
    signature: str | None = None                 # of the places that config names, see `settings.signature`

    file = None                                  # the path that it was read from

    def build(self, weights="ema"):
        """The network, in eval mode, and the Diffusion or None; weights: "ema" or "model".  ValueError if they do not fit."""
        try:
            network = models.build_with(self.network, getattr(self, weights))
            classes, known = getattr(network, "num_classes", None), self.data.classes
            if known and classes is not None and classes != len(known):
                raise ValueError(f"it names {len(known)} classes, and its network knows {classes}")
            diffusion, process = None, self.diffusion
            if process is not None:
                if not hasattr(network, "context_dim"):
                    raise ValueError(f"a {self.network['class']} denoises nothing, and has no process")
                if not 0 < process.T <= MOST_STEPS:
                    raise ValueError(f"a process of {process.T} steps, which has from 1 to {MOST_STEPS:,}")
                betas = SCHEDULES[process.schedule](process.T, *process.range)
                scale, offset = process.time
                diffusion = Diffusion(betas, process.prediction, process.variance, np.arange(len(betas)) * scale + offset)
        except (ValueError, *MISFIT) as error:
            raise ValueError(f"the checkpoint does not describe its network: {' '.join(str(error).split())[:300]}") from None
        return network, diffusion


def plain(record):
    """A record as a dict of plain values and tensors: the inverse of `typed`."""
    return {field.name: plain(value) if is_dataclass(value := getattr(record, field.name)) else value for field in fields(record)}


def typed(kind, content):
    """A record of a kind, a dataclass, of a dict.  ValueError on a field that is missing or of another type."""
    values = {}
    for field in fields(kind):
        if field.name not in content:
            continue                                     # older files lack what has a default
        value = content[field.name]
        record = next(filter(is_dataclass, get_args(field.type) or (field.type,)), None)
        if record and isinstance(value, dict):
            value = typed(record, value)
        if not isinstance(value, field.type):
            raise ValueError(f"its {field.name} is a {type(value).__name__}")
        if isinstance(value, int) and not 0 <= value < 2 ** 63:
            raise ValueError(f"its {field.name} is {str(value)[:50]}")
        values[field.name] = value
    try:
        return kind(**values)
    except TypeError as error:                           # names what is missing
        raise ValueError(f"it lacks {str(error).partition(': ')[2]}") from None


def check_plain(run):
    """ValueError on what no run of train.py has where it has plain values, or on numbers that mean nothing."""
    def of(kind, values):
        return all(isinstance(value, kind) for value in values)

    data, process, scale = run.data, run.diffusion, run.vae.scale if run.vae else 1
    for name, fits in (
            ("config", of(str, run.config) and of((str, int, float, type(None)), run.config.values())),
            ("classes", of(str, data.classes or ())),
            ("image_size", isinstance(data.image_size, int) or len(data.image_size) == 2 and of(int, data.image_size)),
            ("range", process is None or len(process.range) <= 2 and of((int, float), process.range)),
            ("time", process is None or len(process.time) == 2 and of((int, float), process.time)
             and all(map(math.isfinite, process.time))),
            ("scale", 0 < scale < math.inf),
            ("autoencoder", not (run.vae and run.vae.network) or run.vae.network.get("class") == "AutoencoderKL")):
        if not fits:
            raise ValueError(f"its {name} is none")


def save(path, run):
    """Write a run atomically. OSError if it cannot be written, a full disk included; the previous file then stays whole."""
    try:
        with atomic_file(path) as file:
            torch.save(plain(run), file)
    except RuntimeError as error:                        # in which torch's archive writer hides the disk's error
        raise OSError(f"cannot write {path}: {error.__context__ or error}") from None


def snapshot(content):
    """Nested dicts and lists with their tensors copied to the CPU's memory; from a GPU they are there once it is waited for."""
    if isinstance(content, dict):
        return {key: snapshot(value) for key, value in content.items()}
    if isinstance(content, list):
        return [snapshot(value) for value in content]
    return content.to("cpu", non_blocking=True, copy=True) if torch.is_tensor(content) else content


class Saves:
    """Writes runs while training goes on, one at a time.  As a context it waits for the last, also after an error."""

    def __init__(self):
        self.thread, self.last = ThreadPoolExecutor(1), None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with self.thread:
            self.wait()

    def begin(self, path, run):
        """Have a run written, see `save`, as it is now: its weights and moments may change once this returns."""
        self.wait()
        copies = {part: snapshot(getattr(run, part)) for part in ("model", "ema", "optimizer")}
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.last = self.thread.submit(save, path, replace(run, **copies))

    def wait(self):
        """Wait until what was begun is written.  OSError if it could not be."""
        last, self.last = self.last, None
        if last:
            last.result()

    def check(self):
        """As `wait`, but without waiting: an error is raised once it is known."""
        if self.last and self.last.done():
            self.wait()


def load(path, config=None):
    """The Run in a run.pt, or one made up around official weights (then without optimizer; config: see `models.infer`).

    ValueError or OSError if there is none that can be read.
    """
    content = read(path)
    try:
        if not (isinstance(content, dict) and "version" in content and "network" in content):
            released = released_run(content, config)
            if released["places"][1:] and os.environ.get("RANK", "0") == "0":
                first, *others = (place.strip(".") or "its top level" for place in released["places"])
                print(f"{path} holds several sets of weights: {first} is taken, not {', '.join(others)}", file=sys.stderr)
            content = {"version": VERSION, **released}
        if content["version"] != VERSION:
            raise ValueError(f"it has format version {str(content['version'])[:50]}, this code reads {VERSION}")
        run = typed(Run, content)
        check_plain(run)
        run.file = Path(path)
        return run
    except (ValueError, *MISFIT) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"cannot use {path}: {reason}") from None


def load_network(path, config=None):
    """The network of a run.pt (its EMA weights), of an official checkpoint or of a .safetensors file, in eval mode."""
    return load(path, config).build()[0]


def load_autoencoder(path):
    """The autoencoder of a run, or of a released file, .safetensors or a .pt, .bin or .ckpt of plain tensors, in eval mode.

    Its scale is the run's, or Stable Diffusion's. Its `origin`, an `Autoencoder`, is what a run on its latents keeps of it.
    ValueError or OSError if there is none that can be read.
    """
    content = read(path)
    try:
        if isinstance(content, dict) and "network" in content:
            run = load(path)
            if run.network.get("class") != "AutoencoderKL":
                raise ValueError(f"it holds a {run.network.get('class')}, which is no autoencoder")
            if run.vae is None:
                raise ValueError("it lacks the scale of its latents")
            network, _ = run.build()
            network.scale = run.vae.scale
        else:
            run, network = None, released_autoencoder(content)
    except (ValueError, *MISFIT) as error:
        raise ValueError(f"cannot use {path}: {error}") from None
    small = run and sum(value.nbytes for value in network.state_dict().values()) < EMBEDDED
    network.origin = Autoencoder(network.scale, str(Path(path).resolve()), sha256_of(path),
                                 *((run.network, network.state_dict()) if small else ()))
    return network


def load_clip(path):
    """CLIP's text encoder, in eval mode, and its tokenizer -> (CLIPTextEncoder, Tokenizer).

    path: a folder of Hugging Face's files, or the weights, whose folder then holds the vocabulary. The encoder's `origin`, path
    and sha256, is what a run on its contexts keeps of it. ValueError or OSError if a file is missing, damaged
    or of another network.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        path = next(filter(Path.is_file, (folder / name for name in CLIP_WEIGHTS)), folder / CLIP_WEIGHTS[0])
    tensors = read(path)
    try:
        encoder = clip_encoder(tensors)
    except (ValueError, *MISFIT) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise ValueError(f"{path} holds no text encoder of CLIP: {reason}") from None
    settings = folder / "config.json"                    # where it is there: OpenCLIP's shapes do not show their exact GELU
    if settings.is_file() and re.search(r'"hidden_act":\s*"gelu"', read_text(settings)):
        raise ValueError(f"{settings} asks for an exact GELU: only OpenAI's CLIP, with its quick GELU, is known here")
    files = (folder / "vocab.json", folder / "merges.txt")
    tokenizer = text.Tokenizer(*(files if files[0].is_file() else (None, folder / text.MERGES_FILE)), length=encoder.length)
    if len(tokenizer.ids) != encoder.vocab:
        raise ValueError(f"the vocabulary in {folder} has {len(tokenizer.ids)} pieces where its encoder has {encoder.vocab}")
    encoder.origin = dict(path=str(folder.resolve()), sha256=sha256_of(path))
    return encoder, tokenizer


def summary(path):
    """What a checkpoint holds, as lines of text."""
    def listed(settings):
        return ", ".join(f"{key}={value}" for key, value in settings.items() if value is not None)

    run = load(path)
    try:
        models.check_description(run.network)
        rows = {
            "network": f"{run.network['class']} {listed(run.network['arguments'])}",
            "parameters": f"{sum(value.numel() for value in run.model.values()):,}",
            "diffusion": listed({field.name: value for field in fields(Process) if run.diffusion
                                 and (value := getattr(run.diffusion, field.name)) != field.default}),
            "data": listed({**plain(run.data), "summary": None}),
            "found": run.data.summary,
            "latents": f"of an autoencoder, scaled by {run.vae.scale}" if run.vae else "",
            "flags": " ".join(f"--{key.replace('_', '-')}" + f" {value}" * (value is not True)
                              for key, value in run.config.items() if value is not None and value is not False),
        }
    except (ValueError, *MISFIT) as error:
        raise ValueError(f"{path} does not describe its network: {error}") from None
    title = f"{path}: " + ("official weights" if run.step is None else f"a run at step {run.step}")
    return [title, *(f"{name:10} {value}" for name, value in rows.items() if value)]


def slim(run):
    """A run with its averaged weights only, in half precision: what sampling and features need, an eighth of the size.

    ValueError if it is no run, but released weights.
    """
    if run.step is None:
        raise ValueError("these are released weights, which hold nothing else: only a run of train.py can be made slim")
    weights = {key: value.half() if value.is_floating_point() else value for key, value in run.ema.items()}
    return replace(run, model=weights, ema=weights, optimizer=None, log=None)        # one tensor is stored once


def flags():
    """The command line."""
    parser = Parser(prog="checkpoint.py", description="Show what a checkpoint holds.")
    parser.add_argument("file", help="run.pt, a released checkpoint, or a .safetensors file")
    parser.add_argument("--slim", metavar="OUT", help="write its averaged weights alone to this .pt, in half precision")
    add_overwrite_flag(parser)
    return parser


def main(argv=None):
    """The command: print what a file holds, or write what of it is worth sharing."""
    args = flags().parse_args(argv)
    with one_line_errors("checkpoint.py"):
        if args.slim:
            check_output(args.slim, "slim run", **rule_of(args))
            save(args.slim, slim(load(args.file)))
        print("\n".join(summary(args.slim or args.file)))


if __name__ == "__main__":
    sys.exit(main())
