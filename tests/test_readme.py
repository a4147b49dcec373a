"""README.md and README.zh-CN.md: the same facts in two languages, and no dead links."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

import wechat.config

NAMES = ("README.md", "README.zh-CN.md")
TEXTS = [(ROOT / name).read_text(encoding="utf-8") for name in NAMES]
both = pytest.mark.parametrize("text", TEXTS, ids=NAMES)


def code(text: str) -> list[str]:
    """Return the fenced blocks and the indented ones, without their comments."""
    blocks = re.findall(r"^```.*?^```$|(?:^ {4}[^\n]*\n)+", text, re.MULTILINE | re.DOTALL)
    return [re.sub(r"(^| +)# .*$", "", block, flags=re.MULTILINE) for block in blocks]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def sections(text: str) -> list[str]:
    return re.split(r"^## ", prose(text), flags=re.MULTILINE)


def tables(text: str) -> list[list[list[str]]]:
    """Return the cells of the rows of the tables."""
    found = re.findall(r"(?:^\|.*\|\n)+", prose(text), re.MULTILINE)
    return [[row.strip("|").split(" | ") for row in table.splitlines()] for table in found]


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)*", text)


def names(text: str) -> set[str]:
    return set(re.findall(r"`[^`\n]+`", text))


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


def elsewhere(text: str) -> list[str]:
    """Return the links out of this page, but for the one to the other language."""
    return [link for link in links(text) if link[0] != "#" and link not in NAMES]


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_each_readme_links_the_other_before_anything_else() -> None:
    assert [links(text)[0] for text in TEXTS] == [NAMES[1], NAMES[0]]


@both
def test_every_link_leads_somewhere(text: str) -> None:
    for link in links(text):
        path, _, anchor = link.partition("#")
        assert "://" in link or (ROOT / path).exists(), link
        assert not anchor or (not path and anchor in anchors(text)), link


@both
def test_the_contents_list_every_section_in_order(text: str) -> None:
    contents = re.findall(r"^- \[(.*)\]\(#", sections(text)[0], re.MULTILINE)
    assert contents == [section.partition("\n")[0] for section in sections(text)[1:]]


def test_both_have_the_same_code_but_for_comments() -> None:
    english, chinese = map(code, TEXTS)
    assert len(english) > 10
    assert english == chinese


def test_both_have_the_same_sections_with_the_same_numbers_names_and_links() -> None:
    english, chinese = map(sections, TEXTS)
    assert len(english) == len(chinese) > 5
    for one, other in zip(english, chinese, strict=True):
        assert sorted(numbers(one)) == sorted(numbers(other)), other.partition("\n")[0]
        assert names(one) == names(other), other.partition("\n")[0]
        assert elsewhere(one) == elsewhere(other), other.partition("\n")[0]


def test_both_have_the_same_tables_with_the_same_figures_and_names() -> None:
    english, chinese = map(tables, TEXTS)
    assert len(english) == len(chinese) > 4
    for one, other in zip(english, chinese, strict=True):
        assert len(one) == len(other)
        for row, counterpart in zip(one, other, strict=True):
            assert len(row) == len(counterpart), counterpart
            assert list(map(numbers, row)) == list(map(numbers, counterpart)), counterpart
            assert list(map(names, row)) == list(map(names, counterpart)), counterpart


@both
def test_every_key_of_the_config_is_explained_under_its_section(text: str) -> None:
    explained: dict[str, list[str]] = {}
    for row in re.findall(r"^\| ?(?:\[(\w+)\] )?\| `(\w+)` \|", text, re.MULTILINE):
        if row[0]:
            section = explained.setdefault(row[0], [])
        section.append(row[1])
    assert explained == {name: list(keys) for name, keys in wechat.config.settings().items()}
