"""Profiles this project's side of a job of `make bench`: `python benchmarks/profile_job.py ppo-large-bf16`.

Prints the most expensive operators with their share of all operators' own time, by PyTorch's profiler, which slows a
job down by a tenth. MFU in docs/speed.md counts matrix products (mm, bmm, addmm, linear) only.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from side_by_side import project
from side_by_side.jobs import JOBS, THREADS
from side_by_side.workplace import has_real_data, prepare

SHOWN = 12
PRODUCTS = ("mm", "linear", "convolution")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=JOBS, help="name of the job")
    job = JOBS[parser.parse_args().job]
    torch.set_num_threads(THREADS)
    run = project.ppo if job.kind == "ppo" else project.reward
    with tempfile.TemporaryDirectory() as folder:
        prepare(job, Path(folder), real=has_real_data())
        with torch.profiler.profile() as profiler:
            run(job, Path(folder))
    sys.stdout.write(table({event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}))


def table(seconds: dict[str, float]) -> str:
    """The operators' own seconds, largest first, and the sum of the matrix products, as a Markdown table."""
    total = sum(seconds.values())
    products = sum(spent for name, spent in seconds.items() if is_product(name))
    rows = [("all matrix products", products), *sorted(seconds.items(), key=lambda row: -row[1])[:SHOWN]]
    lines = ["| operator | seconds | share |", "|---|---|---|"]
    lines += [f"| {name} | {spent:.1f} | {spent / total:.0%} |" for name, spent in rows]
    return "\n".join(lines) + "\n"


def is_product(name: str) -> bool:
    """Whether an operator multiplies matrices."""
    return any(part in name for part in PRODUCTS)


if __name__ == "__main__":
    main()
