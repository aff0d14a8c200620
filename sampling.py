"""Sampling from a network: its conditions, its batches, guidance, decoding; and a set of samples that is drawn once.

Report §4-5 (inference), §2-5 (latents are decoded), §4-1 (a text is encoded), §3 (guidance). sample.py is the command; pictures
of runs, evaluate.py and study.py draw through here as well. An image depends on the seed and its number alone, whatever the batch
size, the number of threads or of processes: to rounding, which in float32 is at most one grey level. Who calls chooses the
precision, by `cli.autocast`.
"""
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import ddpm
from checkpoint import Clip, load, load_autoencoder, load_clip
from cli import PRECISIONS, natural, not_negative, positive, side_by_side, threads_for
from data import OWN_SETS, Dataset, to_uint8
from files import sha256_of
from tables import Table, fill
from unet import SuperResUNet
from vae import in_pieces, pieces

CFG_SCALE = 1.5                  # where the network knows an unconditional input
SCATTERED = 2000                 # samples of a run on points
STEPS = 20                       # of DPM-Solver++; more barely change the picture


def labels_of(indices, classes):
    """The conditions (n, …) of images number `indices`, or None: of classes, K numbers or the rows (K, …) of a text, in turn."""
    return None if classes is None else torch.from_numpy(np.asarray(classes)[[i % len(classes) for i in indices]])


@torch.no_grad()
def encode_condition(network, y):
    """Conditions (n, …) as the network takes them at every step: on its device, and a text's ids encoded, once."""
    if y is None:
        return None
    y = y.to(next(network.parameters()).device)
    if network.context_dim is None:
        return y
    return y.float() if y.is_floating_point() else network.text_encoder(y)               # (n, L, D)


class TextReader(NamedTuple):
    """What makes conditions of captions."""

    tokenizer: object                                    # a network's own text encoder, or CLIP's tokenizer
    encoder: object = None                               # CLIP's encoder; None where the network encodes the ids itself
    empty: torch.Tensor | None = None                    # the empty caption's ids or context, where a run keeps it

    @torch.no_grad()
    def __call__(self, captions):
        """Ids (K, L, W) of a network's own encoder, or CLIP's contexts (K, L, D), of a list of captions."""
        ids = self.tokenizer.tokenize(captions)
        return ids if self.encoder is None else self.encoder(ids.to(next(self.encoder.parameters()).device)).cpu()

    def record(self):
        """What a run keeps of CLIP; None of an encoder of its own."""
        return None if self.encoder is None else Clip(**self.encoder.origin, empty=self([""])[0])


def unconditional(network, reader=None, cfg_drop=None):
    """The unconditional input of guidance: a null label, or the empty caption's ids or context (L, D); None if it was not learned.

    reader: a text network's; cfg_drop: the share of captions that were dropped in its training, where that is known.
    """
    if network.context_dim is None:
        return network.null_label
    if cfg_drop == 0:
        return None
    return reader([""])[0] if reader.empty is None else reader.empty


def draw(network, diffusion, indices, classes=None, seed=0, batch_size=None, callback=None, **options):
    """Images number `indices` of a seed: an iterator of (indices, x (n, C, H, W) on the network's device), batch by batch.

    classes: a list of numbers, or the ids (K, …) or contexts (K, L, D) of captions, in turn. callback and options are
    `ddpm.sample`'s. Where a GPU's memory does not hold a batch it is halved. On the CPU it is drawn in parts side by side, unless
    a callback wants to see the batches one after the other, or the network is compiled, which threads must not do together.
    """
    device = next(network.parameters()).device
    batch_size = batch_size or (64 if device.type == "cpu" else 256)
    options = {"sampler": "dpm++", "steps": STEPS, **options}
    if network.context_dim is not None and options.get("y_null") is not None:
        options["y_null"] = encode_condition(network, options["y_null"][None])[0]

    def drawn(batch, callback):
        return batch, ddpm.sample(diffusion, network, (len(batch), network.channels, *network.image_size),
                                  encode_condition(network, labels_of(batch, classes)), seeds=[(seed, i) for i in batch],
                                  callback=callback, **options)
    at_once = math.ceil(len(indices) / max(1, math.ceil(len(indices) / batch_size)))     # in batches of equal size
    workers = 1 if callback else threads_for(network, at_once)
    if workers < 2:
        return pieces(lambda batch: drawn(batch, callback), indices, batch_size)
    part = math.ceil(at_once / workers)
    return side_by_side(drawn, [indices[i:i + part] for i in range(0, len(indices), part)], workers)


