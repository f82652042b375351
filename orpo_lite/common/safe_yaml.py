"""YAML of recipes: plain values only, no aliases, no key given twice."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ADVICE = {
    "'\\t'": "a tab; indent with spaces",
    "constructor for the tag": "remove the tag",
    "another document": "keep one",
}


class YamlError(ValueError):
    """Text that cannot be read as such YAML: what is wrong and what to do, and the line where that is known."""

    def __init__(self, problem: str, line: int | None = None):
        super().__init__(problem)
        self.line = line


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader, without aliases (ten lines of them can stand for billions of values)."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = f"found the alias *{event.anchor}: write the values out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines:
                problem = f"{key.value} stands twice (first on line {lines[name]}): keep one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[name] = line
        return super().construct_mapping(node, deep)


def read(path: Path) -> Any:
    """Read the value in a file.

    Raises:
        YamlError: the file cannot be read, is not UTF-8, or fails as in `parse`.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise YamlError(f"cannot be read: {error.strerror}") from None
    try:
        return parse(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise YamlError(f"not UTF-8 (byte {error.start}: {error.reason}): save it as UTF-8", line) from None


def parse(text: str) -> Any:
    """Return the value of one YAML document, or None where there is none.

    Raises:
        YamlError: not YAML, a tag of Python or of one's own, a key given twice, an alias.
    """
    try:
        return yaml.load(text, Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(f"not readable as YAML: {explain(error)}", mark.line + 1 if mark else None) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise YamlError(f"not readable as YAML: character #x{error.character:04x}, {error.reason}", line) from None
    except RecursionError:
        raise YamlError("nested too deeply, expected sections such as model: and data: with a few values") from None
    except (ValueError, OverflowError) as error:  # a number of thousands of digits, the 99th of a month
        raise YamlError(f"not readable as YAML: {error}") from None


def keys_without_value(text: str) -> list[str]:
    """List the keys of all mappings in readable YAML behind which nothing stands: `{a:1, b}` has two, `{a: null}` none."""

    def walk(node: yaml.Node | None) -> Iterator[str]:
        for child in getattr(node, "value", None) or [] if isinstance(node, yaml.CollectionNode) else []:
            key, value = child if isinstance(child, tuple) else (None, child)
            if key is not None and value.tag == "tag:yaml.org,2002:null" and value.value == "":
                yield str(key.value)
            yield from walk(value)

    return list(walk(yaml.compose(text, Loader)))


def explain(error: yaml.MarkedYAMLError) -> str:
    """Return PyYAML's words and what to do."""
    problem = str(error.problem or error.context or error)
    if known := next((advice for words, advice in ADVICE.items() if words in problem), ""):
        return f"{problem}: {known}"
    return f"{problem} ({error.context}): fix this line or the one before" if error.context else problem
