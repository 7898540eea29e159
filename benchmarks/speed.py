"""Compares this project with TRL on the same jobs: `make bench` (an hour and a half on two cores).

Each job runs in three rounds, TRL and this project in turn, each in a separate process. Results of other jobs stay in
results/speed.json. docs/speed.md explains the figures.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from side_by_side.jobs import JOBS, THREADS, Job
from side_by_side.table import UnequalWorkError, check_equal_work, summary, table
from side_by_side.workplace import has_real_data, prepare

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "speed.json"
PEERS = HERE.parent / ".peers"  # what `make bench` builds
LIBRARIES = ("torch", "transformers", "trl")

Report = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=lambda names: names.split(","), default=list(JOBS), help=", ".join(JOBS))
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side per job")
    parser.add_argument("--quick", action="store_true", help="check that both sides do the same, in tiny jobs")
    parser.add_argument("--table", action="store_true", help="print the table of the last results, measure nothing")
    options = parser.parse_args()
    if unknown := set(options.jobs) - set(JOBS):
        parser.error(f"there is no job {', '.join(sorted(unknown))}; jobs: {', '.join(JOBS)}")
    if options.quick:
        for name in options.jobs:
            list(measured(JOBS[name].tiny(), options.rounds, real=False))
        return
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in [] if options.table else options.jobs:
        for report in measured(JOBS[name], options.rounds, real=has_real_data()):
            kept[name] = report
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    sys.stdout.write(table(kept))


def measured(job: Job, rounds: int, *, real: bool) -> Iterator[Report]:
    """Yields the report of a job after each round. Exits if the two sides did different work."""
    with tempfile.TemporaryDirectory() as folder:
        workplace = Path(folder)
        operations = prepare(job, workplace, real=real)
        report: Report = {
            "settings": asdict(job),
            "unit": job.unit,
            "data": "hh-rlhf" if real else "generated text",
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "versions": versions(job),
            "operations": operations,
            "matrix_rates": [],
            "runs": [],
        }
        for round_ in range(1, rounds + 1):
            report["matrix_rates"].append(matrix_rate(job.precision))
            peer, project = run_peer(job, workplace), run_project(workplace)
            try:
                check_equal_work(job.precision, peer, project)
            except UnequalWorkError as error:
                sys.exit(f"{job.name}: {error}")
            report["runs"] += [
                {"round": round_, "side": "trl", **peer},
                {"round": round_, "side": "deep_rlhf", **project},
            ]
            report["units"] = peer["work"]["prompts" if job.kind == "ppo" else "pairs_kept"]
            report["summary"] = summary(report)
            sys.stderr.write(
                f"{job.name}, round {round_} of {rounds}: TRL {peer['seconds']:.1f} s, here {project['seconds']:.1f} s,"
                f" matrix rate {report['matrix_rates'][-1] / 1e9:.0f} GFLOP/s\n"
            )
            yield report


def run_peer(job: Job, workplace: Path) -> Report:
    """One run of TRL, in its own environment."""
    return run_side([str(peer_python(job)), str(HERE / "peers" / f"trl_{job.kind}.py")], workplace)


def run_project(workplace: Path) -> Report:
    """One run of this project."""
    return run_side([sys.executable, "-m", "side_by_side.project"], workplace)


def run_side(command: list[str], workplace: Path) -> Report:
    """Runs one side in a new process and returns its report."""
    result = workplace / "result.json"
    result.unlink(missing_ok=True)
    done = subprocess.run([*command, str(workplace), str(result)], env=environment(), capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(result.read_text())


def environment() -> dict[str, str]:
    """The environment of both sides: the same threads, no accelerator, no network, and the shared modules."""
    return {
        **os.environ,
        "PYTHONPATH": str(HERE),
        "OMP_NUM_THREADS": str(THREADS),
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def matrix_rate(precision: str) -> float:
    """The CPU's operations per second in matrix products, measured in a separate process."""
    code = f"from side_by_side.measure import matrix_rate; print(matrix_rate({precision!r}, {THREADS}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    return float(done.stdout)


def peer_python(job: Job) -> Path:
    python = PEERS / job.kind / "bin" / "python"
    if not python.exists():
        sys.exit(f"There is no '{python}': run make bench, which builds TRL's environments.")
    return python


def versions(job: Job) -> dict[str, str]:
    """Versions of the peer's libraries, which `make bench` installs by this project's constraints."""
    code = f"from importlib.metadata import version; print(*map(version, {LIBRARIES}))"
    done = subprocess.run([str(peer_python(job)), "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(LIBRARIES, done.stdout.split(), strict=True))


def machine() -> dict[str, Any]:
    """The machine of the measurements."""
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":")[1].strip() for line in described.splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": platform.platform(),
        "threads": THREADS,
    }


if __name__ == "__main__":
    main()
