"""Where a result comes from: the code, the inputs and the parameters that determine it, as hashes."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline import paths
from pipeline.runtime.files import sha256_file, sha256_json

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "ddpm_core")
KEY_LENGTH = 16


def source_files(module: str) -> list[Path]:
    """The project's files that `module` imports, directly or not, lazily or not, itself included.

    Args:
        module: dotted name, such as `pipeline.train`.

    Returns:
        paths relative to the repository's root, sorted.
    """
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        for path in _files_of(waiting.pop()):
            if path not in found:
                found.add(path)
                waiting.extend(_imported_by(path))
    return sorted(path.relative_to(ROOT) for path in found)


def _files_of(module: str) -> Iterator[Path]:
    """The file of a module and the `__init__.py` of every package above it; nothing for a name that is no module."""
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        path = ROOT.joinpath(*parts[:depth])
        for candidate in (path / "__init__.py", path.with_suffix(".py")):
            if candidate.is_file():
                yield candidate


def _imported_by(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names: Iterable[str] = (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in PACKAGES)


@cache
def source_sha256(module: str) -> str:
    """One hash of all :func:`source_files`."""
    return sha256_json({str(path): sha256_file(ROOT / path) for path in source_files(module)})


def stage_key(module: str, sections: Iterable[BaseModel], inputs: dict[str, str]) -> str:
    """The name of a stage's resume state: equal if and only if parameters, inputs and code are.

    Args:
        module: the stage.
        sections: of params.yaml, all that reach the result.
        inputs: name -> hash of what the stage reads.

    Returns:
        16 hexadecimal digits.
    """
    content: dict[str, Any] = {type(s).__name__: s.model_dump(mode="json") for s in sections}
    return sha256_json({"params": content, "inputs": inputs, "code": source_sha256(module)})[:KEY_LENGTH]


def provenance() -> dict[str, str]:
    """Tags that lead from a run back to its origin: git commit, whether files differ from it, hash of dvc.lock."""
    tags = {}
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags["git_commit"] = tags["mlflow.source.git.commit"] = commit  # the second fills the UI's column "Version"
        tags["git_dirty"] = str(bool(_git("status", "--porcelain", "--untracked-files=no"))).lower()
    if paths.DVC_LOCK.exists():
        tags["dvc_lock_sha256"] = sha256_file(paths.DVC_LOCK)
    return tags


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
