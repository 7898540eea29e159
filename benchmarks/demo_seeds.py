"""Runs the demo with three seeds and checks its targets: `make bars` (about nine minutes on two cores).

The targets: the judge's mean score on held-out prompts rises by 0.3, the tuned policy wins against the SFT policy on
85 % of them, KL stays within 15 nats per response, and a run takes at most four minutes. Writes
results/demo_seeds.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

SEEDS = (1, 2, 3)
RESULTS = Path(__file__).parent / "results" / "demo_seeds.json"
SHOWN = ("seed", "seconds", "gold_before", "gold_after", "win_rate", "win_rate_ci", "kl", "reward_accuracy",
         "reward_accuracy_length_baseline", "response_tokens_before", "response_tokens_after")  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    RESULTS.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            command = [
                sys.executable,
                "-m",
                "deep_rlhf.cli.main",
                "demo",
                f"--seed={seed}",
                f"--output_dir={folder}/{seed}",
            ]
            subprocess.run(command, check=True)
            summary = json.loads((Path(folder) / str(seed) / "summary.json").read_text())
            rows.append({name: summary[name] for name in SHOWN})
    RESULTS.write_text(json.dumps(rows, indent=2) + "\n")
    sys.stdout.write(RESULTS.read_text())
    missed = [f"seed {row['seed']}: {name}" for row in rows for name, met in bars(row).items() if not met]
    sys.exit(f"missed: {', '.join(missed)}" if missed else None)


def bars(row: dict) -> dict[str, bool]:
    """Whether a run meets each target."""
    return {
        "judge +0.3": row["gold_after"] - row["gold_before"] >= 0.3,
        "win rate 0.85": row["win_rate"] >= 0.85,
        "KL 15": row["kl"] <= 15,
        "four minutes": row["seconds"] <= 240,
    }


if __name__ == "__main__":
    main()
