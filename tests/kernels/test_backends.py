"""The implementations of the kernels against each other, what they refuse, and how they are built."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from helpers.processes import ROOT, run_command
from test_kernels import (
    DTYPES,
    MIXTURE,
    SHIFTS,
    Run,
    _backend,  # noqa: F401, the fixture
    backend_named,
    filled,
    ints,
    on_compiled_backends,
    poisoned,
    slots_of,
    tokens,
)

from megatron.dmc.kernels import AppendParams, append, build, decode_attention, fork, free, use_backend


@on_compiled_backends
@pytest.mark.parametrize("window", [12, 3, None])
@pytest.mark.parametrize("d", [40, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_cache_as_the_reference(monkeypatch, backend, device, dtype, d, window) -> None:
    """After every step: the same pages for the same heads, equal lengths, segments, rings and slots; twice the same
    bits, on the emulator with threads in another order.
    """
    q, k, v = tokens((3, 70), 2, 2, d, SHIFTS["some"], dtype)
    options = {"num_pages": 64, "max_seqs": 3, "num_layers": 2, "num_kv_heads": 2, "head_dim": d, "max_slots": 80}
    runs = {
        name: Run(
            q, k, v, [2, 0, 1], poisoned(device, window=window, dtype=dtype, **options), window=window, device=device
        )
        for name in ("reference", "compiled", "again")
    }
    for counts in MIXTURE:
        for seed, (name, run) in enumerate(runs.items()):
            monkeypatch.setenv("DMC_EMULATOR_SEED", str(seed))
            with backend_named(name if name == "reference" else backend):
                run.step(counts)
        want, got, again = (runs[name].state for name in ("reference", "compiled", "again"))
        for name in ("page_table", "lengths", "segment", "free_pages", "counters"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        for x, y in zip(got.tensors(), again.tensors(), strict=True):
            assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
        # Sums in another order, rounded once: one unit in the last place of the dtype.
        bound = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        for row in range(3):
            for head in range(2):
                for x, y in zip(slots_of(got, row, 1, head), slots_of(want, row, 1, head)):
                    assert torch.allclose(x.float(), y.float(), rtol=bound, atol=bound)
                n = min(int(want.segment[row, 1, head]), want.ring_w.size(-1))
                for name in ("ring_k", "ring_v", "ring_w"):
                    x, y = (getattr(state, name)[row, 1, head, :n].float() for state in (got, want))
                    assert torch.allclose(x, y, rtol=2e-6, atol=2e-6), name
    assert torch.equal(runs["compiled"].out, runs["again"].out)
    for name, run in runs.items():
        with backend_named(name if name == "reference" else backend):
            free(run.state, ints([1], device))
            fork(run.state, ints([2, 0], device), ints([1, -1], device))
            free(run.state, ints([2, 0], device))
    for name in ("free_pages", "refcounts", "counters", "lengths", "segment"):
        assert torch.equal(getattr(runs["compiled"].state, name), getattr(runs["reference"].state, name)), name
    runs["compiled"].state.check_integrity()


@on_compiled_backends
def test_a_copy_of_a_state_has_tensors_of_its_own(backend, device) -> None:
    """A library keeps the addresses of a state that it has seen; a copy must not be taken for it."""
    state, _ = filled([[20, 3]], 32, 16, torch.float32, device)
    decode_attention(state, 1, torch.ones(1, 2, 32, device=device), ints([0], device), 1.0)
    other, pages = copy.deepcopy(state), state.free_count()
    free(other, ints([0], device))
    assert state.free_count() == pages and state.lengths.sum() == 23
    assert other.free_count() == other.num_pages and not other.lengths.any()
    for x in (state, other):
        x.check_integrity()


def test_results_do_not_depend_on_threads() -> None:
    state, _ = filled([[5000, 700], [3, 2100]], 64, 16, torch.float32, "cpu")
    q, results, chunks = torch.randn(2, 8, 64), [], []
    raw = tokens((2, 150), 4, 2, 64, SHIFTS["some"], torch.bfloat16)
    before = torch.get_num_threads()
    with use_backend("cpp"):
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(decode_attention(state, 1, q, ints([0, 1]), 0.125))
            options = {
                "num_pages": 64,
                "max_seqs": 2,
                "num_layers": 2,
                "num_kv_heads": 2,
                "head_dim": 64,
                "max_slots": 150,
            }
            run = Run(*raw, [0, 1], poisoned(dtype=torch.bfloat16, **options), window=12)
            run.step([100, 30])
            run.step([50, 120])
            chunks.append(run.out)
    torch.set_num_threads(before)
    for got in (results, chunks):
        assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])


@pytest.mark.parametrize("backend", ["cpp", "emulated"])
@pytest.mark.parametrize("op", ["decode", "append"])
def test_wrong_arguments_are_named(backend, op) -> None:
    state, _ = filled([[20, 3]], 32, 16, torch.float32, "cpu")
    q, k, v = tokens((3,), 2, 2, 32, 0.0)
    good = {"layer": 1, "q": q, "k": k, "cu": ints([0, 3]), "rows": ints([0]), "inv_freq": torch.ones(16)}
    bad = {"layer": 2, "q": q.bfloat16(), "rows": ints([1])}
    if op == "append":
        bad |= {"k": k[:2], "cu": ints([0, 2]), "inv_freq": torch.ones(32)}
    if backend == "emulated":  # looks at no values
        bad |= {name: value for name, value in (("rows", torch.tensor([0])), ("cu", ints([0, 1, 3]))) if name in bad}
    names = {
        "layer": "layer 2",
        "q": "q",
        "rows": r"rows(\[0\])? is",
        "k": "k is",
        "cu": "cu_seqlens",
        "inv_freq": "inv_freq",
    }

    def call(layer, q, k, cu, rows, inv_freq) -> None:
        if op == "decode":
            decode_attention(state, layer, q[:1], rows, 1.0)
        else:
            append(state, layer, AppendParams(q, k, v, cu, rows, ints([0, 1, 2]), inv_freq, 0.0, 0.1, window=12))

    for name, value in bad.items():
        with pytest.raises(ValueError, match=names[name]):
            call(**{**good, name: value})
    wrong = AppendParams(q, k, v, ints([0, 3]), ints([0]), ints([0, 1, 2]), torch.ones(16), 0.0, 0.1, window=5)
    with pytest.raises(ValueError, match="window is 5"):
        append(state, 1, wrong)


@pytest.mark.skipif(build.PACKAGED.exists(), reason="kernels were built into the package: no compiler is needed")
def test_without_a_compiler_the_reference_runs_and_says_so(tmp_path) -> None:
    code = (
        "import torch\nfrom megatron.dmc.kernels import *\n"
        "s = make_state(num_pages=2, max_seqs=1, num_layers=1, num_kv_heads=1, head_dim=8, max_slots=16)\n"
        "for _ in range(2): out = decode_attention(s, 0, torch.ones(1, 1, 8), torch.zeros(1, dtype=torch.int32), 1.0)\n"
        "print(active_backend('cpu'), out.sum().item())"
    )
    env = {"CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    done = run_command([sys.executable, "-c", code], env=env)
    assert done.stdout.split() == ["reference", "0.0"]
    assert done.stderr.count("no C++ compiler") == 1 and "PyTorch kernels run instead" in done.stderr


@pytest.mark.slow
def test_a_librarys_name_tells_of_every_source() -> None:
    """A file that it does not count would be changed, and the old library loaded."""
    counted = {name for device in ("cpu", "cuda") for name in build.source_files(device)}
    assert counted == {path.name for path in build.SOURCES.iterdir() if path.is_file()}


def test_every_instruction_set(tmp_path) -> None:
    """The portable library holds a path for any CPU: those this CPU runs pass tests of both methods, and the others
    compile. The best of this CPU's is what all other tests run, so here it and the others are compiled without
    optimization.
    """
    usable, every = build.usable_instruction_sets(), list(build.instruction_sets())
    build.build_cpu(every, tmp_path / "megatron-dmc" / "kernels", unoptimized=set(every) - set(usable[1:]))
    chosen = "shapes_equal or equal_the_oracle and not reference or head_dims or precision or plain or unequal"
    chosen = f"cpp and ({chosen}) or codes"
    names = ("test_kernels.py", "test_evicting.py", "test_evicting_shapes.py", "test_quantized.py", "test_linear.py")
    tests = [str(ROOT / "tests" / "kernels" / name) for name in names]
    for name in usable[1:]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", chosen]
        env = {"MEGATRON_DMC_ISA": name, "XDG_CACHE_HOME": str(tmp_path)}
        done = run_command(command, env=env, timeout=600)
        assert " passed" in done.stdout
        code = "from megatron.dmc.kernels import cpp; print(cpp.instruction_set())"
        assert run_command([sys.executable, "-c", code], env=env).stdout.strip() == name
