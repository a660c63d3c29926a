"""Changes to a valid file: to its structure, as a person's slip or a program's fault makes them, and to its bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any

import yaml
from hypothesis import strategies as st

Place = tuple[Any, Any]
"""A list or mapping, and a key of it."""

LONG = "x" * 5000
NESTED = 60
HOSTILE = (
    "<script>alert(1)</script>",
    '" onload="alert(1)',
    "]]>",
    "a|b\nc",
    "\\input{x}_^$%&#{}~",
    "../../outside",
    "${HOME}",
)
RAW = (
    "!!python/object/apply:os.system ['touch RAN']", "!!python/name:os.system", "!local x", "&a [*a]", "*nowhere",
    "2020-01-01", "2020-01-01T10:00:00Z", "yes", "no", "~", "1e-5", "0x" + "f" * 6000, "9" * 5000, ".inf", "-.inf",
    ".nan", "1_000", "0o17", "12:30:45", "!!binary aGk=", "!!set {a, b}", "'", '"', "{", "[", "]", "%", "@", "|", ">",
    "? [a]", "&a {<<: *a}", "{<<: 3}", "{<<: [1]}", "{a: 1, a: 2}", "{1: 2}", "{null: 2}", "{=: 2}", "=", "<<",
    "[" * 400, "{a: " * 300, "- " * 300, "\x07", "\ud800",
)  # fmt: skip
"""Written into the file as it stands here."""
PLAIN = st.one_of(
    st.sampled_from([None, True, False, 0, -1, 1, 1.5, -0.0, 10**9, 2**31, 2**63, 10**30, -(10**30), 1e308, 1e-300]),
    st.sampled_from(
        [float("nan"), float("inf"), float("-inf"), "", " ", "nan", "1", "a b", "\u2028", "é", "\u202e", "\0"]
    ),
    st.sampled_from([*HOSTILE, LONG, [], {}, [[]], {"": None}, {"a": {"b": []}}, list(range(3000))]),
    st.just({f"k{i}": i for i in range(3000)}),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
)
TEXTUAL = ("cut", "bytes", "bom", "utf-16", "crlf", "tabs", "drop line", "twice line", "bomb", "empty", "latin")
# 1.3 kB that hold 9 to the power of 20 values
BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]\n" for i in range(21))
MERGES = "b0: &b0 {x: 1}\n" + "".join(f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 9)}]}}\n" for i in range(1, 21))


def places(value: Any) -> Iterator[Place]:
    """Every place in a nested value, outermost first."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from places(value[key])


def nested(value: Any, depth: int) -> Any:
    for i in range(depth):
        value = [value] if i % 2 else {"a": value}
    return value


@st.composite
def edited(draw: st.DrawFn, value: Any) -> Any:
    """The value with one to three changes."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        found = list(places(value))
        if not found:
            break
        inside, key = found[draw(st.integers(0, len(found) - 1))]
        old = inside[key]
        match draw(
            st.sampled_from(("set", "set", "raw", "delete", "rename", "wrap", "scale", "many", "near", "share"))
        ):
            case "set":
                inside[key] = copy.deepcopy(draw(PLAIN))  # a drawn list is changed further, and is drawn again
            case "raw":
                inside[key] = Raw(draw(st.sampled_from(RAW)))
            case "delete":
                del inside[key]
            case "rename" if isinstance(inside, dict):
                inside[draw(st.one_of(st.sampled_from([*HOSTILE, "", LONG, f"{key}x", "1", "yes"]), st.text()))] = (
                    inside.pop(key)
                )
            case "wrap":
                inside[key] = nested(old, draw(st.sampled_from((1, 2, NESTED, 300))))
            case "scale" if isinstance(old, int | float) and not isinstance(old, bool):
                inside[key] = old * draw(st.sampled_from((0, -1, 0.5, 2, 1000, 10**12)))
            case "many" if isinstance(inside, dict):
                inside |= {f"{key}{i}": old for i in range(draw(st.sampled_from((2, 40, 3000))))}
            case "many":
                inside += [old] * draw(st.sampled_from((1, 40, 3000)))
            case "near" if isinstance(old, str):
                inside[key] = old + draw(st.sampled_from(("x", " ", "\n", "/", "..", "-" * 80, "<b>")))
            case _:
                other, where = found[draw(st.integers(0, len(found) - 1))]
                inside[key] = copy.deepcopy(other.get(where) if isinstance(other, dict) else None)
    return value


class Raw(str):
    """Text that is written into the file without quotes."""


def dumped(value: Any, dump: Callable[[Any], str]) -> str:
    """The file's text, with raw pieces put in where they belong."""
    raw: list[str] = []

    def marked(part: Any) -> Any:
        if isinstance(part, Raw):
            raw.append(str(part))
            return f"RAW{len(raw) - 1}WAR"
        if isinstance(part, dict):
            return {key: marked(inner) for key, inner in part.items()}
        return [marked(inner) for inner in part] if isinstance(part, list) else part

    text = dump(marked(value))
    for number, piece in enumerate(raw):
        text = text.replace(f'"RAW{number}WAR"', piece).replace(f"RAW{number}WAR", piece)
    return text


@st.composite
def garbled(draw: st.DrawFn, text: str) -> bytes:
    """The text with its bytes changed."""
    data = text.encode("utf-8", errors="surrogatepass")
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    lines = text.splitlines(keepends=True) or [""]
    line = at % len(lines)
    match draw(st.sampled_from(TEXTUAL)):
        case "cut":
            return data[:at]
        case "bytes":
            return data[:at] + draw(st.binary(min_size=1, max_size=6)) + data[at + draw(st.integers(0, 6)) :]
        case "bom":
            return b"\xef\xbb\xbf" + data
        case "utf-16":
            return text.encode("utf-16", errors="replace")
        case "latin":
            return ("é" + text).encode("latin-1", errors="replace")
        case "crlf":
            return data.replace(b"\n", b"\r\n")
        case "tabs":
            return data.replace(b"  ", b"\t", draw(st.integers(1, 9)))
        case "drop line":
            del lines[line]
        case "twice line":
            lines.insert(line, lines[line])
        case "bomb":
            return (draw(st.sampled_from((BOMB, MERGES))) + text).encode("utf-8", errors="surrogatepass")
        case _:
            return draw(st.sampled_from((b"", b"\n", b"null", b"[]", b"{}", b"3", b'"x"', b"---\n---\n", b"\0")))
    return "".join(lines).encode("utf-8", errors="surrogatepass")


def changed(value: Any, dump: Callable[[Any], str]) -> st.SearchStrategy[bytes]:
    """Bytes of a file that once held `value`: seven in ten changed in structure, the others in their bytes."""
    structural = edited(value).map(lambda new: dumped(new, dump).encode("utf-8", errors="surrogatepass"))
    return st.integers(0, 9).flatmap(lambda n: structural if n < 7 else garbled(dump(value)))


def as_yaml(value: Any) -> str:
    """Block YAML, which dates and aliases of equal objects keep."""
    return yaml.dump(value, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=True, width=10**6)


def as_json(value: Any) -> str:
    """JSON with NaN where there is one."""
    return json.dumps(value, default=lambda odd: odd.isoformat() if isinstance(odd, date) else str(odd))


def as_jsonl(rows: Any) -> str:
    """One value a line."""
    return "".join(as_json(row) + "\n" for row in (rows if isinstance(rows, list) else [rows]))
