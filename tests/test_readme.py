"""What the README and the notebooks point at is there."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
PAGES = [ROOT / "README.md", *(ROOT / "notebooks").glob("*.py")]


def test_every_notebook_has_a_badge_in_the_readme_and_in_itself():
    slug = REPOSITORY.removeprefix("https://github.com/")
    readme = (ROOT / "README.md").read_text()
    for script in (ROOT / "notebooks").glob("*.py"):
        badge = f"https://colab.research.google.com/github/{slug}/blob/main/notebooks/{script.stem}.ipynb"
        assert badge in readme and badge in script.read_text()


def test_badges_lead_to_files_in_this_repository():
    """The public home stands in pyproject.toml; everything else agrees with it."""
    found = 0
    for page in PAGES:
        for slug, path in re.findall(
            r"colab\.research\.google\.com/github/([^/]+/[^/]+)/blob/main/([^)\s]+)", page.read_text()
        ):
            assert REPOSITORY.endswith(slug) and (ROOT / path).is_file(), (page.name, slug, path)
            found += 1
    assert found >= 6
    for page in [*PAGES, ROOT / "CITATION.cff"]:
        for address in re.findall(r"https://github\.com/[\w.-]+/[\w-]+", page.read_text()):
            assert address == REPOSITORY, page.name


def test_the_citation_can_be_read():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    papers = [reference["url"].split("/")[-1] for reference in citation["references"]]
    assert citation["title"].startswith("blindlib") and papers == ["2211.10656", "2309.00287", "2506.14605"]


@pytest.mark.parametrize("page", ["README.md", "figures/README.md"])
def test_relative_links_exist(page):
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text())
    local = [(ROOT / page).parent / l for l in links if not l.startswith(("http", "#"))]
    assert local and all(l.exists() for l in local), [l for l in local if not l.exists()]


def test_the_make_targets_that_the_readme_names_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`?make ([a-z]+)", (ROOT / "README.md").read_text()))
    assert named and named <= targets
    assert set(["help", "demo", "test", "lab", "sync", "figures", "train", "bench", "gpu", "clean"]) <= targets
