r"""Prompts from patterns: `a {style} photo` is filled from columns, `{red|blue}` is expanded.

A backslash before `{`, `|`, `}` or another backslash makes it a plain character.
"""

import re
from collections.abc import Mapping
from itertools import product

from sana_cli.errors import UsageError
from sana_cli.recipe import MAX_IMAGES

TOKEN = re.compile(r"\\[{|}\\]|\{[^{|}\\]*\}|.", re.DOTALL)
ESCAPE = re.compile(r"\\([{|}\\])")


def columns_of(template: str, expanded: bool) -> list[str]:
    """Return the columns that a template names. UsageError if it is not a template."""
    names = [token[1:-1].strip() for token in TOKEN.findall(template) if _is_column(token)]
    if "" in names:
        raise UsageError("--template has an empty {}", "name a column, as in {animal}")
    rest = "".join("" if _is_column(token) else token for token in TOKEN.findall(template))
    plain = ESCAPE.sub("", rest)
    if not expanded and ("{" in plain or "}" in plain):
        raise UsageError(
            "--template has braces that name no column", r"add --expand for {a|b}, or write \{"
        )
    return names


def fill(template: str, columns: Mapping[str, str], expanded: bool) -> str:
    """Fill in the columns of a template; KeyError names a missing one.

    With `expanded`, escapes are left for `alternatives` to read.
    """
    text = ""
    for token in TOKEN.findall(template):
        if _is_column(token):
            text += columns[token[1:-1].strip()]
        else:
            text += token if expanded else ESCAPE.sub(r"\1", token)
    return text


def _is_column(token: str) -> bool:
    return len(token) > 1 and token[0] == "{"


def alternatives(text: str) -> list[str]:
    """Expand `a {red|blue} {fox|owl}` to all four, the last group changing fastest; groups nest.

    ValueError if braces do not match, a group has one alternative, or there are too many results.
    """
    try:
        return _sequence(text, 0, nested=False)[0]
    except RecursionError:
        raise ValueError("has groups in groups, too deep") from None


def _sequence(text: str, at: int, nested: bool) -> tuple[list[str], int]:
    """Expand from `at` to the end, or to the `|` or `}` that ends a nested group."""
    parts: list[list[str]] = [[""]]
    while at < len(text):
        character = text[at]
        if character == "\\" and text[at + 1 : at + 2] in ("{", "|", "}", "\\"):
            choices, at = [text[at + 1]], at + 2
        elif character == "{":
            choices, at = _group(text, at)
        elif nested and character in "|}":
            break
        elif character == "}":
            raise ValueError(r"has a } without a {; write \} for a plain one")
        else:
            choices, at = [character], at + 1
        if len(choices) == len(parts[-1]) == 1:
            parts[-1] = [parts[-1][0] + choices[0]]
        else:
            parts.append(choices)
    size = 1
    for choices in parts:
        size *= len(choices)
    if size > MAX_IMAGES:
        raise ValueError(f"has more than {MAX_IMAGES} combinations")
    return ["".join(choice) for choice in product(*parts)], at


def _group(text: str, at: int) -> tuple[list[str], int]:
    began, choices, count = at, [], 0
    while True:
        found, at = _sequence(text, at + 1, nested=True)
        choices += found
        count += 1
        if at == len(text):
            raise ValueError(r"has a { without a }; write \{ for a plain one")
        if text[at] == "}":
            break
    if count == 1:
        raise ValueError(rf"{text[began : at + 1][:40]} has nothing to choose from; write \{{")
    return choices, at + 1
