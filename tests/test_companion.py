"""companion.py: excerpts are the code's own lines, equations MathML, the page well-formed HTML that a browser lays out."""
import json
import re
import shutil
import subprocess
import textwrap
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

import companion
import mathml

CODE = '''\
"""A module."""
import math

SIZES = {                                        # a table
    "S": dict(dim=384),
    "B": dict(dim=768),
}
LOW = 1


def decorated(name):
    return lambda function: function


@decorated("x")
@decorated("y")
def jump(x0, t, eps):
    """All steps at once."""
    a = alpha_bars[t]
    return a ** 0.5 * x0 + (1 - a) ** 0.5 * eps      # Eq. 2-3, with the alpha_bar of step t, in a line that is long


class Block:
    """A block.

    It has a docstring.
    """

    kinds = (
        "adaln",
        "cross",
    )

    def __init__(self, dim):
        self.dim = dim
        self.grid = (
            dim, dim,
        )

    def forward(self, x, c):
        x = self.first(x)
        for block in self.blocks:
            if block:
                x = block(x, c)
        x = self.last(x)                         # a_word_that_is_longer_than_a_phone_is_wide_and_holds_no_space_to_break_it_at
        return x


class Long:
    """It is too long with this,

    and short enough without.
    """

    def method(self):
        """So is that of a method."""
''' + "".join(f"        a{i} = {i}\n" for i in range(22)) + '''

def endless():
''' + "".join(f"    a{i} = {i}\n" for i in range(30))
TESTS = "def test_a_jump_is_many_steps():\n    pass\n"
FIGURE = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 90" width="900" height="90">'
          '<rect width="900" height="90" fill="#59f"/></svg>')


def block(info, body=""):
    """The lines of an excerpt: its name with a link, and its fence."""
    file, _, name = re.match(r"([\w/.]+)(: )([\w.]+)", info).groups()
    return f"[`{file}: {name}`]({file})\n```python {info}\n{body}```\n"


SAMPLE = rf"""# The report & the code

Words with *emphasis*, **weight**, `1 < 2`, a <b>tag</b>, \*stars\*, $\bar\alpha_t$ and a [link](#errata).

## §2-1 <span dir="rtl" lang="fa">مدل‌های انتشار</span> · Diffusion

- One
  - Inside
- Two, [below](#2-1-1)

## <a id="2-1-1"></a>§2-1-1 <span dir="rtl" lang="fa">فرآیند انتشار پیشرو</span> · The forward process

All steps at once.

$$ x_t = \sqrt{{\bar\alpha_t}} x_0 + \sqrt{{1 - \bar\alpha_t}} \epsilon \tag{{2-3}} $$

{block("code.py: jump")}
| symbol | variable | at t = 500 |
|---|:-:|--:|
| $\bar\alpha_t$ | `alpha_bars[t] \| x` | 0.0786 |

Proved by [`test_a_jump_is_many_steps`](tests/test_code.py).

> **Printed** is another form, and so long that it does not fit beside the code or on a phone:
>
> $$ \mathbb{{E}}_q \left[ \sum_{{t > 1}} D_{{\mathrm{{KL}}}}(q(x_{{t-1}} \mid x_t, x_0) \Vert p_\theta(x_{{t-1}} \mid x_t))
> - \log p_\theta(x_0 \mid x_1) \right] $$

{block("code.py: SIZES")}
{block('code.py: Block.forward "x = self.first" … "x = self.last"')}
Symbols.

![A figure that is wider than a phone](figure.svg)

## Errata

```math
\begin{{aligned}} a &= b \\ &= \frac{{c}}{{d}} \end{{aligned}}
```

1. `code.py: Block.dim, LOW`
2. <https://example.org/a_b>

```python
>>> 1 + 1
2
```
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with code, a test, a figure and a source whose excerpts are up to date; the current one."""
    monkeypatch.chdir(tmp_path)
    Path("tests").mkdir()
    for name, text in (("code.py", CODE), ("tests/test_code.py", TESTS), ("figure.svg", FIGURE)):
        Path(name).write_text(text, encoding="utf-8")
    Path("REPORT.md").write_text(companion.synced(SAMPLE, tmp_path), encoding="utf-8")
    return tmp_path


