"""Runs a side's script and measures its peak GPU memory: `python -m side_by_side.on_gpu SCRIPT WORKPLACE RESULT`.

Adds `gpu_peak_gb`, in 10⁹ bytes, to the script's report. It imports torch alone, so that both sides can run it.
"""

import argparse
import json
import runpy
import sys
from pathlib import Path

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("script", "workplace", "result"):
        parser.add_argument(name)
    options = parser.parse_args()
    script, result = options.script, options.result
    sys.argv = sys.argv[1:]
    runpy.run_path(script, run_name="__main__")
    if not torch.cuda.is_available():
        return
    peak = torch.cuda.max_memory_allocated()
    if peak == 0:
        sys.exit(f"'{script}' did not use the GPU.")
    outcome = json.loads(Path(result).read_text())
    Path(result).write_text(json.dumps(outcome | {"gpu_peak_gb": peak / 1e9}))


if __name__ == "__main__":
    main()
