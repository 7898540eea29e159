"""A side's script, and the most GPU memory that it allocated: `python -m side_by_side.on_gpu SCRIPT WORKPLACE RESULT`.

Adds `gpu_peak_gb`, in 10⁹ bytes, to what the script reports. Needs nothing but torch, so that both sides can run it.
"""

import json
import runpy
import sys
from pathlib import Path

import torch


def main() -> None:
    sys.argv = sys.argv[1:]
    script, _, result = sys.argv
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
