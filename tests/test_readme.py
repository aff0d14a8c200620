"""README.md, RESULTS.md and CHANGING.md: every command parses and names settings that exist; those for a laptop are run, cut to two
steps; the library's lines run; every link, and every name of the code, leads to something that exists."""
import importlib
import os
import re
import shlex
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cascade
import companion
import data
import dit
import plot
import restoration
import sampling
import settings
import unet
import uvit
import vit
from reports import first_line
from test_train import SMALLER

ROOT = Path(__file__).parents[1]
PAGES = {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "RESULTS.md", "CHANGING.md")}
README, TEXT = PAGES["README.md"], "\n".join(PAGES.values())
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.S | re.M)         # language and lines
LINES = [line.split("#")[0].strip() for language, block in BLOCKS if not language for line in block.splitlines()]
INLINE = re.findall(r"`(python \w+\.py[^`…]*)`", TEXT.replace("\n", " "))        # in tables and prose; an ellipsis is no command
COMMANDS = list(dict.fromkeys([line for line in LINES if re.match(r"python \w+\.py|torchrun|pip", line)]
                              + [re.sub(" N$", " 0", line) for line in INLINE]))
RUN = ("train", "sample", "plot", "checkpoint")          # evaluate, study, bench and gflops are run by their own tests
NOT_HERE = (                                             # what of a command asks for more than a laptop and this repository
    "torchrun", "--resume", "--eval-every",              # more processes, a run that was begun, minutes of scoring
    "--size B", "--size S", "--size L", "--size XL", "ddpm-cifar10",     # days
    "cifar", "photos", "images.npz", "coco", "sd-vae", "DiT-XL", "studies/")     # files of others, and of study.py
FEW = {                                                  # what is added to a command, by program
    "train": ["--steps", "2", "--batch-size", "8", "--sample-every", "2", "--device", "cpu", "--cache", "cache"],
    "sample": ["--steps", "2", "--n", "2"]}


def program_and_flags(command):
    """The last "X.py flags" of a command line; torchrun's "--" may stand before it."""
    words = shlex.split(command.split("&&")[-1])
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[at].removesuffix(".py"), words[at + 1:]


def test_the_readme_has_many_commands_and_begins_with_two():
    assert len(COMMANDS) > 50 and all(line.startswith("pip install -r requirements.txt && python") for line in COMMANDS[:2])


