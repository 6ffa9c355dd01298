"""A YAML document and the keys that it has more than once, of which YAML itself would take the last."""

from collections.abc import Iterator
from typing import Any

import yaml

_MERGE = "tag:yaml.org,2002:merge"


def read(text: str) -> tuple[Any, list[tuple[str, list[int]]]]:
    """The value of `text`, and each repeated key as its dotted path with its lines. Raises what PyYAML does."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, []
        repeated = sorted(_repeated(node, "", set()), key=lambda found: found[1])
        return loader.construct_document(node), repeated
    finally:
        loader.dispose()


def _repeated(node: yaml.Node, path: str, seen: set[int]) -> Iterator[tuple[str, list[int]]]:
    if id(node) in seen:  # an alias: looked at already, or being looked at
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _repeated(item, path, seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, list[int]] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else "?"
            if name != "?" and key.tag != _MERGE:
                lines.setdefault(path + name, []).append(key.start_mark.line + 1)
            yield from _repeated(value, f"{path}{name}.", seen)
        yield from ((name, at) for name, at in lines.items() if len(at) > 1)
