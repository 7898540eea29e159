"""Medians and ratios of a job's runs, and a Markdown table of all jobs."""

from statistics import median
from typing import Any

from side_by_side.jobs import BARS, JOBS, LEAST_SHARE

# Between the losses of the first step; TRL uses autocast for bf16, which rounds elsewhere.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}

HEADER = (
    "| job | precision | TRL | Deep RLHF | speed | TRL, GB | Deep RLHF, GB | memory | MFU |",
    "|---|---|---|---|---|---|---|---|---|",
)


class UnequalWorkError(Exception):
    """The two sides did different work, so their figures cannot be compared; the message names the differences."""


def check_equal_work(precision: str, peer: dict[str, Any], project: dict[str, Any]) -> None:
    """Raises UnequalWorkError if counts, number format or the loss of the first step differ between two runs."""
    different = [
        f"{name} {peer['work'].get(name)} and {project['work'].get(name)}"
        for name in sorted({*peer["work"], *project["work"]})
        if peer["work"].get(name) != project["work"].get(name)
    ]
    different += [
        f"precision {run['precision']} instead of {precision}"
        for run in (peer, project)
        if run["precision"] != precision
    ]
    losses = [run.get("first_loss", 0.0) for run in (peer, project)]
    if not abs(losses[0] - losses[1]) <= LOSS_TOLERANCE[precision]:
        different.append(f"first loss {losses[0]} and {losses[1]}")
    if different:
        raise UnequalWorkError(f"TRL and this project did different work: {'; '.join(different)}.")


def summary(job: dict[str, Any]) -> dict[str, Any]:
    """Medians and ratios of a job's runs.

    A ratio of speed or memory is TRL's median divided by this project's. `share` is the MFU: the necessary arithmetic
    in the median time, divided by the measured matrix rate.
    """
    runs = {side: [run for run in job["runs"] if run["side"] == side] for side in ("trl", "deep_rlhf")}
    seconds = {side: median(run["seconds"] for run in found) for side, found in runs.items()}
    memory = {side: median(run["peak_gb"] - run["start_gb"] for run in found) for side, found in runs.items()}
    operations = sum(job["operations"].values())
    return {
        "seconds": seconds,
        "memory_gb": memory,
        "per_second": {side: job["units"] / value for side, value in seconds.items()},
        "share": {side: operations / value / max(job["matrix_rates"]) for side, value in seconds.items()},
        "speed_ratio": seconds["trl"] / seconds["deep_rlhf"],
        "memory_ratio": memory["trl"] / memory["deep_rlhf"],
    }


def missed(name: str, job: dict[str, Any]) -> list[str]:
    """Descriptions of the targets that a job misses."""
    bar, found = BARS[name], job["summary"]
    least = LEAST_SHARE.get(job["settings"]["precision"], 0.0)
    measures = {
        f"speed {found['speed_ratio']:.2f} × of {bar.speed} ×": found["speed_ratio"] >= bar.speed,
        f"memory {found['memory_ratio']:.2f} × less of {bar.memory} ×": found["memory_ratio"] >= bar.memory,
        f"MFU {found['share']['deep_rlhf']:.1%} of {least:.0%}": found["share"]["deep_rlhf"] >= least,
    }
    return [text for text, met in measures.items() if not met]


def table(jobs: dict[str, dict[str, Any]]) -> str:
    """The jobs as a Markdown table with their targets, the machines, and the missed targets."""
    lines, notes, machines = list(HEADER), [], []
    for name in [name for name in JOBS if "summary" in jobs.get(name, {})]:
        job, bar = jobs[name], BARS[name]
        found, settings = job["summary"], job["settings"]
        speed, memory, share = (found[key] for key in ("per_second", "memory_gb", "share"))
        cells = [
            settings["title"],
            settings["precision"],
            f"{speed['trl']:.2f} {job['unit']}/s",
            f"{speed['deep_rlhf']:.2f} {job['unit']}/s",
            f"{found['speed_ratio']:.2f} × (≥ {bar.speed:g} ×)",
            f"{memory['trl']:.2f}",
            f"{memory['deep_rlhf']:.2f}",
            f"{found['memory_ratio']:.2f} × less (≥ {bar.memory:g} ×)",
            f"{share['deep_rlhf']:.1%} (TRL {share['trl']:.0%})",
        ]
        lines.append("| " + " | ".join(cells) + " |")
        if misses := missed(name, job):
            notes.append(f"missed in {settings['title']}, {settings['precision']}: {'; '.join(misses)}")
        machines.append(_machine(job))
    return "\n".join([*lines, "", *dict.fromkeys(machines), *notes]) + "\n"


def _machine(job: dict[str, Any]) -> str:
    machine, versions = job["machine"], job["versions"]
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{machine['cpu']}, {machine['threads']} threads, {machine['memory_gb']} GB; {job['data']}; {listed}"
