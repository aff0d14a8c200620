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

import numpy as np
import torch

import judges
from checkpoint import load
from cli import Parser, one_line_errors, positive
from ddpm import PREDICTIONS
from dit import BLOCKS
from files import append, atomic_file
from gflops import count, inputs_of
from pictures import COLOURS, Chart, save_image, spread
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


# Runs: flags of train.py, besides --seed and --out

RUNS = {"digits": "", "vae": "--model vae",
        "latents": "--vae {vae} --size Ti/2", "roll": "--data swissroll",
        **{name: f"--conditioning {name} --steps 1200" for name in BLOCKS},
        **{f"{prediction} {schedule} {size}": f"--prediction {prediction} --schedule {schedule} --size {size} --steps 600"
           for size, prediction, schedule in product(("Ti/16", "Ti/8"), PREDICTIONS, ("linear", "cosine"))},
        **{f"{model} {size}": f"--model {model} --size {size} --steps 1400"
           for model, size in (("dit", "Ti/4"), ("uvit", "Nano/4"), ("unet", "Nano"), ("dit", "Ti/8"), ("dit", "Ti/16"))},
        "objects": "--model uvit --data shapes:one --text --steps 6000",
        "scenes": "--model uvit --data shapes --text --steps 6000"}


def flags_of(name, seed, folder):
    """The command line of a run, without the word train.py."""
    words = [str(path_of("vae", 0, folder)) if word == "{vae}" else word for word in RUNS[name].split()]
    return [*words, "--seed", str(seed), "--sample-every", "1000000", "--out", str(path_of(name, seed, folder))]


def path_of(name, seed, folder):
    """Where a run lies."""
    return Path(folder) / f"{re.sub('[ /]', '-', name)}-{seed}.pt"


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
    if any("{vae}" in RUNS[run] for run, _ in wanted):
        train_run("vae", 0, folder, None)
    for i in range(0, len(wanted), together):
        at_once = wanted[i:i + together]
        with ThreadPoolExecutor(together) as pool:
            minutes = list(pool.map(lambda run: train_run(*run, folder, threads), at_once))
        for (run, seed), taken in zip(at_once, minutes):
            score_run(name, run, seed, taken, folder, threads, done)
    return read_scores(name)


# What came out

def values(rows, score, **chosen):
    """The values (n,) of a score in the rows of a run, or of a setting."""
    return np.array([float(row[score]) for row in rows if all(row[key] == str(value) for key, value in chosen.items())])


def spread_of(values, form):
    """A mean and the range of several seeds, in words."""
    mean, low, high = (format(value, form) for value in (values.mean(), values.min(), values.max()))
    return mean if low == high else f"{mean} ({low} – {high})"


