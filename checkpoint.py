"""Files of a run: save and load run.pt, read official checkpoints and .safetensors, show what is inside.

Report §4-7 … §4-9 (released models). A run is one dict of plain values and tensors: version, step, config (every flag),
network (class, arguments, text), diffusion (schedule, T, prediction, variance; None for a classifier), data (spec, classes,
channels, image size), vae (None for pixels), text (None without CLIP), model, ema, optimizer, and what training accumulates.
Nothing else is ever unpickled: files are read with weights_only=True. Released files load by name, see released.py.

    python checkpoint.py run.pt
    python checkpoint.py run.pt --slim shared.pt
"""
import fcntl
import json
import math
import mmap
import os
import re
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import models
import text
from cli import Parser, one_line_errors
from ddpm import SCHEDULES, Diffusion
from files import atomic_file, sha256_of
from released import clip_encoder, released_autoencoder, released_run

VERSION = 1
EMBEDDED = 32 * 2 ** 20                          # bytes of an autoencoder's weights below which a run carries them
FIELDS = {"step": int, "config": dict, "network": dict, "diffusion": (dict, type(None)), "data": dict, "vae": (dict, type(None)),
          "text": (dict, type(None)), "model": dict, "ema": dict, "optimizer": dict}
CLIP_WEIGHTS = ("model.safetensors", "pytorch_model.bin")                # Hugging Face's names for them
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def save(path, run):
    """Write a run atomically. OSError if it cannot be written, a full disk included; the previous file then stays whole."""
    try:
        with atomic_file(path) as file:
            torch.save(run, file)
    except (OSError, RuntimeError) as error:             # torch's archive writer hides a full disk behind a RuntimeError
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"cannot write {path}: {reason}") from None


