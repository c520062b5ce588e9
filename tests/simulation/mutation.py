"""
Mutations of the product's source, anchored by function and matched by structure.

A mutation names a function and gives a snippet of its code: an expression, or one or more statements.
The snippet is compared with the function's syntax tree, so that formatting, comments and line breaks do
not matter. `_1` to `_9` in a snippet match any expression, or any one statement where they stand alone as
a statement; the replacement may use what they matched. `name = value` matches a keyword argument too.
A snippet that is replaced by nothing is removed.
"""

from __future__ import annotations

import ast
import re
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.support.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PLACEHOLDER = re.compile(r"_[1-9]")


class AnchorError(Exception):
    """The function does not exist, or its code does not match the snippet exactly once."""


class Mutation(NamedTuple):
    """A change of one place of the product, and the defect that it causes."""

    anchor: str
    """Module below `bfaas` and qualified name: `pooling.lifecycle:MachineLifecycle.create`."""

    old: str
    new: str
    defect: str

    @property
    def module(self) -> str:
        return self.anchor.partition(":")[0]

    @property
    def path(self) -> Path:
        return ROOT / "bfaas" / f"{self.module.replace('.', '/')}.py"

    def apply(self) -> ast.Module:
        """Return the module's syntax tree with the mutation in it. Raises `AnchorError`."""
        return mutate(self.path.read_text(), self.anchor.partition(":")[2], self.old, self.new)


def mutate(source: str, qualified_name: str, old: str, new: str) -> ast.Module:
    """Return the syntax tree of `source` in which one function's code is changed. Raises `AnchorError`."""
    tree = ast.parse(source)
    function = _find_function(tree, qualified_name)
    old_code, new_code = ast.parse(old).body, ast.parse(new).body
    if all(len(code) == 1 and isinstance(code[0], ast.Expr) for code in (old_code, new_code)):
        places = _expressions(function, old_code[0].value, new_code[0].value)  # type: ignore[attr-defined]
    else:
        places = _statements(function, old_code, new_code)
        if _is_assignment(old_code) and _is_assignment(new_code):
            places += _keywords(function, old_code[0], new_code[0])
    if len(places) != 1:
        raise AnchorError(f"{qualified_name} matches {len(places)} times: {old}")
    places[0].put()
    return ast.fix_missing_locations(tree)


def find_lines(source: str, qualified_name: str, snippet: str) -> set[int]:
    """Return the lines of the statement in a function that matches a snippet. Raises `AnchorError`."""
    places = _statements(_find_function(ast.parse(source), qualified_name), ast.parse(snippet).body, [])
    if len(places) != 1:
        raise AnchorError(f"{qualified_name} matches {len(places)} times: {snippet}")
    place = places[0]
    statements = getattr(place.node, place.field)[place.at]
    return set(range(statements[0].lineno, statements[-1].end_lineno + 1))


class _Place(NamedTuple):
    """A part of a syntax tree that can be replaced: a field of a node, or a range of a list in it."""

    node: ast.AST
    field: str
    at: slice | int | None
    replacement: Any

    def put(self) -> None:
        if self.at is None:
            setattr(self.node, self.field, self.replacement)
        else:
            getattr(self.node, self.field)[self.at] = self.replacement
            if not getattr(self.node, self.field):
                setattr(self.node, self.field, [ast.Pass()])


def _find_function(tree: ast.Module, qualified_name: str) -> ast.AST:
    node: ast.AST = tree
    for name in qualified_name.split("."):
        found = [
            child
            for child in _within_scope(node)
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and child.name == name
        ]
        if len(found) != 1:
            raise AnchorError(f"{qualified_name} is defined {len(found)} times")
        node = found[0]
    return node


def _within_scope(node: ast.AST) -> Iterator[ast.AST]:
    """Iterate over the nodes below `node`, without those within functions and classes below it."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _within_scope(child)


def _expressions(function: ast.AST, old: ast.expr, new: ast.expr) -> list[_Place]:
    places = []
    for node in ast.walk(function):
        for field, value in ast.iter_fields(node):
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                found: dict[str, ast.AST] = {}
                if isinstance(child, ast.expr) and _matches(old, child, found):
                    places.append(_Place(node, field, index, _filled_in(new, found)))
    return places


def _statements(function: ast.AST, old: list[ast.stmt], new: list[ast.stmt]) -> list[_Place]:
    places = []
    for node in ast.walk(function):
        for field, value in ast.iter_fields(node):
            if not isinstance(value, list) or not value or not isinstance(value[0], ast.stmt):
                continue
            for first in range(len(value) - len(old) + 1):
                found: dict[str, ast.AST] = {}
                if _matches(old, value[first : first + len(old)], found):
                    replacement = [_filled_in(statement, found) for statement in new]
                    places.append(_Place(node, field, slice(first, first + len(old)), replacement))
    return places


def _is_assignment(code: list[ast.stmt]) -> bool:
    return len(code) == 1 and isinstance(code[0], ast.Assign) and isinstance(code[0].targets[0], ast.Name)


def _keywords(function: ast.AST, old: Any, new: Any) -> list[_Place]:
    places = []
    for node in ast.walk(function):
        found: dict[str, ast.AST] = {}
        if (
            isinstance(node, ast.keyword)
            and node.arg == old.targets[0].id
            and _matches(old.value, node.value, found)
        ):
            places.append(_Place(node, "value", None, _filled_in(new.value, found)))
    return places


def _matches(pattern: Any, code: Any, found: dict[str, ast.AST]) -> bool:
    """Compare two parts of syntax trees; `found` gets what the pattern's placeholders stand for."""
    name = _placeholder(pattern)
    if name is not None and isinstance(code, ast.expr | ast.stmt):
        if name in found:
            return _matches(found[name], code, {})
        found[name] = code
        return True
    if isinstance(pattern, list):
        return (
            isinstance(code, list)
            and len(pattern) == len(code)
            and all(_matches(one, other, found) for one, other in zip(pattern, code, strict=True))
        )
    if isinstance(pattern, ast.AST):
        return type(pattern) is type(code) and all(
            _matches(value, getattr(code, field, None), found)
            for field, value in ast.iter_fields(pattern)
            if field != "ctx"
        )
    return type(pattern) is type(code) and bool(pattern == code)


def _placeholder(node: Any) -> str | None:
    if isinstance(node, ast.Expr):
        node = node.value
    return node.id if isinstance(node, ast.Name) and _PLACEHOLDER.fullmatch(node.id) else None


class _FillIn(ast.NodeTransformer):
    def __init__(self, found: dict[str, ast.AST]) -> None:
        self._found = found

    def visit(self, node: ast.AST) -> Any:
        name = _placeholder(node)
        if name is None:
            return self.generic_visit(node)
        code = deepcopy(self._found[name])
        return ast.Expr(code) if isinstance(node, ast.Expr) and isinstance(code, ast.expr) else code


def _filled_in(code: Any, found: dict[str, ast.AST]) -> Any:
    return _FillIn(found).visit(deepcopy(code))
