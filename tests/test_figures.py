"""assets/*.svg, the figures of architectures: they stand alone, can share one page, and name what the code has."""
import ast
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
SVG = "{http://www.w3.org/2000/svg}"
MODULES = {                                              # where the names of a figure stand
    "unet": ("unet",),
    "vit": ("vit",),
    "ldm": ("vae", "latents", "objectives", "ddpm", "sampling", "models", "dit", "uvit", "unet"),
    "dit": ("dit",),
    "dit-blocks": ("dit",),
    "uvit": ("uvit",),
}
figures = pytest.mark.parametrize("figure", MODULES)


def source(figure):
    return (ROOT / "assets" / f"{figure}.svg").read_text(encoding="utf-8")


def labels(figure):
    """Its ids and classes."""
    elements = [*ElementTree.fromstring(source(figure)).iter()]
    return {label for element in elements for label in (element.get("id", ""), *element.get("class", "").split())} - {""}


def identifiers(module):
    """What a module calls anything: its functions, classes, arguments, variables and attributes, and keys, as of a ModuleDict."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))):
        names |= {getattr(node, field, None) for field in ("name", "id", "attr", "arg", "value")}
    return {name for name in names if isinstance(name, str)}


@figures
def test_the_figure_has_a_title_a_description_and_scales(figure):
    root = ElementTree.fromstring(source(figure))
    title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert root.tag == f"{SVG}svg" and root.get("viewBox") and root.get("width") is None
    assert title.text.strip() and len(description.text.split()) > 20
    assert root.get("aria-labelledby").split() == [title.get("id"), description.get("id")]


@figures
def test_the_figure_refers_to_nothing_outside_itself(figure):
    text = source(figure).replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"http|href|@import|<script|<image|foreignObject", text)
    assert {*re.findall(r"url\((.*?)\)", text)} <= {f"#{label}" for label in labels(figure)}


@figures
def test_the_style_reaches_this_figure_only_and_has_no_rule_too_many(figure):
    style = re.search(r"<style>(.*)</style>", source(figure), re.S)[1]
    selectors = [part.strip() for rule in re.findall(r"[^{}]+(?=\{)", style) if "@media" not in rule for part in rule.split(",")]
    assert all(selector.split()[0] == f"#fig-{figure}" for selector in selectors)
    assert {*re.findall(r"\.([a-z-]+)", " ".join(selectors))} <= labels(figure)


def test_figures_on_one_page_share_no_id_and_no_class():
    sets = [labels(figure) for figure in MODULES]
    assert all(sets) and len(set().union(*sets)) == sum(map(len, sets))


@figures
def test_every_name_in_the_figure_is_a_name_of_the_code(figure):
    known = set().union(*map(identifiers, MODULES[figure]))
    texts = [e.text for e in ElementTree.fromstring(source(figure)).iter() if "-code" in e.get("class", "")]
    names = {*re.findall(r"[A-Za-z_]\w*", " ".join(texts))}
    assert len(names) > 3 and names <= known, names - known
