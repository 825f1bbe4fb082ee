"Help for the Quarto site: `python tests/tools/site.py prepare` before the build, `... lint _docs` after it."
import argparse
import json
import re
import shutil
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[2]
PLOTLY = "application/vnd.plotly.v1+json"

# Quarto accepts any key without a word: a misspelt one does nothing. These are the ones we know to work.
KNOWN = {
    "": {"project", "execute", "format", "website", "lang"},
    "project": {"type", "output-dir", "render", "resources"},
    "execute": {"enabled"},
    "format": {"html"},
    "website": {"title", "description", "favicon", "site-url", "repo-url", "repo-actions", "page-navigation", "bread-crumbs",
                "search", "navbar", "sidebar", "page-footer"},
}
MACHINE_PATH = re.compile(r"(?<![\w.])(?:/(?:root|work|home/\w+|Users/\w+|tmp/\w+)/[\w.]+|[A-Z]:\\Users\\)")


# ---------------------------------------------------------------- before the build
def uses_plotly(notebook):
    "Whether a saved notebook holds a plotly chart."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return any(PLOTLY in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))


def notebooks(nbs):
    return sorted(p for p in nbs.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(nbs).parts))


def prepare(nbs):
    "Put plotly's script beside the notebooks, once for the whole site, if a notebook has a plotly chart."
    target = nbs / "assets" / "plotly.min.js"
    if not any(map(uses_plotly, notebooks(nbs))): return "no notebook has a plotly chart: nothing to prepare"
    import plotly

    source = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    if target.is_file() and target.stat().st_size == source.stat().st_size: return f"{target.name} is there already"
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(source, target)
    return f"copied {target.name}"


# ---------------------------------------------------------------- the configuration
def _files(entry):
    "Files and patterns that a navbar or sidebar entry names."
    if isinstance(entry, str): yield entry
    elif isinstance(entry, list):
        for e in entry: yield from _files(e)
    elif isinstance(entry, dict):
        for key in ("href", "file", "contents", "section", "menu"):
            value = entry.get(key)
            if key != "section" or (isinstance(value, str) and value.endswith(".ipynb")): yield from _files(value)


def lint_config(quarto, nbs):
    "Problems of `_quarto.yml`: keys nobody knows, and entries that name no file."
    import yaml

    config = yaml.safe_load(quarto.read_text(encoding="utf-8"))
    for section, known in KNOWN.items():
        there = config if not section else config.get(section) or {}
        for key in sorted(set(there) - known): yield f"{quarto.name}: unknown key {f'{section}.{key}'.lstrip('.')!r}"
    website = config.get("website") or {}
    navbar, sidebar = website.get("navbar") or {}, website.get("sidebar") or {}
    bars = sidebar if isinstance(sidebar, list) else [sidebar]
    named = [*_files(navbar.get("left")), *_files(navbar.get("right")), *(f for bar in bars for f in _files(bar.get("contents")))]
    for name in named:
        if "://" in name: continue
        if not any(p.is_file() for p in nbs.glob(name)): yield f"{quarto.name}: {name!r} names no file under {nbs.name}/"
    shown = {p for name in named if "://" not in name for p in nbs.glob(name)}
    for path in notebooks(nbs):
        if path not in shown: yield f"{quarto.name}: the sidebar leaves out {path.relative_to(nbs).as_posix()}"


# ---------------------------------------------------------------- the built site
BLOCKS = {"p", "pre", "div", "li", "td", "th", "tr", "br", "figure", "figcaption", "section", "h1", "h2", "h3", "h4", "body"}


