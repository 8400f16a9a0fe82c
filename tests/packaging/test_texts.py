"""The Markdown pages: what they name exists, their code runs, lines and lists stay short."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

import dwconv_ext.compile
from benchmarks import pages

ROOT = Path(__file__).parents[2]
COLUMNS = 100
GENERATED = ("benchmarks/results/", "docs/mutations.md", "docs/build_time.md")
SKIPPED_FOLDERS = {"build", "dist", "data", "runs"}


@cache
def documents() -> list[str]:
    """Markdown files that git tracks; without git, as in an sdist, those of the tree."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(["git", "ls-files", "-z", "*.md"], cwd=ROOT, capture_output=True, text=True)
        if listed.returncode == 0 and listed.stdout:
            return sorted(name for name in listed.stdout.split("\0") if (ROOT / name).is_file())
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*.md"))
    return sorted(
        p.as_posix() for p in found if p.parts[0] not in SKIPPED_FOLDERS and not any(q.startswith(".") for q in p.parts)
    )


def without_code(text: str) -> str:
    text = re.sub(r"^( *)(```|~~~).*?^ *\2", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(`+)(?:(?!\n\n)[^`])+\1", "`code`", text)  # within a paragraph


def slug(heading: str) -> str:
    """A heading's anchor as GitHub makes it."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@cache
def anchors(path: Path) -> set[str]:
    """Of a page's headings; a repeated one gets -1, -2 and so on."""
    fenced = re.sub(r"^( *)(```|~~~).*?^ *\2", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?)(?: +#+)?$", fenced, re.MULTILINE):
        anchor, count = slug(heading), 0
        while (numbered := f"{anchor}-{count}" if count else anchor) in found:
            count += 1
        found.add(numbered)
    return found


def links(text: str) -> list[str]:
    """Targets of links and images inside the repository."""
    text = without_code(text)
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"^\[[^\]]+\]: +(\S+)", text, re.MULTILINE)
    targets += re.findall(r"<(?:a|img)\b[^>]*\b(?:href|src)=\"([^\"]+)\"", text)
    return [unquote(t) for t in targets if not re.match(r"[a-z][a-z0-9+.-]*:|//", t, re.IGNORECASE)]


def broken(document: Path, text: str) -> list[str]:
    """The links of a text that lead nowhere."""
    wrong = []
    for target in links(text):
        file, _, anchor = target.partition("#")
        path = document if not file else ROOT / file[1:] if file.startswith("/") else document.parent / file
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("document", documents())
def test_links(document):
    assert broken(ROOT / document, (ROOT / document).read_text()) == []


def test_links_that_lead_nowhere_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One: `two`, [three](x)_4\n\n# Again\n\n## Again\n\n```\n# comment\n```\n")
    assert anchors(page) == {"one-two-three_4", "again", "again-1"}
    good = "[a](#again-1) [b](page.md#one-two-three_4) ![c](page.md) [d](https://no/where) `[e](code)`\n```\n[f](code)\n```\n"
    bad = '[![a](no.png)](no.md) [b](#no) [c](page.md#comment)\n\n[d]: no/folder\n<img src="no.svg">'
    assert broken(page, good) == []
    assert sorted(broken(page, bad)) == ["#no", "no.md", "no.png", "no.svg", "no/folder", "page.md#comment"]


@pytest.mark.parametrize("document", [name for name in documents() if not name.startswith(GENERATED)])
def test_paths_named_in_code_exist(document):
    text = (ROOT / document).read_text()
    named = re.findall(r"`((?:csrc|dwconv_ext|tests|benchmarks|examples|docs|tools)/[\w./-]*)`", text)
    assert [name for name in named if not ((ROOT / document).parent / name).exists() and not (ROOT / name).exists()] == []


def test_makefile_targets_named_in_the_readme_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named <= targets and {"test", "demo"} <= named


def python_blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


@pytest.mark.parametrize("document", [name for name in documents() if python_blocks(name)])
def test_examples_run(document):
    """A page's blocks in order, in one namespace."""
    names: dict = {}
    for block in python_blocks(document):
        exec(compile(block, document, "exec"), names)