def refused(argv, capsys):
    """The line that a call is refused with."""
    with pytest.raises(SystemExit) as caught:
        companion.main(argv)
    captured = capsys.readouterr()
    assert caught.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    return captured.err


# Excerpts

def lines_of(first, last):
    """The lines of CODE from the one to the other, both found by their whole text."""
    lines = CODE.split("\n")
    start = lines.index(first)
    return textwrap.dedent("\n".join(lines[start:lines.index(last, start) + 1])) + "\n"


@pytest.mark.parametrize("info, first, last", [
    ("code.py: SIZES", "SIZES = {                                        # a table", "}"),
    ("code.py: jump", '@decorated("x")', [line for line in CODE.split("\n") if "Eq. 2-3" in line][0]),
    ("code.py: Block.kinds", "    kinds = (", "    )"),
    ("code.py: Block.grid", "        self.grid = (", "        )"),
    ("code.py: Block.forward", "    def forward(self, x, c):", "        return x"),
    ('code.py: Block.forward "for block" … "x = "', "        for block in self.blocks:", "                x = block(x, c)"),
    ('code.py: Block.forward "x = " … "x = "', "        x = self.first(x)", "                x = block(x, c)"),
    ('code.py: Block "def __init__" … "self.grid"', "    def __init__(self, dim):", "        self.grid = ("),
])
def test_an_excerpt_is_the_named_lines_without_their_indent(folder, info, first, last):
    assert companion.synced(block(info), folder) == block(info, lines_of(first, last))


def test_docstrings_are_left_out_of_what_would_be_longer_than_25_lines(folder):
    shown = companion.synced(block("code.py: Long"), folder).split("\n")[2:-2]
    assert shown == [line for line in lines_of("class Long:", "        a21 = 21").split("\n")[:-1]
                     if line and not any(words in line for words in ('"""', "and short enough"))]


def test_sync_renews_what_the_code_changed_and_nothing_else(folder):
    before = Path("REPORT.md").read_text(encoding="utf-8")
    Path("code.py").write_text(CODE.replace("dim=384", "dim=385"), encoding="utf-8")
    companion.main(["--sync"])
    assert Path("REPORT.md").read_text(encoding="utf-8") == before.replace("dim=384", "dim=385") != before


def test_sync_of_a_synced_file_does_not_write_it(folder):
    before = Path("REPORT.md").stat()
    companion.main(["--sync"])
    assert Path("REPORT.md").stat().st_mtime_ns == before.st_mtime_ns and Path("REPORT.md").stat().st_ino == before.st_ino


def test_a_stale_excerpt_is_named_with_its_line_and_makes_no_page(folder, capsys):
    text = Path("REPORT.md").read_text(encoding="utf-8")
    assert companion.stale(text, folder) == []
    Path("code.py").write_text(CODE.replace("dim=384", "dim=385"), encoding="utf-8")
    line = 1 + text.split("\n").index("```python code.py: SIZES")
    assert [complaint.split(":")[0] for complaint in companion.stale(text, folder)] == [f"line {line}"]
    assert f"REPORT.md, line {line}: the excerpt of code.py: SIZES differs" in refused([], capsys)
    assert not Path("companion.html").exists()