def score_table(study, rows):
    """The scores of a study in Markdown: a line a run and setting, each a mean and a range over seeds."""
    keys = list(study.settings[0])
    lines = [["run", *keys, "Gflops", "minutes", *study.columns]]
    lines += [["---"] * len(lines[0])]
    for run, setting in product(study.runs, study.settings):
        mine = [row for row in rows if row["run"] == run and all(row[key] == str(value) for key, value in setting.items())]
        if not mine:
            continue
        minutes = [float(row["minutes"]) for row in mine if row["minutes"]]
        lines.append([run, *map(str, setting.values()), f"{float(mine[0]['gflops']):.3g}",
                      f"{np.mean(minutes):.1f}" if minutes else "",
                      *(spread_of(values(mine, score), form) for score, form in study.columns.items())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ranking(score, claimed=None, best=min):
    """An outcome: the runs from the best to the worst mean of a score; claimed: the run that the report expects to be first."""
    def say(study, rows):
        found = {run: values(rows, score, run=run) for run in study.runs}
        order = sorted(found, key=lambda run: found[run].mean(), reverse=best is max)
        first, second = order[:2]
        apart = (found[first].max() < found[second].min() if best is min else found[first].min() > found[second].max())
        means = ", ".join(f"{run} {spread_of(found[run], study.columns[score])}" for run in order)
        text = (f"{score}, from the best: {means}. The ranges of {first} and {second} "
                + ("lie apart." if apart else "overlap: these seeds do not tell them apart."))
        if claimed:
            text += " " + ("This agrees with the report." if first == claimed and apart else
                           "This contradicts the report." if first != claimed and found[first].max() < found[claimed].min() else
                           "This neither confirms the report nor contradicts it.")
        return text
    return say


def duels(score, claimed, other):
    """An outcome: whether runs whose name begins with `claimed` have a lower score than those of the same name with `other`."""
    def say(study, rows):
        text, better, worse = [], 0, 0
        names = list(dict.fromkeys(run.partition(" ")[2] for run in study.runs))         # what the first words are tried with
        for name in names:
            found = {run.split()[0]: values(rows, score, run=run) for run in study.runs if run.partition(" ")[2] == name}
            order = sorted(found, key=lambda word: found[word].mean())
            text.append(f"{name}: " + ", ".join(f"{word} {spread_of(found[word], study.columns[score])}" for word in order))
            better += found[claimed].max() < found[other].min()
            worse += found[claimed].min() > found[other].max()
        verdict = ("agrees with" if better and not worse else "contradicts" if worse and not better else
                   "neither confirms nor contradicts")
        return (f"{score}, from the best: {'; '.join(text)}. All seeds of {claimed} are better than those of {other} in {better} "
                f"of {len(names)} cases, and worse in {worse}. This {verdict} the report.")
    return say


def trade_off(study, rows):
    """The outcome of guidance: what precision and recall do up to the scale of the highest precision, and beyond it."""
    text, scales = [], [setting["scale"] for setting in study.settings]
    for run in study.runs:
        p, r, distance = ({scale: values(rows, score, run=run, scale=scale).mean() for scale in scales}
                          for score in ("precision", "recall", "FD"))
        first, best, last = scales[0], max(p, key=p.get), scales[-1]
        if best == first or r[best] >= r[first]:
            said = f"recall is {r[best]:.3f} at scale {best:g}, where precision is highest, which contradicts the report"
        else:
            said = (f"from scale {first:g} to {best:g} precision goes from {p[first]:.3f} to {p[best]:.3f} and recall from "
                    f"{r[first]:.3f} to {r[best]:.3f}, as the report says")
        beyond = f"; at scale {last:g} precision is {p[last]:.3f} and recall {r[last]:.3f}" if best != last else ""
        text.append(f"{run}: {said}{beyond}; FD is lowest at scale {min(distance, key=distance.get):g}.")
    return " ".join(text)


def sampled(study, rows):
    """The outcome of samplers: what each needs at least to reach the distance of 250 ancestral steps, and how fast that is."""
    full = dict(sampler="ddpm", steps=250)
    distance, rate = (values(rows, score, **full) for score in ("FD", "images_per_s"))
    text = [f"250 ancestral steps reach an FD of {spread_of(distance, '.2f')}."]
    for sampler in ("ddpm", "ddim", "dpm++"):
        enough = [setting for setting in study.settings
                  if setting["sampler"] == sampler and values(rows, "FD", **setting).mean() <= distance.max()]
        text.append(f"{sampler} does not reach it." if not enough else
                    f"{sampler} reaches it with {enough[0]['steps']} evaluations, at "
                    f"{values(rows, 'images_per_s', **enough[0]).mean() / rate.mean():.1f} times the images/s.")
    return " ".join(text)


def numbers_of(*scores):
    """An outcome where nothing is ranked: some scores of each run in each setting."""
    def say(study, rows):
        text = []
        for run, setting in product(study.runs, study.settings):
            found = (f"{score} {spread_of(values(rows, score, run=run, **setting), study.columns[score])}" for score in scores)
            text.append(", ".join([run, *(f"{key} {value}" for key, value in setting.items())]) + ": " + ", ".join(found))
        return "; ".join(text) + "."
    return say


# Charts

def by_run(score, log=False):
    """A chart of a score: a row a run, a disc a seed."""
    def draw(study, rows, path):
        found = [values(rows, score, run=run) for run in study.runs]
        low, high = spread(*found, log=log)
        room = high * (high / low) ** 0.3 if log else high + 0.3 * (high - low)          # for names
        chart = Chart((low, room), (0.5, len(found) + 0.5), x_label=score, width=900, height=110 + 34 * len(found), log_x=log)
        chart.y_ticks = []                               # rows have names
        for row, run, scored, colour in zip(range(len(found), 0, -1), study.runs, found, COLOURS * 3):
            chart.points(scored, np.full(len(scored), row), colour, 6)
            chart.text(scored.max(), row, run, colour)
        return chart.image()
    return draw


def along(key, score, lines="run", log=False):
    """A chart of the mean of a score along a setting, a line each run, or each value of another setting; discs are seeds."""
    def draw(study, rows, path):
        x, y = values(rows, key), values(rows, score)
        chart = Chart(spread(x, log=log), spread(y), x_label=key, y_label=score, width=900, height=480, log_x=log)
        for name, colour in zip(dict.fromkeys(row[lines] for row in rows), COLOURS):
            places = sorted({float(row[key]) for row in rows if row[lines] == name})
            mine = [np.array([float(row[score]) for row in rows if row[lines] == name and float(row[key]) == place])
                    for place in places]
            chart.line(places, [scored.mean() for scored in mine], colour, label=name)
            for place, scored in zip(places, mine):
                chart.points(np.full(len(scored), place), scored, colour, 4)
        return chart.image()
    return draw


def against(x, y, key):
    """A chart of a score against another: a line a run through the means in its settings, whose `key` is said; discs are seeds."""
    def draw(study, rows, path):
        chart = Chart(spread(values(rows, x)), spread(values(rows, y)), x_label=x, y_label=y, width=900, height=480)
        for run, colour in zip(study.runs, COLOURS):
            seeds = [[values(rows, score, run=run, **setting) for score in (x, y)] for setting in study.settings]
            means = np.array(seeds).mean(axis=2)                         # (settings, 2)
            chart.line(*means.T, colour, label=run)
            for pair, mean, setting in zip(seeds, means, study.settings):
                chart.points(*pair, colour, 4)
                chart.text(*mean, f"{setting[key]:g}", colour)
        return chart.image()
    return draw


def seen(picture):
    """Samples of the first run, as a picture of judges.py shows them."""
    return lambda study, rows, path: picture(path)


# The studies

SCORED = {"FD": ".2f", "precision": ".3f", "recall": ".3f", "accuracy": ".1%", "unique": ".0%", "authentic": ".0%"}
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
    "networks": Study(
        "Transformers can take the U-Net's place, and more Gflops give better images (§1, §2-7-1, Fig. 4-3).",
        tuple(name for name in RUNS if name.startswith(("dit ", "uvit ", "unet "))), judges.digit_scores, SCORED,
        ranking("FD", "dit Ti/4"), along("gflops", "FD", log=True), "1,400 steps are few, and the recipe is DiT's. Each network "
        "at its own best learning rate, until its held-out loss is flat, would settle it.", 45, seeds=(0, 1)),
    "restoration": Study(
        "A diffusion model fills in and enlarges images (§1-2).", ("digits",), judges.restored_share,
        {"kept": ".1%", "nearest": ".1%"}, numbers_of("kept", "nearest"), seen(judges.restored_digits),
        "Other images than digits.", 8, seeds=(0,), settings=tuple(
            {"task": task, "label": label} for task in judges.TASKS for label in ("given", "not given"))),
    "denoising": Study(
        "A diffusion model removes noise (§1-2).", ("digits",), judges.denoised,
        dict.fromkeys(("label given", "no label", "linear filter", "best blur", "noisy"), ".1f"),
        numbers_of("no label", "linear filter"), seen(judges.denoised_digits), "Other images than digits.", 1, seeds=(0,)),
    "captions": Study(
        "Images are drawn from text (§4-1).", ("objects", "scenes"), judges.prompts_fulfilled,
        {"right": ".1%", "right in colour": ".1%"}, numbers_of("right"), seen(judges.prompts_drawn),
        "A finer patch, and more steps.", 30, seeds=(0,), settings=tuple({"prompts": kind} for kind in judges.KINDS)),
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
