"""Train a network: DiT, U-ViT or U-Net to denoise, ViT to classify, an autoencoder to give images back.

Report §4-5, §2-4 and §2-5. What a step draws and minimises is in objectives.py and depends on (seed, step) alone, so a run
resumes exactly, and one process or eight train alike; the loop here is the same for all.

    python train.py                                                       a small DiT on the embedded digits, minutes on a CPU
    python train.py --model uvit --size S/2 --data cifar10 --flip         after the paper's recipe
    python train.py --model uvit --data shapes --text                     a small U-ViT learns to draw what a caption says
    torchrun --nproc-per-node 8 train.py --size L/2 --data photos/ --image-size 64
"""
import argparse
import contextlib
import copy
import csv
import math
import re
import sys
import time
import warnings
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoint
import data
import dit
import unet
from cli import (Parser, first_in_turn, ignore_signals, natural, not_negative, one_line_errors, parent_of, positive, processes,
                 stop_signals, total)
from ddpm import PREDICTIONS, SCHEDULES, VARIANCES, key_seed
from sampling import clip_record
from files import atomic_file
from latents import embeddings, latents
from models import TRAINABLE, build, describe
from objectives import DROPOUT, objective_of
from text import TextEncoder
from vit import divided

COMMON = dict(model="dit", size=None, conditioning=None, hybrid=False, data="mnist", image_size=None, vae=None, latent_scale=None,
              text=False, clip=None, flip=False, skip_bad=False, cache=None, eval_every=None, eval_n=2000, features=None,
              accumulate=1, seed=0, device="auto", precision=None, compile=False, checkpointing=False, out="run.pt", resume=False)
LAPTOP = dict(schedule="cosine", prediction="x0", variance="small", steps=2800, batch_size=32, lr=2e-3, warmup=100,
              decay="cosine", weight_decay=0.0, clip_grad=1.0, ema=0.999, cfg_drop=0.1, shift=0, sample_every=560, save_every=280)
FEW = {**LAPTOP, "steps": 1000, "sample_every": 250, "save_every": 125}              # a U-Net's step takes three times as long
DIT = dict(schedule="linear", prediction="eps", variance="learned", steps=400_000, batch_size=256, lr=1e-4, warmup=0,
           decay="none", weight_decay=0.0, clip_grad=0.0, ema=0.9999, cfg_drop=0.1, shift=0, sample_every=5000, save_every=1000)
UVIT = {**DIT, "variance": "small", "steps": 500_000, "batch_size": 128, "lr": 2e-4, "weight_decay": 0.03, "warmup": 2500}
DDPM = {**DIT, "variance": "large", "steps": 800_000, "batch_size": 128, "lr": 2e-4, "warmup": 5000, "clip_grad": 1.0}
IDDPM = {**DIT, "schedule": "cosine", "steps": 500_000, "batch_size": 128}
VIT = {**DIT, "steps": 375_000, "batch_size": 1024, "lr": 1e-3, "weight_decay": 0.05, "warmup": 6250, "decay": "cosine",
       "clip_grad": 1.0}
VAE = {**DIT, "steps": 250_000, "batch_size": 96}
DENOISING = ("schedule", "prediction", "variance", "cfg_drop",           # flags of no use to the OTHERS
             "eval_every", "eval_n", "features", "vae", "latent_scale", "text", "clip")