@pytest.mark.parametrize("source, line, words", [
    (block("missing.py: x"), 2, "missing.py cannot be read as Python: No such file"),
    (block("broken.py: x"), 2, "broken.py cannot be read as Python: '(' was never closed"),
    ("A line.\n\n" + block("code.py: jumped"), 4, "code.py defines no jumped"),
    (block("code.py: Block.backward"), 2, "code.py defines no Block.backward"),
    (block('code.py: jump "b =" … "return"'), 2, "no line of code.py: jump begins with 'b ='"),
    (block('code.py: jump "return" … "a ="'), 2, "no line of code.py: jump begins with 'a =' after 'return'"),
    (block("code.py: LOW"), 2, "has 1 lines here, an excerpt 3 to 25"),
    (block("code.py: endless"), 2, "has 31 lines here"),
    (block('code.py: jump "a ="'), 2, "is no excerpt"),
    ("```python code.py: jump\n```\n", 1, "the line above must begin with [`code.py: jump`](code.py)"),
    (block("code.py: jump").replace("(code.py)", "(tests)"), 2, "the line above must begin"),
    ("- Item\n  ```python code.py: jump\n  ```\n", 2, "outside of lists"),
    ("> ```python code.py: jump\n> ```\n", 1, "outside of lists"),
    (block("code.py: jump") + "\n```\nno end\n", 5, "a fenced block without an end"),
    (block("code.py: jump").removesuffix("```\n") + "Prose\n\n" + block("code.py: jump"), 2, "a fenced block without an end"),
])
def test_an_excerpt_that_cannot_be_had_is_an_error_of_its_line_and_nothing_is_written(folder, capsys, source, line, words):
    Path("broken.py").write_text("x = (", encoding="utf-8")
    Path("REPORT.md").write_text(source, encoding="utf-8")
    Path("companion.html").write_text("old", encoding="utf-8")
    for argv in (["--sync"], []):
        message = refused(argv, capsys)
        assert message.startswith(f"companion.py: REPORT.md, line {line}: ") and words in message
    assert Path("REPORT.md").read_text(encoding="utf-8") == source and Path("companion.html").read_text(encoding="utf-8") == "old"


@given(st.text(st.sampled_from("abdefx01 \n\t\"'#(){}[]:=.<&λ"), max_size=60))
def test_colours_change_no_character_of_the_code(code):
    assert "".join(ElementTree.fromstring(f"<p>{companion.coloured(code)}</p>").itertext()) == code + "\n"


def test_keywords_definitions_strings_numbers_and_comments_have_their_colours():
    html = companion.coloured('def f(x):\n    """Doc,\n    more."""\n    return "a" + f"{x}" * 2  # why\n')
    spans = re.findall(r'<span class="(\w+)">([^<]*)</span>', html)
    assert [kind for kind, _ in spans if kind != "line"] == [
        "keyword", "definition", "comment", "comment", "keyword", "string", "string", "number", "comment"]
    assert ("definition", "f") in spans and ("comment", "# why") in spans


# LaTeX

def outline(element):
    """An element as text: name(children), or the characters of a leaf."""
    inside = ",".join(map(outline, element))
    return f"{element.tag}({inside})" if inside or element.tag in ("mrow", "mspace") else element.text or "-"


