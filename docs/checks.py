"""What the built site must hold: nothing is fetched from elsewhere, and no link inside it leads nowhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}


class _Reader(HTMLParser):
    """The anchors, links and fetched files of one page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids.update(given[name] for name in ("id", "name") if name in given)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        # a canonical or alternate link is an address to know, not a file to fetch
        if tag in FETCHED and FETCHED[tag] in given and given.get("rel") not in ("canonical", "alternate"):
            self.fetched.append(given[FETCHED[tag]])


def problems(site: Path) -> list[str]:
    """One sentence for each file fetched from elsewhere and each link that leads nowhere."""
    pages = {page.resolve(): _Reader(page) for page in sorted(site.rglob("*.html"))}
    found = []
    for page, read in pages.items():
        name = page.relative_to(site.resolve())
        found += [f"{name} fetches {url}" for url in read.fetched if urlsplit(url).netloc]
        if page.name == "404.html":
            continue
        for url in [*read.links, *read.fetched]:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            missing = not target.exists() or (anchor and target in pages and anchor not in pages[target].ids)
            found += [f"{name} links to {url}, which is not there"] if missing else []
    for sheet in site.rglob("*.css"):
        outside = re.findall(r"(?:@import\s+|url\()\s*[\"']?((?:https?:)?//[^\"')\s]+)", sheet.read_text())
        found += [f"{sheet.relative_to(site)} fetches {url}" for url in outside]
    return found


def on_post_build(config: Any) -> None:
    """Ends the build where something is wrong."""
    from mkdocs.exceptions import PluginError

    if found := problems(Path(config.site_dir)):
        raise PluginError("\n".join(found))
