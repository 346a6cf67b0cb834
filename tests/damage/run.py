"""Every reader against mutated files, at full size: ``python tests/damage/run.py [--number 300] [--seed 0]``.

Not collected by pytest: 300 mutations and the commands that read each take some minutes. Exits with 1 and names each
mutation that ends in anything but one line and status 2, or no change, within 5 seconds.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "damage")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=300, help="Number of mutations over all files.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the mutations.")
    parser.add_argument("--only", default="", help="Part of the path of the files to mutate.")
    args = parser.parse_args()
    from mutations import model_targets, mutations, training_targets

    faults: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        targets = [target for make in (model_targets, training_targets) for target in make(directory)]
        targets = [target for target in targets if args.only in str(target.file)]
        share = -(-args.number // len(targets))
        for target in targets:
            out = directory / "out"
            before = target.before(out)
            source = mutations(target.file.read_bytes(), random.Random(f"{args.seed} {target.file.name}"))
            found = [fault for _ in range(share) for fault in target.check(next(source), before, out)]
            print(f"{target.file.relative_to(directory)}: {share} mutations, {len(found)} faults", flush=True)
            for fault in found:
                print(f"  {fault}".rstrip(), flush=True)
            faults += found
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