@contextmanager
def sole_writer(path):
    """Keep a second process from writing the same run. ValueError if one does already."""
    lock = Path(path).with_suffix(".lock")
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)             # the kernel lets go of it however the process ends
            sole = os.path.samestat(os.fstat(file.fileno()), os.stat(lock))          # and nobody removed it meanwhile
        except OSError:
            sole = False
        if not sole:
            raise ValueError(f"{path} is being written by another run: choose another --out") from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def read(path):
    """The content of a .pt or .safetensors file. ValueError or OSError if it is missing, damaged, or would run code."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: there is no such file")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")                  # of what is then refused
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception:                                # torch raises anything at all on a damaged file
            raise ValueError(f"{path} is not a checkpoint of plain tensors: it is damaged or cut off, or holds Python objects, "
                             "which could run code and are not loaded (of released weights, use the .safetensors file)") from None


def read_safetensors(path):
    """Tensors by name, mapped from the file.  Layout: 8 bytes of header length, a JSON header, the raw tensors.

    ValueError if the header is none, or a tensor's place is outside the file, overlaps another's or does not fit its shape.
    """
    def refuse(reason):
        raise ValueError(f"{path} is not a valid safetensors file: {reason}")

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name appears twice")
        return dict(pairs)

    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            refuse("it ends before its header does")
        try:
            header = json.loads(file.read(length), object_pairs_hook=unique)
            header.pop("__metadata__", None)
            entries = []
            for name, entry in header.items():
                (begin, end), shape = entry["data_offsets"], entry["shape"]
                if any(type(number) is not int or number < 0 for number in (begin, end, *shape)):
                    raise ValueError(f"{name} has other than whole numbers from 0 on: {[begin, end]}, {shape}")
                entries.append((begin, end, name, DTYPES[entry["dtype"]], shape))
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            refuse(f"its header is not understood ({type(error).__name__}: {error})")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)   # read when touched, writable without the file
    tensors, expected = {}, 0
    for begin, end, name, dtype, shape in sorted(entries, key=lambda entry: entry[:3]):
        nbytes = math.prod(shape) * dtype.itemsize
        if end > size - 8 - length:
            refuse(f"{name} ends outside the file")
        if begin != expected:
            refuse(f"{name} overlaps another tensor, or leaves a gap")
        if end - begin != nbytes:
            refuse(f"{name} has {end - begin} bytes where its shape {shape} takes {nbytes}")
        expected = end
        try:
            flat = (torch.frombuffer(content, dtype=dtype, count=math.prod(shape), offset=8 + length + begin) if nbytes
                    else torch.empty(0, dtype=dtype))
            tensors[name] = flat.reshape(shape)
        except (RuntimeError, TypeError):                # no elements, yet sides beyond 64 bits
            refuse(f"{name} cannot have the shape {shape}")
    return tensors


def load(path, config=None):
    """The run in a run.pt, or one made up around official weights (then without optimizer; config: see `released.infer`).

    ValueError or OSError if there is none that can be read.
    """
    content = read(path)
    try:
        if not (isinstance(content, dict) and "version" in content and "network" in content):
            return {"version": VERSION, **released_run(content, config)}
        if content["version"] != VERSION:
            raise ValueError(f"it has format version {content['version']}, this code reads {VERSION}")
        content.setdefault("text", None)                 # runs of before there was text lack it
        for key, kind in FIELDS.items():
            if not isinstance(content[key], kind):
                raise ValueError(f"its {key} is a {type(content[key]).__name__}")
        return content
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"cannot use {path}: {reason}") from None


def build(run, weights="ema"):
    """The network and the Diffusion (or None) of a run; weights: "ema" or "model".  ValueError if they do not fit."""
    try:
        network = models.build(run["network"])
        network.load_state_dict(run[weights], strict=True)
        diffusion, described = None, run["diffusion"]
        if described is not None:
            betas = SCHEDULES[described["schedule"]](described["T"], *described.get("range", ()))
            scale, offset = described.get("time", (1, 0))
            diffusion = Diffusion(betas, described["prediction"], described["variance"], np.arange(len(betas)) * scale + offset)
    except (KeyError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"the checkpoint does not describe its network: {str(error).strip()[:300]}") from None
    return network.eval(), diffusion


def load_network(path, config=None):
    """The network of a run.pt (its EMA weights), of an official checkpoint or of a .safetensors file, in eval mode."""
    return build(load(path, config))[0]


def load_autoencoder(path):
    """The autoencoder of a run, or of a released file, .safetensors or a .pt, .bin or .ckpt of plain tensors, in eval mode.

    Its scale is the run's, or Stable Diffusion's. Its `origin` is what a run notes of it that is trained on its latents: path,
    sha256, and network and model if it is one of ours and small. ValueError or OSError if there is none that can be read.
    """
    content = read(path)
    try:
        if isinstance(content, dict) and "network" in content:
            run = load(path)
            if run["network"].get("class") != "AutoencoderKL":
                raise ValueError(f"it holds a {run['network'].get('class')}, which is no autoencoder")
            network, _ = build(run)
            network.scale = (run["vae"] or {}).get("scale")
            if not isinstance(network.scale, float):
                raise ValueError("it lacks the scale of its latents")
        else:
            run, network = None, released_autoencoder(content.get("state_dict", content) if isinstance(content, dict) else content)
    except ValueError as error:
        raise ValueError(f"cannot use {path}: {error}") from None
    network.origin = dict(path=str(Path(path).resolve()), sha256=sha256_of(path))
    if run and sum(value.nbytes for value in network.state_dict().values()) < EMBEDDED:
        network.origin |= dict(network=run["network"], model=network.state_dict())
    return network


def load_clip(path):
    """CLIP's text encoder, in eval mode, and its tokenizer -> (CLIPTextEncoder, Tokenizer).

    path: a folder of Hugging Face's files, or the weights, whose folder then holds the vocabulary. The encoder's `origin`, path
    and sha256, is what a run notes of it that was trained with its contexts. ValueError or OSError if a file is missing, damaged
    or of another network.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        path = next(filter(Path.is_file, (folder / name for name in CLIP_WEIGHTS)), folder / CLIP_WEIGHTS[0])
    tensors = read(path)
    try:
        encoder = clip_encoder(tensors)
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise ValueError(f"{path} holds no text encoder of CLIP: {reason}") from None
    settings = folder / "config.json"                    # where it is there: OpenCLIP's shapes do not show their exact GELU
    if settings.is_file() and re.search(r'"hidden_act":\s*"gelu"', settings.read_text("utf-8", "replace")):
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
        rows = {
            "network": f"{run['network']['class']} {listed(run['network']['arguments'])}",
            "parameters": f"{sum(value.numel() for value in run['model'].values()):,}",
            "diffusion": listed(run["diffusion"] or {}),
            "data": listed(run["data"]),
            "latents": run["vae"] and f"of an autoencoder, scaled by {run['vae']['scale']}",
            "flags": " ".join(f"--{key.replace('_', '-')}" + f" {value}" * (value is not True)
                              for key, value in run["config"].items() if value is not None and value is not False),
        }
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} does not describe its network: {error}") from None
    title = f"{path}: " + ("official weights" if run["step"] is None else f"a run at step {run['step']}")
    return [title, *(f"{name:10} {value}" for name, value in rows.items() if value)]


def slim(run):
    """A run with its averaged weights only, in half precision: what sampling and features need, an eighth of the size.

    ValueError if it is no run, but released weights.
    """
    if run["step"] is None:
        raise ValueError("these are released weights, which hold nothing else: only a run of train.py can be made slim")
    weights = {key: value.half() if value.is_floating_point() else value for key, value in run["ema"].items()}
    kept = {key: run[key] for key in ("version", "step", "config", "network", "diffusion", "data", "vae", "text")}
    return {**kept, "model": weights, "ema": weights, "optimizer": {}}   # one tensor is stored once


def flags():
    """The command line."""
    parser = Parser(prog="checkpoint.py", description="Show what a checkpoint holds.")
    parser.add_argument("file", help="run.pt, a released checkpoint, or a .safetensors file")
    parser.add_argument("--slim", metavar="OUT", help="write its averaged weights alone to this .pt, in half precision")
    return parser


def main(argv=None):
    """The command: print what a file holds, or write what of it is worth sharing."""
    args = flags().parse_args(argv)
    with one_line_errors("checkpoint.py"):
        if args.slim:
            if Path(args.slim).exists():
                raise ValueError(f"--slim {args.slim}: there is such a file already, which stays as it is")
            save(args.slim, slim(load(args.file)))
        print("\n".join(summary(args.slim or args.file)))


if __name__ == "__main__":
    sys.exit(main())