OF_IMAGES = ("vae", "text", "clip", "flip", "shift", "skip_bad", "eval_every", "checkpointing")      # points do without
OTHERS = {"vit": "a ViT classifies", "vae": "an autoencoder encodes and decodes"}
RECIPES = {                            # by model and the size's first word; None: any other size. What they leave out: REPORT.md
    "dit": {"Ti": LAPTOP, None: DIT},                                    # Peebles & Xie 2023, section 4
    "uvit": {"Nano": LAPTOP, "Ti": LAPTOP, None: UVIT},                  # Bao et al. 2023, appendix, for CIFAR-10
    "unet": {"Nano": FEW, "Ti": FEW,
             "iddpm": IDDPM, "adm": DIT, None: DDPM},    # Nichol & Dhariwal 2021; as DiT; Ho et al. 2020, for CIFAR-10
    "vit": {"Ti": {**LAPTOP, "steps": 2200, "batch_size": 64, "lr": 5e-4, "weight_decay": 0.05, "shift": 2},
            "Nano": {**LAPTOP, "steps": 2800, "batch_size": 64, "weight_decay": 0.05, "shift": 2},
            None: VIT},                                                  # Touvron et al. 2021, table 9, and ViT's clipping
    "mlp": {None: {**LAPTOP, "schedule": "linear", "prediction": "v",    # of eps, errors grow where alpha_bar is near 0
                   "steps": 8000, "batch_size": 256, "lr": 4e-3, "sample_every": 2000, "save_every": 1000}},
    "vae": {"Ti": {**LAPTOP, "steps": 1600, "lr": 1e-3, "sample_every": 400, "save_every": 200},
            None: VAE},                                                  # ours: the paper's losses are others
}
DEFAULT_SIZE = {"dit": "Ti/8", "uvit": "Ti/8", "unet": "Ti", "vit": "Ti/8", "vae": "Ti", "mlp": "Ti"}       # for a laptop
LOG_EVERY = 50                                   # steps between rows of run.csv
TEXT_LR = 7e-4                                   # the most with captions: at 2e-3 networks draw well, but for long not what is said
TEXT = dict(context_dim=192, context_tokens=32)  # of our text encoder: its width, and its length if no caption is shorter
MAX_BAD_STEPS = 10                               # non-finite gradients in a row that end the run
MAY_CHANGE = {"steps", "device", "precision", "compile", "checkpointing", "accumulate", "sample_every", "save_every",
              "eval_every", "eval_n", "features", "cache", "out", "resume"}
# on --resume may change: the end (a cosine stretches to it), the machine, when to save and what to score
MOVED = {"vae": "vae", "clip": "text"}           # and files that lie elsewhere now, if what the run notes of them still holds


def flags():
    """The command line; what it leaves out is None, and filled in by `settings`."""
    def default(key):
        return f"default: {LAPTOP[key]} for dit Ti, {DIT[key]} for dit B; others have their own"
    switch = dict(action="store_true", default=None)
    parser = Parser(prog="train.py", description="Train a DiT, U-ViT or U-Net to denoise, a ViT to classify, or an autoencoder. "
                    "Flags left out take the recipe of the model and its size.")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=TRAINABLE, help="default: dit, or mlp for swissroll")
    add("--size", help="Ti S B L XL … and the patch, as B/4; a U-Net's has no patch (default: Ti/8 or Ti, for a laptop; an unknown "
        "size gets the list)")
    add("--conditioning", choices=dit.BLOCKS, help="how a DiT is told (default: adaln-zero, the best; a text by cross-attention)")
    add("--hybrid", **switch, help="a ViT's patches are a small CNN's features")
    add("--schedule", choices=SCHEDULES, help=f"of the noise ({default('schedule')})")
    add("--prediction", choices=PREDICTIONS, help=f"what the network outputs ({default('prediction')})")
    add("--variance", choices=VARIANCES, help=f"of the reverse step ({default('variance')})")
    add = parser.add_argument_group("data").add_argument
    add("--data", help="mnist, shapes[:one], swissroll (points), cifar10[:DIR], coco:DIR, a folder of images, or an .npz (default: "
        "mnist)")
    add("--image-size", type=positive, help="pixel side (default: the data's own; folders need it)")
    add("--vae", help="an autoencoder of train.py or a released one: train on its latents, encoded once")
    add("--latent-scale", type=not_negative, help="what latents are multiplied by (default: the autoencoder's: measured, or Stable "
        "Diffusion's 0.18215; U-ViT's on MS-COCO is 0.2301)")
    add("--text", **switch, help="learn from the data's captions, with a small text encoder that is trained too")
    add("--clip", metavar="DIR", help="with CLIP's text encoder instead, which stays as it is: a folder of Hugging Face's files")
    add("--flip", **switch, help="mirror half of the images; not for digits")
    add("--shift", type=natural, help="move images by up to N pixels (default: 2 for vit Ti and Nano, else 0)")
    add("--skip-bad", **switch, help="leave out image files that cannot be read")
    add("--cache", help="folder for decoded images and downloads (default: the user's cache)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=positive, help=default('steps'))
    add("--batch-size", type=positive, help=f"images a step, of all processes ({default('batch_size')})")
    add("--lr", type=not_negative, help=f"AdamW's ({default('lr')}; with --text {TEXT_LR} at most)")
    add("--warmup", type=natural, help=f"steps in which the rate rises ({default('warmup')})")
    add("--decay", choices=("none", "cosine"), help=f"of the rate, to 0 ({default('decay')})")
    add("--weight-decay", type=not_negative, help=default('weight_decay'))
    add("--clip-grad", type=not_negative, help=f"largest gradient norm; 0 is none ({default('clip_grad')})")
    add("--ema", type=not_negative, help=f"decay of the averaged weights ({default('ema')})")
    add("--cfg-drop", type=not_negative, help="share of labels dropped, for guidance (default: 0.1)")
    add("--accumulate", type=positive, help="micro-batches a step, to save memory (default: 1)")
    add("--seed", type=natural, help="default: 0")
    add = parser.add_argument_group("precision and devices").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), help="default: CUDA where there is a GPU")
    add("--precision", choices=("fp32", "bf16"), help="default: bf16 autocast on CUDA, fp32 on the CPU")
    add("--compile", **switch, help="torch.compile the network")
    add("--checkpointing", **switch, help="recompute activations: less memory, a third more work")
    add = parser.add_argument_group("saving").add_argument
    add("--out", help="the run; its run.csv and run.png stand beside it (default: run.pt)")
    add("--resume", **switch, help="go on with --out; flags left out are the run's own")
    add("--save-every", type=positive, help=f"steps between saves ({default('save_every')})")
    add("--sample-every", type=positive, help=f"steps between pictures and held-out scores ({default('sample_every')})")
    add("--eval-every", type=positive, help="steps between evaluate.py's scores in run.csv, of --eval-n samples (default: never)")
    add("--eval-n", type=positive, help="samples for them; papers take 50000 (default: 2000)")
    add("--features", help="as evaluate.py's: inception, or a file (default: the shipped ViT for the digits, else inception)")
    return parser


