r"""MathML for the equations of the companion: the LaTeX that a paper on diffusion needs, and no more.

`equation` converts one; the tables below list its commands, and an unknown one is an error that names it and its line. Browsers
draw MathML themselves, so that companion.html needs neither a network nor JavaScript. The letters of another font, such as those
of \mathbb, are characters of their own.
"""
import re
import unicodedata
from html import escape


def error(line, message):
    """The ValueError of a line of the source; companion.py puts the file's name before it."""
    return ValueError(f"line {line}: {message}")


def pairs(text):
    """A dict of the words of a text, every other one a key."""
    return dict(zip(text.split()[::2], text.split()[1::2]))


LETTERS = {name: chr(code) for code, name in enumerate("""alpha beta gamma delta varepsilon zeta eta theta iota kappa lambda mu nu
    xi omicron pi rho varsigma sigma tau upsilon varphi chi psi omega""".split(), 0x3b1)} | pairs(r"""epsilon ϵ phi ϕ vartheta ϑ
    Gamma Γ Delta Δ Theta Θ Lambda Λ Xi Ξ Pi Π Sigma Σ Phi Φ Psi Ψ Omega Ω infty ∞ partial ∂ nabla ∇ ell ℓ emptyset ∅ top ⊤
    prime ′ varnothing ∅ dots … ldots … cdots ⋯ vdots ⋮ % % # # $ $ _ _ & &""")
OPERATORS = pairs("""sim ∼ propto ∝ approx ≈ equiv ≡ simeq ≃ lt < gt > leq ≤ le ≤ geq ≥ ge ≥ neq ≠ ne ≠ ll ≪ gg ≫ in ∈ notin ∉
    subset ⊂ subseteq ⊆ cup ∪ cap ∩ to → rightarrow → leftarrow ← mapsto ↦ Rightarrow ⇒ Leftrightarrow ⇔ iff ⇔ cdot ⋅ odot ⊙
    otimes ⊗ oplus ⊕ times × div ÷ pm ± mp ∓ circ ∘ star ⋆ ast ∗ forall ∀ exists ∃ land ∧ lor ∨ perp ⊥ colon : parallel ∥ int
    ∫""")
LIMITS = pairs("sum ∑ prod ∏ max max min min lim lim sup sup inf inf")       # scripts above and below in a displayed equation
FUNCTIONS = "log ln exp sin cos tan tanh arg det dim Pr".split()
DELIMITERS = pairs(r"""( ( ) ) [ [ ] ] | | . . \{ { \} } \lbrace { \rbrace } \| ‖ \Vert ‖ \lVert ‖ \rVert ‖ \vert | \lvert |
    \rvert | \langle ⟨ \rangle ⟩ \lfloor ⌊ \rfloor ⌋ \lceil ⌈ \rceil ⌉""")
SPACES = pairs(r"\, 0.17 \: 0.22 \; 0.28 \! -0.17 \quad 1 \qquad 2 ~ 0.33") | {"\\ ": "0.33", "\\\n": "0.33"}
SIZES = pairs("big 1.2 bigl 1.2 bigr 1.2 Big 1.8 Bigl 1.8 Bigr 1.8 bigg 2.4 biggl 2.4 biggr 2.4")
FONTS = dict(mathbb="DOUBLE-STRUCK", mathcal="SCRIPT", mathbf="BOLD", boldsymbol="BOLD ITALIC", mathrm="upright")
FORMS = {                                        # commands with one argument, {0}, or two
    "frac": "<mfrac>{0}{1}</mfrac>", "sqrt": "<msqrt>{0}</msqrt>",
    "dfrac": '<mfrac displaystyle="true">{0}{1}</mfrac>', "tfrac": '<mfrac displaystyle="false">{0}{1}</mfrac>',
    "overset": "<mover>{1}{0}</mover>", "underset": "<munder>{1}{0}</munder>",
    "underbrace": '<munder>{0}<mo stretchy="true">⏟</mo></munder>', "overbrace": '<mover>{0}<mo stretchy="true">⏞</mo></mover>',
    **{name: f'<mover accent="true">{{0}}<mo stretchy="{"true" if len(name) > 4 else "false"}">{accent}</mo></mover>'
       for name, accent in pairs("bar ¯ overline ¯ hat ^ widehat ^ tilde ~ widetilde ~ vec → dot ˙").items()},
}
TABLES = dict(aligned="..", cases="{.", matrix="..", pmatrix="()", bmatrix="[]")    # environments, and the delimiters around them
THIN, UNSPACED = ' lspace="0.17em" rspace="0.17em"', ' lspace="0" rspace="0"'
LEFT, RIGHT = 'form="prefix" stretchy="true"', 'form="postfix" stretchy="true"'
NO_BREAK = "\u00a0"                               # MathML swallows spaces


