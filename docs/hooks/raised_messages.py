"""Every message of the package, errors and warnings, read from its source: what stands there cannot go stale."""

import ast
import html
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import hf_topkast


PACKAGE = Path(hf_topkast.__file__).parent
# Where a message comes from, in the words of the page; the first path that fits counts.
ROOMS = {
    "Importing": ("__init__",),
    "Settings": ("config", "checks", "method"),
    "Making a model sparse, and dense again": ("surgery",),
    "Choosing A and B": ("sets",),
    "Layers and their products": ("layers", "ops", "native"),
    "Sets, reservoir and processes": ("storage",),
    "Loading, saving, resuming": ("checkpoints", "headers"),
    "Training": ("training", "layer_log"),
    "The command line": ("cli", "plots", "report", "runs", "__main__"),
}
WARNINGS = ("warn", "warning", "warning_once")
# A literal with fewer words is no message by itself.
WORDS = 4


@dataclass(frozen=True)
class Message:
    """One message: `kind` is the exception's class, or "warning"; in `text` what differs is ‹named›."""

    kind: str
    text: str
    path: Path


def collect() -> list[Message]:
    """All messages, by file and line."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        found += _Module(path).messages()
    return list(dict.fromkeys(found))


def room_of(path: Path) -> str:
    """
    Raises:
        KeyError: if a file or folder of the package stands in none of `ROOMS`.
    """
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for title, starts in ROOMS.items():
        if first.startswith(starts):
            return title
    raise KeyError(f"docs/hooks/raised_messages.py: ROOMS has no place for {first}.")


def page() -> str:
    """The messages of each room as a list, with what differs in italics."""
    rooms: dict[str, list[Message]] = {title: [] for title in ROOMS}
    for message in collect():
        rooms[room_of(message.path)].append(message)
    lines = []
    for title, messages in rooms.items():
        lines += [f"### {title}", "", '<ul class="messages">']
        lines += [f"<li><code>{message.kind}</code> {shown(message.text)}</li>" for message in messages]
        lines += ["</ul>", ""]
    return "\n".join(lines)


def shown(text: str) -> str:
    """A message's text as HTML."""
    escaped = html.escape(text, quote=False).replace("\n", " ")
    return re.sub("‹(.*?)›", r"<var>\1</var>", escaped)