def test_readme_has_examples():
    assert python_blocks("README.md")


@pytest.mark.parametrize("document", [name for name in documents() if not name.startswith(GENERATED)])
def test_lines_are_short(document):
    lines = (ROOT / document).read_text().splitlines()
    assert [f"{document}:{n}" for n, line in enumerate(lines, 1) if len(line) > COLUMNS] == []


def test_every_page_is_in_the_sites_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [page for page in documents() if page.startswith("docs/") and f"{page}\n" not in navigation] == []


def test_the_api_page_has_every_public_name():
    named = re.findall(r"^::: dwconv_ext\.(?:\w+\.)*(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert {*dwconv_ext.__all__, *dwconv_ext.compile.__all__} <= set(named)


def lines_of_section(text: str, title: str) -> list[str]:
    """Lines that are not blank, from a second-level heading to the next one."""
    _, _, after = text.partition(f"\n## {title}")
    return [line for line in re.split(r"^## ", after, flags=re.MULTILINE)[0].splitlines()[1:] if line.strip()]


def test_changelog_is_short():
    lines = lines_of_section((ROOT / "CHANGELOG.md").read_text(), "0.1.0")
    assert 0 < len(lines) <= 15


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


@pytest.mark.parametrize("page", [pages.README, pages.BENCHMARKS], ids=lambda page: page.name)
def test_tables_are_of_the_saved_results(page):
    assert pages.written(page) == page.read_text()  # else: python -m benchmarks.pages


def test_the_readme_says_what_its_figures_are_of():
    text = pages.README.read_text()
    results = json.loads(pages.readme_results(text).read_text())
    below = " ".join(text.partition("<!-- /networks -->")[2].partition("![")[0].split())
    assert all(fact in below for fact in (results["commit"], results["date"], f"torch {results['torch'].split(',')[0]}"))
    assert f"fused blocks on an NVIDIA H200, float16, batch 128, channels_last, run at {pages.h200_blocks()}".lower() in (
        " ".join(text.split()).lower()
    )


def test_machines_have_the_commits_of_their_files():
    text = pages.BENCHMARKS.read_text()
    files = dict(re.findall(r"^\[(\w+)\]: \.\./(\S+)\.md$", text, re.MULTILINE))
    found = 0
    for line in lines_of_section(text, "Machines"):
        for name in re.findall(r"\]\[(\w+)\]", line) if line.startswith("|") else ():
            saved = json.loads((ROOT / f"{files[name]}.json").read_text())
            facts = [next(iter(saved["benchmarks"].values()))] if "benchmarks" in saved else [saved]
            stated = [fact[key] for fact in facts for key in ("commit", "date") if key in fact]
            assert all(f"| {fact} " in line for fact in stated), (name, stated)
            found += 1
    assert found >= 12


FORMS = {"limits.md": ["What", "Bound", "Evidence", "Tried"]}
DESIGN = sorted(path.name for path in (ROOT / "docs/design").glob("*.md") if path.name not in ("architecture.md", "README.md"))


@pytest.mark.parametrize("page", DESIGN)
def test_design_entries_are_short_and_of_one_form(page):
    text = (ROOT / "docs/design" / page).read_text()
    entries = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert entries
    for entry in entries:
        title, *lines = entry.splitlines()
        form = re.findall(r"^\*\*(\w+)\*\*\s", entry, re.MULTILINE)
        assert form == FORMS.get(page, ["Context", "Decision", "Evidence", "Rejected"]), title
        words = sum(len(line.split()) for line in lines if not line.startswith("|"))
        assert words <= 150, f"{title}: {words} words"


def test_tests_named_for_planted_faults_exist():
    named = re.findall(r"`([\w/]+\.py)::(\w+)", (ROOT / "docs/mutations.md").read_text())
    there = {
        (path.relative_to(ROOT / "tests").as_posix(), name)
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^ *def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert named and sorted(set(named) - there) == []
