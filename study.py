"""The report's claims, each tried at a size that anyone can run again.

Report §1 … §4. A study trains a few runs with several seeds, scores each once, and says what came out: a table, a chart, a
paragraph. All numbers come from its table of scores in assets/, which grows row by row. A study that is stopped goes on where it
stood, also days later.

    python study.py                      the studies, and how long each takes
    python study.py blocks               train and score what is missing of one; print its table, draw its chart
    python study.py blocks --write       and put both into RESULTS.md

Times on shared machines drift by tens of percent. Scores depend on the machine by rounding only.
"""
import interrupts                        # noqa: F401  first, for signals while PyTorch is imported
import csv
import io
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

import judges
from checkpoint import load
from cli import Parser, one_line_errors, positive
from ddpm import PREDICTIONS
from dit import BLOCKS
from files import append, atomic_file
from gflops import count, inputs_of
from outcomes import (against, along, by_run, duels, falls_with, numbers_of, ranking, sampled, scattered, score_table, seen,
                      trade_off)
from pictures import save_image
from settings import MAY_CHANGE, read_settings

ROOT = Path(__file__).parent
RESULTS, ASSETS = ROOT / "RESULTS.md", ROOT / "assets"
OF_MACHINES = MAY_CHANGE - {"steps", "lr", "warmup", "decay", "clip_grad"}       # settings that change no result
ABOUT = ("run", "seed", "minutes", "threads", "training_steps", "parameters", "gflops", "machine", "torch", "date")


class Study(NamedTuple):
    """A claim, what is trained and measured to try it, and what is said of the outcome."""

    claim: str                         # the report's, with its section
    runs: tuple                        # names, of RUNS
    judge: object                      # (path of a run, seed, **setting) -> {score: value}
    columns: dict                      # {score to print: its format}
    outcome: object                    # (study, rows) -> what came out, in words
    picture: object                    # (study, rows, path of the first run) -> the chart, uint8 (H, W, C)
    open: str                          # what this leaves open, and what would settle it
    minutes: int                       # on 2 cores
    seeds: tuple = (0, 1, 2)
    settings: tuple = ({},)            # ways in which each run is sampled


# Runs: flags of train.py, besides --seed and --out. "{rate}" is the best rate of the study `rates`.

AUTOENCODERS = {"{digits-vae}": "vae", "{shapes-vae}": "vae of shapes"}          # runs, by the words that stand for their files
LATENT = "--vae {digits-vae}"
FAIR = ("--schedule cosine --prediction x0 --variance small --max-weight 5 --batch-size 32 --warmup 100 --decay cosine "
        "--weight-decay 0 --clip-grad 1 --ema 0.998")    # whatever the network
BACKBONES = {f"{model} on {what}": f"--model {model} --size {size} {flags} {FAIR}"      # at equal Gflops
             for what, flags, sizes in (("pixels", "", ("Nano", "Nano/4", "Ti/4")),
                                        ("latents", LATENT, ("Nano-latent", "Nano/2", "Ti/2")))
             for model, size in zip(("unet", "uvit", "dit"), sizes)}
RATES = ("0.0005", "0.0012", "0.003")
WIDTHS = {"Nano": "0.004", "Nano-deep": "0.004", "Ti": "0.002", "Ti-deep": "0.002", "S-shallow": "0.001", "S": "0.001"}   # rates
RUNS = {"digits": "", "vae": "--model vae",
        "latents": f"{LATENT} --size Ti/2", "roll": "--data swissroll",
        **{name: f"--conditioning {name} --steps 1200" for name in BLOCKS},
        **{f"{prediction} {schedule} {size}": f"--prediction {prediction} --schedule {schedule} --size {size} --steps 600"
           for size, prediction, schedule in product(("Ti/16", "Ti/8"), PREDICTIONS, ("linear", "cosine"))},
        **{f"{name}, rate {rate}": f"{flags} --lr {rate} --steps 400" for name, flags in BACKBONES.items() for rate in RATES},
        **{name: f"{flags} --lr {{rate}} --steps 800" for name, flags in BACKBONES.items()},
        **{f"{size}/{patch}, {steps} steps": f"{LATENT} --size {size}/{patch} {FAIR} --lr {rate} --steps {steps}"
           for steps in (400, 1000) for size, rate in WIDTHS.items() for patch in ((2, 4, 1) if size == "Ti" else (2,))},
        **{f"U-ViT {size}": f"--model uvit --size {size}/8 --steps 1000" for size in ("Ti", "Ti-no-skips", "Ti-no-conv")},
        "vae of shapes": "--model vae --data shapes:many --steps 1200",
        "text": "--data shapes:uneven --text --vae {shapes-vae} --size Ti/2 --conditioning adaln-zero --schedule scaled-linear "
                "--max-weight 5 --lr 0.001 --steps 9000"}