def recipe(chosen):
    """The recipe of the model and size chosen, or of the default ones."""
    model = chosen.get("model", COMMON["model"])
    size = chosen.get("size", DEFAULT_SIZE[model])
    recipes = RECIPES[model]
    found = {**recipes.get(re.split("[/-]", size)[0], recipes[None]), "size": size}
    if chosen.get("text") or chosen.get("clip"):
        found["lr"] = min(found["lr"], TEXT_LR)
    return {**found, **dict.fromkeys(DENOISING)} if model in OTHERS else found


def flag(key):
    """A setting's name on the command line."""
    return f"--{key.replace('_', '-')}"


def settings(argv):
    """All flags, and the run to resume or None.  What the command line leaves out the run decides, else the recipe."""
    given = {key: value for key, value in vars(flags().parse_args(argv)).items() if value is not None}
    if given.get("data") == "swissroll":
        given.setdefault("model", "mlp")
    out, run = Path(given.get("out", COMMON["out"])), None
    parent_of(out)
    if out.suffix != ".pt":
        raise ValueError(f"--out {out}: a run's name ends in .pt")
    if given.get("resume"):
        run = checkpoint.load(out)
        if run["optimizer"] is None or not {"bad_steps", "log"} <= set(run):
            raise ValueError(f"--resume: {out} is not a run of train.py")
        config = run["config"]
        clashes = [f"{flag(key)} is {config.get(key)} there, not {value}" for key, value in given.items()
                   if key not in MAY_CHANGE and value != config.get(key) and not run.get(MOVED.get(key))]
        if clashes:
            raise ValueError(f"--resume: the run in {out} has other settings: {'; '.join(clashes)}")
        chosen = {**COMMON, **recipe(config), **config, **given, "out": str(out)}        # it may have been moved
        if run["step"] >= chosen["steps"]:
            raise ValueError(f"--resume: {out} is at step {run['step']} of {chosen['steps']} already: --steps sets a later end")
    else:
        if out.exists():
            raise ValueError(f"{out} exists: --resume goes on with it, --out NAME.pt starts another")
        chosen = {**COMMON, **recipe(given), **given}
    args = argparse.Namespace(**chosen)
    args.text = args.text or args.clip is not None
    check_flags(args, given)
    return args, run