@pytest.mark.parametrize("command", [command for command in COMMANDS if " -m pytest" not in command])
def test_the_command_parses_and_its_recipe_exists(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, argv = program_and_flags(command)
    for flag in {"--vae", "--clip"} & {*argv}:           # they are looked for at once
        Path(argv[argv.index(flag) + 1]).touch()
    if program == "train" and "--resume" in argv:
        settings.flags().parse_args(argv)
    elif program == "train":
        settings.read_settings(argv)
    else:
        curves = ["curves"] if program == "plot" and argv[0].endswith(".csv") else []
        importlib.import_module(program).flags().parse_args([*curves, *argv])


def anchors(path):
    """The names in a Markdown file that a link may lead to: of its headings, as GitHub makes them, and of `<a id>`."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    headings = (re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in re.findall(r"^#+ (.*)", text, re.M))
    return {*headings, *re.findall(r'<a id="([^"]+)"', text)}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_or_a_heading_leads_to_one(page):
    for name, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", PAGES[page]):
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists() and (not anchor or anchor in anchors(target)), (name, anchor)


@pytest.mark.parametrize("name", sorted({*re.findall(r"`(\w+\.py: [\w.]+)", TEXT)}))
def test_every_name_of_the_code_is_defined_there(name):
    companion.find(ROOT, *name.split(": "), 0)           # raises what it does not find


def test_the_map_names_each_module_once():
    modules = {path.name for path in ROOT.glob("*.py")} - {"conftest.py"}
    assert sorted(re.findall(r"\[`(\w+\.py)`\]", README)) == sorted(modules)


@pytest.mark.parametrize("steps, batch_size, device, epochs, lines", [
    (400_000, 256, "cpu", "11,378 epochs", 2), (400_000, 256, "cuda", "11,378 epochs", 1), (2800, 32, "cpu", "10 epochs", 1)])
def test_a_run_begins_with_its_epochs_and_on_a_cpu_with_what_fits_it(steps, batch_size, device, epochs, lines):
    args = Namespace(steps=steps, batch_size=batch_size, data="mnist", size="B/4", vae=None, precision="fp32")
    training = Namespace(args=args, dataset=data.load(), start=0, described={"class": "DiT"}, device=torch.device(device), world=1,
                         state=Namespace(network=torch.nn.Linear(1, 1)))
    read_as, first, *more = first_line(training).split("\n")
    assert read_as.startswith("mnist: 9,000 images, 32x32 pixels, grey, levels 0 to 255; 10 classes: 0, 1, 2, 3, 4, …; no captions; ")
    assert first.endswith(f"of {batch_size} images, {epochs}") and len(more) == lines - 1
    assert all("python train.py," in line for line in more)


def test_the_readme_is_read_in_a_few_minutes():
    assert len(README.splitlines()) <= 160


def test_the_librarys_lines_run(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_run, "run.pt")
    lines, = (block for language, block in BLOCKS if language == "python")
    names = {}
    exec(lines, names)
    assert names["images"].shape == (8, 1, 32, 32) and names["images"].abs().max() <= 1 and names["network"].num_classes == 10


def test_the_commands_for_a_laptop_run_in_the_readmes_order(tmp_path, monkeypatch, capsys):
    """With small networks, two steps of eight images, one evaluation a sample, 100 images of each data set, 50 points, and a
    reader's files."""
    def few_images(*args, load=data.load, **options):
        dataset = load(*args, **options)
        dataset.rows = dataset.rows[:None if "swissroll" in args else 100]
        return dataset
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", few_images)
    for module in (cascade, sampling, restoration):
        monkeypatch.setattr(module, "STEPS", 1)
    monkeypatch.setattr(plot, "CHAIN", 50)
    for sizes, smaller in ((dit.SIZES, SMALLER), (uvit.SIZES, SMALLER), (vit.SIZES, SMALLER), (unet.SIZES, dict(multipliers=(1, 1)))):
        for size in {"Nano", "Ti", "Ti-up", "XS"} & sizes.keys():
            monkeypatch.setitem(sizes, size, {**sizes[size], **smaller})
    pixels = np.pad(np.full((14, 14), 255, np.uint8), 9)
    for name, image in (("digit", 255 - pixels), ("noisy", pixels), ("mask", pixels), ("small", pixels[::4, ::4])):
        Image.fromarray(image).save(f"{name}.png")
    here = [program_and_flags(command) for command in COMMANDS if " -m " not in command and not any(w in command for w in NOT_HERE)]
    chosen = [(program, argv) for program, argv in here if program in RUN]
    assert len(chosen) > 30
    made = set()
    for program, argv in sorted(chosen, key=lambda command: command[0] != "train"):      # trainings first, else as they stand
        out = argv[argv.index("--out") + 1] if "--out" in argv else "run.pt"
        if program == "train" and out in made:           # a line that stands twice with other comments
            continue
        made |= {out} if program == "train" else set()
        restores = {"--upscale", "--inpaint", "--denoise"} & {*argv}     # takes its own number of steps
        importlib.import_module(program).main([*argv, *([] if restores else FEW.get(program, []))])
        assert "" == capsys.readouterr().err.replace("\r", ""), (program, argv)
    assert {"run.pt", "uvit.pt", "unet.pt", "vae.pt", "latent.pt", "shapes.pt", "base.pt", "sr.pt", "roll.pt"} <= made
    assert {"samples.png", "schedules.png", "swissroll.png", "way.gif", "roll.gif", "curves.png"} <= {*os.listdir()}