@pytest.mark.parametrize("latex, expected", [
    ("x", "x"),
    ("x_t", "msub(x,t)"),
    ("x_t^2", "msubsup(x,t,2)"),
    ("x^2_t", "msubsup(x,t,2)"),
    ("x_{t-1}'", "msubsup(x,mrow(t,−,1),′)"),
    ("{}^2", "msup(mrow(),2)"),
    (r"\frac12", "mfrac(1,2)"),
    (r"\frac{a+b}{2}", "mfrac(mrow(a,+,b),2)"),
    (r"\sqrt{\bar\alpha_t}", "msqrt(msub(mover(α,¯),t))"),
    (r"\sqrt[3]x", "mroot(x,3)"),
    (r"\sum_{t=1}^T x", "mrow(munderover(∑,mrow(t,=,1),T),x)"),
    (r"\int_0^1", "msubsup(∫,0,1)"),
    (r"\max_y p", "mrow(munder(max,y),p)"),
    (r"\mathcal{N}(0, \mathbf{I})", "mrow(𝒩,(,0,,,𝐈,))"),
    (r"\mathbb{E} \mathbb{R} \mathcal{L} \mathbf{1} \boldsymbol\epsilon", "mrow(𝔼,ℝ,ℒ,𝟏,𝝐)"),
    (r"\mathbf{I} I", "mrow(𝐈,I)"),
    (r"D_{\mathrm{KL}}(q \Vert p)", "mrow(msub(D,mrow(K,L)),(,q,‖,p,))"),
    (r"\left( \frac ab \right]", "mrow((,mfrac(a,b),])"),
    (r"\left\lbrace x \right.", "mrow({,x,-)"),
    (r"\big| x \big|", "mrow(|,x,|)"),
    (r"q(x \mid y)", "mrow(q,(,x,|,y,))"),
    (r"\operatorname{tr} A", "mrow(tr,A)"),
    (r"\operatorname*{arg\,min}_x", r"munder(arg\,min,x)"),
    (r"\text{if } x", "mrow(if\u00a0,x)"),
    (r"\underbrace{a b}_{\text{c}}", "munder(munder(mrow(a,b),⏟),c)"),
    (r"\overset{!}{=}", "mover(=,!)"),
    (r"a \sim b \propto c \neq d \to \infty", "mrow(a,∼,b,∝,c,≠,d,→,∞)"),
    (r"\begin{aligned} a &= b \\ c &= d \\ \end{aligned}",
     "mtable(mtr(mtd(a),mtd(mrow(=,b))),mtr(mtd(c),mtd(mrow(=,d))))"),
    (r"\begin{cases} 1 & x \\ 0 & y \end{cases}", "mrow({,mtable(mtr(mtd(1),mtd(x)),mtr(mtd(0),mtd(y))),-)"),
    (r"a \quad b", "mrow(a,mspace(),b)"),
    ("a < b", "mrow(a,<,b)"),
])
def test_an_equation_has_its_structure(latex, expected):
    assert outline(ElementTree.fromstring(mathml.equation(latex, 1))[0]) == expected


def test_an_equation_with_a_number_has_it_at_its_side():
    box = ElementTree.fromstring(mathml.equation(r"x \tag{2-3}", 1, display=True))
    assert box.find("math").get("display") == "block" and box.find("span").text == "(2-3)"


def test_a_minus_is_a_sign_after_an_operator_or_a_parenthesis_and_else_between_two():
    signs = [element.get("form") for element in ElementTree.fromstring(mathml.equation("-a - b = -(c) - (-d)", 1)).iter("mo")
             if element.text == "−"]
    assert signs == ["prefix", None, "prefix", None, "prefix"]


def test_every_command_of_the_tables_makes_well_formed_mathml():
    names = [*mathml.LETTERS, *mathml.OPERATORS, *mathml.LIMITS, *mathml.FUNCTIONS, "mid"]
    one = [f"\\{name}" for name in names] + [*mathml.DELIMITERS, *mathml.SPACES][:-1]
    taking = [rf"\{name}{{a}}{{b}}" for name in (*mathml.FORMS, *mathml.FONTS, "text", "operatorname")]
    sized = [rf"\{name}(" for name in mathml.SIZES]
    tables = [rf"\begin{{{name}}} a & b \\ c \end{{{name}}}" for name in mathml.TABLES]
    for latex in [*one, *taking, *sized, *tables]:
        if latex != ".":
            assert ElementTree.fromstring(mathml.equation(f"x {latex} y", 1)).tag == "math"