def check_flags(args, given):
    """ValueError, before anything is read, on settings that do not go together; given: those on the command line."""
    for keys, useless, why in (
            (DENOISING, args.model in OTHERS, f"{OTHERS.get(args.model)}, it does not denoise"),
            (OF_IMAGES, args.model == "mlp", "points have no use for it"),
            (("checkpointing",), args.model == "vae", "an autoencoder keeps its activations; use --accumulate to save memory"),
            (("eval_n", "features"), not args.eval_every, "it says how to score, which only --eval-every does"),
            (("latent_scale",), not (args.vae and args.latent_scale), "it is a number above 0, of the latents of --vae"),
            (("shift",), args.vae and args.shift, "it moves pixels, and --vae encodes them once: leave one out"),
            (("vae", "text", "clip", "eval_every"), args.size in unet.UPSAMPLERS,
             f"--size {args.size} enlarges the pixels that another network draws; python sample.py --cascade runs both, and "
             "evaluate.py --samples scores what they draw")):
        for key in keys:
            if useless and key in given:
                raise ValueError(f"{flag(key)}: {why}")
    if (args.model == "mlp") != (args.data == "swissroll"):
        raise ValueError(f"--model {args.model} --data {args.data}: mlp learns points, which swissroll has, and all others images")
    if args.vae and not Path(args.vae).is_file():
        raise ValueError(f"--vae {args.vae}: there is no such file")
    if args.clip and not Path(args.clip).exists():
        raise ValueError(f"--clip {args.clip}: there is no such folder")
    if max(args.ema, args.cfg_drop or 0) >= 1:
        raise ValueError("--ema and --cfg-drop must lie in [0, 1)")
    description(args, TEXT if args.text else {}, image_size=0, channels=1, num_classes=1)      # refuses what no data can mend


def description(args, text, **data):
    """The description of the network that the flags name, for the data's image_size, channels and num_classes.

    text: {} or the context's size, and the arguments of a text encoder of its own, see `read_captions`. ValueError on a size that
    there is not, an option of another model, or a network that needs what no data set here has.
    """
    context = {key: text[key] for key in ("context_dim", "context_tokens") if key in text}
    described = describe(args.model, args.size, **data, null_class=bool(args.cfg_drop), learn_sigma=args.variance == "learned",
                         conditioning=args.conditioning, hybrid=args.hybrid, **context)
    if "context_dim" in described["arguments"] and not context:
        raise ValueError(f"--size {args.size} is told a text: give --text")
    return {**described, **({"text": text["encoder"]} if text.get("encoder") else {})}


def build_network(args, dataset, text):
    """The network that the flags name, at the data's size, channels and classes, and its description; text: see there."""
    described = description(args, text, image_size=dataset.image_size, channels=dataset.channels, num_classes=dataset.num_classes)
    torch.manual_seed(args.seed)
    network = build(described)
    network.checkpointing = args.checkpointing
    return network, described


def learning_rate(step, args):
    """The rate of a step: a linear rise over --warmup, then constant, or a half cosine to 0 at --steps."""
    rise = min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
    fall = 0.5 * (1 + math.cos(math.pi * step / args.steps)) if args.decay == "cosine" else 1.0
    return args.lr * rise * fall


@torch.no_grad()
def update_ema(ema, network, step, decay, finite):
    """ema <- d ema + (1 - d) network, d = min(decay, (1 + step) / (10 + step)); unchanged where finite (0 or 1) is 0."""
    weight = (1 - min(decay, (1 + step) / (10 + step))) * finite
    parameters, averages = list(network.parameters()), list(ema.parameters())
    torch._foreach_lerp_(averages, parameters, [weight] * len(averages))
    for average, buffer in zip(ema.buffers(), network.buffers()):
        average.copy_(buffer)                            # tables and statistics are no weights: copied, not averaged


def say(line):
    """Print a line above the bar, at once."""
    tqdm.write(line)
    sys.stdout.flush()


