"""Build of the ``megatron-dmc`` distribution: the package ``megatron.dmc``, beside megatron-core's ``megatron.core``.

``megatron`` is a PEP 420 namespace of both distributions: it has no ``__init__.py``, and only ``megatron.dmc`` is
packaged. The ranges here say what may be installed, ``constraints.txt`` the one version of each that is tested.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).resolve().parent

INSTALL_REQUIRES = [
    "torch>=2.6",  # what megatron-core 0.16 asks for
    "megatron-core>=0.16.1,<0.17",  # the compatibility layer for CPU touches its internals
    "psutil",  # without it a megatron-core checkpoint save hangs
    "numpy",
    "apache-tvm-ffi>=0.1.15",  # binds the inference kernels, without torch's C++ ABI
    "safetensors",  # checkpoint conversion
    "pyyaml",
    "sentencepiece",
    "tqdm",
    "tensorboard",
    "matplotlib",
]

# jinja2 is for chat templates, httpx2 for `dmc bench serve`, llguidance for structured outputs.
EXTRAS_REQUIRE = {
    "gpu": ["transformer-engine[pytorch]>=2.9", "flash-attn>=2.7"],
    "serve": [
        "fastapi",
        "uvicorn",
        "pydantic>=2.9",
        "prometheus_client",
        "transformers",
        "jinja2",
        "httpx2",
        "llguidance",
    ],
    "gguf": ["gguf"],
    "eval": ["lm-eval[api]", "transformers"],
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
        "accelerate",
        "fastapi",
        "uvicorn",
        "pydantic>=2.9",
        "prometheus_client",
        "transformers",
        "jinja2",
        "httpx2",
        "llguidance",
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
    python_requires=">=3.10,<3.14",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["dmc = megatron.dmc.cli:main"]},
    zip_safe=False,
)
