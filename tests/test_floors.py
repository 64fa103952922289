"""The floors of the package: an import only ever goes down, and the imports that go up are named here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "vluna_llm"

# From the top, as in the README. What stands on one floor may import its neighbours, but never in a circle.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"__main__", "cli", "demo"}),
    frozenset({"integrations"}),
    frozenset({"sandbox"}),
    frozenset({"vluna", "manual", "billable"}),
    frozenset({"slot"}),
    frozenset({"admission", "lifecycle", "preparation"}),
    frozenset({"process", "runtime"}),
    frozenset({"settler", "delivery", "keeper", "sharing", "obey"}),
    frozenset({"ledger", "settlement", "owed", "books"}),
    frozenset({"reporting"}),
    frozenset({"gate", "outbox"}),
    frozenset({"telemetry", "pricing", "gauges"}),
    frozenset({"tap", "_tap_watch", "_tap_wire"}),
    frozenset({"operation", "policy", "ending", "usage", "backlog", "alarm"}),
    frozenset({"settings", "context", "budget", "identity", "errors", "types", "reentry", "scoped", "failpoints"}),
)
FLOOR_OF = {unit: number for number, floor in enumerate(FLOORS) for unit in floor}
# Two words that the lowest floor borrows from the one above: the record TokenUsage and the literal MetersMode.
DATA = {"usage.types", "usage.meters"}
# wrap() stands where users look for it; the integration behind it is loaded when it is called.
UPWARDS = {("vluna", "integrations.openai"), ("vluna", "integrations.anthropic")}
# What these do depends on their arguments alone, so that every interleaving can be tried.
PURE = {"operation", "policy", "ending", "usage", "backlog", "alarm"}
IMPURE = {"asyncio", "http", "httpx", "os", "queue", "select", "socket", "sqlite3", "ssl", "threading", "time"}


class Import(NamedTuple):
    """One import: the file it stands in, what it names, and whether it is only there for the type checker."""

    file: str
    target: str
    types_only: bool

    @property
    def unit(self) -> str:
        """The file or package below ``vluna_llm`` in which it stands."""
        return self.file.partition(".")[0]


def imports_of(source: str, file: str) -> Iterator[Import]:
    """All imports of one module, also those inside functions and through ``importlib``, as absolute names."""
    package = ["vluna_llm", *file.split(".")[:-1]]

    def walk(node: ast.AST, types_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from chain.from_iterable(walk(child, True) for child in node.body)
            yield from chain.from_iterable(walk(child, types_only) for child in node.orelse)
            return
        if isinstance(node, ast.Import):
            yield from (Import(file, alias.name, types_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            home = ".".join([*base, *filter(None, [node.module])])
            # "from . import x" may name a module; elsewhere the names are those of things inside the module.
            names = [alias.name for alias in node.names] if home == "vluna_llm" else [""]
            yield from (Import(file, f"{home}.{name}".rstrip("."), types_only) for name in names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield Import(file, name.value, types_only)
        yield from chain.from_iterable(walk(child, types_only) for child in ast.iter_child_nodes(node))

    return walk(ast.parse(source), False)


def all_imports() -> list[Import]:
    """Every import of the package; its ``__init__``, the door that loads names late, stands on no floor."""
    found: list[Import] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        file = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if file != "__init__":
            found += imports_of(path.read_text(encoding="utf-8"), file)
    return found


def inside(one: Import) -> str | None:
    """What is imported, below ``vluna_llm``; None for other packages and for the package's own version."""
    head, _, rest = one.target.partition(".")
    return rest if head == "vluna_llm" and rest not in ("", "__version__") else None


def wrong_ways(found: list[Import]) -> set[tuple[str, str]]:
    """The imports that go up."""
    wrong = set()
    for one in found:
        target = inside(one)
        if target is None or target in DATA:
            continue
        if FLOOR_OF[target.partition(".")[0]] < FLOOR_OF[one.unit]:
            wrong.add((one.file, target))
    return wrong


IMPORTS = all_imports()


def test_every_module_has_a_floor() -> None:
    """A new file is placed before it is used."""
    assert {one.unit for one in IMPORTS} | {path.stem for path in PACKAGE.glob("*.py")} <= {*FLOOR_OF, "__init__"}


def test_an_import_only_ever_goes_down() -> None:
    """Also inside functions and for the type checker; the exceptions are named, and still needed."""
    assert wrong_ways(IMPORTS) == UPWARDS


def test_no_circles() -> None:
    """Neighbours on one floor do not need each other to be loaded."""
    graph: dict[str, set[str]] = {}
    for one in IMPORTS:
        target = inside(one)
        if target is None or one.types_only or target in DATA or (one.file, target) in UPWARDS:
            continue
        other = target.partition(".")[0]
        if other != one.unit:
            graph.setdefault(one.unit, set()).add(other)
    assert list(TopologicalSorter(graph).static_order())


def test_the_pure_floors_touch_nothing() -> None:
    """No socket, clock, file, thread or loop where the rules are."""
    used = {(one.file, one.target.partition(".")[0]) for one in IMPORTS if one.unit in PURE}
    assert not {(file, name) for file, name in used if name in IMPURE}


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("policy", "from .settler import Settler", {("policy", "settler")}),
        ("usage.reader", "def f():\n    from ..gate import client", {("usage.reader", "gate")}),
        ("tap", "from . import vluna", {("tap", "vluna")}),
        ("runtime", "if TYPE_CHECKING:\n    from .vluna import Vluna", {("runtime", "vluna")}),
        ("gate.core", "import vluna_llm.outbox.row, importlib", set()),
        ("ledger", "importlib.import_module('vluna_llm.cli')", {("ledger", "cli")}),
        ("vluna", "from .gate.client import GateClient", set()),
    ],
)
def test_the_check_sees_every_kind_of_import(file: str, source: str, wrong: set[tuple[str, str]]) -> None:
    """The rule above can fail."""
    assert wrong_ways(list(imports_of(source, file))) == wrong