class Log:
    """run.csv and the line or bar on the terminal. Losses are summed on the device and read once a row."""

    def __init__(self, path, args, objective, start, sums, rank):
        self.path, self.args, self.objective, self.rank = path, args, objective, rank
        self.sums = sums                                 # (2, G): of losses, and how many, by group, since the last row
        self.columns = ("step", "images", "loss", *objective.groups, *objective.scores, "grad_norm", "lr", "images_per_s")
        self.scores = {}                                 # of the next row
        self.since = (start, time.perf_counter())
        self.bar = tqdm(total=args.steps, initial=start, disable=rank > 0 or not sys.stderr.isatty(), unit="step")
        if rank > 0:
            return
        rows = []
        if start and path.exists():
            with open(path, newline="") as file:         # rows beyond the checkpoint's step are trained again
                old = csv.DictReader(file)
                rows = [row for row in old if None not in (*row, *row.values()) and row.get("step", "").isdigit()
                        and int(row["step"]) <= start]
                self.columns += tuple(name for name in old.fieldnames or () if name not in self.columns)    # scores given up since
        lines = [self.columns, *([row.get(name, "") for name in self.columns] for row in rows)]
        with atomic_file(path) as file:
            file.write("".join(",".join(line) + "\n" for line in lines).encode())

    def add(self, losses, groups):
        """Sum losses (n,) of samples that belong to groups (n,)."""
        masks = groups == torch.arange(self.sums.shape[1], device=groups.device).unsqueeze(1)    # (G, n)
        self.sums[0] += torch.where(masks, losses.detach().double(), 0.0).sum(dim=1)
        self.sums[1] += masks.sum(dim=1)

    def write(self, sums, step, norm):
        """Append the row of the steps since the last one; sums are those of all processes."""
        now = time.perf_counter()
        rate = (step - self.since[0]) * self.args.batch_size / (now - self.since[1])
        self.since = (step, now)
        self.sums.zero_()
        if self.rank > 0:
            return
        losses, counts = sums.tolist()
        mean, groups, scores = sum(losses) / sum(counts), self.objective.groups, self.objective.scores
        by_group = [loss / count if count else math.nan for loss, count in zip(losses, counts)] if groups else []
        values = (mean, *by_group, *map(self.scores.get, scores), norm.item(), learning_rate(step - 1, self.args))
        row = [str(step), str(step * self.args.batch_size), *("" if value is None else f"{value:.8g}" for value in values),
               f"{rate:.1f}"]
        with open(self.path, "a") as file:
            file.write(",".join(row + [""] * (len(self.columns) - len(row))) + "\n")
        said = "".join(f", {name} {value:.4g}" for name, value in self.scores.items())
        self.scores = {}
        self.bar.set_postfix(loss=f"{mean:.4f}", images_per_s=f"{rate:.0f}")
        if self.bar.disable or said:
            left = (self.args.steps - step) * self.args.batch_size / rate / 60
            say(f"step {step}: loss {mean:.4f}{said}, {rate:.0f} images/s, {left:.1f} minutes left")


def guarded_step(optimizer, parameters, clip):
    """Clip and take an optimizer step, unless a gradient is not finite: then weights and moments stay as they are.

    Decided on the device, without waiting for it -> the gradient's norm, and whether it is finite (1.0 or 0.0).
    """
    norm = get_total_norm([parameter.grad for parameter in parameters])
    finite = norm.isfinite().float()
    if clip:
        clip_grads_with_norm_(parameters, clip, norm)
    optimizer.grad_scale, optimizer.found_inf = None, 1 - finite         # the fused kernel reads them, as for a GradScaler
    optimizer.step()
    optimizer.zero_grad()
    return norm, finite


def load_data(args, run, device):
    """The training split, or with --vae its latents, which are encoded once it is clear that the network takes them."""
    with first_in_turn():
        pixels = data.load(args.data, args.image_size, cache=args.cache, skip_bad=args.skip_bad)
    if args.text and pixels.captions is None:
        raise ValueError(f"--text: {args.data} has no captions; shapes, coco:DIR and a folder with a .txt beside each image do")
    if not args.vae:
        return pixels
    autoencoder = checkpoint.load_autoencoder(args.vae).to(device).requires_grad_(False)
    sha256, factor = autoencoder.origin["sha256"], autoencoder.factor
    autoencoder.scale = args.latent_scale or autoencoder.scale
    if run and (run["vae"] or {}).get("sha256") != sha256:
        raise ValueError(f"--resume: {args.vae} is another autoencoder than the run in {args.out} was trained with")
    size = divided(pixels.image_size, factor, "the autoencoder's factor")
    try:
        with torch.device("meta"):
            build(description(args, TEXT if args.text else {}, image_size=size, channels=autoencoder.latent_channels,
                              num_classes=pixels.num_classes))
    except ValueError as error:
        raise ValueError(f"{error}; of latents: an image's side is {factor} times that") from None
    return latents(pixels, autoencoder, sha256, args.flip, args.cache)


