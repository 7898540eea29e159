"""`make fuzz`: runs cases of a seed, and prints what they found, grouped by the kind of failure."""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fuzz.case import Case
from fuzz.kinds import KINDS, draw, make_case, numbers_of
from fuzz.oracle import Fault
from fuzz.runner import build_world, run_cases, warm_up

SHOWN = 5  # cases of one kind of failure


class Finding(NamedTuple):
    """A fault, and the case that showed it, as SEED:NUMBER."""

    name: str
    case: Case
    fault: Fault

    def __str__(self) -> str:
        return f"{self.name} {draw(*_numbers(self.name))[0]}: {': '.join(self.fault)}\n    {self.case.what[:300]}"


def main() -> None:
    """Exits with code 1 if something was found."""
    options = _options()
    root = Path(tempfile.mkdtemp(prefix="fuzz-")).resolve()
    start = time.monotonic()

    def tell(text: str) -> None:
        if not options.quiet:
            _write(sys.stderr, f"\r{text}\x1b[K" if sys.stderr.isatty() else f"{text}\n")

    names = options.case or names_of(options.seed, options.cases, options.kinds)
    try:
        found = run(root, names, options.jobs, tell, keep=options.keep, show=bool(options.case))
    finally:
        if not options.keep:
            shutil.rmtree(root, ignore_errors=True)
    _write(sys.stdout, report(found, f"{len(names)} cases in {time.monotonic() - start:.0f} s"))
    if options.keep:
        _write(sys.stdout, f"Kept: {root}\n")
    sys.exit(bool(found))


def search(root: Path, seed: int, cases: int, kinds: frozenset[str], jobs: int, result: Path) -> None:
    """Runs cases of these kinds, and writes what they found to `result`, as a JSON list of texts."""
    root.mkdir()
    found = run(root.resolve(), names_of(seed, cases, kinds), jobs)
    result.write_text(json.dumps([str(finding) for finding in found]))


def names_of(seed: int, cases: int, kinds: frozenset[str]) -> list[str]:
    """The names of the first cases of these kinds."""
    return [f"{seed}:{number}" for number in numbers_of(seed, cases, kinds)]


def run(
    root: Path,
    names: Sequence[str],
    jobs: int,
    tell: Callable[[str], None] = lambda text: None,
    *,
    keep: bool = False,
    show: bool = False,
) -> list[Finding]:
    """Runs the cases of these names below `root`. keep: the folders of failures stay. show: prints all output."""
    warm_up()
    world = root / "world"
    world.mkdir()
    build_world(world, jobs, tell)
    found: list[Finding] = []
    slowest = (0.0, "")
    for done, ending in enumerate(run_cases(_made(root, names, world), jobs), 1):
        name, folder, case, faults, said, seconds = ending
        slowest = max(slowest, (seconds, name))
        found += [Finding(name, case, fault) for fault in faults]
        if show:
            _write(sys.stdout, f"{case.what}\n{_words(case)}\n{said}\n")
        for finding in found[len(found) - len(faults) :]:
            _write(sys.stderr, f"{finding}\n")
        tell(f"{done}/{len(names)}  {len(found)} failures  slowest: {slowest[1]}, {slowest[0]:.0f} s")
        if keep and faults:
            (folder / "output.txt").write_text(f"{case.what}\n{_words(case)}\n{said}", errors="backslashreplace")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return found


def _made(root: Path, names: Sequence[str], world: Path) -> Iterator[tuple[str, Path, Case]]:
    for name in names:
        folder = root / name.replace(":", "-")
        yield name, folder, make_case(*_numbers(name), folder, world)


def report(found: list[Finding], what: str) -> str:
    """The failures, each kind with the commands that repeat its cases."""
    groups: dict[str, list[Finding]] = {}
    for finding in found:
        kind, detail = finding.fault
        groups.setdefault(f"{kind}: {detail.split(' <- ')[-1][:100]}", []).append(finding)
    lines = []
    for kind, findings in sorted(groups.items(), key=lambda item: -len(item[1])):
        lines.append(f"\n{len(findings)} × {kind}")
        for finding in findings[:SHOWN]:
            lines += [f"  --case {finding.name}  {finding.case.what[:160]}", f"      {finding.fault[1][:300]}"]
    lines.append(f"\n{len(found)} failures, {what}. Repeat one: make fuzz FUZZ='--case SEED:NUMBER --keep'\n")
    return "\n".join(lines)


def _numbers(name: str) -> tuple[int, int]:
    seed, number = name.split(":")
    return int(seed), int(number)


def _words(case: Case) -> str:
    return " ".join(["deep-rlhf", *case.argv])


def _write(file: object, text: str) -> None:
    file.write(text.encode("utf-8", "backslashreplace").decode())  # type: ignore[attr-defined]
    file.flush()  # type: ignore[attr-defined]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make fuzz FUZZ=…", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--kinds", default=",".join(KINDS), help="with commas between them; default: all")
    parser.add_argument("--case", action="append", help="SEED:NUMBER of one case, whose output is printed; repeatable")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cases that run at the same time")
    parser.add_argument("--keep", action="store_true", help="keep the folders of failures, with what was printed")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args()
    options.kinds = frozenset(options.kinds.split(","))
    if unknown := options.kinds - KINDS.keys():
        parser.error(f"unknown kinds: {', '.join(unknown)}; known are {', '.join(KINDS)}")
    return options


if __name__ == "__main__":
    main()