def best_rate(name):
    """The rate of the least held-out loss of a network, of those in RATES, by the study `rates`.  ValueError if one is missing."""
    losses = {row["run"]: float(row["held-out loss"]) for row in read_scores("rates")}
    missing = [rate for rate in RATES if f"{name}, rate {rate}" not in losses]
    if missing:
        raise ValueError(f"the rate of {name!r} follows from the study rates, which has not tried {', '.join(missing)} yet: "
                         "python study.py rates")
    return min(RATES, key=lambda rate: losses[f"{name}, rate {rate}"])


def flags_of(name, seed, folder):
    """The command line of a run, without the word train.py."""
    words = [str(path_of(AUTOENCODERS[word], 0, folder)) if word in AUTOENCODERS else best_rate(name) if word == "{rate}" else word
             for word in RUNS[name].split()]
    return [*words, "--seed", str(seed), "--sample-every", "1000000", "--out", str(path_of(name, seed, folder))]


def path_of(name, seed, folder):
    """Where a run lies."""
    return Path(folder) / f"{re.sub('[ ,/]+', '-', name)}-{seed}.pt"


def train_run(name, seed, folder, threads):
    """Train a run to its end, unless it is there; go on with one that was stopped -> its minutes, None where not all were seen.

    ValueError if a run of other settings has its name, or if it is stopped.
    """
    path, began = path_of(name, seed, folder), time.perf_counter()
    argv, there = flags_of(name, seed, folder), path.exists()
    args, _ = read_settings([*argv, "--out", str(path.with_suffix(".new.pt"))])          # as if it were not there
    run = load(path) if there else None
    differ = [key for key in vars(args) if there and key not in OF_MACHINES and run.config.get(key) != getattr(args, key)]
    if differ:
        raise ValueError(f"{path} is a run of other settings than the study's: " + "; ".join(
            f"--{key.replace('_', '-')} is {run.config.get(key)}, not {getattr(args, key)}" for key in differ) + ": move it away")
    if not there or run.step < args.steps:
        environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
        subprocess.run([sys.executable, ROOT / "train.py", *argv, *["--resume"] * there], env=environment, check=False)
        if not path.exists() or load(path).step < args.steps:
            raise ValueError(f"the run {name!r}, seed {seed}, did not come to its end: the same command goes on with it")
    return None if there else (time.perf_counter() - began) / 60


# Scores

def columns_of(study):
    """The columns of a study's table of scores."""
    return [*ABOUT, *study.settings[0], *study.columns]


def table_path(name):
    """Where a study's scores are kept."""
    return ASSETS / f"study-{name}.csv"


def read_scores(name):
    """The rows of a study's table, dicts of text.  ValueError if it has other columns."""
    path, columns = table_path(name), columns_of(STUDIES[name])
    if not path.exists():
        append(path, ",".join(columns) + "\n")
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != columns:
            raise ValueError(f"{path} has other columns than this version's: move it away")
        return list(reader)


def machine():
    """The processor, in words."""
    information = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", information.read_text()) if information.exists() else []
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}"


def score_run(name, run, seed, minutes, folder, threads, done):
    """Score a run in each setting that is not done yet, and add the rows to the study's table."""
    study, path = STUDIES[name], path_of(run, seed, folder)
    trained = load(path)
    network, _ = trained.build()
    parameters, multiply_adds = count(network, *inputs_of(network))
    about = dict(run=run, seed=seed, minutes=minutes and f"{minutes:.1f}", threads=threads or torch.get_num_threads(),
                 training_steps=trained.step, parameters=parameters, gflops=f"{multiply_adds / 1e9:.4g}", machine=machine(),
                 torch=torch.__version__, date=date.today())
    for setting in study.settings:
        if (run, str(seed), *map(str, setting.values())) in done:
            continue
        found = study.judge(path, seed, **setting)
        row = io.StringIO()
        csv.DictWriter(row, columns_of(study), lineterminator="\n").writerow(
            {**about, **setting, **{score: f"{found[score]:.5g}" for score in study.columns}})
        append(table_path(name), row.getvalue())
        print(f"{run}, seed {seed}" + "".join(f", {key} {value}" for key, value in setting.items()) + ": "
              + ", ".join(f"{score} {found[score]:{form}}" for score, form in study.columns.items()), flush=True)


