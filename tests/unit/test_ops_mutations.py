"""Flip each sign, comparison and bound in `ops`, one at a time: the tests of that file must notice every one.

A mutant is the module's syntax tree with one edit. Its functions' code is put into the real functions, so that whoever
imported them runs the mutant, and pytest runs the test file of that module. All of it happens in processes of its own.
"""

import ast
import faulthandler
import importlib
import itertools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

import deep_rlhf.ops

OPS = Path(deep_rlhf.ops.__file__).parent
NAMES = sorted(path.stem for path in OPS.glob("[!_]*.py"))

SWAPPED_OPERATORS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.USub: (ast.UAdd,),
    ast.Lt: (ast.Gt, ast.LtE),
    ast.LtE: (ast.GtE, ast.Lt),
    ast.Gt: (ast.Lt, ast.GtE),
    ast.GtE: (ast.LtE, ast.Gt),
}
SWAPPED_NAMES = {"max": "min", "maximum": "minimum", "amax": "amin", "bisect_right": "bisect_left"}
SWAPPED_NAMES |= {new: old for old, new in SWAPPED_NAMES.items()}

Edit = tuple[ast.AST, str, Any]  # node, field, new content


def _edits(node: ast.AST) -> Iterator[Edit]:
    match node:
        case ast.BinOp(op=operator) | ast.AugAssign(op=operator) | ast.UnaryOp(op=operator):
            yield from ((node, "op", new()) for new in SWAPPED_OPERATORS.get(type(operator), ()))
        case ast.Compare(ops=operators):
            for index, operator in enumerate(operators):
                for new in SWAPPED_OPERATORS.get(type(operator), ()):
                    yield node, "ops", [*operators[:index], new(), *operators[index + 1 :]]
        case ast.Name(id=name) if name in SWAPPED_NAMES:
            yield node, "id", SWAPPED_NAMES[name]
        case ast.Attribute(attr=name) if name in SWAPPED_NAMES:
            yield node, "attr", SWAPPED_NAMES[name]
        case ast.Call(func=ast.Attribute(attr="clamp"), args=bounds, keywords=keywords):
            for index, bound in enumerate(bounds):
                yield node, "args", [*bounds[:index], ast.UnaryOp(ast.USub(), bound), *bounds[index + 1 :]]
            for keyword in keywords:
                yield keyword, "value", ast.UnaryOp(ast.USub(), keyword.value)
                yield keyword, "arg", SWAPPED_NAMES[str(keyword.arg)]


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all below it, type hints left out."""
    yield node
    for field, content in ast.iter_fields(node):
        if field not in ("annotation", "returns"):
            for child in content if isinstance(content, list) else [content]:
                if isinstance(child, ast.AST):
                    yield from _nodes(child)


def _mutants(tree: ast.Module) -> Iterator[str]:
    """Make one edit after another in `tree`, name each while it stands, and take it back."""
    for site in list(_nodes(tree)):
        for node, field, new in list(_edits(site)):
            old, before = getattr(node, field), ast.unparse(site)
            setattr(node, field, new)
            yield f"line {site.lineno}: {before}  became  {ast.unparse(site)}"  # type: ignore[attr-defined]
            setattr(node, field, old)


def _load(tree: ast.Module, module: ModuleType) -> None:
    """Give the functions of `module` the code of `tree`; they stay the same objects wherever they were imported."""
    namespace = {"__name__": module.__name__}
    exec(compile(ast.fix_missing_locations(tree), module.__name__, "exec"), namespace)
    for name, content in namespace.items():
        if isinstance(content, FunctionType) and content.__module__ == module.__name__:
            getattr(module, name).__code__ = content.__code__
        elif not name.startswith("__"):
            setattr(module, name, content)


def _tests_pass(name: str) -> bool:
    file = Path(__file__).with_name(f"test_ops_{name}.py")
    # only what the tests need: the plugins that are left out collect all garbage at the end of each run
    plugins = ("cacheprovider", "logging", "unraisableexception", "threadexception", "faulthandler")
    options = ["-x", "-q", "--tb=no", "--noconftest", "-o", "addopts=", *(f"-pno:{plugin}" for plugin in plugins)]
    code = pytest.main([str(file), *options])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {code!r} on {file}")
    return code == pytest.ExitCode.OK


Examined = tuple[bool, int, list[str], bool]


def _examine(name: str, most: int) -> Examined:
    """Do the tests pass on the unchanged tree; how many mutants were made; which survived; do they pass at the end.

    Of more than `most` mutants that many are made, evenly spread.
    """
    module = importlib.import_module(f"deep_rlhf.ops.{name}")
    tree = ast.parse((OPS / f"{name}.py").read_text(encoding="utf-8"))
    _load(tree, module)
    passed_before, made, survivors = _tests_pass(name), 0, []
    every = math.ceil(sum(1 for _ in _mutants(tree)) / most)
    for mutant in itertools.islice(_mutants(tree), 0, None, every):
        _load(tree, module)
        made += 1
        faulthandler.dump_traceback_later(120, exit=True)  # a mutant that loops for ever fails the test
        if _tests_pass(name):
            survivors.append(f"{name}.py {mutant}")
    faulthandler.cancel_dump_traceback_later()
    _load(tree, module)
    return passed_before, made, survivors, _tests_pass(name)


def _prepare_process() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@pytest.fixture(scope="module")
def examined() -> Iterator[Callable[[int], dict[str, Future[Examined]]]]:
    """examined(most): what comes of `most` mutants of each module, in two processes."""
    with ProcessPoolExecutor(2, get_context("spawn"), _prepare_process) as processes:
        yield cache(lambda most: {name: processes.submit(_examine, name, most) for name in NAMES})


@pytest.mark.processes
@pytest.mark.parametrize("most", [2, pytest.param(10_000, marks=pytest.mark.slow)], ids=["a few", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_no_mutant_survives(name: str, most: int, examined: Callable[[int], dict[str, Future[Examined]]]) -> None:
    passed_before, made, survivors, passed_after = examined(most)[name].result()
    # without an edit the tests pass, before and after: what kills a mutant is its edit
    assert passed_before
    assert passed_after
    assert made > 0
    assert not survivors, "\n".join(survivors)


TOY = '''
"""A docstring - not mutated."""
LIMIT = 3 + 1


def toy(x: "int | None", bound=-2):
    """Nor is this -x + 1."""
    if 0 < x <= max(LIMIT, bound):
        return x.clamp(min=bound)
    return x - 1
'''


def test_the_edits_of_a_toy_module_are_these_and_are_taken_back() -> None:
    tree = ast.parse(TOY)
    untouched = ast.dump(tree)
    assert list(_mutants(tree)) == [
        "line 3: 3 + 1  became  3 - 1",
        "line 6: -2  became  +2",
        "line 8: 0 < x <= max(LIMIT, bound)  became  0 > x <= max(LIMIT, bound)",
        "line 8: 0 < x <= max(LIMIT, bound)  became  0 <= x <= max(LIMIT, bound)",
        "line 8: 0 < x <= max(LIMIT, bound)  became  0 < x >= max(LIMIT, bound)",
        "line 8: 0 < x <= max(LIMIT, bound)  became  0 < x < max(LIMIT, bound)",
        "line 8: max  became  min",
        "line 9: x.clamp(min=bound)  became  x.clamp(min=-bound)",
        "line 9: x.clamp(min=bound)  became  x.clamp(max=bound)",
        "line 10: x - 1  became  x + 1",
    ]
    assert ast.dump(tree) == untouched


def test_a_loaded_mutant_runs_wherever_the_function_was_imported() -> None:
    module = ModuleType("toy")
    exec(TOY, vars(module))
    toy = module.toy
    assert toy(9) == 8
    _load(ast.parse(TOY.replace("x - 1", "x + 1").replace("3 + 1", "30 + 1")), module)
    assert toy(-9) == -8
    assert module.LIMIT == 31
