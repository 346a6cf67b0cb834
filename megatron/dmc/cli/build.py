"""``dmc build``: compile the kernels ahead of time."""

import argparse
import sys
import time
from pathlib import Path

from megatron.dmc import flags


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        prog="dmc build",
        description="Compile the kernels ahead of time.\n\n"
        "Without flags a portable library for CPUs goes to the user's cache ($XDG_CACHE_HOME or ~/.cache,\n"
        "megatron-dmc/kernels), and one for GPUs where nvcc is.",
        examples="""
            dmc build --in-package
            dmc build --device cpu --for-this-machine
            dmc build --device cuda --output kernels/
            """,
    )
    parser.set_defaults(run=_run)
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--in-package",
        action="store_true",
        help="Put the library beside the sources, which suits an image for many users and machines.",
    )
    place.add_argument(
        "--output", type=Path, metavar="DIR", help="Directory for the library. Default: the user's cache."
    )
    parser.add_argument(
        "--for-this-machine",
        action="store_true",
        help="Compile for the instruction set of this CPU only, which is faster.",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="Kernels to compile. Default: cpu, and cuda where nvcc is."
    )
    parser.add_argument(
        "--resources", action="store_true", help="Print registers and spills of each CUDA kernel, and compile nothing."
    )
    return parser


main = flags.entry(build_parser)


def _run(args: argparse.Namespace) -> int:
    from megatron.dmc.kernels import build

    try:
        if args.resources:
            print(f"{'registers':>9} {'shared':>7} {'stack':>6} {'spilled':>8}  architecture and kernel")
            for r in build.cuda_resources():
                print(f"{r.registers:9} {r.shared:7} {r.stack:6} {r.spilled:8}  sm_{r.architecture} {r.kernel}")
            return 0
        _build(args)
    except (build.BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _build(args: argparse.Namespace) -> None:
    from megatron.dmc.kernels import build

    place = build.PACKAGED if args.in_package else args.output or build.cache_directory()
    if args.device != "cuda":
        sets = [build.best_instruction_set()] if args.for_this_machine else list(build.instruction_sets())
        start = time.perf_counter()
        path = build.build_cpu(sets, place)
        print(f"{path}: CPU kernels for {', '.join(sets)}, {time.perf_counter() - start:.0f} s")
    if args.device == "cuda" or args.device is None and build.has_nvcc():
        start = time.perf_counter()
        path = build.build_cuda(place)
        names = ", ".join(f"sm_{arch}" for arch in build.CUDA_ARCHITECTURES)
        print(f"{path}: CUDA kernels for {names}, {time.perf_counter() - start:.0f} s")