def read_captions(args, dataset, run, device):
    """Have batches hold what --text tells the network, and the size of it as `description` takes it; {} without --text.

    Captions become ids, which an encoder of the network's own reads; or with --clip contexts, encoded once, and then dataset.text
    is what run.pt notes: CLIP's path and sha256, and the context of the empty caption.
    """
    if not args.text:
        return {}
    if args.clip:
        encoder, tokenizer = checkpoint.load_clip(args.clip)
        if run and (run["text"] or {}).get("sha256") != encoder.origin["sha256"]:
            raise ValueError(f"--resume: {args.clip} is another text encoder than the run in {args.out} was trained with")
        encoder = encoder.to(device).requires_grad_(False)
        dataset.encode_captions(lambda captions: embeddings(captions, encoder, tokenizer, args.cache))
        dataset.text = clip_record(encoder, tokenizer)
        return dict(context_dim=encoder.dim, context_tokens=encoder.length)
    longest = max(sum(len(pieces) for _, pieces in TextEncoder.pieces(caption))
                  for row in dataset.rows for caption in dataset.captions[row])
    arguments = dict(dim=TEXT["context_dim"], length=min(longest + 1, TEXT["context_tokens"]))       # one ends the caption
    encoder = TextEncoder(**arguments)
    dataset.encode_captions(lambda captions: encoder.tokenize(captions).numpy())
    return dict(context_dim=encoder.dim, context_tokens=encoder.length, encoder=arguments)


