"""Links that work in a checkout work in the site: it has the documents at its top."""

from __future__ import annotations

import pytest

from tools.site_links import links, on_page_content, turned


@pytest.mark.parametrize(
    ("own", "link", "wanted"),
    [
        ("docs/index.md", "guides/dcp.md", "guides/dcp.md"),
        ("docs/index.md", "../README.md", "project/README.md"),
        ("docs/guides/dcp.md", "../../SECURITY.md#limits", "../project/SECURITY.md#limits"),
        ("docs/guides/dcp.md", "loading.md#a-part", "loading.md#a-part"),
        ("README.md", "docs/glossary.md", "../glossary.md"),
        ("README.md", "examples/train_gpt.py", "examples/train_gpt.py"),
        ("benchmarks/README.md", "../docs/spec/format-v1.md", "../../spec/format-v1.md"),
        # A folder is its README, or else its first page.
        ("README.md", "docs/design/", "../design/README.md"),
        ("README.md", "docs/spec", "../spec/commit-v1.md"),
    ],
)
def test_link_is_turned(own: str, link: str, wanted: str) -> None:
    assert turned(own, f"see [it]({link}).") == f"see [it]({wanted})."


@pytest.mark.parametrize(
    "text",
    [
        "[far](https://example.org/a.md)",
        "[here](#below)",
        "`x[0](README.md)`",
        "```python\nx = y[0](README.md)\n```",
    ],
)
def test_what_is_no_path_is_left_alone(text: str) -> None:
    assert turned("docs/guides/dcp.md", text) == text
    assert links("docs/guides/dcp.md", text) == []


def test_links_are_paths_from_the_root() -> None:
    text = "[a](../../CHANGELOG.md#added) `[b](c.md)` [d](loading.md)"
    assert links("docs/guides/dcp.md", text) == ["CHANGELOG.md", "docs/guides/loading.md"]


def test_names_of_the_package_lead_to_the_reference() -> None:
    html = on_page_content("<code>dist_ckpt.load</code> <code>load</code>")
    assert html == (
        '<autoref identifier="dist_ckpt.load" optional><code>dist_ckpt.load</code></autoref> '
        "<code>load</code>"
    )
    linked = '<a href="x"><code>dist_ckpt.load</code></a>'
    assert on_page_content(linked) == linked
