"""What the repository says of itself in several places: its version, its links and the papers that it cites."""

import re
from importlib.metadata import metadata
from pathlib import Path

import pytest

import gradnorm_ext

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "CITATION.cff").exists(), reason="runs in the source tree")

PAGES = sorted(path for folder in (ROOT, ROOT / "docs", ROOT / "bench") for path in folder.glob("*.md"))
CITING = sorted(
    path
    for folder in ("gradnorm_ext", "triton_kernels", "examples", "csrc", "docs")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".h", ".cpp", ".cu", ".md") and path.name != "references.md"
)
NUMBER = re.compile(r"\barXiv[\s:]+(\d{4}\.\d{4,5})\b")


def anchors(page):
    """What a link may name within a page: its headings, as hosts of Markdown turn them into fragments."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_version_is_that_of_pyproject_everywhere():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    released = re.findall(r"^## \[(\d.*?)\] - \d{4}-\d{2}-\d{2}$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert gradnorm_ext.__version__ == version == released[0] == cited


def test_the_citation_has_the_date_of_the_newest_release():
    released = re.findall(r"^## \[\d.*?\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert f'date-released: "{released[0]}"' in (ROOT / "CITATION.cff").read_text()


def test_the_licence_is_the_one_that_is_declared():
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()
    assert "license: Apache-2.0" in (ROOT / "CITATION.cff").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert metadata("gradnorm_ext")["Name"] == "gradnorm_ext"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target} does not exist"
        assert not fragment or fragment in anchors(file), f"{page.name}: {target} has no such heading"


def test_every_paper_that_is_cited_is_among_the_references():
    references = (ROOT / "docs" / "references.md").read_text()
    of_papers = {number: path for path in CITING for number in NUMBER.findall(path.read_text())}
    assert len(of_papers) >= 8  # the pattern still finds them
    missing = {number: str(path.relative_to(ROOT)) for number, path in of_papers.items() if number not in references}
    assert not missing, f"docs/references.md must have {missing}"


def test_references_link_to_the_paper_that_they_name():
    links = re.findall(
        r"\[arXiv ([\d.]+)\]\(https://arxiv.org/abs/([\d.]+)\)", (ROOT / "docs" / "references.md").read_text()
    )
    assert links and all(named == linked for named, linked in links)
