"""params.yaml as frozen, strict, typed objects. The only reader of YAML in the project.

Read with ruamel in its safe YAML 1.2 mode, as DVC does: PyYAML takes `1e-4` for a string.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import UserError
from pipeline.sections import Params, Section


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check params.yaml.

    Raises:
        UserError: the file is missing, is not YAML, or has a key that is unknown, missing or out of range; the
            message names every such key by its full path with what is allowed.
    """
    path = Path(path)
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} not found: run from the repository's root, where params.yaml lies") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected sections such as `train:`, found {type(content).__name__}")
    return params_from(content, where=str(path))


def params_from(content: dict[str, Any], *, where: str) -> Params:
    """Check a nested dictionary against :class:`Params`; `where` names its origin in error messages."""
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        problems: dict[str, list[str]] = {}
        for item in error.errors():
            # A union reports one problem per member under KEY.MEMBER; fold them into one line for KEY.
            location = [str(part) for part in item["loc"]]
            key = ".".join(location[:2]) or "params"
            given = "" if item["type"] in {"missing", "value_error"} else f" (found {item['input']!r})"
            problems.setdefault(key, []).append(_plain(item) + given)
        lines = "; ".join(f"{key}: {' or '.join(dict.fromkeys(texts))}" for key, texts in problems.items())
        raise UserError(f"{where}: {lines}") from None


def _plain(item: Any) -> str:
    """One pydantic problem in the words of a person who edits params.yaml."""
    match item["type"]:
        case "missing":
            return "missing; add it, see the params.yaml of the repository"
        case "extra_forbidden":
            known = ", ".join(Params.model_fields) if len(item["loc"]) == 1 else _known_keys(str(item["loc"][0]))
            return f"unknown key; known here: {known}"
        case "value_error":
            return str(item["ctx"]["error"])
        case _:
            return str(item["msg"]).removeprefix("Input ")


def _known_keys(section: str) -> str:
    annotation = Params.model_fields[section].annotation
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]  # or one that may be None
    (section_type,) = [kind for kind in kinds if issubclass(kind, Section)]
    return ", ".join(section_type.model_fields)