class _Module:
    """One file: its syntax tree, and what names in it stand for."""

    def __init__(self, path: Path):
        self.path = path
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}

    def messages(self) -> Iterator[Message]:
        for node in ast.walk(self.tree):
            for kind, text in self._of(node):
                if _words(text):
                    yield Message(kind, text, self.path)

    def _of(self, node: ast.AST) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.Return | ast.Yield) and isinstance(node.value, ast.Constant | ast.JoinedStr):
            text = self._text(node.value)  # what other messages quote
            if (
                _words(text) >= WORDS
                and not text.startswith("<")
                and not self._function(node).name.endswith(("repr__", "__str__", "_repr"))
            ):
                yield "part", "… " + text
        if not isinstance(node, ast.Call):
            return
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        if name.endswith(("Error", "Parameter")) and node.args:  # typer.BadParameter
            yield name, self._text(node.args[1] if name == "OSError" else node.args[0])
        elif name == "Table" and len(node.args) == 3:  # of ops/costs.py, which the first product logs
            yield "warning", self._text(node.args[2])
        elif name in WARNINGS and node.args:
            yield "warning", self._text(node.args[0])
        elif name == "append" and getattr(called.value, "id", "") == "errors":  # of torch's load_state_dict
            yield "RuntimeError", self._text(node.args[0])
        elif name == "fix":
            yield "ValueError", f"‹field›=‹value› is not allowed now: it is ‹former› and {self._text(node.args[1])}."
        elif name == "check" and len(node.args) == 4:
            allowed = self._text(node.args[3])
            for field in self._fields(node.args[1], node):
                yield "ValueError", f"{field}=‹value› is not allowed: it must be {allowed}."

    def _text(self, node: ast.AST) -> str:
        """The text that an expression makes, with ‹names› in the place of what is only known when it runs."""
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(self._text(part) for part in node.values)
        if isinstance(node, ast.FormattedValue):
            return self._text(node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._text(node.left) + self._text(node.right)
        if isinstance(node, ast.IfExp):
            sides = [side for side in map(self._text, (node.body, node.orelse)) if side]
            return " / ".join(dict.fromkeys(sides))
        if isinstance(node, ast.Name):
            assigned = self._assigned(node)
            return self._text(assigned) if assigned is not None else f"‹{node.id.strip('_').lower()}›"
        if isinstance(node, ast.Attribute) and node.attr == "__name__":
            return self._text(node.value)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "type",
            "repr",
            "str",
            "tuple",
            "list",
            "len",
        ):
            return self._text(node.args[0])
        return f"‹{_last_name(node)}›"

    def _assigned(self, node: ast.Name) -> ast.AST | None:
        """The text that a name was given last, in its function or at the top of the file."""
        function = self._function(node)
        inside = [] if function is None else ast.walk(function)
        values = [
            value
            for line, value in sorted(_assignments(inside, node.id), key=lambda pair: pair[0])
            if line < node.lineno
        ]
        values = (
            values or [value for _, value in _assignments(self.tree.body, node.id)] or _constants().get(node.id, [])
        )
        return values[-1] if values and _is_text(values[-1]) else None

    def _fields(self, node: ast.AST, inside: ast.AST) -> list[str]:
        """The names of the settings that a check is of: one, those of a loop, or those that callers give."""
        if isinstance(node, ast.Constant):
            return [node.value]
        function, loop = self._function(inside), inside
        while loop is not function:
            loop = self.parents[loop]
            if isinstance(loop, ast.For) and isinstance(loop.iter, ast.Tuple) and _binds(loop.target, node):
                return [(row.elts[0] if isinstance(row, ast.Tuple) else row).value for row in loop.iter.elts]
        calls = [call for call in ast.walk(self.tree) if isinstance(call, ast.Call)]
        given = [
            call.args[1] for call in calls if getattr(call.func, "id", "") == function.name and len(call.args) > 1
        ]
        return [arg.value for arg in given if isinstance(arg, ast.Constant)] or [self._text(node)]

    def _function(self, node: ast.AST) -> ast.AST | None:
        while node is not None and not isinstance(node, ast.FunctionDef):
            node = self.parents.get(node)
        return node


def _assignments(nodes: Iterable[ast.AST], name: str) -> list[tuple[int, ast.AST]]:
    """The lines in which a name is given something, with what."""
    return [
        (node.lineno, node.value)
        for node in nodes
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == name for target in node.targets)
    ]


@cache
def _constants() -> dict[str, list[ast.AST]]:
    """What names in capitals stand for that one file of the package alone defines."""
    found: dict[str, list[ast.AST]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)]
            for name in filter(str.isupper, names):
                found.setdefault(name, []).append(node.value)
    return {name: values for name, values in found.items() if len(values) == 1}


def _is_text(node: ast.AST) -> bool:
    if isinstance(node, ast.IfExp):
        return _is_text(node.body) and _is_text(node.orelse)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _binds(target: ast.AST, node: ast.AST) -> bool:
    first = target.elts[0] if isinstance(target, ast.Tuple) else target
    return isinstance(first, ast.Name) and isinstance(node, ast.Name) and first.id == node.id


def _last_name(node: ast.AST) -> str:
    """What stands for an expression: the last name in it that says something."""
    if isinstance(node, ast.Attribute):
        return node.attr.strip("_")
    if isinstance(node, ast.Subscript):
        return _last_name(node.value)
    names = [
        part.attr if isinstance(part, ast.Attribute) else part.id
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute | ast.Name)
    ]
    names = [name.strip("_").lower() for name in names if name not in ("join", "map", "repr", "sorted", "str", "list")]
    return names[-1] if names else "…"


def _words(text: str) -> int:
    return len(re.findall(r"[^\W\d]{2,}", re.sub("‹.*?›", "", text)))
