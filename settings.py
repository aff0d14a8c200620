"""Settings of training: recipes, the command line, what goes together, and what may change when a run is resumed.

Report §4-5. A recipe is a row of hyperparameters for a model and its size, from its paper. A flag that is given replaces the
recipe's value. A resumed run keeps its own settings, besides those of MAY_CHANGE.
"""
import argparse
import hmac
import json
import os
import re
import secrets
import sys
from pathlib import Path

import checkpoint
import dit
import unet
from cli import PRECISIONS, Parser, at_least, natural, not_negative, parent_of, positive, rule_of
from data import OWN_SETS
from ddpm import PREDICTIONS, SCHEDULES, VARIANCES
from files import cache_folder, check_output, readable
from image_files import MAX_PIXELS_HELP
from models import TRAINABLE, check_options, describe, named

COMMON = dict(model="dit", size=None, conditioning=None, hybrid=False, data="mnist", image_size=None, vae=None, latent_scale=None,
              text=False, clip=None, flip=False, skip_bad=False, max_pixels=None, cache=None, eval_every=None, eval_n=2000,
              features=None, reference=None, accumulate=1, seed=0, device="auto", precision=None, compile=False,
              checkpointing=False, out="run.pt", resume=False)
LAPTOP = dict(schedule="cosine", prediction="x0", variance="small", max_weight=1.0, steps=2800, batch_size=32, lr=2e-3,
              warmup=100, decay="cosine", weight_decay=0.0, clip_grad=1.0, ema=0.999, cfg_drop=0.1, shift=0, sample_every=560,
              save_every=280)
FIRST = {**LAPTOP, "max_weight": 5.0, "steps": 2400, "batch_size": 64, "lr": 1.5e-3, "ema": 0.998,   # RESULTS.md: the first run
         "sample_every": 480, "save_every": 240}
FEW = {**LAPTOP, "steps": 1000, "sample_every": 250, "save_every": 125}              # a U-Net's step takes three times as long
DIT = dict(schedule="linear", prediction="eps", variance="learned", max_weight=1.0, steps=400_000, batch_size=256, lr=1e-4,
           warmup=0, decay="none", weight_decay=0.0, clip_grad=0.0, ema=0.9999, cfg_drop=0.1, shift=0, sample_every=5000,
           save_every=1000)
UVIT = {**DIT, "variance": "small", "steps": 500_000, "batch_size": 128, "lr": 2e-4, "weight_decay": 0.03, "warmup": 2500}
DDPM = {**DIT, "variance": "large", "steps": 800_000, "batch_size": 128, "lr": 2e-4, "warmup": 5000, "clip_grad": 1.0}
IDDPM = {**DIT, "schedule": "cosine", "steps": 500_000, "batch_size": 128}
VIT = {**DIT, "steps": 375_000, "batch_size": 1024, "lr": 1e-3, "weight_decay": 0.05, "warmup": 6250, "decay": "cosine",
       "clip_grad": 1.0}
VAE = {**DIT, "steps": 250_000, "batch_size": 96}
DENOISING = ("schedule", "prediction", "variance", "max_weight", "cfg_drop",     # flags of no use to the OTHERS
             "eval_every", "eval_n", "features", "reference", "vae", "latent_scale", "text", "clip")
