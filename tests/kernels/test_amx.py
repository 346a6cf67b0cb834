"""Prefill attention by the tiles of Intel's CPUs (AMX), on any CPU with AVX512_BF16: the machine code that CPUs with
AMX run, with its tile instructions emulated (tests/amx_emulator).
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess

import pytest
import test_evicting
import test_evicting_shapes
import test_kernels
import test_quantized
import torch
from helpers import emulated
from test_kernels import SHIFTS, Run, backend_named, poisoned, tokens

from megatron.dmc.kernels import build, cpp

TILES = {"ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored", "tdpbf16ps"}
needs_avx512 = pytest.mark.skipif(not emulated.runs_avx512(), reason="the CPU has no AVX512_BF16")


@pytest.fixture
def check_tiles():
    """Function that checks whether tiles were multiplied since its last call; in the end no thread has tiles in use.
    A CPU with AMX executes the instructions itself, which nobody counts.
    """
    native, seen = "amx" in build.usable_instruction_sets(), emulated.amx_counters()[0]

    def check(multiplied: bool) -> None:
        nonlocal seen
        before, seen = seen, emulated.amx_counters()[0]
        assert native or (seen > before) == multiplied

    yield check
    assert emulated.amx_counters()[1] == 0


@needs_avx512
@pytest.mark.parametrize(("d", "g"), [(32, 8), (64, 2), (64, 3), (96, 1), (128, 4), (160, 1), (256, 2)])
def test_precision(check_tiles, d, g) -> None:
    """A model that merges: at most twice the error of PyTorch in bf16."""
    with backend_named("amx"):
        test_kernels.test_prefill_precision("amx", "cpu", d, g, torch.bfloat16)
    check_tiles(True)


def out_of(backend: str, chunks: list[int], d: int, g: int, page_size: int, plain: bool) -> torch.Tensor:
    """Outputs for one sequence in chunks."""
    n = sum(chunks)
    q, k, v = tokens((1, n), g, 2, d, SHIFTS["some"], torch.bfloat16)
    pages = {"num_pages": 2 * -(-n // page_size) + 4, "page_size": page_size, "max_slots": n}
    options = {"max_seqs": 1, "num_layers": 2, "num_kv_heads": 2, "head_dim": d, "dtype": torch.bfloat16, **pages}
    state = poisoned(compress=not plain, window=None if plain else 12, **options)
    run = Run(q, k, v, [0], state, window=None if plain else 12, plain=plain)
    with backend_named(backend):
        for count in chunks:
            run.step([count])
    return run.out.float()


@needs_avx512
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "merging"])
@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize(("d", "g"), [(64, 3), (128, 1)])
def test_edges_of_tiles(check_tiles, d, g, page_size, plain) -> None:
    """Chunks that end beside the edges of tiles of 16, 32 and 64 slots and queries; memory behind the last slot is NaN.
    They equal the reference, whose weights are not rounded.
    """
    for chunks in ([2], [15, 2], [16, 17], [31, 2], [33, 31], [63, 3], [66, 65]):
        got, want = (out_of(name, chunks, d, g, page_size, plain) for name in ("amx", "reference"))
        check_tiles(True)
        torch.testing.assert_close(got, want, rtol=1.6e-2, atol=1.6e-2)


EVICTING = [shape for shape in test_evicting_shapes.SHAPES if shape[-1] == "bf16" and shape[4] % 32 == 0]


@needs_avx512
@pytest.mark.parametrize(("window", "page_size", "g", "kv", "d", "dtype"), EVICTING)
def test_a_model_that_evicts(check_tiles, window, page_size, g, kv, d, dtype) -> None:
    test_evicting_shapes.test_shapes_equal_the_reference("amx", "cpu", window, page_size, g, kv, d, dtype)
    check_tiles(True)


@needs_avx512
def test_a_model_that_evicts_equals_the_oracle(check_tiles) -> None:
    with backend_named("amx"):
        test_evicting.test_shapes_and_neurons_equal_the_oracle("amx", "cpu", 2, "query", 32, 64, torch.bfloat16)
    check_tiles(True)


@needs_avx512
@pytest.mark.slow
def test_threads_and_company_do_not_change_a_bit(check_tiles) -> None:
    test_evicting_shapes.test_threads_and_company_do_not_change_a_bit("amx", "cpu", "bf16")
    check_tiles(True)


@needs_avx512
@pytest.mark.parametrize(
    ("d", "dtype"), [(80, torch.bfloat16), (48, torch.bfloat16), (64, torch.float32), (64, torch.float16)]
)
def test_everything_else_takes_no_tiles(check_tiles, d, dtype) -> None:
    with backend_named("amx"):
        test_kernels.test_prefill_precision("amx", "cpu", d, 1, dtype)
    check_tiles(False)


@needs_avx512
@pytest.mark.parametrize("evict_window", [None, 40], ids=["merging", "evicting"])
@pytest.mark.parametrize(("d", "g", "kv_dtype"), [(64, 2, torch.int8), (128, 1, torch.float8_e4m3fn)])
def test_codes(check_tiles, evict_window, d, g, kv_dtype) -> None:
    with backend_named("amx"):
        test_quantized.test_prompts_in_chunks("amx", "cpu", kv_dtype, evict_window, d, g, torch.bfloat16)
    check_tiles(True)


def test_chosen_only_where_the_cpu_has_it(monkeypatch) -> None:
    """By CPUID and by the operating system's permission; then before all others, and Intel's order stays."""
    flags = " ".join(set().union(*(kind.needs for kind in build.X86.values())))
    rest = ["avx512", "avx512bf16", "avx2", "base"]
    monkeypatch.setattr(build, "instruction_sets", lambda: build.X86)
    monkeypatch.setattr(build, "is_intel", lambda: True)
    for has, permitted, want in (
        (flags, True, ["amx", *rest]),
        (flags, False, rest),
        (flags.replace("amx_bf16", ""), True, rest),
    ):
        monkeypatch.setattr(build, "cpu_info", lambda has=has: {"flags": has})
        monkeypatch.setattr(build, "may_use_tiles", lambda permitted=permitted: permitted)
        assert build.usable_instruction_sets() == want
    monkeypatch.undo()
    assert (cpp.instruction_set() == "amx") == ("amx" in build.usable_instruction_sets())


@needs_avx512
@pytest.mark.skipif(not shutil.which("objdump"), reason="there is no objdump")
def test_machine_code() -> None:
    """Tiles are used by prefill attention alone, and the loops of products hold nothing but tiles and addresses: no
    number goes to memory and back between two products.
    """
    command = ["objdump", "--disassemble", "--no-show-raw-insn", "--demangle", str(emulated.amx_library())]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"}).stdout
    functions = dict(re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)+)", text, re.MULTILINE))
    code = {
        name: re.findall(r"^ *[0-9a-f]+:\t([a-z0-9]+) *(.*)", body, re.MULTILINE) for name, body in functions.items()
    }
    using = {name for name, lines in code.items() if any(op in TILES for op, _ in lines)}
    assert using and all(
        "attend_block<" in x and "Tiled" in x or x.startswith("dmc_prefill") or "prefill<" in x for x in using
    )
    loops = 0
    for name in using:
        ops = [op for op, _ in code[name]]
        starts = [i for i, op in enumerate(ops) if op == "tdpbf16ps"]
        for group in itertools.batched(starts, 4) if hasattr(itertools, "batched") else zip(*[iter(starts)] * 4):
            between = {op for op in ops[group[0] : group[-1] + 1] if op not in TILES}
            assert between <= {"lea", "add", "mov"}, between
            assert ops[group[0] : group[-1] + 1].count("tileloadd") == 2
            loops += 1
    assert loops >= 4


# A product of tiles of two rows and two columns. Arguments: a fault to make, and the numbers in hexadecimal.
PROBE = """
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } config;
int main(int, char** argument) {
  uint16_t a[2][4], b[2][4];
  float c[2][2] = {{1, 2}, {3, 4}};
  for (int i = 0; i < 8; i++) {
    (&a[0][0])[i] = strtol(argument[i + 2], 0, 16);
    (&b[0][0])[i] = strtol(argument[i + 10], 0, 16);
  }
  config.palette = 1;
  for (int i = 0; i < 3; i++) config.bytes[i] = 8, config.rows[i] = 2;
  if (!strcmp(argument[1], "palette")) config.palette = 2;
  if (!strcmp(argument[1], "shapes")) config.rows[2] = 3;
  if (!strcmp(argument[1], "large")) config.rows[2] = 17;
  if (strcmp(argument[1], "none")) _tile_loadconfig(&config);
  _tile_loadd(0, c, 8);
  _tile_loadd(1, a, 8);
  _tile_loadd(2, b, 8);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, c, 8);
  _tile_release();
  printf("%.9g %.9g %.9g %.9g", c[0][0], c[0][1], c[1][0], c[1][1]);
}
"""


@needs_avx512
def test_the_emulator(tmp_path) -> None:
    """Arithmetic where orders and denormal numbers tell, and the faults of a CPU."""
    source, program = tmp_path / "probe.cpp", tmp_path / "probe"
    source.write_text(PROBE)
    emulator = str(emulated.AMX_EMULATOR / "emulator.cpp")
    flags = [*emulated.AMX_EMULATOR_FLAGS, "-O0", "-mamx-tile", "-mamx-bf16"]
    subprocess.run([*build.compiler().split(), *flags, str(source), emulator, "-o", str(program)], check=True)

    def run(fault: str, a: list[float], b: list[float]) -> subprocess.CompletedProcess:
        bits = torch.tensor([*a, *b], dtype=torch.bfloat16).view(torch.int16).tolist()
        return subprocess.run([program, fault, *(f"{x & 0xFFFF:x}" for x in bits)], capture_output=True, text=True)

    def product(a: list[float], b: list[float]) -> list[float]:
        return [float(x) for x in run("", a, b).stdout.split()]

    # a: rows of two pairs; b [pair][column][of the pair].
    a, b = [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8]
    assert product(a, b) == [1 + 1 + 4 + 15 + 24, 2 + 3 + 8 + 21 + 32, 3 + 5 + 12 + 35 + 48, 4 + 15 + 24 + 49 + 64]
    # Even and odd numbers of pairs are summed by themselves: 2^24 + 1 + 1 would be 2^24.
    large = product([2.0**24, 1, 0, 1, 0, 0, 0, 0], [1] * 8)
    assert large == [2.0**24 + 4, 2.0**24 + 4, 3, 4]
    # A denormal number is zero, where it would be an eighth.
    tiny = product([2.0**-130, 0, 2.0**-70, 0, 0, 0, 2.0**-60, 0], [2.0**127, 0, 0, 0, 2.0**-70, 0, 2.0**80, 0])
    assert tiny == [1, 2 + 2.0**10, 3, 4 + 2.0**20]
    for fault, message in (
        ("none", "not configured"),
        ("palette", "unknown palette"),
        ("large", "too large"),
        ("shapes", "do not fit"),
    ):
        done = run(fault, a, b)
        assert done.returncode and "AMX emulator: #" in done.stderr and message in done.stderr, fault
