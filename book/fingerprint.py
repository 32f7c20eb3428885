"""What a chapter's result depends on, as one hash: its code, its parameters and the part of the core it imports.

Text is left out on purpose: a corrected sentence in a chapter, a comment in a module, a page of the book must not
train a model again.
"""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

from nbformat import NotebookNode
from notebook_checks import code_cells, parse, tags

PACKAGE = "difr3ct_core"


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def code_of(notebook: NotebookNode) -> list[list[Any]]:
    """Source and tags of every code cell, in order."""
    return [[cell.source, sorted(tags(cell))] for cell in code_cells(notebook)]


def core_files(root: Path, source: str) -> set[Path]:
    """The files of the core that ``source`` imports, directly or through other modules of the core.

    A package's ``__init__`` counts only when a name is taken from it: that it is run on the way to a module changes
    no result. A module that imports by a computed name cannot be followed: then the whole core is returned.
    """
    found: set[Path] = set()
    waiting = _imports(root, parse(source), package="")
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = (_name(node) for node in ast.walk(tree) if isinstance(node, (ast.Name, ast.Attribute)))
        if "import_module" in names:
            return set((root / PACKAGE).rglob("*.py"))
        waiting |= _imports(root, tree, ".".join(path.parent.relative_to(root).parts)) - found
    return found


def core_hash(root: Path, source: str) -> str:
    """Hash of :func:`core_files`' code; comments and layout do not count."""
    files = sorted(core_files(root, source))
    return digest([[str(path.relative_to(root)), ast.dump(ast.parse(path.read_text("utf-8")))] for path in files])


def chapter_key(root: Path, notebook: NotebookNode, parameters: dict[str, Any], inputs: dict[str, str]) -> str:
    """Hash of everything that a chapter's executed copy depends on; ``inputs`` are the keys of what ran before it."""
    source = "\n".join(cell.source for cell in code_cells(notebook) if parse(cell.source))
    return digest([code_of(notebook), parameters, core_hash(root, source), inputs])


def _name(node: ast.Name | ast.Attribute) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr


def _module(root: Path, name: str) -> Path | None:
    """The file of the core's module called ``name``."""
    base = root.joinpath(*name.split("."))
    files = [path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()]
    return files[0] if files and name.split(".")[0] == PACKAGE else None


def _imports(root: Path, tree: ast.Module | None, package: str) -> set[Path]:
    """The core's files that a module of ``package`` imports itself."""
    files: set[Path | None] = set()
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Import):
            files |= {_module(root, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import name`: the module of that name, or else what the package itself defines.
            files |= {_module(root, f"{base}.{alias.name}") or _module(root, base) for alias in node.names}
    return {path for path in files if path is not None}