OF_IMAGES = ("vae", "text", "clip", "flip", "shift", "skip_bad", "max_pixels", "eval_every", "checkpointing")     # not of points
OTHERS = {"vit": "a ViT classifies", "vae": "an autoencoder encodes and decodes"}
RECIPES = {                            # by model and the size's first word; None: any other size. REPORT.md: how papers differ
    "dit": {"XS": FIRST, "Nano": LAPTOP, "Ti": LAPTOP, None: DIT},       # Peebles & Xie 2023, section 4
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
DEFAULT_SIZE = {"dit": "XS/16", "uvit": "Ti/8", "unet": "Ti", "vit": "Ti/8", "vae": "Ti", "mlp": "Ti"}       # for a laptop
TEXT_LR = 7e-4                                   # upper limit with captions: at 2e-3 the class of shape is learned late
TEXT_DIM, TEXT_TOKENS = 192, 32                  # of our text encoder: its width, and its length if no caption is shorter
MAY_CHANGE = {"steps", "lr", "warmup", "decay", "clip_grad", "device", "precision", "compile", "checkpointing", "accumulate",
              "sample_every", "save_every", "eval_every", "eval_n", "features", "reference", "max_pixels", "cache",
              "out", "resume"}
# on --resume may change: the end (a cosine stretches to it), what tames a run that diverged, the machine, when to save and score
MOVED = {"vae": lambda run: run.vae and run.vae.sha256, "clip": lambda run: run.text and run.text.sha256,
         "data": lambda run: run.data.fingerprint}           # and what lies elsewhere now, of which a run has this hash

PLACES = ("data", "vae", "clip", "cache", "features", "reference")       # settings that may name a file or folder


def parts_or_auto(text):
    """argparse type: a number of micro-batches, or "auto"."""
    return text if text == "auto" else positive(text)


def flags():
    """The command line; what it leaves out is None, and filled in by `read_settings`."""
    def default(key):
        return f"default: {FIRST[key]} for dit XS, {DIT[key]} for dit B; others have their own"
    switch = dict(action="store_true", default=None)
    toggle = dict(action=argparse.BooleanOptionalAction, default=None)   # what a resumed run may be without
    parser = Parser(prog="train.py", description="Train a DiT, U-ViT or U-Net to denoise, a ViT to classify, or an autoencoder. "
                    "Flags left out take the recipe of the model and its size.")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=TRAINABLE, help="default: dit, or mlp for swissroll")
    add("--size", help="Ti XS S B L XL … and the patch, as B/4; a U-Net's has no patch (default: XS/16, Ti/8 or Ti, for a laptop; "
        "an unknown one gets the list)")
    add("--conditioning", choices=dit.BLOCKS, help="how a DiT sees time and class (default: adaln-zero; a text: "
        "cross-attention)")
    add("--hybrid", **switch, help="a ViT's patches are a small CNN's features")
    add("--schedule", choices=SCHEDULES, help=f"of the noise ({default('schedule')})")
    add("--prediction", choices=PREDICTIONS, help=f"what the network outputs ({default('prediction')})")
    add("--variance", choices=VARIANCES, help=f"of the reverse step ({default('variance')})")
    add("--max-weight", type=at_least(1, float), help="limit of the loss's weight, 1 / (1 - alpha_bar), where x0 is predicted; 1 is the "
        "simple loss (default: 5 for dit XS, else 1)")
    add = parser.add_argument_group("data").add_argument
    add("--data", help="mnist, shapes[:one|:many|:uneven], swissroll (points), cifar10[:DIR], coco:DIR, a folder of images, "
        "or an .npz (default: mnist)")
    add("--image-size", type=positive, help="pixel side (default: the data's own; folders need it)")
    add("--vae", help="an autoencoder of train.py or a released one: train on its latents, encoded once")
    add("--latent-scale", type=not_negative, help="what latents are multiplied by (default: the autoencoder's: measured, or Stable "
        "Diffusion's 0.18215; U-ViT's on MS-COCO is 0.2301)")
    add("--text", **switch, help="learn from the data's captions, with a small text encoder that is trained too")
    add("--clip", metavar="DIR", help="with CLIP's text encoder instead, which stays as it is: a folder of Hugging Face's files")
    add("--flip", **switch, help="mirror half of the images; not for digits")
    add("--shift", type=natural, help="move images by up to N pixels (default: 2 for vit Ti and Nano, else 0)")
    add("--skip-bad", **switch, help="leave out image files that cannot be read")
    add("--max-pixels", type=positive, help=MAX_PIXELS_HELP)
    add("--cache", help="folder for decoded images and downloads (default: the user's cache)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=positive, help=default('steps'))
    add("--batch-size", type=positive, help=f"images a step, of all processes ({default('batch_size')})")
    add("--lr", type=not_negative, help=f"AdamW's learning rate ({default('lr')}; with --text {TEXT_LR} at most)")
    add("--warmup", type=natural, help=f"steps in which the learning rate rises ({default('warmup')})")
    add("--decay", choices=("none", "cosine"), help=f"of the learning rate, to 0 ({default('decay')})")
    add("--weight-decay", type=not_negative, help=default('weight_decay'))
    add("--clip-grad", type=not_negative, help=f"largest gradient norm; 0 is none ({default('clip_grad')})")
    add("--ema", type=not_negative, help=f"decay of the averaged weights ({default('ema')})")
    add("--cfg-drop", type=not_negative, help="share of labels dropped, for guidance (default: 0.1)")
    add("--accumulate", type=parts_or_auto, help="micro-batches a step, to save memory; auto: as few as the GPU has room for "
        "(default: 1)")
    add("--seed", type=natural, help="default: 0")
    add = parser.add_argument_group("precision and devices").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), help="default: CUDA where there is a GPU")
    add("--precision", choices=PRECISIONS, help="of products; tf32 on CUDA only (default: bf16 autocast on CUDA, fp32 on the CPU)")
    add("--compile", **toggle, help="torch.compile the network: a transformer by blocks, others whole; needs a C++ compiler, "
        "on CUDA Triton")
    add("--checkpointing", **toggle, help="recompute activations: less memory, a third more work")
    add = parser.add_argument_group("saving").add_argument
    add("--out", help="the run; its run.csv and run.png stand beside it (default: run.pt)")
    add("--resume", **switch, help="go on with --out; flags left out are the run's own")
    add("--save-every", type=positive, help=f"steps between saves ({default('save_every')})")
    add("--sample-every", type=positive, help=f"steps between pictures and held-out scores ({default('sample_every')})")
    add("--eval-every", type=positive, help="steps between evaluate.py's scores in run.csv, of --eval-n samples (default: never)")
    add("--eval-n", type=positive, help="samples for them; papers take 50000 (default: 2000)")
    add("--features", help="as evaluate.py's: inception, or a file (default: the shipped ViT for the digits, else inception)")
    add("--reference", metavar="FILE", help="compare with an .npz of evaluate.py --save-reference (default: the training data, "
        "measured once)")
    return parser


