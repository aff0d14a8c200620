"""REPORT.md names only what exists, leaves out no section and no equation, and its example prints what it shows."""
import ast
import doctest
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "REPORT.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in TEXT.splitlines() if line.startswith("|")]
SECTIONS = """1-1 1-1-1 1-1-2 1-2 1-3
    2-1 2-1-1 2-1-2 2-2 2-2-1 2-3 2-4 2-4-1 2-4-2 2-4-3 2-4-4 2-5 2-5-1 2-5-2 2-5-3 2-6 2-6-1 2-6-2 2-7 2-7-1
    2-8 2-8-1 2-8-2 2-8-3
    4-1 4-1-1 4-1-2 4-1-3 4-2 4-2-1 4-2-2 4-2-3 4-3 4-4 4-5 4-6 4-7 4-8 4-9 4-10 5-1 5-1-1 5-1-2 5-2""".split()


def cited(text):
    """(file, name) of every `file.py: name, name` in the text."""
    return [(file, name) for file, names in re.findall(r"`([\w/.]+\.py): ([^`]+)`", text) for name in names.split(", ")]


def names(node):
    """What a statement defines: a function, a class with its methods and attributes, or the targets of an assignment."""
    if isinstance(node, ast.Assign):
        return {part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    if isinstance(node, ast.ClassDef):
        inside = set().union(*map(names, node.body)) | {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)
                                                        and isinstance(part.ctx, ast.Store)}
        return {node.name} | {f"{node.name}.{name}" for name in inside}
    return {node.name} if isinstance(node, ast.FunctionDef) else set()


def test_every_name_that_the_report_cites_exists_in_its_file():
    files = {file: ROOT / file for file, _ in cited(TEXT)}
    known = {file: set().union(*map(names, ast.parse(path.read_text(encoding="utf-8")).body)) if path.is_file() else set()
             for file, path in files.items()}
    assert len(cited(TEXT)) > 100
    assert [f"{file}: {name}" for file, name in cited(TEXT) if name not in known[file]] == []


def test_every_section_has_its_row_in_the_reports_order():
    rows = [row[0].removeprefix("§") for row in ROWS if len(row) == 5 and re.match(r"§\d+-", row[0])]
    assert rows == SECTIONS and sum(row[0] == "§3" for row in ROWS) > 0


def test_every_equation_has_its_row():
    rows = [row[0] for row in ROWS if row[0].startswith("Eq.") and cited(row[2])]
    assert rows == [f"Eq. 2-{k}" for k in range(1, 12)]


def test_every_figure_has_its_row_in_the_reports_order():
    rows = [row[0] for row in ROWS if len(row) == 5 and row[0].startswith("Fig")]
    assert rows == [f"Fig. {chapter}-{k}" for chapter, count in ((1, 2), (2, 5), (4, 3), (5, 2)) for k in range(1, count + 1)]


def test_what_is_implemented_is_proved_by_one_to_three_tests_and_the_rest_is_said_not_to_be():
    for row in ROWS:
        if len(row) == 5 and row[0].startswith(("§", "Fig")) or row[0].startswith("Eq.") and cited(row[2]):
            tests = [name for file, name in cited(row[-1]) if file.startswith("tests/") and name.startswith("test_")]
            assert 1 <= len(tests) <= 3 if cited(row[-2]) else not tests and row[-2].startswith("prose"), row[0]


def test_the_example_prints_what_the_report_shows():
    result = doctest.testfile(str(ROOT / "REPORT.md"), module_relative=False, encoding="utf-8")
    assert result.attempted > 0 and result.failed == 0