@pytest.mark.parametrize("latex, line, words", [
    (r"x \foo y", 1, r"the LaTeX command \foo is not known"),
    ("x\n+\n\\fooo", 3, r"\fooo is not known"),
    (r"\begin{array} a \end{array}", 1, "environment array is not known"),
    (r"\begin{aligned} a \end{cases}", 1, "aligned ends as cases"),
    (r"\begin{aligned} a", 1, r"its end where \end must stand"),
    ("{a\n", 2, "its end where } must stand"),
    ("a}", 1, "} where its end must stand"),
    (r"\frac{a}", 1, "its end where a symbol must stand"),
    (r"\text{a", 1, "its end where } must stand"),
    (r"\text a", 1, "a where { must stand"),
    (r"\left( a", 1, r"its end where \right must stand"),
    (r"\left a", 1, "a where a delimiter must stand"),
    ("x_a_b", 1, "no second _"),
    ("x^", 1, "a symbol must stand"),
    ("a & b", 1, "& where its end must stand"),
    ("a $ b", 1, "$ where a symbol must stand"),
])
def test_what_is_no_equation_is_an_error_of_its_line(latex, line, words):
    with pytest.raises(ValueError, match=f"^line {line}: .*{re.escape(words)}"):
        mathml.equation(latex, 1)


# Markdown

def html(text, folder="."):
    return "".join(part for _, part in companion.Markdown(Path(folder), Path(folder)).blocks(text, 1))


@given(st.text(st.sampled_from("ab12 \n\n*`$|-#>[]()!<&\"'\\_.~§"), max_size=60))
def test_any_text_makes_well_formed_html_or_is_refused(text):
    try:
        made = html(text)
    except ValueError as reason:
        assert re.match(r"line \d+: ", str(reason))
    else:
        ElementTree.fromstring(f"<body>{made}</body>")


@given(st.lists(st.text(st.sampled_from("ab<>&\"'.,:;?/=+% é"), min_size=1).map(str.strip).filter(bool), min_size=1))
def test_text_without_marks_is_itself(words):
    words = ["w" + word for word in words]
    body = ElementTree.fromstring(f"<body>{html('{0}{0}'.format(chr(10)).join(words))}</body>")
    assert [paragraph.text for paragraph in body] == words


@pytest.mark.parametrize("source, expected", [
    ("*a* **b** `c`", "<p><em>a</em> <strong>b</strong> <code>c</code></p>"),
    ("2 * 3 * 4 and snake_case_name", "<p>2 * 3 * 4 and snake_case_name</p>"),
    (r"\*a\* costs $5 or $6", "<p>*a* costs $5 or $6</p>"),
    ("<script>x</script>", "<p>&lt;script&gt;x&lt;/script&gt;</p>"),
    ("one\ntwo\n- a\n- b\n  - c\n\n  more\n\nthree",
     "<p>one\ntwo</p><ul><li>a</li><li>b<ul><li>c</li></ul><p>more</p></li></ul><p>three</p>"),
    ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    ("> a\n>\n> b", "<blockquote><p>a</p><p>b</p></blockquote>"),
    ("a\n\n---\n\nb<br>c", "<p>a</p><hr/><p>b<br/>c</p>"),
    ("| a | b |\n|---|--:|\n| `x \\| y` | 2 |", '<div class="table"><table><tr><th class="left">a</th><th class="right">b</th></tr>'
     '<tr><td class="left"><code>x | y</code></td><td class="right">2</td></tr></table></div>'),
    ("```\n<a> *b*\n```", "<pre><code>&lt;a&gt; *b*</code></pre>"),
])
def test_markdown_is_its_html(source, expected):
    assert html(source) == expected


def test_headings_have_the_ids_that_github_gives_them():
    source = companion.Markdown(Path(), Path())
    source.blocks("# It's `DiT`, & more_\n\n## A\n\n## A\n\n## §2-1 <span dir=\"rtl\" lang=\"fa\">شبکه‌ی ۲</span> · U-Net", 1)
    assert source.ids == ["its-dit--more_", "a", "a-1", "2-1-شبکهی-۲--u-net"]


