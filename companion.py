r"""The companion: REPORT.md checked against the code, and set as one page with the code beside the text.

    python companion.py --sync             take the excerpts of REPORT.md from the code again
    python companion.py                    write companion.html: no network, no JavaScript

REPORT.md is GitHub's Markdown: headings, paragraphs, lists, tables, quotes, fenced blocks, **bold**, *italic*, `code`, links,
figures `![…](assets/x.png)`, `<img src="assets/x.svg" width="392" alt="…">`, `<br>`, `<a id="x"></a>` and
`<span dir="rtl" lang="fa">…</span>`. Other HTML is text. A section:

    ## §2-1-1 <span dir="rtl" lang="fa">فرآیند انتشار پیشرو</span> · The forward process

    One to five sentences, with $x_t$ in a line and equations of their own:

    $$ x_t = \sqrt{\bar\alpha_t} x_0 + \sqrt{1 - \bar\alpha_t} \epsilon \tag{2-3} $$

    [`ddpm.py: Diffusion.q_sample`](ddpm.py)
    ```python ddpm.py: Diffusion.q_sample
    (the lines that --sync writes)
    ```

    Symbols, a line or a table. Proved by [`test_two_forward_steps_equal_one_jump`](tests/test_ddpm.py).

- The page sets an excerpt on the right, level with the text before it. What follows the last excerpt of a section stays in its
  text; so does what stands between two, as far as a paragraph that has the words "Proved by".
- An excerpt is what defines a name, with decorators, without indent: a function, class, method, or assignment (`dit.py: SIZES`, and
  `dit.py: DiT.grid` for self.grid). ```python dit.py: DiT.forward "c = self.cond" … "x = run_block" is its part from the first line
  that begins so to the next one. It stands outside of lists and quotes, and has 3 to 25 lines: longer ones lose their docstrings.
- `file.py: name, name` in code font, and [`name`](file.py), must be defined there. A link leads to a file that exists, to a heading
  by the name that GitHub gives it, or to an `<a id>`.
- Equations: $…$ or $`…`$ in a line, $$ … $$ or a ```math block. Between plain dollars GitHub takes a backslash before punctuation
  (`\\`, `\,`, `\{`, `\|`) for its own: the forms with backticks are for those. The tables of mathml.py list the commands.
"""
import interrupts                        # noqa: F401  first, for signals while PyTorch is imported
import ast
import base64
import io
import keyword
import os
import re
import sys
import textwrap
import tokenize
import unicodedata
from functools import cache
from html import escape, unescape
from itertools import accumulate
from pathlib import Path
from urllib.parse import unquote

from cli import Parser, add_overwrite_flag, one_line_errors, rule_of
from files import atomic_file, output_file, readable
from mathml import equation, error

PAGE, STYLE = (Path(__file__).parent / "assets" / name for name in ("companion.html", "companion.css"))
tree_of = cache(ast.parse)                       # find reads a file again for each of its names
LEAST, MOST = 3, 25                              # lines of an excerpt: fewer need no block, more are not read beside a formula


# Excerpts

def binds(node, name):
    """Whether a statement defines a name: a function, a class, or an assignment to it, such as "x" or "self.x"."""
    targets = [target for target in getattr(node, "targets", [getattr(node, "target", None)]) if target]
    stored = [part for target in targets for part in ast.walk(target) if isinstance(getattr(part, "ctx", None), ast.Store)]
    return getattr(node, "name", None) == name or name in map(ast.unparse, stored)


def find(root, file, name, line):
    """The lines of a file under root, and the statement of it that defines a dotted name: Class.method and Class.attribute too."""
    try:
        source = (root / file).read_text(encoding="utf-8")
        node = tree_of(source)
    except (OSError, ValueError, SyntaxError) as reason:
        raise error(line, f"{file} cannot be read as Python: {getattr(reason, 'strerror', None) or reason}") from None
    for part in name.split("."):
        found = [inner for inner in getattr(node, "body", ()) if binds(inner, part)] or \
            [inner for inner in ast.walk(node) if isinstance(inner, ast.stmt) and binds(inner, f"self.{part}")]
        if not found:
            raise error(line, f"{file} defines no {name}")
        node = found[0]
    return source.split("\n"), node


