"""YAML that anyone may have written: bounded in size and depth, plain values only, no key given twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 250_000
"""PyYAML reads some 100 KB a second, and a recipe has a few."""
MAX_VALUES = 20_000
"""Once aliases are written out: ten lines of aliases of aliases stand for billions of values."""
MERGE = "tag:yaml.org,2002:merge"
UTF_BOMS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


class YamlError(ValueError):
    """Text that is no such YAML: what is wrong with it and what to do, and the line where that is known."""

    def __init__(self, problem: str, line: int | None = None):
        super().__init__(problem)
        self.line = line


def read(path: Path) -> Any:
    """The value in a file.

    Raises:
        YamlError: not readable, not UTF-8, or as `parse`.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise YamlError(f"{size / 1e6:.1f} MB, expected at most {MAX_BYTES / 1e6} MB: is this a data file?")
        content = path.read_bytes()
    except OSError as error:
        raise YamlError(f"cannot be read: {error.strerror}") from None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        known = next((f" but {name}" for bom, name in UTF_BOMS.items() if content.startswith(bom)), "")
        line = content[: error.start].count(b"\n") + 1
        raise YamlError(f"not UTF-8{known} (byte {error.start}: {error.reason}): save it as UTF-8", line) from None
    return parse(text)


def parse(text: str) -> Any:
    """The value of one YAML document; None where there is none.

    Raises:
        YamlError: not YAML, tags of Python or one's own, a key twice, an alias inside of what it stands for, more than
            MAX_VALUES values.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        count_values(node, loader, {}, set())
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(f"not readable as YAML: {explain(error)}", mark.line + 1 if mark else None) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise YamlError(f"not readable as YAML: character #x{error.character:04x}, {error.reason}", line) from None
    except RecursionError:
        raise YamlError(
            "nested too deeply, expected sections such as model: and data: with a value or two inside"
        ) from None


def explain(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's words and what to do."""
    problem = str(error.problem or error.context or error)
    if "'\\t'" in problem:
        return f"{problem}: a tab; indent with spaces"
    if "constructor for the tag" in problem:
        return f"{problem}: values are plain text, numbers, lists and mappings here; remove the tag"
    if "document" in problem and "another" in problem:
        return f"{problem}: keep one recipe a file"
    if "duplicate anchor" in problem or "undefined alias" in problem:
        return f"{problem}: write the value out"
    return f"{problem} ({error.context}): mend this line or the one before" if error.context else f"{problem}: mend it"


def count_values(node: yaml.Node, loader: yaml.SafeLoader, known: dict[yaml.Node, int], above: set[yaml.Node]) -> int:
    """Values that a node stands for, aliases written out; raises YamlError for what no recipe should hold."""
    if node in known:
        return known[node]
    line = node.start_mark.line + 1
    if node in above:
        raise YamlError("an alias contains itself: write the values out", line)
    if isinstance(node, yaml.ScalarNode):
        try:
            if node.tag != MERGE:
                loader.construct_object(node)
        except (ValueError, OverflowError) as error:  # a number of thousands of digits, the 99th of a month
            raise YamlError(f"not readable as YAML: {node.value[:40]!r}: {error}", line) from None
        return 1
    above.add(node)
    total = 1
    if isinstance(node, yaml.MappingNode):
        first: dict[tuple[str, Any], int] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                here = key.start_mark.line + 1
                if (key.tag, key.value) in first:
                    place = first[key.tag, key.value]
                    raise YamlError(f"{key.value} stands twice (first on line {place}): keep one", here)
                first[key.tag, key.value] = here
            total += count_values(key, loader, known, above) + count_values(value, loader, known, above)
    else:
        total += sum(count_values(item, loader, known, above) for item in node.value)
    if total > MAX_VALUES:
        raise YamlError(f"its aliases stand for more than {MAX_VALUES:,} values: write the values out", line)
    above.discard(node)
    known[node] = total
    return total