@pytest.mark.parametrize("source, words", [
    ("see [there](missing.md)", "there is no missing.md, to which a link leads"),
    ("see [there](#nowhere)", "no heading has the name #nowhere"),
    ("proved by [`test_nothing`](tests/test_code.py)", "tests/test_code.py defines no test_nothing"),
    ("see `code.py: jump, walk`", "code.py defines no walk"),
    ("![a figure](missing.svg)", "missing.svg is no figure"),
    ("![a figure](https://example.org/a.svg)", "is no figure"),
    (r"an $\unknown$ here", r"the LaTeX command \unknown is not known"),
    ("| a | b |\n|---|---|\n| c | $\\unknown$ |", r"the LaTeX command \unknown is not known"),
    ("- item\n\n  $$\n  \\unknown\n  $$", r"\unknown is not known"),
    ("> quote\n>\n> $$ \\unknown $$", r"\unknown is not known"),
    ("```math\n\\unknown\n```", r"\unknown is not known"),
    ("$$ x", "a block without an end"),
])
def test_what_does_not_exist_is_an_error_of_its_line_and_the_page_stays(folder, capsys, source, words):
    Path("REPORT.md").write_text(f"# Title\n\nA paragraph\nof two lines.\n\nAnother,\n{source}\n", encoding="utf-8")
    Path("companion.html").write_text("old", encoding="utf-8")
    wrong = next(i for i, line in enumerate(source.split("\n")) if re.search(r"there|py|unknown|svg|\$\$ x", line))
    message = refused([], capsys)
    assert message.startswith(f"companion.py: REPORT.md, line {7 + wrong}: ") and words in message
    assert Path("companion.html").read_text(encoding="utf-8") == "old"


# The page

def test_the_page_is_well_formed_whole_and_asks_for_nothing(folder):
    companion.main([])
    text = Path("companion.html").read_text(encoding="utf-8")
    page = ElementTree.fromstring(text)
    assert page.find("head/title").text == "The report & the code"
    assert not list(page.iter("script")) and not re.search(r"url\(|@import", text)
    assert all(element.get("src").startswith("data:image/") for element in page.iter("img"))
    assert [link.get("href") for link in page.iter("link")] == ["data:,"]
    assert [span.get("dir") for span in page.iter("span") if span.get("lang") == "fa"] == ["rtl", "rtl"]


def test_an_excerpt_stands_beside_the_text_before_it_and_what_follows_below(folder):
    companion.main([])
    page = ElementTree.parse("companion.html")
    rows = [["".join(row.find(f"div[@class='{part}']").itertext()) for part in ("before", "code", "after")]
            for row in page.iter("div") if row.get("class") == "row"]
    assert len(rows) == 2
    (before, code, after), (before2, code2, after2) = rows
    assert "All steps at once" in before and "def jump" in code and "symbol" in after and "Proved by" in after
    assert "Printed" in before2 and "SIZES = {" in code2 and "for block in" in code2 and "Symbols." in after2


def test_links_lead_from_where_the_page_lies(folder):
    Path("built").mkdir()
    companion.main(["--out", "built/page.html"])
    assert '<a href="../tests/test_code.py">' in Path("built/page.html").read_text(encoding="utf-8")


def test_contents_list_the_sections_by_number_and_english_title(folder):
    companion.main([])
    nav = ElementTree.parse("companion.html").find("body/nav")
    assert [" ".join("".join(item.itertext()).split()) for item in nav.iter("li")] == [
        "§2-1 Diffusion", "§2-1-1 The forward process", "Errata"]


# In a browser