def excerpt(root, file, name, first, last, line):
    """The text that a block shows: the lines that define a name, or the part of them from `first` to `last`."""
    source, node = find(root, file, name, line)
    top = (getattr(node, "decorator_list", None) or [node])[0]
    shown = range(top.lineno, node.end_lineno + 1)                       # counted from 1, as ast counts
    if first:
        begins = [number for number in shown if source[number - 1].lstrip().startswith(first)]
        ends = [number for number in shown if source[number - 1].lstrip().startswith(last) and begins and number > begins[0]]
        if not ends:
            raise error(line, f"no line of {file}: {name} begins with " + (f"{last!r} after {first!r}" if begins else repr(first)))
        shown = range(begins[0], ends[0] + 1)
    if len(shown) > MOST:
        for inner in ast.walk(node):
            if isinstance(inner, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(inner):
                docs = inner.body[0]
                left_out = range(docs.lineno, docs.end_lineno + 1 + (not source[docs.end_lineno].strip()))
                shown = [number for number in shown if number not in left_out]
    if not LEAST <= len(shown) <= MOST:
        raise error(line, f"{file}: {name} has {len(shown)} lines here, an excerpt {LEAST} to {MOST}: quote where to begin and end")
    return textwrap.dedent("\n".join(source[number - 1] for number in shown))


FENCE = re.compile(r"^([ >]*)(`{3,})([^`\n]*)\n((?:[^\n]*\n)*?)(?:[ >]*\2 *$|[^\n]*(\Z))", re.M)
EXCERPT = re.compile(r'python ([\w/]+\.py): ([\w.]+)(?: "(.+)" … "(.+)")?')


def excerpts(text, root):
    """Every excerpt of a source -> the match of its block, its line, "file: name", and the text it should hold."""
    for block in FENCE.finditer(text):
        line, info = 1 + text.count("\n", 0, block.start()), block[3].strip()
        if block[5] is not None or re.search(f"^[ >]*{block[2]}", block[4], re.M):
            raise error(line, "a fenced block without an end")
        if info.startswith("python "):
            form = EXCERPT.fullmatch(info)
            if not form or block[1]:
                raise error(line, f'{info} is no excerpt: ```python file.py: name "first line" … "last line", outside of lists, is')
            file, name, first, last = form.groups()
            if not text[:block.start()].rpartition("\n")[0].rpartition("\n")[2].startswith(f"[`{file}: {name}`]({file})"):
                raise error(line, f"the line above must begin with [`{file}: {name}`]({file})")
            yield block, line, f"{file}: {name}", excerpt(root, file, name, first, last, line) + "\n"


def synced(text, root):
    """The source with every excerpt taken from the code anew."""
    for block, _, _, code in reversed([*excerpts(text, root)]):
        text = text[:block.start(4)] + code + text[block.end(4):]
    return text


def stale(text, root):
    """A line for each excerpt that differs from the code: an empty list if all is well."""
    return [f"line {line}: the excerpt of {what} differs from the code: run python companion.py --sync"
            for block, line, what, code in excerpts(text, root) if block[4] != code]


def coloured(code):
    """Python as HTML: a span around each line, and around each keyword, defined name, string, number, comment and docstring."""
    starts = [0, *accumulate(len(line) + 1 for line in code.split("\n"))]
    html, done, before = "", 0, ""
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            kind = tokenize.tok_name[token.type].split("_")[0].replace("FSTRING", "STRING").lower()
            if kind == "name":
                kind = "keyword" if keyword.iskeyword(token.string) else "definition" if before in ("def", "class") else ""
            if kind == "string" and token.string.startswith('"""'):
                kind = "comment"
            if kind in ("keyword", "definition", "string", "number", "comment"):
                start, end = (starts[row - 1] + column for row, column in (token.start, token.end))
                parts = [f'<span class="{kind}">{escape(part)}</span>' for part in code[start:end].split("\n")]
                html += escape(code[done:start]) + "\n".join(parts)
                done = end
            before = token.string
    except (tokenize.TokenError, SyntaxError):                           # part of a statement, or no Python: the rest is plain
        pass
    html = re.sub(r'(?<=\S)( {3,})(?=<span class="comment">#)', r'<span class="gap">\1</span>', html)
    lines = (html + escape(code[done:])).split("\n")
    indents = [len(line) - len(line.lstrip()) for line in code.split("\n")]
    return "".join(f'<span class="line" style="--indent: {indent}ch">{line}\n</span>' for indent, line in zip(indents, lines))


# Markdown

BEGINS = r"(?:\s*$|\#{1,6}\ |```|\$\$|\||>|---+$|\ *(?:[-*]|1\.)\ )"   # what ends a paragraph, an empty line among them
BLOCK = re.compile(rf"""^(?: (?P<heading>\#{{1,6}}\ [^\n]+)
    | (?P<fence>(?P<ticks>`{{3,}})(?P<info>[^`\n]*)\n(?P<body>(?:[^\n]*\n)*?)(?P=ticks)[ ]*$)
    | \$\$(?P<math>.*?)\$\$[ ]*$
    | (?P<open>(?:```|\$\$)[^\n]*)
    | (?P<table>\|[^\n]*\n\|[-:|\ ]+(?:\n\|[^\n]*)*)
    | (?P<quote>>[^\n]*(?:\n>[^\n]*)*)
    | (?P<rule>---+)$
    | (?P<list>\ *(?:[-*]|\d+\.)\ [^\n]*(?:\n\n?\ *(?:[-*]\ |\d+\.\ |(?<=\ )\S)[^\n]*|\n(?!{BEGINS})[^\n]+)*)
    | (?P<paragraph>[^\n]*\S[^\n]*(?:\n(?!{BEGINS})[^\n]+)*))""", re.M | re.S | re.X)
ITEM = re.compile(r"^( *)([-*]|\d+\.)( +)", re.M)
INLINE = re.compile(r"""\\(?P<escaped>[!-/:-@\[-`{-~]) | \$`(?P<math>[^`]+)`\$ | (?P<ticks>`+)(?P<code>.+?)(?<!`)(?P=ticks)(?!`)
    | \$(?P<dollars>(?![\s`])(?:\\.|[^\\$])+?)(?<!\s)\$(?!\d) | !\[(?P<alt>[^\]]*)\]\((?P<image>[^)\s]+)\)
    | <img\ src="(?P<picture>[^"]+)"\ width="(?P<width>\d+)"\ alt="(?P<words>[^"]*)"\s?/?>
    | \[(?P<text>(?:`[^`]*`|!\[[^\]]*\]\([^)]*\)|[^\[\]])+)\]\((?P<href>[^)\s]+)\) | <(?P<url>https?://[^>\s]+)>
    | \*\*(?P<strong>\S.*?)\*\* | \*(?P<em>[^\s*](?:[^*]*[^\s*])?)\* | <br\s*/?>(?P<br>) | <a\ id="(?P<id>[^"]+)"></a>
    | <span\ dir="rtl"\ lang="fa">(?P<persian>[^<]*)</span>""", re.X | re.S)
PLAIN = dict(url='<a href="{0}">{0}</a>', br="<br/>", persian='<span dir="rtl" lang="fa">{0}</span>', escaped="{0}")
TITLE = re.compile(r"((?:<a id=[^>]*></a>)?)(§\S+|Fig\. \S+|Eq\. \S+) (<span dir=.*?</span>) · (.+)")
MIME = {".svg": "svg+xml", ".png": "png", ".gif": "gif", ".jpg": "jpeg"}


class Markdown:
    """The conversion of one source, which lies in the folder `root`, to a page in the folder `out`."""

    def __init__(self, root, out):
        self.root, self.out, self.contents, self.ids, self.links = root, out, [], [], []

    def inline(self, text, line):
        """The text of a paragraph, heading, item or cell as HTML."""
        html, done = "", 0
        for match in INLINE.finditer(text):
            html += escape(text[done:match.start()], quote=False) + self.span(match, line + text.count("\n", 0, match.start()))
            done = match.end()
        return html + escape(text[done:], quote=False)

    def span(self, match, line):
        """What INLINE finds, as HTML."""
        kind, part = match.lastgroup, match[match.lastgroup]
        if kind in ("math", "dollars"):
            return equation(part, line)
        if kind == "code":
            if cited := re.fullmatch(r"([\w/]+\.py): ([\w.]+(?:,\s[\w.]+)*)", part):
                for name in re.split(r",\s", cited[2]):
                    find(self.root, cited[1], name, line)
            return f"<code>{escape(' '.join(part.split())).replace('_', '_<wbr/>')}</code>"
        if kind in ("image", "words"):
            path, alt = (match["image"], match["alt"]) if kind == "image" else (match["picture"], part)
            file, width = self.root / path, f' width="{match["width"]}"' * (kind == "words")
            if file.suffix not in MIME or not file.is_file():
                raise error(line, f"{path} is no figure: it must be a file here that ends in {', '.join(MIME)}")
            content = base64.b64encode(file.read_bytes()).decode()
            return f'<img src="data:image/{MIME[file.suffix]};base64,{content}" alt="{escape(alt)}"{width}/>'
        if kind == "href":
            return f'<a href="{escape(self.target(part, match["text"], line))}">{self.inline(match["text"], line)}</a>'
        if kind == "id":
            self.ids.append(part)
            return f'<a id="{escape(part)}"></a>'
        return PLAIN[kind].format(escape(part)) if kind in PLAIN else f"<{kind}>{self.inline(part, line)}</{kind}>"

    def target(self, href, text, line):
        """Where a link leads, seen from the page."""
        if href.startswith("#"):
            self.links.append((unquote(href[1:]), line))                 # looked for when all headings are known
        elif not re.match("https?://", href):
            file, *heading = href.split("#")
            if not (self.root / file).exists():
                raise error(line, f"there is no {file}, to which a link leads")
            if file.endswith(".py") and (name := re.fullmatch(r"`([\w.]+)`", text)) and name[1] != Path(file).name:
                find(self.root, file, name[1], line)
            href = "#".join([Path(os.path.relpath(self.root / file, self.out)).as_posix(), *heading])
        return href

    def heading(self, text, line):
        """A heading, under the id that GitHub gives it."""
        marks, text = text.split(" ", 1)
        html = label = self.inline(text.strip(), line)
        words = unescape(re.sub("<[^>]+>", "", html)).lower()
        slug = "".join(char for char in words if char in " -_" or unicodedata.category(char)[0] in "LMN").replace(" ", "-")
        again = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", known) is not None for known in self.ids)
        slug += f"-{again}" * (again > 0)
        self.ids.append(slug)
        if title := TITLE.fullmatch(html):
            anchor, number, persian, english = title.groups()
            label = f'<span class="number">{number}</span> {english}'
            html = f'{anchor}<a class="number" href="#{slug}">{number}</a> <span>{english}</span> {persian}'
        if len(marks) in (2, 3):
            label = re.sub("</?a[^>]*>", "", label)
            self.contents.append(f'<li class="level{len(marks)}"><a href="#{slug}">{label}</a></li>')
        return f'<h{len(marks)} id="{slug}">{html}</h{len(marks)}>'

    def table(self, text, line):
        """A table; its second line has the alignment."""
        rows = [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", row.strip()[1:].removesuffix("|"))]
                for row in text.split("\n")]
        sides = [{"::": "center", "-:": "right"}.get(dashes[:1] + dashes[-1:], "left") for dashes in rows[1]]
        html = ""
        for i, row in enumerate(rows):
            tag = "td" if i else "th"
            cells = [f'<{tag} class="{side}">{self.inline(cell, line + i)}</{tag}>' for side, cell in zip(sides, row)]
            html += f"<tr>{''.join(cells)}</tr>" * (i != 1)
        return f'<div class="table"><table>{html}</table></div>'

    def items(self, text, line):
        """A list, nested where items are indented."""
        first = ITEM.match(text)
        marks = [mark for mark in ITEM.finditer(text) if len(mark[1]) <= len(first[1])]
        html = ""
        for mark, end in zip(marks, [mark.start() for mark in marks[1:]] + [len(text)]):
            inside = re.sub(rf"^ {{1,{mark.end() - mark.start()}}}", "", text[mark.end():end], flags=re.M)
            (kind, content), *more = self.blocks(inside, line + text.count("\n", 0, mark.start())) or [("", "")]
            content = content[3:-4] if kind == "paragraph" else content
            html += f"<li>{content}{''.join(block for _, block in more)}</li>"
        return f"<ul>{html}</ul>" if first[2] in "-*" else f'<ol start="{first[2][:-1]}">{html}</ol>'

    def blocks(self, text, line):
        """A text as a list of (kind, HTML)."""
        blocks = []
        for match in BLOCK.finditer(text):
            kind, part, at = match.lastgroup, match[match.lastgroup], line + text.count("\n", 0, match.start())
            if kind == "open":
                raise error(at, f"a block without an end: {part}")
            if kind == "fence" and match["info"].strip() == "math":
                kind, part, at = "math", match["body"], at + 1
            if kind == "fence":
                language, body = match["info"].split(" ")[0], match["body"].rstrip("\n")
                html = f"<pre><code>{coloured(body) if language == 'python' else escape(body)}</code></pre>"
                if match["info"].startswith("python "):
                    kind, html = "excerpt", f"<figure><figcaption>{blocks.pop()[1][3:-4]}</figcaption>{html}</figure>"
            elif kind == "math":
                html = equation(part, at, display=True)
            elif kind == "quote":
                inside = self.blocks(re.sub("^> ?", "", part, flags=re.M), at)
                html = f"<blockquote>{''.join(block for _, block in inside)}</blockquote>"
            elif kind == "rule":
                html = "<hr/>"
            elif kind == "paragraph":
                html = f"<p>{self.inline(part.strip(), at)}</p>"
            else:
                html = {"heading": self.heading, "table": self.table, "list": self.items}[kind](part, at)
            blocks.append((kind, html))
        return blocks


# The page

ROW = re.compile("h|([tp]*)(x+)([tp]*(?=h|$)|(?:[tp]*p)?)|[tp]+")        # of kinds: heading, text, paragraph that proves, excerpt


def page(text, root, out):
    """The page that a source in the folder `root` makes in the folder `out`, as HTML.  ValueError on what is wrong, and where."""
    for complaint in stale(text, root):
        raise ValueError(complaint)
    source = Markdown(root, out)
    blocks = source.blocks(text, 1)
    for target, line in source.links:
        if target not in source.ids:
            raise error(line, f"no heading has the name #{target}, to which a link leads")
    kinds = "".join({"heading": "h", "excerpt": "x"}.get(kind, "p" if "Proved by" in html else "t") for kind, html in blocks)
    main = ""
    for match in ROW.finditer(kinds):
        whole, before, code, after = ("".join(html for _, html in blocks[slice(*match.span(i))]) for i in range(4))
        if code:
            whole = f'<div class="before">{before}</div>\n<div class="code">{code}</div>\n<div class="after">{after}</div>'
        main += whole + "\n" if match[0] == "h" else f'<div class="{"row" if code else "wide"}">{whole}</div>\n'
    title = escape(next((line[2:] for line in text.split("\n") if line.startswith("# ")), "The companion"))
    frame, style = (file.read_text(encoding="utf-8") for file in (PAGE, STYLE))
    return frame.format(title=title, style=style, contents="\n".join(source.contents), main=main)


def flags():
    """The command line."""
    parser = Parser(prog="companion.py", description="Set REPORT.md as a page, the code beside the text, or renew its excerpts.")
    parser.add_argument("--sync", action="store_true", help="take the excerpts of the source from the code, and write no page")
    parser.add_argument("--report", metavar="FILE", default="REPORT.md", help="the source, beside the code (REPORT.md)")
    parser.add_argument("--out", metavar="FILE", default="companion.html", help="the page (companion.html)")
    add_overwrite_flag(parser)
    return parser


def main(argv=None):
    """The command: write the page, or with --sync the source, if anything in it differs from the code."""
    args = flags().parse_args(argv)
    with one_line_errors("companion.py"):
        report = Path(args.report)
        root = report.absolute().parent
        try:
            text = readable(report).read_text(encoding="utf-8")
            made = synced(text, root) if args.sync else page(text, root, Path(args.out).absolute().parent)
        except ValueError as reason:
            raise ValueError(f"{report.name}, {reason}") from None
        if not args.sync or made != text:
            with atomic_file(report) if args.sync else output_file(args.out, "page", **rule_of(args)) as file:
                file.write(made.encode())
        print(f"{len([*excerpts(text, root)])} excerpts of {report.name} are those of the code" if args.sync else args.out)


if __name__ == "__main__":
    sys.exit(main())
