"""Record of the last run of tools/gpu_check.sh on a GPU: a warning, not a failure, where it is missing or was of other
kernels.
"""

from __future__ import annotations

import json
import subprocess
import warnings
from pathlib import Path

import pytest

from megatron.dmc.kernels.build import kernel_hashes

ROOT = Path(__file__).resolve().parent.parent.parent


def stale(results: Path) -> str:
    """Fault of the record that fits today's sources best; empty if there is none."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("gpu_*.json"))]
    if not records:
        return "no GPU has run the CUDA kernels: there is no gpu_*.json in benchmarks/results"
    now = kernel_hashes()
    changed = min(([name for name in now if record["kernels"].get(name) != now[name]] for record in records), key=len)
    return f"{', '.join(changed)} changed since a GPU ran the CUDA kernels" if changed else ""


def test_a_gpu_has_run_these_kernels() -> None:
    what = stale(ROOT / "benchmarks" / "results")
    if what:
        warnings.warn(
            f"{what}; run tools/gpu_check.sh where there is one, and commit its JSON", UserWarning, stacklevel=1
        )


def test_what_is_stale(tmp_path: Path) -> None:
    assert "no GPU" in stale(tmp_path)
    now = kernel_hashes()
    assert "cuda_decode.cu" in now and "cuda_device.cuh" in now
    (tmp_path / "gpu_a.json").write_text(json.dumps({"kernels": {**now, "cuda_decode.cu": "0"}}))
    assert stale(tmp_path).startswith("cuda_decode.cu changed")
    (tmp_path / "gpu_b.json").write_text(json.dumps({"kernels": now}))
    assert stale(tmp_path) == ""


@pytest.mark.parametrize("arguments", [["--help"], ["--nonsense"]])
def test_the_script_reads_its_arguments(arguments: list[str]) -> None:
    done = subprocess.run([str(ROOT / "tools" / "gpu_check.sh"), *arguments], capture_output=True, text=True)
    assert (done.returncode, "compute-sanitizer" in done.stdout) == (
        (0, True) if arguments == ["--help"] else (2, False)
    )