MEASURE = """<script>
addEventListener("load", () => {
  const over = [], box = element => element.getBoundingClientRect();
  const scrolls = element => ["auto", "scroll", "hidden"].includes(getComputedStyle(element).overflowX);
  for (const element of document.querySelectorAll("nav *, main *:not(wbr)")) {
    let outer = element.parentElement;
    while (!scrolls(outer) && !outer.matches(".before, .code, .after, .wide, main, nav, body")) outer = outer.parentElement;
    const inside = scrolls(outer) ? outer.scrollWidth - outer.clientWidth : 0;
    if (box(element).right > box(outer).right + inside + 1 || box(element).left < box(outer).left - 1)
      over.push(element.tagName + " " + element.textContent.slice(0, 40));
  }
  for (const code of document.querySelectorAll(".code pre"))
    if (code.scrollWidth > code.clientWidth) over.push("code " + code.textContent.slice(0, 40));
  const sides = [...document.querySelectorAll(".row")].map(row => {
    const [text, code] = [box(row.querySelector(".before")), box(row.querySelector(".code"))];
    return code.left >= text.right && Math.abs(code.top - text.top) < 2 ? "beside" : code.top >= text.bottom - 1 ? "below" : "?";
  });
  const astray = [...document.querySelectorAll("a[href^='#']")].filter(link => {
    link.click();
    const target = document.getElementById(decodeURIComponent(link.hash.slice(1)));
    const end = scrollY + innerHeight >= document.documentElement.scrollHeight - 1;
    return !target || !(Math.abs(box(target).top) < 60 || end && box(target).top < innerHeight);
  }).map(link => link.hash);
  const undrawn = [...document.querySelectorAll("math")].filter(math => !(box(math).width > 4 && box(math).height > 4)).length;
  parent.postMessage({width: innerWidth, page: document.documentElement.scrollWidth, over, sides, astray, undrawn,
    math: document.querySelectorAll("math").length, links: document.querySelectorAll("a[href^='#']").length}, "*");
});
</script>"""
FRAMES = """<!DOCTYPE html><body><script>addEventListener("message", event => {
  document.body.append(Object.assign(document.createElement("pre"), {textContent: JSON.stringify(event.data)}));
});</script>
<iframe src="measured.html" style="border:0;width:1280px;height:800px"></iframe>
<iframe src="measured.html" style="border:0;width:390px;height:800px"></iframe>"""


def measured(page, folder):
    """What a headless Chromium measures of a page at 1280 and at 390 pixels: a list of two dicts, and its console's lines."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Debian's packages chromium and fonts-noto-core")
    (folder / "measured.html").write_text(page.replace("</head>", MEASURE + "</head>"), encoding="utf-8")
    (folder / "frames.html").write_text(FRAMES, encoding="utf-8")
    flags = """--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update
        --disable-sync --disable-quic --enable-logging=stderr --window-size=1400,900 --virtual-time-budget=999 --dump-dom""".split()
    done = subprocess.run([chromium, *flags, f"--user-data-dir={folder / 'profile'}", (folder / "frames.html").as_uri()],
                          capture_output=True, text=True, timeout=120)
    results = [json.loads(found.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
               for found in re.findall(r"<pre>(.*?)</pre>", done.stdout)]
    return sorted(results, key=lambda result: -result["width"]), [line for line in done.stderr.split("\n") if "CONSOLE" in line]


def test_a_browser_lays_the_page_out_at_both_widths(folder, tmp_path_factory):
    companion.main([])
    page = Path("companion.html").read_text(encoding="utf-8")
    (wide, narrow), console = measured(page, tmp_path_factory.mktemp("browser"))
    assert console == []
    for result, width, side in ((wide, 1280, "beside"), (narrow, 390, "below")):
        assert result["width"] == width >= result["page"]
        assert result["over"] == [] and result["astray"] == [] and result["undrawn"] == 0
        assert result["sides"] == [side, side]
        assert result["math"] == page.count("<math") > 4 and result["links"] == page.count('href="#') > 4


def test_a_figure_may_have_a_width(folder):
    made = companion.page('<img src="figure.svg" width="90" alt="A & B">', folder, folder)
    assert re.search(r'<img src="data:image/svg\+xml;base64,[^"]+" alt="A &amp; B" width="90"/>', made)


def test_the_gap_before_a_comment_is_marked_and_no_character_changes(folder):
    made = companion.coloured("x = 1" + " " * 20 + "# one\n    # two")
    assert made.count('class="gap"') == 1 and re.sub("<[^>]+>", "", made) == "x = 1" + " " * 20 + "# one\n    # two\n"
