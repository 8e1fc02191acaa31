"""Take what the documents link to outside of `docs/` into the site, and turn the links to it.

In the checkout, and wherever its files are shown, a link is a path from the file that has it. The
site has the content of `docs/` at its top and everything else that is linked to below `project/`,
so only links from one of the two to the other have to change. mkdocs calls the functions `on_...`.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = "docs/"
PROJECT = "project/"

# A relative target, without an anchor. What stands in a code block is no link.
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)#\s]+)")
_CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)

_NAME = re.compile(r"(<code>(dist_ckpt\.[\w.]+)</code>)(?!</(?:a|autoref)>)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add to the site what its pages link to outside of `docs/`, and what that links to."""
    found = {f"{DOCS}{file.src_uri}" for file in files.documentation_pages()}
    waiting = sorted(found)
    while waiting:
        path = waiting.pop()
        if not path.startswith(DOCS):
            files.append(_added(path, config))
        if not path.endswith(".md"):
            continue
        linked = set(links(path, (ROOT / path).read_text(encoding="utf-8"))) - found
        # What is not there is left to mkdocs, which tells of the broken link.
        new = {each for each in linked if not each.startswith(DOCS) and (ROOT / each).is_file()}
        found |= new
        waiting += sorted(new)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of one page."""
    uri = page.file.src_uri
    own = uri.removeprefix(PROJECT) if uri.startswith(PROJECT) else f"{DOCS}{uri}"
    return turned(own, markdown)


def on_page_content(html: str, **_: object) -> str:
    """Let names of the package, `dist_ckpt.load`, lead to the reference if they are in it."""
    return _NAME.sub(r'<autoref identifier="\2" optional>\1</autoref>', html)


def links(own: str, markdown: str) -> list[str]:
    """Return what the file `own` links to; all paths are from the root of the checkout."""
    found = []
    for text in _CODE.split(markdown):
        found += [target(own, match[1]) for match in _LINK.finditer(text)]
    return found


def turned(own: str, markdown: str) -> str:
    """Return the text of the file `own` with its links as they are in the site."""
    here = posixpath.dirname(_in_site(own))

    def turn(match: re.Match[str]) -> str:
        return posixpath.relpath(_in_site(target(own, match[1])), here or ".")

    parts, end = [], 0
    for code in _CODE.finditer(markdown):
        parts += [_LINK.sub(turn, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, _LINK.sub(turn, markdown[end:])])


def target(own: str, link: str) -> str:
    """Return the path from the root of the checkout that `link` in the file `own` leads to.

    A site has no list of a folder, so a link to one leads to its README or else its first page.
    """
    path = posixpath.normpath(posixpath.join(posixpath.dirname(own), link))
    pages = sorted((ROOT / path).glob("*.md"), key=lambda page: (page.name != "README.md", page))
    return pages[0].relative_to(ROOT).as_posix() if pages else path


def _in_site(path: str) -> str:
    return path.removeprefix(DOCS) if path.startswith(DOCS) else f"{PROJECT}{path}"


def _added(path: str, config: MkDocsConfig) -> File:
    return File.generated(config, _in_site(path), abs_src_path=str(ROOT / path))