def recipe(chosen):
    """The recipe of the model and size chosen, or of the default ones."""
    model = chosen.get("model", COMMON["model"])
    size = chosen.get("size", DEFAULT_SIZE[model])
    recipes = RECIPES[model]
    found = {**recipes.get(re.split("[/-]", size)[0], recipes[None]), "size": size}
    if chosen.get("text") or chosen.get("clip"):
        found["lr"] = min(found["lr"], TEXT_LR)
    if chosen.get("prediction", "x0") != "x0":
        found["max_weight"] = 1.0
    return {**found, **dict.fromkeys(DENOISING)} if model in OTHERS else found


def flag(key):
    """A setting's name on the command line."""
    return f"--{key.replace('_', '-')}"


def read_settings(argv):
    """All flags, and the Run to resume or None.  What the command line leaves out the run decides, else the recipe."""
    given = {key: value for key, value in vars(flags().parse_args(argv)).items() if value is not None}
    if given.get("data") == "swissroll":
        given.setdefault("model", "mlp")
    out = Path(given.get("out", COMMON["out"]))
    parent_of(out)
    if out.suffix != ".pt":
        raise ValueError(f"--out {out}: a run's name ends in .pt")
    run = resumable(out, given) if given.get("resume") else None
    if run is None and out.exists():
        raise ValueError(f"{out} exists: --resume goes on with it, --out NAME.pt starts another")
    config = run.config if run else {}                   # of a run that may have been moved since
    args = argparse.Namespace(**{**COMMON, **recipe({**given, **config}), **config, **given, "out": str(out)})
    args.text = args.text or args.clip is not None
    check_flags(args, given)
    for key in ("lr", "warmup", "decay", "clip_grad") if run else ():
        if getattr(args, key) != config.get(key) and os.environ.get("RANK", "0") == "0":
            print(f"from step {run.step} on, {flag(key)} is {getattr(args, key)}, not {config.get(key)}", file=sys.stderr)
    if run is None:
        check_output(out, "run")
    check_output(out.with_suffix(".csv"), "log" if run else "new log", **rule_of(args))
    check_output(out.with_suffix(".png"), "picture", **rule_of(args))
    return args, run


def places(config):
    """Which of PLACES name a file or folder -> {setting: path}."""
    named = {key: str(config.get(key) or "") for key in PLACES}
    return {key: path.removeprefix("coco:").removeprefix("cifar10:") for key, path in named.items()
            if path not in ("", "inception", *OWN_SETS)}