def complete(name, folder, together):
    """Train and score what a study lacks, `together` runs at once, each on one thread if there are several -> all rows."""
    study, threads = STUDIES[name], 1 if together > 1 else None
    done = {(row["run"], row["seed"], *(row[key] for key in study.settings[0])) for row in read_scores(name)}
    wanted = [(run, seed) for seed, run in product(study.seeds, study.runs)
              if any((run, str(seed), *map(str, setting.values())) not in done for setting in study.settings)]
    for run in wanted:
        flags_of(*run, folder)                           # refuses what cannot be, before anything is trained
    for word, autoencoder in AUTOENCODERS.items():
        if any(word in RUNS[run] for run, _ in wanted):
            train_run(autoencoder, 0, folder, None)

    def train_and_score(run, seed):
        score_run(name, run, seed, train_run(run, seed, folder, threads), folder, threads, done)
    pool = ThreadPoolExecutor(together, initializer=torch.set_num_threads, initargs=(threads or torch.get_num_threads(),))
    try:
        for future in [pool.submit(train_and_score, *run) for run in wanted]:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)               # what runs comes to its end
    return read_scores(name)


# The studies

SCORED = {"FD": ".2f", "precision": ".3f", "recall": ".3f", "accuracy": ".1%", "unique": ".0%", "authentic": ".0%"}
FITTED = {"held-out loss": ".4f", **SCORED, "training TFLOP": ".2f"}
STUDIES = {
    "first": Study(
        "A diffusion transformer learns to draw (abstract).", ("digits",), judges.digit_scores, {**SCORED, "recognised": ".1%"},
        numbers_of("FD", "recall"), seen(judges.drawn_digits), "A person decides whether the strokes are whole.", 20,
        settings=({"scale": 1.0}, {"scale": 1.5})),
    "blocks": Study(
        "adaLN-Zero is the best of four block designs (§2-8-3, §4-2).",
        tuple(BLOCKS), judges.digit_scores, SCORED, ranking("FD", "adaln-zero"), by_run("FD"),
        "The gates of adaLN-Zero let a deep network begin as the identity, and these networks have six blocks. The four designs at "
        "B/4, for 400,000 steps, would settle it.", 30),
    "guidance": Study(
        "Guidance trades recall for precision (§3, §4-8 … §4-10, Fig. 5-2).", ("digits", "latents"), judges.digit_scores, SCORED,
        trade_off, against("recall", "precision", "scale"), "These are ten clear classes of one data set; photographs may differ.", 40,
        settings=tuple({"scale": scale} for scale in (1.0, 1.5, 3.0, 6.0))),
    "samplers": Study(
        "Improved samplers need fewer steps (§3).", ("digits",), judges.digit_scores, {**SCORED, "images_per_s": ".1f"},
        sampled, along("steps", "FD", "sampler", log=True), "The run predicts x0. A run that predicts eps may rank samplers "
        "otherwise.", 60, settings=tuple(
            {"scale": 1.0, "sampler": sampler, "steps": steps} for sampler, numbers in (
                ("ddpm", (10, 25, 50, 250)), ("ddim", (5, 10, 20, 50)), ("dpm++", (5, 10, 15, 20, 50)))
            for steps in numbers)),
    "prediction": Study(
        "Predicting the noise is better than predicting the pixels (§3).",
        tuple(name for name in RUNS if name.split()[0] in PREDICTIONS), judges.digit_scores, SCORED, duels("FD", "eps", "x0"),
        by_run("FD", log=True), "After 600 steps of 32 images only x0 draws digits: this shows which is learned first, not where "
        "each ends. A patch of 16x16 pixels is 256 numbers in a token of 192, one of 8x8 is 64: noise needs all of them, an image "
        "few. Longer runs, smaller patches and latents would settle it.", 60),
    "rates": Study(
        "Each network of the study backbones has a learning rate of its own.",
        tuple(name for name in RUNS if ", rate " in name), judges.held_out_loss, {"held-out loss": ".4f"},
        numbers_of("held-out loss"), by_run("held-out loss", log=True), "Larger rates, where the largest of the three is best.",
        30, seeds=(0,)),
    "backbones": Study(
        "Transformers can take the U-Net's place (abstract, §4, §5).", tuple(BACKBONES), judges.loss_and_scores, FITTED,
        duels("FD", "dit", "unet"), by_run("FD", log=True),
        "A convolution knows which pixels are neighbours, and tokens have to learn it. The budget of 800 steps ends before losses "
        "are flat. The papers compare after hundreds of thousands of steps, which would settle it.", 70, seeds=(1, 2, 3)),
    "scaling": Study(
        "More Gflops give a lower FID, whatever they are spent on (§2-7-1, §4-2-3, Fig. 4-3).",
        tuple(name for name in RUNS if name.endswith(" steps")), judges.loss_and_scores, FITTED,
        falls_with((("gflops", "400 steps"), ("gflops", "1000 steps"), ("gflops", "/2, 1000 steps"), ("training TFLOP", "")),
                   ("held-out loss", "FD")),
        scattered(("gflops", "training TFLOP"), "FD", ("400 steps", "1000 steps")), "At a patch of 4 there are four tokens, which "
        "agree sooner than 16 or 64: in a thousand steps this counts for more than Gflops. The same networks after 100,000 steps "
        "would show whether smaller patches overtake larger ones, as in Fig. 4-3.", 60, seeds=(0,)),
    "skips": Study(
        "Long skips and the last convolution matter (§3, §4-1).", tuple(name for name in RUNS if name.startswith("U-ViT")),
        judges.loss_and_scores, FITTED, ranking("FD", "U-ViT Ti"), by_run("FD"), "Six blocks and a thousand steps on digits. Sizes "
        "of the paper on CIFAR-10, for the 500,000 steps of its recipe, would settle it.", 20),
    "restoration": Study(
        "A diffusion model fills in and enlarges images (§1-2).", ("digits",), judges.restored_share,
        {"kept": ".1%", "nearest": ".1%"}, numbers_of("kept", "nearest"), seen(judges.restored_digits),
        "Other images than digits.", 8, seeds=(0,), settings=tuple(
            {"task": task, "label": label} for task in judges.TASKS for label in ("given", "not given"))),
    "denoising": Study(
        "A diffusion model removes noise (§1-2).", ("digits",), judges.denoised,
        dict.fromkeys(("label given", "no label", "linear filter", "best blur", "noisy"), ".1f"),
        numbers_of("no label", "linear filter"), seen(judges.denoised_digits), "Other images than digits.", 1, seeds=(0,)),
    "text": Study(
        "Images are drawn from text (§4-1).", ("text",), judges.prompts_fulfilled,
        {"right": ".1%", "right in colour": ".1%"}, numbers_of("right"), seen(judges.prompts_drawn),
        "Shapes of two objects at once, which longer training may bring: colours and places are right.", 30, seeds=(0,),
        settings=tuple({"prompts": kind} for kind in judges.KINDS)),
    "roll": Study(
        "The reverse process turns noise into data (§2-1, Fig. 2-1).", ("roll",), judges.distance_to_roll,
        {"distance": ".4f", "of data to data": ".4f"}, numbers_of("distance", "of data to data"), seen(judges.drawn_points),
        "Nothing in the plane.", 2),
}


