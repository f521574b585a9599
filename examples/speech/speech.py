"""Merge adapters of Whisper that each write down one language, and count what the merge keeps of each.

Needs no Hub: the base model comes in a Python package, the sounds come with Debian (README.md says what to install).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from base_model import PackageMissingError, base_model
from sounds import tasks
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))
from recovery_table import print_recovery_table

ADAPTERS = Path(__file__).parent / "adapters"
#: Columns, with defaults: nothing was chosen on these sounds.
METHODS = ("linear", "ties", "dc_merge")


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sounds", type=Path, default=Path("/"), help="under which Debian's packages are unpacked")
    parser.add_argument("--out", type=Path, default=Path("out/speech"), help="where answers and the page are kept")
    parser.add_argument("--prepare", action="store_true", help="only make the base model and the tasks, for `plait train`")
    options = parser.parse_args()
    logging.set_verbosity_error()
    started = time.perf_counter()
    try:
        base, files = base_model(), tasks(options.sounds)
    except (FileNotFoundError, PackageMissingError) as error:
        raise SystemExit(str(error)) from None
    print(f"base: {base}\ntasks: {', '.join(map(str, files.values()))}")
    if not options.prepare:
        shown = {"measure": "errors per word", "examples": "prompts"}
        print_recovery_table(ADAPTERS, base, files, options.out, methods=METHODS, **shown)
        print(f"{time.perf_counter() - started:.0f} seconds")


if __name__ == "__main__":
    main()
