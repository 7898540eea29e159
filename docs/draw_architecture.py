"""Draws docs/images/architecture.png from the imports of the code: `make architecture`.

Rows are the layers of import-linter's contract in pyproject.toml; the texts come from the packages' docstrings. A black
arrow is a direct import that no chain of other imports implies; the other imports are grey. The script also writes the
imports to docs/images/architecture.json, which a test compares with the code.
"""

import argparse
import ast
import json
import textwrap
import tomllib
from pathlib import Path

import grimp
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
PACKAGE = "deep_rlhf"

Imports = dict[str, list[str]]

WIDTH, HEIGHT = 100, 144  # of the drawing, in units of a tenth of an inch
BOX_WIDTH, BOX_HEIGHT = 27.0, 9.0
# The centre of each box, so that arrows pass beside boxes; the rows come from the contract.
CENTRES = {
    "cli": 50,
    "compat": 15,
    "web": 85,
    "evaluation": 52,
    "feedback": 85,
    "planning": 15,
    "algorithms": 54,
    "rollout": 33,
    "models": 33,
    "data": 15,
    "accel": 51,
    "runtime": 85,
    "ops": 33,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    imports = package_imports()
    (IMAGES / "architecture.json").write_text(as_json(imports))
    figure = drawing(layers(), imports)
    figure.savefig(IMAGES / "architecture.png", dpi=100)


def package_imports() -> Imports:
    """The direct imports between the packages on the top level, without imports for type checkers."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None, exclude_type_checking_imports=True)
    imports: dict[str, list[str]] = {}
    for package in sorted(path.parent.name for path in (ROOT / "src" / PACKAGE).glob("*/__init__.py")):
        modules = graph.find_descendants(f"{PACKAGE}.{package}") | {f"{PACKAGE}.{package}"}
        imported = {name for module in modules for name in graph.find_modules_directly_imported_by(module)}
        imports[package] = sorted({f"{name}.".split(".")[1] for name in imported} - {package})
    return {package: [part for part in imported if part in imports] for package, imported in imports.items()}


def as_json(imports: Imports) -> str:
    """The imports, one package a line."""
    lines = [f"  {json.dumps(part)}: {json.dumps(imported)}" for part, imported in imports.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def layers() -> list[list[str]]:
    """The layers of the contract, uppermost first."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    (contract,) = (contract for contract in contracts if contract["type"] == "layers")
    return [[name.strip().removeprefix(f"{PACKAGE}.") for name in layer.split(":")] for layer in contract["layers"]]


def is_implied(imports: Imports, importer: str, imported: str) -> bool:
    """Whether `importer` reaches `imported` by a chain of at least two imports."""
    pending, reached = [part for part in imports[importer] if part != imported], set()
    while pending:
        part = pending.pop()
        if part not in reached:
            reached.add(part)
            pending += imports[part]
    return imported in reached


def first_sentence(part: str) -> str:
    """The first sentence of a package's docstring, without what follows a semicolon."""
    tree = ast.parse((ROOT / "src" / PACKAGE / part / "__init__.py").read_text(encoding="utf-8"))
    sentence = (ast.get_docstring(tree) or "").split(". ")[0].split(".\n")[0]
    return sentence.split(";")[0].rstrip(".") if len(sentence) > 70 else sentence.rstrip(".")


def drawing(layers: list[list[str]], imports: Imports) -> Figure:
    packages = [[part for part in layer if part in CENTRES] for layer in layers]
    packages = [layer for layer in packages if layer]
    modules = [part for layer in layers for part in layer if part not in CENTRES]
    figure = Figure(figsize=(WIDTH / 10, HEIGHT / 10))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    step = (HEIGHT - 13) / len(packages)
    places = {
        part: (float(CENTRES[part]), HEIGHT - 6.5 - row * step) for row, layer in enumerate(packages) for part in layer
    }
    for importer, importeds in imports.items():
        for imported in importeds:
            draw_arrow(axes, places[importer], places[imported], grey=is_implied(imports, importer, imported))
    for part, place in places.items():
        draw_box(axes, place, part, first_sentence(part))
    draw_modules(axes, modules)
    return figure


def draw_box(axes: Axes, place: tuple[float, float], name: str, text: str) -> None:
    x, y = place
    corner = (x - BOX_WIDTH / 2, y - BOX_HEIGHT / 2)
    style = {"boxstyle": "round,pad=0,rounding_size=1", "facecolor": "#F4F6FA", "edgecolor": "#34558B", "zorder": 3}
    axes.add_patch(FancyBboxPatch(corner, BOX_WIDTH, BOX_HEIGHT, linewidth=1.2, **style))
    axes.text(x, y + 2.6, name, ha="center", va="center", fontsize=13, fontweight="bold", zorder=4)
    lines = "\n".join(textwrap.wrap(text, 38)[:2])
    axes.text(x, y - 1.4, lines, ha="center", va="center", fontsize=8.5, color="#333333", zorder=4)


def draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], *, grey: bool) -> None:
    """From the lower edge of the importer to the upper edge of the imported package."""
    (x0, y0), (x1, y1) = start, end
    if y0 == y1:
        side = BOX_WIDTH / 2 if x1 > x0 else -BOX_WIDTH / 2
        begin, finish = (x0 + side, y0), (x1 - side, y1)
    else:
        lean = max(-0.35, min(0.35, (x1 - x0) / 100)) * BOX_WIDTH
        begin, finish = (x0 + lean, y0 - BOX_HEIGHT / 2), (x1 - lean, y1 + BOX_HEIGHT / 2)
    style = {"color": "#D5DAE3", "linewidth": 0.9} if grey else {"color": "#1F2A44", "linewidth": 1.6}
    arrow = {"arrowstyle": "-|>", "mutation_scale": 9 if grey else 13, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(begin, finish, zorder=1 if grey else 2, **arrow, **style))


def draw_modules(axes: Axes, modules: list[str]) -> None:
    """The single modules at the bottom, which every package may import."""
    style = {"boxstyle": "round,pad=0,rounding_size=1", "facecolor": "#FFFFFF", "edgecolor": "#999999", "zorder": 3}
    axes.add_patch(FancyBboxPatch((1.5, 5), WIDTH - 3, 5.5, linewidth=1.0, linestyle="--", **style))
    text = f"{', '.join(f'{name}.py' for name in modules)}: imported by the packages above"
    axes.text(WIDTH / 2, 7.75, text, ha="center", va="center", fontsize=10.5, zorder=4)
    caption = "Arrows: who imports whom. Black: not implied by a chain of other imports. Grey: all others."
    axes.text(WIDTH / 2, 2.3, caption, ha="center", va="center", fontsize=9.5, color="#555555")


if __name__ == "__main__":
    main()