class Page(HTMLParser):
    "What a page links to, what can be linked to in it, and its visible text."

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.sources, self.text, self._silent = set(), [], [], [], 0
        self.feed(text)
        self.text = "".join(self.text)

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.anchors |= {a[key] for key in ("id", "name") if a.get(key)}
        if tag in ("a", "area") and a.get("href"): self.links.append(a["href"])
        if tag == "link" and a.get("href") and a.get("rel") in ("stylesheet", "icon"): self.sources.append(a["href"])
        if tag in ("img", "script", "source", "iframe", "video") and a.get("src"): self.sources.append(a["src"])
        if tag in ("script", "style"): self._silent += 1
        if tag in BLOCKS: self.text.append("\n")

    def handle_endtag(self, tag):
        if tag in ("script", "style"): self._silent -= 1
        if tag in BLOCKS: self.text.append("\n")

    def handle_data(self, data):
        if not self._silent: self.text.append(data)


def page_name(notebook):
    "nbdev's name of a notebook's page: the number goes, letters become small."
    return notebook.with_name(re.sub(r"^\d+[a-zA-Z0-9]*_", "", notebook.name.lower())).with_suffix(".html")


def site_address(root):
    "Where the site will be published: links that nbdev makes from back-ticks start with it."
    parser = ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini", encoding="utf-8")
    cfg = parser["DEFAULT"]
    return (cfg["doc_host"] + cfg["doc_baseurl"]).rstrip("/") + "/"


def lint_site(site, nbs, address):
    "Problems of a built site, one line each."
    texts = {p: p.read_text(encoding="utf-8") for p in sorted(site.rglob("*.html"))}
    pages = {p: Page(text) for p, text in texts.items()}
    for notebook in notebooks(nbs):
        expected = site / page_name(notebook.relative_to(nbs))
        if expected not in pages: yield f"{notebook.relative_to(nbs).as_posix()} has no page {expected.relative_to(site).as_posix()}"
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        for kind, addresses in (("link", page.links), ("file", page.sources)):
            for reference in sorted(set(addresses)):
                problem = _dead(reference, path, site, pages, address)
                if problem: yield f"{name}: {problem} {kind} {reference}"
        for wrong in sorted(set(re.findall(r"\?@[\w-]+", page.text))): yield f"{name}: unresolved reference {wrong}"
        for line in page.text.splitlines():
            if re.match(r"\s*#\|", line): yield f"{name}: raw directive {line.strip()[:60]!r}"
        for wrong in sorted({m[0] for m in MACHINE_PATH.finditer(page.text)} | {r for r in page.links + page.sources if r.startswith("file:")}):
            yield f"{name}: path of a machine {wrong!r}"


def _dead(reference, path, site, pages, address):
    "What is wrong with a reference, or None."
    if reference.startswith(address): reference = "/" + reference[len(address):]
    parts = urlsplit(reference)
    if parts.scheme or parts.netloc or reference.startswith(("data:", "//")): return None
    target = path
    if parts.path:
        target = (site / unquote(parts.path).lstrip("/")) if parts.path.startswith("/") else path.parent / unquote(parts.path)
        target = Path(*target.resolve().parts)
        if target.is_dir(): target = target / "index.html"
        if not target.is_relative_to(site.resolve()): return "outside the site:"
        if not target.is_file(): return "dead"
        target = site / target.relative_to(site.resolve())
    fragment = unquote(parts.fragment)
    if fragment and target in pages and fragment not in pages[target].anchors and fragment not in ("top", "_top"):
        return "no such anchor:"
    return None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare", help="copy what the site needs")
    lint = commands.add_parser("lint", help="look for what Quarto passes over in silence")
    lint.add_argument("folder", type=Path, help="the built site")
    args = parser.parse_args(argv)
    if args.command == "prepare":
        print(prepare(ROOT / "nbs"))
        return 0
    if not (args.folder / "index.html").is_file():
        print(f"{args.folder} is no built site: it has no index.html", file=sys.stderr)
        return 1
    problems = [*lint_config(ROOT / "_quarto.yml", ROOT / "nbs"), *lint_site(args.folder, ROOT / "nbs", site_address(ROOT))]
    for problem in problems: print(problem, file=sys.stderr)
    print(f"{len(problems)} problems in {args.folder}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