class Latex:
    """An equation: tokens with their lines, read once from left to right.  Methods return MathML; ValueError on what is wrong."""

    def __init__(self, source, line):
        self.tokens, self.font, self.tag = [], None, ""
        for token in re.findall(r"\\operatorname\*|\\[A-Za-z]+|\\.|\d+(?:\.\d+)?|\s+|.", source, re.S):
            self.tokens.append((token, line))
            line += token.count("\n")
        self.tokens = [*self.tokens, ("", line)][::-1]                   # the next one last; "" is the equation's end

    def peek(self):
        while self.tokens[-1][0].isspace():
            self.tokens.pop()
        return self.tokens[-1][0]

    def next(self):
        return self.tokens.pop()[0] if self.peek() else ""

    def wrong(self, wanted):
        return error(self.tokens[-1][1], f"an equation has {self.peek() or 'its end'} where {wanted or 'its end'} must stand")

    def raw(self):
        r"""The text of a group, such as that of \text."""
        if self.peek() != "{":
            raise self.wrong("{")
        self.next()
        text = ""
        while self.tokens[-1][0] not in ("}", ""):
            text += self.tokens.pop()[0]
        if self.next() != "}":
            raise self.wrong("}")
        return text

    def row(self, *ends):
        """All up to one of the tokens `ends`, which stays to be read, as one element."""
        items = []
        while self.peek() not in ends:
            if self.peek() in ("}", "&", r"\\", r"\right", r"\end", ""):
                raise self.wrong(ends[-1])
            sign = self.peek() in ("+", "-") and (not items or items[-1].startswith("<mo") and items[-1][-6] not in ")]}|‖")
            item = self.scripted()
            items.append(item.replace("<mo>", '<mo form="prefix">') if sign else item)
        return items[0] if len(items) == 1 else f"<mrow>{''.join(items)}</mrow>"

    def argument(self, end="}"):
        """A group in braces, or in brackets if `end` is one, or a single atom."""
        if self.peek() != {"}": "{", "]": "["}[end]:
            token, line = self.tokens[-1]
            if token[:1].isdigit():                                      # a single digit, as in \frac12
                self.tokens[-1:] = [(rest, line) for rest in (token[1:], token[0]) if rest]
            return self.atom()[0]
        self.next()
        inside = self.row(end)
        self.next()
        return inside

    def scripted(self):
        """An atom and what stands above and below it."""
        base, limits = ("<mrow></mrow>", False) if self.peek() in ("^", "_") else self.atom()
        scripts = {"_": "", "^": ""}
        while self.peek() in ("^", "_", "'"):
            place = "_" if self.peek() == "_" else "^"
            if scripts[place]:
                raise self.wrong(f"no second {place}")
            scripts[place] = self.argument() if self.next() != "'" else "<mo>′</mo>"
        names = ("munder", "mover", "munderover") if limits else ("msub", "msup", "msubsup")
        name = names[bool(scripts["_"]) + 2 * bool(scripts["^"]) - 1]
        return f"<{name}>{base}{scripts['_']}{scripts['^']}</{name}>" if any(scripts.values()) else base

    def styled(self, char):
        """A letter or digit in the font of the group that it stands in."""
        words = re.sub("LATIN |GREEK |LUNATE | LETTER", "", unicodedata.name(char))
        for name in (f"MATHEMATICAL {self.font} {words}", f"{self.font} {words}") if self.font else ():
            try:
                return unicodedata.lookup(name)
            except KeyError:                                             # such as the script B: it has the second name
                continue
        return char

    def letter(self, char):
        upright = ' mathvariant="normal"' if self.font == "upright" or char in "∞∅⊤…⋯⋮" or "Γ" <= char <= "Ω" else ""
        return f"<mi{upright}>{escape(self.styled(char))}</mi>"

    def delimiter(self, attributes):
        if self.peek() not in DELIMITERS:
            raise self.wrong("a delimiter")
        return f"<mo {attributes}>{DELIMITERS[self.next()].strip('.')}</mo>"

    def atom(self):
        """One element without its scripts, and whether they go above and below it."""
        token, name, line = self.peek(), self.peek().removeprefix("\\"), self.tokens[-1][1]
        if token == "{":
            return self.argument(), False
        if token in DELIMITERS and token != ".":
            return self.delimiter('stretchy="false"' + UNSPACED * (DELIMITERS[token] in "|‖")), False
        if token in ("^", "_", "}", "$", "&", r"\\", r"\right", r"\end", ""):
            raise self.wrong("a symbol")
        self.next()
        if token in SPACES:
            return f'<mspace width="{SPACES[token]}em"></mspace>', False
        if token == name:                                                # no command
            if token[0].isdigit():
                return f"<mn>{''.join(self.styled(digit) if digit.isdigit() else digit for digit in token)}</mn>", False
            return self.letter(token) if token.isalpha() else f"<mo>{escape(token.translate({45: '−', 42: '∗'}))}</mo>", False
        if name in LETTERS:
            return self.letter(LETTERS[name]), False
        if name in OPERATORS:
            return f"<mo>{escape(OPERATORS[name])}</mo>", False
        if name == "mid":
            return '<mo stretchy="false" lspace="0.28em" rspace="0.28em">|</mo>', False
        if name in LIMITS:
            return f'<mo movablelimits="true"{THIN}>{LIMITS[name]}</mo>', True
        if name in FUNCTIONS or name.startswith("operatorname"):
            word = escape(self.raw() if name.startswith("operatorname") else name)
            return f"<mo{UNSPACED if self.peek() in ('(', '[', '_', '^') else THIN}>{word}</mo>", name.endswith("*")
        if name in FONTS:
            outer, self.font = self.font, FONTS[name]
            inside, self.font = self.argument(), outer
            return inside, False
        if name == "sqrt" and self.peek() == "[":
            degree = self.argument("]")
            return f"<mroot>{self.argument()}{degree}</mroot>", False
        if name in FORMS:
            arguments = [self.argument() for _ in range(1 + ("{1}" in FORMS[name]))]
            return FORMS[name].format(*arguments), name.endswith("brace")
        if name == "text":
            return f"<mtext>{escape(self.raw()).replace(' ', NO_BREAK)}</mtext>", False
        if name == "tag":
            self.tag = self.raw()
            return "", False
        if name in SIZES:
            return self.delimiter(f'minsize="{SIZES[name]}em" maxsize="{SIZES[name]}em"' + UNSPACED), False
        if name == "left":
            left, inside = self.delimiter(LEFT), self.row(r"\right")
            self.next()
            return f"<mrow>{left}{inside}{self.delimiter(RIGHT)}</mrow>", False
        if name == "begin":
            return self.environment(line), False
        raise error(line, f"the LaTeX command {token} is not known here: the tables of mathml.py list those that are")

    def environment(self, line):
        """The table between a begin and its end."""
        name, rows, ending = self.raw(), [""], None
        if name not in TABLES:
            raise error(line, f"the LaTeX environment {name} is not known here: one of {', '.join(TABLES)}")
        while ending != r"\end":
            cell = self.row("&", r"\\", r"\end")
            rows[-1] += f"<mtd>{cell}</mtd>"
            ending = self.next()
            if ending == r"\\" and self.peek() == r"\end":               # a break after the last line begins none
                ending = self.next()
            elif ending == r"\\":
                rows.append("")
        if (other := self.raw()) != name:
            raise error(line, f"the LaTeX environment {name} ends as {other}")
        style = ' displaystyle="true"' if name == "aligned" else ""
        inside = f'<mtable class="{name}"{style}>{"".join(f"<mtr>{row}</mtr>" for row in rows)}</mtable>'
        left, right = (char.strip(".") for char in TABLES[name])
        return f"<mrow><mo {LEFT}>{left}</mo>{inside}<mo {RIGHT}>{right}</mo></mrow>" if left else inside


def equation(source, line, display=False):
    """An equation that begins on a line of the source, as HTML: in a box of its own if it is displayed, its number at the right."""
    latex = Latex(source, line)
    inside = latex.row("")
    tag = f'<span class="tag">({escape(latex.tag)})</span>' if latex.tag else ""
    return f'<div class="equation"><math display="block">{inside}</math>{tag}</div>' if display else f"<math>{inside}</math>"
