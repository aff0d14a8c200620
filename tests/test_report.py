"""REPORT.md leaves nothing of the report out, its excerpts are the code, and what it names, links to and computes is there."""
import doctest
import re
from pathlib import Path

import companion

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "REPORT.md").read_text(encoding="utf-8")
SECTIONS = """1-1 1-1-1 1-1-2 1-2 1-3
    2-1 2-1-1 2-1-2 2-2 2-2-1 2-3 2-4 2-4-1 2-4-2 2-4-3 2-4-4 2-5 2-5-1 2-5-2 2-5-3 2-6 2-6-1 2-6-2 2-7 2-7-1
    2-8 2-8-1 2-8-2 2-8-3 3
    4-1 4-1-1 4-1-2 4-1-3 4-2 4-2-1 4-2-2 4-2-3 4-3 4-4 4-5 4-6 4-7 4-8 4-9 4-10 5-1 5-1-1 5-1-2 5-2""".split()
FIGURES = "1-1 1-2 2-1 2-2 2-3 2-4 2-5 4-1 4-2 4-3 5-1 5-2".split()
DRAWN = ("unet", "vit", "ldm", "dit", "dit-blocks", "uvit")
ERRATA = """§1, footnotes 2, 3; §1-1-1; Fig. 1-2; §2-1-1; §2-1-1, end; §2-1-2; Eq. 2-6 … 2-8; Fig. 2-1; Eq. 2-9;
    Eq. 2-9, second term;
    Eq. 2-9, third term; Eq. 2-9, last line; Eq. 2-11, line 2; Eq. 2-11, line 3; §2-2-1; §2-4-1; §2-4-2; §2-4-2; §2-4-3; §2-5-1;
    §2-6; §2-6-2; §2-6-2; §2-6-2; §2-7-1; §3, §4-1-2; §4-2-2, §4-2-3, §5-1-2; §4-3; §4-4; §4-6; §4-6; §4-7; §4-8, §4-9; §4-10;
    §4-10; Fig. 5-1"""
FORMULAS = {                           # by the section that they stand in: what must be there, some of it in a formula
    "2-1-2": (r"L_{\mathrm{simple}} =", r"L_{\mathrm{hybrid}} &=", r"-\log p_\theta(x_0) &\leq", r"D_{\mathrm{KL}}"),
    "1-2": (r"\hat{x}_0 + A^{+} (y - A \hat{x}_0)", "RePaint", "DDNM"),
    "2-4-1": (r"\mathrm{softmax}\left(\frac{Q K^\top}{\sqrt{d}}\right) V",),
    "2-5": (r"D_{\mathrm{KL}} &= \frac{1}{2} \sum",),
    "2-7-1": (r"2 L^2 D",),
    "2-8-1": (r"\mathrm{vec}",),
    "2-8-2": (r"\sin(c\, \omega)",),
    "2-8-3": (r"g_1 \odot \mathrm{MSA}", r"(1 + \gamma) \odot", "#### In-context", "#### Cross-attention", "norm_final"),
    "3": (r"v &= \sqrt{\bar\alpha_t}\, \epsilon -", r"\eta \sqrt", r"e^{-h_{i+1}}", r"\epsilon_\theta(x_t, \varnothing)",
          r"0.2\, u"),
    "4-1-1": (r"[X, X_{\mathrm{skip}}]\, W_{\mathrm{skip}}",),
    "4-6": (r"(\Sigma_1 \Sigma_2)^{1/2}", r"\sqrt{\lambda_i(A^\top \Sigma_2 A)}", r"\mathrm{IS} &=", r"\mathrm{precision} &=",
            r"\mathrm{recall} &=", "**sFID**"),
}


def sections():
    """{number: what stands below its heading, down to the next section's} in the order of the page."""
    body = TEXT.split("\n## Errata\n")[0]
    parts = re.split(r'^##+ <a id="([\d-]+)"></a>§([\d-]+) (<span dir="rtl" lang="fa">[^<]+</span> · \S.*)$', body, flags=re.M)
    assert parts[1::4] == parts[2::4]                    # the anchor is the number
    return dict(zip(parts[1::4], parts[4::4]))


def test_the_excerpts_are_the_code():
    assert companion.stale(TEXT, ROOT) == [] and companion.synced(TEXT, ROOT) == TEXT


def test_the_page_can_be_made_so_every_name_test_link_and_command_of_an_equation_exists():
    assert len([*companion.excerpts(TEXT, ROOT)]) > 60
    assert companion.page(TEXT, ROOT, ROOT).startswith("<!DOCTYPE html>")


def test_every_section_has_its_heading_with_both_titles_in_the_reports_order():
    assert [*sections()] == SECTIONS


def test_every_equation_stands_in_its_section_in_the_reports_order():
    numbers = {section: re.findall(r"\\tag\{(2-\d+)", text) for section, text in sections().items()}
    assert numbers.pop("2-1-1") == [f"2-{k}" for k in range(1, 5)]
    assert numbers.pop("2-1-2") == [f"2-{k}" for k in range(5, 12)]
    assert not any(numbers.values())


def test_every_figure_has_its_caption_in_the_reports_order_and_ours_are_drawn():
    assert re.findall(r"^\*\*Fig\. ([\d-]+)\*\* · <span", TEXT, re.M) == FIGURES
    assert re.findall(r'<img src="assets/([\w-]+)\.svg" width="392" alt="[^"]+">', TEXT) == [*DRAWN]


def test_every_erratum_has_its_row():
    rows = [line.split(" | ")[0].removeprefix("| ") for line in TEXT.split("\n## Errata\n")[1].split("\n## ")[0].splitlines()
            if line.startswith("| ")]
    assert rows == ["where", *(" ".join(where.split()) for where in ERRATA.split(";"))]


def test_every_section_with_code_names_a_test_that_proves_it_after_the_code():
    for section, text in sections().items():
        code = [*re.finditer(r"^```python \w+\.py: ", text, re.M)]
        proofs = [*re.finditer(r"Proved by\s\[`test_\w+`\]\(tests/test_\w+\.py\)", text)]
        assert not code or proofs and proofs[-1].start() > code[-1].start(), section


def test_the_formulas_of_the_papers_stand_where_they_belong():
    found = sections()
    assert [(section, formula) for section, formulas in FORMULAS.items() for formula in formulas
            if formula not in found[section]] == []


def test_the_example_prints_what_the_report_shows():
    result = doctest.testfile(str(ROOT / "REPORT.md"), module_relative=False, encoding="utf-8")
    assert result.attempted > 0 and result.failed == 0
