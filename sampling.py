"""Drawing from a network: what it is told, its batches, guidance, decoding; and a set of samples that is drawn once.

Report §4-5 (inference), §2-5 (latents are decoded), §4-1 (a text is encoded), §3 (guidance). sample.py is the command; pictures
of runs, evaluate.py and bench.py draw through here as well. An image depends on the seed and its number alone, whatever the batch
size or the number of processes.
"""
import sys
from pathlib import Path

import numpy as np
import torch

import ddpm
from checkpoint import build, load, load_autoencoder, load_clip
from cli import natural, not_negative, positive
from data import Dataset, to_uint8
from files import Table, fill, sha256_of
from vae import in_pieces, pieces

CFG_SCALE = 1.5                  # where the network knows an unconditional input
SCATTERED = 2000                 # samples of a run on points
STEPS = 20                       # of DPM-Solver++; more barely change the picture


def labels_of(indices, classes):
    """The conditions (n, …) of images number `indices`: of classes, K numbers or the rows (K, …) of a text, in turn; or None."""
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


def unconditional(network, text, config):
    """The unconditional input of guidance: a null label, or the empty caption's ids or context (L, D); None if it was not learned.

    text: what a run notes of CLIP, or None; config: its flags.
    """
    if network.context_dim is None:
        return network.null_label
    if config.get("cfg_drop") == 0:
        return None
    return text["empty"] if text else network.text_encoder.tokenize([""])[0]


def draw(network, diffusion, indices, classes=None, seed=0, batch_size=None, **options):
    """Images number `indices` of a seed: an iterator of (indices, x (n, C, H, W) on the network's device), batch by batch.

    classes: a list of numbers, or the ids (K, …) or contexts (K, L, D) of captions, in turn. options are `ddpm.sample`'s. The
    batch is halved where the device's memory does not hold it.
    """
    parameter = next(network.parameters())
    batch_size = batch_size or (256 if parameter.is_cuda else 64)
    options = {"sampler": "dpm++", "steps": STEPS, **options}
    if network.context_dim is not None and options.get("y_null") is not None:
        options["y_null"] = encode_condition(network, options["y_null"][None])[0]

    def some(part):
        return part, ddpm.sample(diffusion, network, (len(part), network.channels, *network.image_size),
                                 encode_condition(network, labels_of(part, classes)), seeds=[(seed, i) for i in part], **options)
    return pieces(some, indices, batch_size)


def draw_points(network, diffusion, n, seed=0):
    """n samples (n, 2), on the CPU, of a network of points."""
    return torch.cat([x for _, x in draw(network, diffusion, range(n), seed=seed, batch_size=n)]).flatten(1).cpu()


def drawable(path):
    """A checkpoint's description, network and process.  ValueError if there is nothing that can be sampled from it."""
    described = load(path)
    network, diffusion = build(described)
    kind = described["network"]["class"]
    if diffusion is None or kind == "SuperResUNet":
        raise ValueError(f"{path} holds a {kind}, which " + {
            "ViT": "classifies: there is nothing to sample",
            "AutoencoderKL": "encodes and decodes: a network trained on its latents samples",
            "SuperResUNet": f"enlarges images: it needs small ones to start from, as --ckpt BASE.pt --cascade {path} draws",
        }.get(kind, "was trained in continuous time: it can be loaded, but not sampled here"))
    if network.context_dim is not None and described["step"] is None and kind == "UNet":
        raise ValueError(f"{path} is told LDM's class as a token, which nothing here encodes: it can be loaded and counted, but "
                         "not sampled")
    return described, network, diffusion


@torch.no_grad()
def clip_record(encoder, tokenizer):
    """What a run notes of CLIP's encoder: its path and sha256, and the context (L, D) of the empty caption."""
    empty = encoder(tokenizer.tokenize([""]).to(next(encoder.parameters()).device))
    return {**encoder.origin, "empty": empty[0].cpu()}


def reader(described, network, clip=None):
    """What reads a text network's captions -> a tokenizer, and CLIP's encoder, or None where the network has one of its own.

    clip: where CLIP is, if not where it was in training. Released weights know nothing of it: what a run notes of CLIP is added
    to what is described. ValueError without CLIP, or if it is another than in training.
    """
    if hasattr(network, "text_encoder"):
        if clip is not None:
            raise ValueError("--clip: the run has a text encoder of its own")
        return network.text_encoder, None
    kept = described["text"] or {}
    if clip is None and "path" not in kept:
        raise ValueError("the network was trained with CLIP: --clip DIR names a folder of its encoder and vocabulary")
    if clip is None and not Path(kept["path"]).exists():
        raise ValueError(f"the text encoder is no longer at {kept['path']}: --clip DIR says where it is")
    encoder, tokenizer = load_clip(clip or kept["path"])
    if kept.get("sha256", encoder.origin["sha256"]) != encoder.origin["sha256"]:
        raise ValueError(f"--clip {clip or kept['path']} is another text encoder than the network was trained with: its SHA-256 is "
                         f"{encoder.origin['sha256']}, not {kept['sha256']}")
    if encoder.dim != network.context_dim:
        raise ValueError(f"--clip {clip}: its contexts are {encoder.dim} wide, the network wants {network.context_dim}")
    described["text"] = described["text"] or clip_record(encoder, tokenizer)
    return tokenizer, encoder


@torch.no_grad()
def read_prompts(prompts, clip, described, network):
    """Ids (K, …) or contexts (K, L, D) of --prompt, a list of texts; None for a network that is told none.

    Says on stderr what of a prompt is cut off. ValueError if the network wants a prompt and there is none, or the reverse.
    """
    if network.context_dim is None:
        if prompts or clip:
            raise ValueError(f"--{'prompt' if prompts else 'clip'}: the network was not trained with texts" +
                             ("; --classes says what it shall draw" if network.num_classes else ""))
        return None
    if not prompts:
        raise ValueError('the network draws what a text says: --prompt "…"')
    tokenizer, encoder = reader(described, network, clip)
    for prompt in prompts:
        if lost := tokenizer.cut(prompt):
            print(f"warning: the prompt is too long for {tokenizer.length} tokens; this is cut off: {lost!r}", file=sys.stderr)
    ids = tokenizer.tokenize(prompts)                                                    # (K, L, W) of ours, (K, L) of CLIP's
    return ids if encoder is None else encoder(ids)                                      # (K, L, D)


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
        options = {key: how[key] for key in ("sampler", "steps", "cfg_scale")}
        for indices, x in draw(network, diffusion, rows.tolist(), classes if contexts is None else contexts, how["seed"],
                               batch_size, y_null=y_null, clip=autoencoder is None, **options):
            yield indices, [to_uint8(x if autoencoder is None else decode(autoencoder, x)).cpu()]

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
                        "with it (default: where it was then)")
    parser.add_argument("--classes", help="numbers or names, as 3,5; the images cycle through them (default: all)")
    parser.add_argument("--cfg-scale", type=not_negative, help=f"guidance; 1 is none (default: {CFG_SCALE} if the run knows an "
                        "unconditional input)")
    parser.add_argument("--sampler", choices=ddpm.SAMPLERS, help="default: dpm++")
    parser.add_argument("--steps", type=positive, help=f"evaluations along the trajectory (default: {STEPS}; 250 for ddpm)")
    parser.add_argument("--batch-size", type=positive, help="images at once in each process (default: what memory holds)")
    parser.add_argument("--seed", type=natural, default=0, help="default: 0")
