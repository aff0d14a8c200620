"""README.md: every command in it parses and names settings that exist; those of a laptop are run, with a step or two in place of all."""
import importlib
import re
import shlex
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [line.split("#")[0].strip() for block in re.findall(r"^```\n(.*?)^```", TEXT, re.S | re.M) for line in block.splitlines()]
INLINE = re.findall(r"`(python \w+\.py[^`…]*)`", TEXT)                   # in tables and prose; an ellipsis is no command
COMMANDS = list(dict.fromkeys([line for line in LINES if re.match(r"python \w+\.py|torchrun|pip", line)] + INLINE))
FILES = ("sd-vae-ft-mse.safetensors", "vae.pt")          # what --vae names is looked for at once


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
    for name in FILES:
        Path(name).touch()
    program, argv = program_and_flags(command)
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