# The command

def study_report(name, rows):
    """A study's table and what is said of it, in Markdown."""
    study = STUDIES[name]
    machines, dates = sorted({row["machine"] for row in rows}), sorted({row["date"] for row in rows})
    seeds = (f"seed {study.seeds[0]}" if len(study.seeds) == 1 else
             f"seeds {', '.join(map(str, study.seeds))}, with the range over them")
    single = "" if all(row["threads"] != "1" for row in rows) else " Rows of one thread had another run beside them."
    return "\n".join([
        score_table(study, rows), "", f"![Scores of the study](assets/study-{name}.png)", "",
        f"**Claimed.** {study.claim} **What came out.** {study.outcome(study, rows)} **Open.** {study.open}", "",
        f"*`python study.py {name}`: {seeds}; {'; '.join(machines)}; "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}.{single}*"])


def write(name, text):
    """Put a study's report into RESULTS.md, between its two marks.  ValueError if they are not there."""
    first, last = f"<!-- study {name}: written by study.py -->", f"<!-- end of study {name} -->"
    page = RESULTS.read_text(encoding="utf-8")
    before, found, rest = page.partition(first)
    _, ended, after = rest.partition(last)
    if not found or not ended:
        raise ValueError(f"{RESULTS} lacks the lines {first} and {last}, between which the study belongs")
    with atomic_file(RESULTS) as file:
        file.write(f"{before}{first}\n\n{text}\n\n{last}{after}".encode())


def flags():
    """The command line."""
    parser = Parser(prog="study.py", description="Try the report's claims, each at a size that anyone can run again.")
    parser.add_argument("name", nargs="?", choices=STUDIES, help="the study (default: the list of them)")
    parser.add_argument("--write", action="store_true", help="put the table and the chart into RESULTS.md and assets/")
    parser.add_argument("--runs", default="studies", help="folder of the runs (default: studies)")
    parser.add_argument("--together", type=positive, default=1, help="runs that are trained at once, on one thread each if "
                        "there are several (default: 1)")
    return parser


def main(argv=None):
    """The command: list the studies, or complete one and say what came out."""
    args = flags().parse_args(argv)
    with one_line_errors("study.py"):
        if args.name is None:
            for name, study in STUDIES.items():
                print(f"{name:12} {study.minutes:4} minutes   {study.claim}")
            return
        Path(args.runs).mkdir(exist_ok=True)
        text = study_report(args.name, rows := complete(args.name, args.runs, args.together))
        print(text)
        if args.write:
            study = STUDIES[args.name]
            picture = study.picture(study, rows, path_of(study.runs[0], study.seeds[0], args.runs))
            save_image(ASSETS / f"study-{args.name}.png", picture, "study")
            write(args.name, text)


if __name__ == "__main__":
    sys.exit(main())