def draw_images(network, diffusion, indices, conditions=None, seed=0, autoencoder=None, scale=None, y_null=None, **options):
    """As `draw`, but images uint8 (n, H, W, C), which latents are decoded to, at the scale that `guidance_scale` says."""
    for batch, x in draw(network, diffusion, indices, conditions, seed, clip=autoencoder is None, y_null=y_null,
                         cfg_scale=guidance_scale(network, scale, y_null), **options):
        yield batch, to_uint8(x if autoencoder is None else decode(autoencoder, x))


def draw_points(network, diffusion, n, seed=0):
    """n samples (n, 2), on the CPU, of a network of points."""
    return torch.cat([x for _, x in draw(network, diffusion, range(n), seed=seed, batch_size=n)]).flatten(1).cpu()


def drawable(path):
    """The Run in a file, its network and its process.  ValueError if there is nothing that can be sampled from it."""
    run = load(path)
    network, diffusion = run.build()
    kind = run.network["class"]
    if diffusion is None or kind == "SuperResUNet":
        raise ValueError(f"{path} holds a {kind}, which " + {
            "ViT": "classifies: there is nothing to sample",
            "AutoencoderKL": "encodes and decodes: a network trained on its latents samples",
            "SuperResUNet": f"enlarges images: it needs small ones to start from, as --ckpt BASE.pt --cascade {path} draws",
        }.get(kind, "was trained in continuous time: it can be loaded, but not sampled here"))
    if network.context_dim is not None and run.step is None and kind == "UNet":
        raise ValueError(f"{path} takes LDM's class as a token, which nothing here encodes: it can be loaded and counted, but not "
                         "sampled")
    return run, network, diffusion


def beside(run, path):
    """The path of what a run names, if that lies beside the run's own file, else None.

    A run may be anyone's: nothing else that it names on this machine is read, and nothing written there.
    """
    name = Path(path).name
    place = run.file.resolve().parent / name if run.file and name not in ("", "..") else None
    return place if place and place.exists() else None


def training_data(run):
    """The training data of a run, as `data.load` takes it: a set of this project, or what lies beside the run.  ValueError else."""
    spec = run.data.spec
    if spec in OWN_SETS:
        return spec
    name, colon, folder = spec.partition(":") if spec.startswith(("coco:", "cifar10:")) else ("", "", spec)
    place = beside(run, folder)
    if place is None:
        raise ValueError(f"{run.file} was trained on {spec}, which does not lie beside it: put it there, or name real images by "
                         "--reference")
    return f"{name}{colon}{place}"


def text_reader(run, network, clip=None):
    """The TextReader of a run's network; None if it was not trained with texts.

    clip: where CLIP is, if not beside the run. ValueError without CLIP, or if it is another than in training.
    """
    if network.context_dim is None:
        if clip is not None:
            raise ValueError("--clip: the network was not trained with texts")
        return None
    if hasattr(network, "text_encoder"):
        if clip is not None:
            raise ValueError("--clip: the run has a text encoder of its own")
        return TextReader(network.text_encoder)
    if clip is None and run.text is None:
        raise ValueError("the network was trained with CLIP: --clip DIR names a folder of its encoder and vocabulary")
    clip = clip or beside(run, run.text.path)
    if clip is None:
        raise ValueError(f"the text encoder {run.text.path} does not lie beside {run.file}: put it there, or name it by --clip DIR")
    encoder, tokenizer = load_clip(clip)
    sha256 = encoder.origin["sha256"]
    if run.text and run.text.sha256 != sha256:
        raise ValueError(f"--clip {clip} is another text encoder than the network was trained with: its SHA-256 is {sha256}, not "
                         f"{run.text.sha256}")
    if encoder.dim != network.context_dim:
        raise ValueError(f"--clip {clip}: its contexts are {encoder.dim} wide, the network wants {network.context_dim}")
    empty = run.text.empty if run.text else None
    if empty is not None and (empty.shape != (encoder.length, encoder.dim) or not empty.is_floating_point()):
        raise ValueError(f"{run.file} holds no context of the empty caption, which guidance needs")
    return TextReader(tokenizer, encoder, empty)


