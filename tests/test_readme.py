"""README.md: every command in it parses and names settings that exist; those of a laptop are run, with a step or two in place of all."""
import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cascade
import restoration
import sampling
import train

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [line.split("#")[0].strip() for block in re.findall(r"^```\n(.*?)^```", TEXT, re.S | re.M) for line in block.splitlines()]
INLINE = re.findall(r"`(python \w+\.py[^`…]*)`", TEXT.replace("\n", " "))        # in tables and prose; an ellipsis is no command
COMMANDS = list(dict.fromkeys([line for line in LINES if re.match(r"python \w+\.py|torchrun|pip", line)]
                              + [re.sub(" N$", " 0", line) for line in INLINE]))


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
    module = importlib.import_module(program)
    if program == "train" and "--resume" not in argv:
        train.settings(argv)
    elif program == "plot" and argv[0].endswith(".csv"):
        module.flags().parse_args(["curves", *argv])
    else:
        module.flags().parse_args(argv)


def test_every_file_that_the_readme_shows_or_links_exists():
    for name in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXT):
        assert name.startswith("http") or (ROOT / name).exists(), name
    assert {path.name for path in ROOT.glob("*.py")} - {"conftest.py"} <= set(re.findall(r"\[`(\w+\.py)`\]", TEXT))


ON_A_LAPTOP = re.compile(r"train\.py(?!.*(--size (?!Ti|Nano)|--data (?!shapes|swissroll)|nproc|--resume|--eval-every|sd-vae))"
                         r"|sample\.py(?!.*(nproc|coco|DiT-XL|adm|cifar|uvit_small))|plot\.py(?!.*compare/)|checkpoint\.py")


def test_the_commands_for_a_laptop_run_in_the_readmes_order(tmp_path, monkeypatch, capsys):
    """With two steps of eight images, two evaluations a sample, and the files that a reader would bring."""
    monkeypatch.chdir(tmp_path)
    for module in (cascade, sampling, restoration):
        monkeypatch.setattr(module, "STEPS", 2)
    pixels = np.pad(np.full((14, 14), 255, np.uint8), 9)
    for name, image in (("digit", 255 - pixels), ("noisy", pixels), ("mask", pixels), ("small", pixels[::4, ::4])):
        Image.fromarray(image).save(f"{name}.png")
    chosen = [command for command in COMMANDS if ON_A_LAPTOP.search(command)]
    assert len(chosen) > 30
    made = []
    for command in sorted(chosen, key=lambda command: "train.py" not in command):        # trainings first, else as they stand
        program, argv = program_and_flags(command)
        out = argv[argv.index("--out") + 1] if "--out" in argv else "run.pt"
        if program == "train":
            if out in made:                              # a line that stands twice with other comments
                continue
            made.append(out)
            argv += ["--steps", "2", "--batch-size", "8", "--sample-every", "2", "--device", "cpu", "--cache", "cache"]
        elif program == "sample" and "--trajectory" in argv:
            argv += ["--steps", "2", "--n", "2"]
        elif program == "sample" and not {"--upscale", "--inpaint", "--denoise"} & {*argv}:
            argv += ["--n", "2", "--steps", "2"]
        importlib.import_module(program).main(argv)
        assert "" == capsys.readouterr().err.replace("\r", ""), command
    assert {"run.pt", "uvit.pt", "unet.pt", "vae.pt", "latent.pt", "shapes.pt", "base.pt", "sr.pt", "roll.pt"} <= {*made}
    assert all((tmp_path / name).exists() for name in ("samples.png", "schedules.png", "swissroll.png", "way.gif", "curves.png"))