def signature(config):
    """Proof that this user's train.py wrote a run with these places, by a key in the user's cache; None without places or cache.

    A run of somebody else has none, and so decides nothing about this machine.
    """
    named = places(config)
    try:
        key = cache_folder() / "key" if named else None
        if key and not key.exists():
            with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secrets.token_bytes(32))
        return named and hmac.new(readable(key).read_bytes(), json.dumps(named).encode(), "sha256").hexdigest() or None
    except OSError:
        return None


def check_places(run, given):
    """ValueError if a run that is somebody else's names a place that lies not beside it, and that the command line does not."""
    own = run.file.resolve().parent
    for key, path in places(run.config).items():
        if key not in given and Path(path).resolve().parent != own and run.signature != signature(run.config):
            raise ValueError(f"--resume: {run.file} names {path}, and was not written by this user here: {flag(key)} says that "
                             f"{'it may be used' if key == 'cache' else 'it may be read'}, or names another")


def could_be_given(action, value):
    """Whether a setting of a run is one that its flag, an action of argparse, could have been given; None is always."""
    if value is None:
        return True
    if action.nargs == 0:
        return isinstance(value, bool)
    try:
        same = (action.type or str)(str(value)) == value
    except (ValueError, argparse.ArgumentTypeError):
        return False
    return same and (not action.choices or value in action.choices)


def resumable(out, given):
    """The Run in a file that --resume goes on with.  ValueError if it is none, or has other settings than those given."""
    run = checkpoint.load(out)
    if run.optimizer is None or run.log is None or run.log.ndim != 2 or len(run.log) != 2:
        raise ValueError(f"--resume: {out} is not a run of train.py")
    known = {action.dest: action for action in flags()._actions}
    strange = [key for key, value in run.config.items() if key in known and not could_be_given(known[key], value)]
    if strange or run.config.get("model") not in RECIPES:
        raise ValueError(f"--resume: {out} is not a run of train.py: its {flag((strange or ['model'])[0])} cannot be that")
    clashes = [f"{flag(key)} is {run.config.get(key)} there, not {value}" for key, value in given.items()
               if key not in MAY_CHANGE and value != run.config.get(key) and not (key in MOVED and MOVED[key](run))]
    if clashes:
        raise ValueError(f"--resume: the run in {out} has other settings: {'; '.join(clashes)}")
    if os.environ.get("RANK", "0") == "0":               # other machines may have other keys
        check_places(run, given)
    return run


def check_flags(args, given):
    """ValueError, before anything is read, on settings that do not go together; given: those on the command line."""
    for keys, useless, why in (
            (DENOISING, args.model in OTHERS, f"{OTHERS.get(args.model)}, it does not denoise"),
            (OF_IMAGES, args.model == "mlp", "points have no use for it"),
            (("max_weight",), args.prediction != "x0", "it weights the errors of --prediction x0"),
            (("checkpointing",), args.model == "vae", "an autoencoder keeps its activations; use --accumulate to save memory"),
            (("eval_n", "features", "reference"), not args.eval_every, "it says how to score, which only --eval-every does"),
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
    for key, kind in (("vae", "file"), ("clip", "folder"), ("reference", "file")):
        path = getattr(args, key)
        if path and not Path(path).exists():
            raise ValueError(f"{flag(key)} {path}: there is no such {kind}")
    if max(args.ema, args.cfg_drop or 0) >= 1:
        raise ValueError("--ema and --cfg-drop must lie in [0, 1)")
    check_options(args.model, args.size, args.variance == "learned", args.conditioning, TEXT_DIM if args.text else None,
                  args.hybrid)
    if "context_dim" in named(args.model, args.size)[1] and not args.text:
        raise ValueError(f"--size {args.size} takes a text: give --text")


def description(args, image_size, channels, num_classes, context_dim=None, context_tokens=77, encoder=None):
    """The description of the network that the flags name, see `models.describe`, for the data's image size, channels and classes.

    context_dim, context_tokens: a text's; encoder: the arguments of a text encoder that is trained along, or None.
    """
    described = describe(args.model, args.size, image_size, channels, num_classes, bool(args.cfg_drop), args.variance == "learned",
                         args.conditioning, context_dim, context_tokens, args.hybrid)
    return {**described, **({"text": encoder} if encoder else {})}