def read_prompts(prompts, reader, network):
    """Ids or contexts of --prompt, a list of texts, see `TextReader`; None for a network without texts, whose reader is None.

    Says on stderr what of a prompt is cut off. ValueError if the network wants a prompt and there is none, or the reverse.
    """
    if reader is None:
        if prompts:
            raise ValueError("--prompt: the network was not trained with texts" +
                             ("; --classes says what it shall draw" if network.num_classes else ""))
        return None
    if not prompts:
        raise ValueError('the network draws what a text says: --prompt "…"')
    for prompt in prompts:
        if lost := reader.tokenizer.cut(prompt):
            print(f"warning: the prompt is too long for {reader.tokenizer.length} tokens; this is cut off: {lost!r}",
                  file=sys.stderr)
    return reader(prompts)


def decoder(path, run, network):
    """The autoencoder that decodes a network's latents: that of --vae, or the run's own, in it or beside it; None if none is known.

    ValueError if it is not there, does not fit, or is another than the run was trained with.
    """
    kept = run.vae
    if kept is None:
        if path is not None:
            raise ValueError("--vae: the network works on pixels, there is nothing to decode")
        return None
    if path is None and kept.model:
        autoencoder, _ = replace(run, network=kept.network, model=kept.model, diffusion=None).build("model")
    elif path is None and kept.path is None:
        return None
    else:
        path = path or beside(run, kept.path)
        if path is None:
            raise ValueError(f"the autoencoder {kept.path} does not lie beside {run.file}: put it there, or name it by --vae FILE")
        autoencoder = load_autoencoder(path)
        if kept.sha256 and kept.sha256 != autoencoder.origin.sha256:
            raise ValueError(f"{path} is another autoencoder than the network was trained with: its SHA-256 is "
                             f"{autoencoder.origin.sha256}, not {kept.sha256}")
    if autoencoder.latent_channels != network.channels:
        raise ValueError(f"--vae {path}: its latents have {autoencoder.latent_channels} channels, those of the network "
                         f"{network.channels}")
    autoencoder.scale = kept.scale
    return autoencoder


@torch.no_grad()
def decode(autoencoder, x, batch_size=16):
    """Images (n, C, f H, f W) of latents x (n, c, H, W), which are scaled; a few at a time, fewer if the memory is full."""
    return in_pieces(lambda z: autoencoder.decode(z / autoencoder.scale), x, batch_size)


def guidance_scale(network, scale=None, y_null=None):
    """The guidance scale: the one asked for, or what suits the network.  ValueError if it needs what the network lacks.

    y_null: a text network's unconditional input.
    """
    known = network.null_label is not None or y_null is not None
    if scale is None:
        return CFG_SCALE if known else 1.0
    if scale != 1 and not known:
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
    for word in [text] if text in (names or ()) else text.split(","):       # a name may have commas
        if names and word in names:
            classes.append(names.index(word))
        elif word.strip().isdecimal() and int(word) < num_classes:
            classes.append(int(word))
        else:
            raise ValueError(f"--classes: {word!r} is not a class of the run, which has 0 to {num_classes - 1}")
    return classes


def pixel_shape(network, autoencoder=None):
    """(H, W, C) of the images that a network draws, through an autoencoder or by itself."""
    if autoencoder is None:
        return (*network.image_size, network.channels)
    return (*(side * autoencoder.factor for side in network.image_size), autoencoder.channels)


