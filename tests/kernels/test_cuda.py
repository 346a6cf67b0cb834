"""CUDA kernels beyond tests/kernels/test_kernels.py: refusals without a wait, plans on the device, CUDA graphs, and how
they compile. The kernels' own code runs on a CPU here, by tests/cuda_emulator, and on a GPU where there is one.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess

import pytest
import torch
from helpers import emulated
from test_kernels import (
    BIAS,
    EPSILON,
    Run,
    attend,
    backend_named,
    decode_case,
    filled,
    ints,
    poisoned,
    slots_of,
    tokens,
)

from megatron.dmc.cli import build as cli_build
from megatron.dmc.kernels import (
    Appended,
    AppendParams,
    append,
    build,
    decode_attention,
    dispatch,
    fork,
    free,
    prefill_attention,
    use_backend,
)
from megatron.dmc.kernels.state import REFUSED, TAKEN
from megatron.dmc.ops import rotary_frequencies

BACKENDS = [
    pytest.param("emulated", "cpu", id="emulated"),
    pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
]
on_cuda_kernels = pytest.mark.parametrize(("backend", "device"), BACKENDS)


@pytest.fixture(autouse=True)
def _backend(request):
    name = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    with backend_named(name or "reference"):
        yield


def same(a, b) -> bool:
    return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(a, b, strict=True))


# --------------------------------------------------------------------------------------------------------- refusals


@on_cuda_kernels
@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("window", [12, None])
def test_heads_without_a_page_are_left_as_they_were(backend, device, window, decode) -> None:
    """The fourth of six heads finds the pool empty: it and those behind it keep everything, the others go on, and a
    flag stays.
    """
    state = poisoned(
        device, num_pages=9, max_seqs=3, num_layers=2, num_kv_heads=2, head_dim=32, max_slots=64, window=window
    )
    run = Run(*tokens((3, 40), 2, 2, 32, -20.0), [2, 0, 1], state, window=window, device=device)
    run.step([16, 16, 16])
    before = copy.deepcopy(state)
    run.step([1, 1, 1] if decode else [2, 2, 2], decode=decode)
    assert torch.isfinite(run.out[:, :17]).all()
    assert state.counters.tolist() == [9, 0, 3, 0]
    added = 1 if decode else 2
    assert state.lengths[[2, 0, 1], 1].tolist() == [[16 + added] * 2, [16 + added, 16], [16, 16]]
    for row, head in ((0, 1), (1, 0), (1, 1)):
        for name in ("segment", "ring_k", "ring_v", "ring_w", "page_table"):
            assert same((getattr(state, name)[row, 1, head],), (getattr(before, name)[row, 1, head],)), name
        assert same(slots_of(state, row, 1, head), slots_of(before, row, 1, head))
    with use_backend("reference"):
        free(state, ints([2], device))
    run.step([0, 0, 1])
    assert state.counters[REFUSED] == 3 and state.lengths[1, 1].tolist() == [17, 17]


@on_cuda_kernels
def test_a_head_beyond_its_row_of_the_table_is_refused(backend, device) -> None:
    """It takes no page that another head could have."""
    state = poisoned(device, num_pages=4, max_seqs=2, num_layers=1, num_kv_heads=1, head_dim=32, max_slots=32)
    run = Run(*tokens((2, 60), 2, 1, 32, -20.0), [0, 1], state, window=12, layer=0, device=device)
    run.step([30, 1])
    run.step([20, 30])
    assert state.lengths.flatten().tolist() == [30, 31] and state.counters.tolist() == [4, 0, 1, 0]


@on_cuda_kernels
def test_copies_that_do_not_fit_write_nothing(backend, device) -> None:
    state = poisoned(device, num_pages=10, max_seqs=4, num_layers=2, num_kv_heads=2, head_dim=32, max_slots=64)
    run = Run(*tokens((1, 40), 2, 2, 32, -20.0), [1], state, window=12, device=device)
    run.step([40])
    before = copy.deepcopy(state)
    for source, target in (([1, 1, 1], [0, 2, 3]), ([2], [1])):
        fork(state, ints(source, device), ints(target, device))
        assert state.counters.tolist() == [6, 0, 1, 0]
        state.counters[REFUSED] = 0
        assert same(state.tensors(), before.tensors())
    fork(state, ints([1, 1], device), ints([0, 3], device))
    state.check_integrity()
    assert state.free_count() == 0


@on_cuda_kernels
def test_a_copy_into_a_row_of_the_same_length_writes_nothing(backend, device) -> None:
    state = poisoned(device, num_pages=16, max_seqs=3, num_layers=1, num_kv_heads=2, head_dim=32, max_slots=64)
    run = Run(*tokens((2, 20), 2, 2, 32, -20.0), [1, 2], state, window=12, layer=0, device=device)
    run.step([20, 20])
    before = copy.deepcopy(state)
    fork(state, ints([1], device), ints([2], device))
    assert state.counters.tolist() == [8, 0, 1, 0]
    state.counters[REFUSED] = 0
    assert same(state.tensors(), before.tensors())
    free(state, ints([2], device))
    fork(state, ints([1], device), ints([2], device))
    state.check_integrity()
    assert torch.equal(state.lengths[1], state.lengths[2])


# ------------------------------------------------------------------------------------------------- many heads, long
# heads


@on_cuda_kernels
def test_more_heads_than_threads(backend, device) -> None:
    """A step of 72 x 32 heads, some of which take a page: several rounds of the scans in append, plan and free."""
    rows, heads = 72, 32
    shape = {"num_pages": 2 * rows * heads, "max_seqs": rows, "num_layers": 1, "num_kv_heads": heads, "head_dim": 8}
    states = [poisoned(device, max_slots=32, window=3, **shape) for _ in range(2)]
    q, k, v = tokens((rows, 1), 1, heads, 8, 0.0)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 17, (rows, 1, heads), generator=generator)
    outs = []
    for name, state in zip((backend, "reference"), states):
        used = lengths.to(device) > 0
        state.lengths.copy_(lengths)
        state.segment.copy_(used)
        state.ring_k.fill_(1), state.ring_v.fill_(1), state.ring_w.fill_(1)
        pages = state.free_pages[: int(used.sum())].clone()
        state.page_table[..., 0][used] = pages
        state.refcounts[pages.long()] = 1
        state.counters[TAKEN] = pages.numel()
        state.k_pages.fill_(1), state.v_pages.fill_(1)
        arguments = (ints(range(rows + 1), device), ints(range(rows), device), ints(range(rows), device))
        options = {"bias": BIAS, "epsilon": EPSILON, "window": 3, "partial": False}
        with backend_named(name):
            raw = [x[:, 0].to(device) for x in (q, k, v)]
            inv_freq = rotary_frequencies(8, 1e4, device=device)
            done = append(state, 0, AppendParams(*raw, *arguments, inv_freq, **options))
            outs.append(decode_attention(state, 0, done.q_rot, arguments[1], 1.0))
            state.check_integrity()
            free(state, ints([5, 3], device))
    for name in ("page_table", "lengths", "segment", "free_pages", "refcounts", "counters"):
        assert torch.equal(getattr(states[0], name), getattr(states[1], name)), name
    assert torch.allclose(outs[0], outs[1], rtol=1e-5, atol=1e-5)


@on_cuda_kernels
@pytest.mark.parametrize(
    ("d", "dtype"), [(64, torch.bfloat16), (40, torch.bfloat16), (80, torch.float16), (48, torch.float32)]
)
@pytest.mark.parametrize("g", [9, 16, 20])
def test_decode_of_large_groups(backend, device, g, d, dtype) -> None:
    decode_case([[33, 300], [1, 0]], g, d, 16, dtype, device)


@on_cuda_kernels
@pytest.mark.parametrize("lengths", [[[700, 1, 64]], [[2000, 40, 0, 65]], [[128, 129, 127, 1200]]])
def test_plans_cover_every_slot_once(backend, device, lengths) -> None:
    """Weights are equal and values count 2^0, 2^1 ... by slot, so a slot left out or read twice changes the sum."""
    state, _ = filled(lengths, 64, 16, torch.float32, device)
    heads = len(lengths[0])
    for h, n in enumerate(lengths[0]):
        at = torch.arange(n, device=device)
        page = state.page_table[0, 1, h, at // 16].long()
        state.v_pages[page, at % 16] = torch.nn.functional.one_hot(at % 64, 64).float() * n
    out = decode_attention(state, 1, torch.zeros(1, heads, 64, device=device), ints([0], device), 1.0)
    for h, n in enumerate(lengths[0]):
        want = torch.arange(n).remainder(64).bincount(minlength=64).float() if n else torch.zeros(64)
        assert torch.allclose(out[0, h].cpu(), want, rtol=1e-5, atol=1e-4), h


@on_cuda_kernels
@pytest.mark.parametrize(
    ("d", "g", "dtype"),
    [(64, 3, torch.bfloat16), (96, 1, torch.float16), (256, 1, torch.bfloat16), (40, 2, torch.float32)],
)
def test_prefill_of_several_blocks_of_rows(backend, device, d, g, dtype) -> None:
    """Against attention in fp64 over slots that are there already: a chunk of several blocks of rows, short ones,
    padding.
    """
    state, content = filled([[150], [40], [0]], d, 32, dtype, device)
    counts, rows, t = [140, 0, 3, 2, 1], [0, 2, 1, -1, 2], 146
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(t, h, d, generator=generator).to(dtype) for h in (g, 1, 1))
    cu = ints([0, *torch.tensor(counts).cumsum(0).tolist()], device)
    limit = torch.cat((torch.linspace(3, 150, 140).int(), ints([38, 39, 40]), ints([0, 0]), ints([0])))
    index = limit[:, None].contiguous().to(device)
    appended = Appended(*(x.to(device) for x in (q, k, v)), index, index.new_empty(0))
    out = prefill_attention(state, 1, appended, cu, ints(rows, device), d**-0.5).cpu()
    exact, plain = [], []
    for i in range(t):
        row = 0 if i < 140 else 1
        for of, to in ((torch.float64, exact), (dtype, plain)):
            keys, values = content[row][0].to(of)[:, : int(limit[i])]
            to.append(attend(q[i].to(of), torch.cat((keys, k[i].to(of))), torch.cat((values, v[i].to(of)))))
    exact, plain = torch.stack(exact), torch.stack(plain).double()
    exact[143:145], plain[143:145] = 0, 0  # padding
    error, allowed = ((x.double() - exact).norm() for x in (out, plain))
    assert error <= max(2 * allowed, 1e-6 * exact.norm()), f"{error:.1e}, PyTorch {allowed:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_order_of_threads_changes_a_bit(monkeypatch, dtype) -> None:
    """Warps and lanes in another order between barriers, as races would need."""
    state, _ = filled([[1500, 40, 333]], 64, 16, dtype, "cpu")
    q = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    chunk = tokens((90,), 2, 3, 64, 0.3, dtype)
    results = []
    for seed in range(4):
        monkeypatch.setenv("DMC_EMULATOR_SEED", str(seed))
        with backend_named("emulated"):
            fresh = poisoned(
                num_pages=40, max_seqs=1, num_layers=1, num_kv_heads=3, head_dim=64, max_slots=90, dtype=dtype
            )
            where, turn = (ints([0, 90]), ints([0])), (ints(range(90)), rotary_frequencies(64, 1e4))
            done = append(fresh, 0, AppendParams(*chunk, *where, *turn, bias=BIAS, epsilon=EPSILON, window=12))
            outs = decode_attention(state, 1, q, ints([0]), 0.125), prefill_attention(fresh, 0, done, *where, 0.125)
            results.append((*outs, *done, *fresh.tensors()))
    assert all(same(results[0], other) for other in results[1:])


# --------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cuda_graph_replays_a_step(dtype) -> None:
    """One capture, many steps: positions and tokens change in place, pages are taken on the device."""
    shape = {"num_pages": 400, "max_seqs": 4, "num_layers": 1, "num_kv_heads": 4, "head_dim": 64, "max_slots": 200}
    q, k, v = (x.cuda() for x in tokens((4, 200), 2, 4, 64, 0.3, dtype))
    states = [poisoned("cuda", dtype=dtype, **shape) for _ in range(2)]
    cu, rows, inv_freq = ints(range(5), "cuda"), ints([2, 0, 3, -1], "cuda"), rotary_frequencies(64, 1e4, device="cuda")
    at = ints([0] * 4, "cuda")
    now = [x[:, 0].contiguous() for x in (q, k, v)]

    def step(state):
        rule = {"bias": BIAS, "epsilon": EPSILON, "window": 12, "partial": False}
        done = append(state, 0, AppendParams(*now, cu, rows, at, inv_freq, **rule))
        return decode_attention(state, 0, done.q_rot, rows, 0.125)

    with use_backend("cuda"):
        scratch = copy.deepcopy(states[0])
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(scratch)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(states[0])
        for t in range(200):
            for x, y in zip(now, (q, k, v)):
                x.copy_(y[:, t])
            at.fill_(t)
            graph.replay()
            assert torch.equal(captured, step(states[1])), t
    for state in states:
        state.check_integrity()
    assert same(states[0].tensors(), states[1].tensors())


@pytest.mark.gpu
def test_the_current_stream_is_used() -> None:
    """A kernel behind a long one on a side stream sees what that one writes."""
    state, _ = filled([[300]], 64, 16, torch.float32, "cuda")
    q, rows = torch.randn(1, 1, 64, device="cuda"), ints([0], "cuda")
    with use_backend("cuda"):
        want = decode_attention(state, 1, q, rows, 0.125)
        late, side = torch.zeros_like(q), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            late.copy_(q)
            got = decode_attention(state, 1, late, rows, 0.125)
        torch.cuda.synchronize()
    assert torch.equal(got, want)


# ------------------------------------------------------------------------------------------------ the emulator, nvcc


RACE = """
#include "cuda_device.cuh"
using namespace dmc;
struct P { int* out; bool wait; };
// Without the barrier, who reads before its neighbour has written?
static void kernel(const P p) {
  __shared__ int x[64];
  x[threadIdx.x] = 0;
  __syncthreads();
  __syncwarp();
  x[threadIdx.x] = threadIdx.x + 1;
  if (p.wait) __syncthreads();
  p.out[threadIdx.x] = x[(threadIdx.x + 33) % 64];
}
static void divergent(const P p) {
  if (threadIdx.x % 2) __syncwarp();
}
int main(int argc, char** argv) {
  int out[64];
  P p = {out, argv[1][0] == 'w'};
  launch(argv[1][0] == 'd' ? divergent : kernel, 1, 64, 0, nullptr, p);
  for (int x : out) printf("%d ", x);
}
"""


def test_the_emulator_shows_races_and_divergence(tmp_path) -> None:
    """Without a barrier results change with the order, and half a warp in a collective ends the run: the tests above
    rely on it.
    """
    (tmp_path / "race.cpp").write_text(RACE)
    cxx = build.compiler().split()
    sources = [str(tmp_path / "race.cpp"), str(emulated.EMULATOR / "emulator.cpp")]
    subprocess.run([*cxx, "-std=gnu++17", "-O0", *emulated.FLAGS, *sources, "-o", str(tmp_path / "race")], check=True)

    def run(what: str, seed: int) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "DMC_EMULATOR_SEED": str(seed)}
        return subprocess.run([str(tmp_path / "race"), what], env=env, capture_output=True, text=True)

    right = " ".join(str((t + 33) % 64 + 1) for t in range(64))
    assert {run("wait", seed).stdout.strip() for seed in range(5)} == {right}
    assert len({run("race", seed).stdout for seed in range(5)}) > 1
    failed = run("divergent", 0)
    assert failed.returncode != 0 and "wait for each other" in failed.stderr


def test_a_gpu_that_is_too_old_gets_the_reference(monkeypatch, capsys) -> None:
    """Under the banner that says why, once, and before anything is compiled."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(dispatch, "_load", dispatch._load.__wrapped__)
    assert dispatch._best("cuda") == "reference"
    said = capsys.readouterr().err
    assert "Tesla T4 is of sm_75" in said and "PyTorch kernels run instead" in said


needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="needs nvcc, the compiler of the CUDA toolkit, on PATH"
)


@needs_nvcc
@pytest.mark.slow
def test_kernels_compile_without_spills(tmp_path, monkeypatch, capsys) -> None:
    """The library, as it is built ahead of time, for all architectures."""
    said, run_all = [], build._run_all
    monkeypatch.setattr(build, "_run_all", lambda jobs: said.extend(run_all(jobs)))
    assert cli_build.main(["--device", "cuda", "--output", str(tmp_path)]) == 0
    path, printed = tmp_path / build.cuda_library_name(), capsys.readouterr().out
    assert str(path) in printed and "sm_80, sm_90" in printed and path.is_file()
    found = build.read_resources("".join(said))
    names = {
        "decide",
        "write",
        "remember",
        "decide_evicting",
        "write_evicting",
        "plan",
        "attend",
        "attend_few",
        "attend_many",
        "free_rows",
        "fork_tables",
        "norm_rows",
        "silu_rows",
    }
    for architecture in build.CUDA_ARCHITECTURES:
        assert names <= {r.kernel.split("<")[0] for r in found if r.architecture == architecture}
    bad = [r for r in found if r.spilled or r.stack]
    assert not bad, "\n".join(map(str, bad))
