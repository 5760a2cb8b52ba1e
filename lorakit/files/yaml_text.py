"""YAML as run files are written in it: safe, with the numbers of YAML 1.2, and no key twice."""

import re
from typing import Any

from lorakit.config.errors import LorakitError

# 2e-4 is a number in YAML 1.2. PyYAML reads YAML 1.1, in which 2e-4 is a text.
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+")


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Args:
        text: The text, of one document.

    Returns:
        The value, of Python's own types; None of an empty text.

    Raises:
        LorakitError: The text is not valid YAML, or a mapping in it holds a key twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key.value, str)]
            for name in names:
                if names.count(name) > 1 and name != "<<":
                    raise ValueError(f"{name} is given twice: keep one")
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except Exception as error:  # the constructor of a tag, as in `!!bool x`, raises anything
        raise LorakitError(f"not valid YAML: {' '.join(str(error).split())}") from None
