"""Values of options that are written as text: on command lines, in names of models, poolings and targets."""

import json
from typing import Any


def option_value(text: str) -> Any:
    """What `text` is as JSON (a number, ``true``, ``null``, a list), or `text` itself, a word, where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # a number of thousands of digits and lists as deep are no JSON to Python
        return text