def draw_once(path, network, diffusion, n, how, names=None, cache=None, batch_size=None, autoencoder=None, contexts=None,
              y_null=None):
    """The first n samples of a checkpoint, as a data set in the cache: a table that is filled as they are drawn.

    how: classes, cfg_scale, sampler, steps, seed, and what else tells samples of the checkpoint apart, plain values; names: of all
    classes, if the samples shall have labels; autoencoder: decodes the network's latents; contexts: of captions, in place of
    classes; y_null: of the empty caption. What an earlier, perhaps killed, call with the same checkpoint and the same `how` drew
    is there already; a larger n adds to it.
    """
    classes = how["classes"]

    def compute(rows):
        for indices, images in draw_images(network, diffusion, rows.tolist(), classes if contexts is None else contexts,
                                           how["seed"], autoencoder, how["cfg_scale"], y_null, batch_size=batch_size,
                                           sampler=how["sampler"], steps=how["steps"]):
            yield indices, [images.cpu()]

    columns = {"images": (pixel_shape(network, autoencoder), np.uint8)}
    with Table(f"{Path(path).stem}-samples", dict(checkpoint=sha256_of(path), **how), n, columns, cache) as table:
        fill(table, compute, "drawing")
        images, = table.arrays()
    labels = None if names is None else labels_of(range(n), classes).numpy()             # released weights have no names
    return Dataset(path, images, labels, names)


def add_sampling_flags(parser):
    """The flags of sample.py and evaluate.py that say how samples are drawn."""
    parser.add_argument("--vae", help="the autoencoder of a latent model, as sd-vae-ft-mse's .safetensors: decodes what it draws")
    parser.add_argument("--clip", metavar="DIR", help="CLIP's text encoder, a folder of Hugging Face's files, for models trained "
                        "with it (default: beside the run)")
    parser.add_argument("--classes", help="numbers or names, as 3,5; the images cycle through them (default: all)")
    parser.add_argument("--cfg-scale", type=not_negative, help=f"guidance; 1 is none (default: {CFG_SCALE} if the run knows an "
                        "unconditional input)")
    parser.add_argument("--sampler", choices=ddpm.SAMPLERS, help="default: dpm++")
    parser.add_argument("--steps", type=positive, help=f"evaluations along the trajectory (default: {STEPS}; 250 for ddpm)")
    parser.add_argument("--batch-size", type=positive, help="images at once in each process (default: what memory holds)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network first: pays for many images")
    parser.add_argument("--seed", type=natural, default=0, help="default: 0")
    parser.add_argument("--precision", choices=PRECISIONS, help="of products, tf32 on CUDA only (default: bf16 on CUDA, fp32 on "
                        "the CPU)")


def load_upsampler(path, base, labelled, shape):
    """The upsampler in a file, and its process, for images (H, W, C) = shape that the network of a run draws.

    base: that run, as `checkpoint.load` gives it; labelled: its network's number of classes, or None. ValueError if the file
    holds no upsampler, or one of other images or classes.
    """
    own = load(path)
    network, diffusion = own.build()
    if not isinstance(network, SuperResUNet):
        raise ValueError(f"--cascade {path} holds a {type(network).__name__}, which enlarges nothing: an upsampler is trained by "
                         "train.py --model unet --size Ti-up")
    height, width = (side // network.factor for side in network.image_size)
    if (height, width, network.channels) != tuple(shape):
        raise ValueError(f"--cascade {path} enlarges {height}x{width} pixels of {network.channels} channels, and --ckpt draws "
                         "{}x{} of {}".format(*shape))
    if network.num_classes is not None:
        names, own_names = base.data.classes, own.data.classes           # None where they are not known
        fits = labelled == network.num_classes and (not names or not own_names or names == own_names)
        if labelled is None:                             # then it gets its null class
            fits = network.null_label is not None
        if not fits:
            raise ValueError(f"--cascade {path} was trained with {network.num_classes} classes, which are not those of --ckpt")
    return network, diffusion
