"""Every setting with its default and its comment, read from the source of `configs/base.py`."""

import ast
import difflib
import io
import textwrap
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ntkrl import configs

STAGE = "stages[i]"
HEAD = (
    "Settings and their defaults. Set one by --config.NAME=VALUE (in quotes for the shell where "
    "VALUE has brackets or blanks; None turns a setting off), or in a config file. Stages are "
    "numbered from 0."
)


class Setting(NamedTuple):
    """A setting: its dotted name, its default as the source writes it, and its comment."""

    name: str
    default: str
    comment: str


def read_settings_list() -> list[Setting]:
    """Return every setting of `configs/base.py`, the fields of a stage last."""
    source = (Path(configs.__path__[0]) / "base.py").read_text(encoding="utf-8")
    functions = {
        node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)
    }
    reader = _Reader(source)
    return [*reader.config(functions["get_config"]), *reader.stage(functions["stage"])]


def format_settings(words: Sequence[str], columns: int) -> str:
    """Return the settings whose names or comments contain all words, as lines of text.

    Args:
      words: any case; "_" is a blank, and a leading `--config.` is left out.
      columns: width of the text.

    Raises:
      ValueError: no such setting; the message names those with the nearest names.
    """
    settings = read_settings_list()
    wanted = [_plain(word.removeprefix("--").removeprefix("config.")) for word in words]
    chosen = [
        setting
        for setting in settings
        if all(word in _plain(f"{setting.name} {setting.comment}") for word in wanted)
    ]
    if not chosen:
        names = {_plain(part): s.name for s in settings for part in (s.name, s.name.split(".")[-1])}
        near = difflib.get_close_matches(" ".join(wanted), names, n=5, cutoff=0.5)
        listed = ", ".join(dict.fromkeys(names[name] for name in near))
        hint = f"; nearest are {listed}" if near else "; `ntkrl settings` lists all"
        raise ValueError(f"no setting has {' and '.join(map(repr, words))}{hint}.")
    width = max(min(columns, 100), 40)
    lines = [*textwrap.wrap(HEAD, width), ""]
    for setting in chosen:
        lines.append(f"{setting.name} = {setting.default}")
        lines += textwrap.wrap(
            setting.comment, width, initial_indent="    ", subsequent_indent="    "
        )
    return "\n".join(lines)


def _plain(text: str) -> str:
    return text.lower().replace("_", " ")


class _Reader:
    """Settings of a config's source, with the comments beside and above their lines."""

    def __init__(self, source: str):
        self.source, self.lines = source, source.splitlines()
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        self.comments = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokens
            if token.type == tokenize.COMMENT
        }

    def config(self, function: ast.FunctionDef) -> Iterator[Setting]:
        """Yield the settings that assignments to `config.…` make."""
        for node in function.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
                name = ast.unparse(node.targets[0]).partition(".")[2]
                yield from self._settings(name, node, node.value, "")

    def stage(self, function: ast.FunctionDef) -> Iterator[Setting]:
        """Yield the fields of a stage."""
        (fields,) = [node for node in ast.walk(function) if isinstance(node, ast.Dict)]
        yield from self._entries(STAGE, fields, "")

    def _settings(
        self, name: str, place: ast.stmt | ast.expr, value: ast.expr, section: str
    ) -> Iterator[Setting]:
        """Yield the settings of a value: one, or those of a dictionary.

        Args:
          name: of the value.
          place: where its line begins.
          value: of the setting or the section.
          section: comment of the dictionary around it.
        """
        comment = self._comment(place, value) or section
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "ConfigDict":
            if value.args:
                yield from self._settings(name, place, value.args[0], section)
        elif isinstance(value, ast.Dict):
            yield from self._entries(name, value, comment)
        else:
            yield Setting(name, self._default(value), comment)

    def _entries(self, name: str, fields: ast.Dict, section: str) -> Iterator[Setting]:
        for key, value in zip(fields.keys, fields.values, strict=True):
            assert isinstance(key, ast.Constant)
            yield from self._settings(f"{name}.{key.value!s}", key, value, section)

    def _comment(self, place: ast.stmt | ast.expr, value: ast.expr) -> str:
        """Return the comment in the lines above a setting and at the end of its line."""
        above: list[str] = []
        line = place.lineno - 1
        while self._is_comment(line):
            above.insert(0, self.comments[line])
            line -= 1
        beside = [
            self.comments[line]
            for line in dict.fromkeys((place.lineno, value.end_lineno))
            if line in self.comments
        ]
        return "; ".join([*([" ".join(above)] if above else []), *beside[:1]])

    def _is_comment(self, line: int) -> bool:
        return line in self.comments and self.lines[line - 1].lstrip().startswith("#")

    def _default(self, value: ast.expr) -> str:
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "placeholder":
            return f"None ({ast.unparse(value.args[0])})"
        if isinstance(value, ast.Name):
            return "(each stage has its own)"
        return ast.get_source_segment(self.source, value) or ""