def train(args, run, device, rank, world):
    """Train from the start, or from where `run` stopped."""
    out, start = Path(args.out), run["step"] if run else 0
    if args.batch_size % (world * args.accumulate):
        raise ValueError(f"--batch-size {args.batch_size} is not a multiple of {world} processes x {args.accumulate} "
                         "micro-batches")
    part = slice(rank * args.batch_size // world, (rank + 1) * args.batch_size // world)
    micro = args.batch_size // (world * args.accumulate)

    dataset = load_data(args, run, device)
    text = read_captions(args, dataset, run, device)
    batches = data.Batches(dataset, args.batch_size, args.seed, part)
    workers = 2 if device.type == "cuda" and dataset.in_files else 0     # what is in memory needs none
    loader = DataLoader(batches, batch_size=None, sampler=range(start, args.steps), pin_memory=device.type == "cuda",
                        num_workers=workers, worker_init_fn=ignore_signals,
                        multiprocessing_context="fork" if workers else None)         # pickling a memory map would read it all

    network, described = build_network(args, dataset, text)
    if run and run["network"] != described:
        raise ValueError(f"--resume: {out} holds {run['network']}, these settings and data make {described}")
    objective = objective_of(args.model, args.size)(args, dataset, network, device)
    network = network.to(device).train()
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    bad_steps = torch.zeros((), device=device)           # non-finite gradients in a row
    sums = torch.zeros(2, max(1, len(objective.groups)), dtype=torch.float64, device=device)     # of losses, and how many
    if run:
        try:
            network.load_state_dict(run["model"])
            ema.load_state_dict(run["ema"])
            optimizer.load_state_dict(run["optimizer"])
            bad_steps += run["bad_steps"]
            sums += run["log"].to(device)
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"--resume: {out} is damaged: {error}") from None
        run.clear()                                      # it takes as much memory as the network and its optimizer
    log = Log(out.with_suffix(".csv"), args, objective, start, sums, rank)
    model = torch.compile(network) if args.compile else network
    if world > 1:
        with warnings.catch_warnings():                  # torch 2.13 has another name for broadcast_buffers, 2.11 this one only
            warnings.simplefilter("ignore", FutureWarning)
            model = DistributedDataParallel(model, [device] if device.type == "cuda" else None, broadcast_buffers=False)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    def save(step):
        sums = total(log.sums, world)
        if rank == 0:
            checkpoint.save(out, dict(
                version=checkpoint.VERSION, step=step, config={**vars(args), "resume": False}, network=described,
                diffusion=objective.process,
                data=dict(spec=args.data, classes=dataset.classes, num_classes=dataset.num_classes, channels=dataset.channels,
                          image_size=list(dataset.image_size)), vae=objective.autoencoder(ema), text=dataset.text,
                model=network.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
                bad_steps=int(bad_steps), log=sums.cpu()))

    if rank == 0:
        count = sum(value.numel() for value in network.state_dict().values())
        size = "x".join(map(str, dataset.image_size)) + (" latents" if args.vae else " pixels")
        say(f"{described['class']} {args.size}, {count:,} parameters, on {len(dataset):,} images of {args.data}, {size}, "
            f"{dataset.channels} channel{'s' * (dataset.channels > 1)}; {device}, {args.precision}, {world} "
            f"process{'es' * (world > 1)}; steps {start} to {args.steps} of {args.batch_size} images")
    began = time.perf_counter()
    with stop_signals() as stop, log.bar:
        for step, (images, labels) in zip(range(start, args.steps), loader):
            batch = objective.draw(step, images, labels, part)
            for i in range(args.accumulate):
                torch.manual_seed(key_seed((args.seed, step, DROPOUT, i, rank)))     # of dropout, which draws globally
                last = world == 1 or i + 1 == args.accumulate
                with contextlib.nullcontext() if last else model.no_sync():          # exchange gradients once a step
                    some = [None if z is None else z[i * micro:(i + 1) * micro] for z in batch]
                    with autocast:
                        losses, groups = objective.loss(model, *some)                # of (n,) samples, and their groups (n,)
                    (losses.mean() / args.accumulate).backward()
                log.add(losses, groups)
            for parameter_group in optimizer.param_groups:
                parameter_group["lr"] = learning_rate(step, args)
            norm, finite = guarded_step(optimizer, parameters, args.clip_grad)
            bad_steps = (bad_steps + 1) * (1 - finite)
            update_ema(ema, network, step, args.ema, finite)
            log.bar.update()

            done = step + 1
            ended, stopping = done == args.steps, world == 1 and bool(stop)
            if done == start + 5:                        # the first steps compile and warm up
                norm.item()                              # waits for the device
                fifth = time.perf_counter()
            if done == start + 10 and rank == 0:
                norm.item()
                say(f"about {(time.perf_counter() - fifth) / 5 * (args.steps - done) / 60:.1f} minutes to go")
            reporting = done % args.sample_every == 0 or ended
            evaluating = bool(args.eval_every) and (done % args.eval_every == 0 or ended)
            if rank == 0 and reporting:
                log.scores |= objective.report(ema, out.with_suffix(".png"))
            if evaluating:
                save(done)                               # scoring takes a while, and may run out of memory
                log.scores |= objective.evaluate(ema)
            if done % LOG_EVERY == 0 or reporting or evaluating:         # the only steps that wait for the device
                log.write(total(log.sums, world), done, norm)
                if bad_steps >= MAX_BAD_STEPS:
                    raise ValueError(f"{int(bad_steps)} steps in a row had a NaN or infinite gradient, and none was taken: lower "
                                     "--lr, set --clip-grad, or look at the data")
                stopping = total(torch.tensor(float(bool(stop)), device=device), world) > 0      # all processes agree
            if done % args.save_every == 0 or ended or stopping:
                save(done)
            if stopping:
                break
    if rank == 0:
        said = f"{done - start} steps in {(time.perf_counter() - began) / 60:.1f} minutes: saved {out}, {out.with_suffix('.csv')}"
        if ended:
            said += f", {out.with_suffix('.png')}"
            if objective.process:                        # it draws
                said += f"; python sample.py {objective.flags} {out}{' --prompt TEXT' * bool(args.text)} draws more"
        else:
            said += f" at step {done}; python train.py --resume --out {out} goes on"
        say(said)


def main(argv=None):
    """The command: validate the flags, join the processes, train."""
    with one_line_errors("train.py"):
        args, run = settings(argv)
        device, rank, world = processes(args.device)
        args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
        with checkpoint.sole_writer(args.out) if rank == 0 else contextlib.nullcontext():
            train(args, run, device, rank, world)


if __name__ == "__main__":
    sys.exit(main())
