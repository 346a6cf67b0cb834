"""The counting of the plugin for vLLM, and its rows, without vLLM."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron.dmc import kernels
from megatron.dmc.inference.recent_pages import Window
from megatron.dmc.kernels.params import AppendParams
from megatron.dmc.ops import rotary_frequencies
from megatron.dmc.vllm.grants import Grants, Layout, Lengths
from megatron.dmc.vllm.prefixes import Prefixes
from megatron.dmc.vllm.rows import Plan, Rows
from megatron.dmc.vllm.seams import SEAMS, Seam, missing

PAGE, LAYERS, HEADS, D = 16, 2, 3, 8
SHAPE = dict(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=D, max_slots=200, window=12, dtype=torch.float32)


def pages(lengths: np.ndarray) -> int:
    return int((-(-lengths // PAGE)).sum())


@pytest.mark.parametrize("seed", range(8))
def test_the_worst_case_is_the_worst_and_is_reached(seed: int) -> None:
    """Whatever merges among the next tokens, a request holds no more pages; when nothing merges, exactly as many."""
    random = np.random.default_rng(seed)
    ranks = [random.integers(0, 70, 6) for _ in range(2)]
    known = Lengths.of(80, ranks[0], PAGE).beside(Lengths.of(80, ranks[1], PAGE))
    assert known.pages == tuple(map(pages, ranks)) and known.slots == tuple(x.sum() for x in ranks)
    for more in (0, 1, 15, 16, 17, 40):
        assert known.pages_after(more) == max(pages(x + more) for x in ranks)
        grown = [x + random.integers(0, more + 1, 6) for x in ranks]
        assert max(map(pages, grown)) <= known.pages_after(more)


def test_blocks_of_worst_and_expected_case() -> None:
    grants = Grants(heads=6, window=Window(0, PAGE), expected_cr=4.0, step_tokens=32)
    assert [grants.worst(n) for n in (0, 1, 16, 17, 320)] == [1, 1, 1, 2, 20]
    assert grants.worst(90, Lengths.of(80, np.full(6, 20), PAGE)) == 2  # 30 slots each
    assert grants.expected(32) == 2  # one step: none of it is known to merge
    assert grants.expected(32 + 160) == 2 + 160 // 4 // PAGE + 1 + 1  # 72 slots, and half a page
    assert Grants(6, Window(0, PAGE), 1.0, 32).expected(320) == 20


def test_what_needs_memory_fits_the_memory() -> None:
    layout = Layout(block_bytes=1000, block_overhead=3, fixed_bytes=2500)
    assert layout.usable(2) < 1
    for blocks in range(1, 400):
        needed = layout.needed(blocks)
        assert layout.usable(needed) >= blocks > layout.usable(needed - 1)


def make_rows(blocks: int = 40, max_seqs: int = 3) -> Rows:
    rows = Rows(max_seqs, PAGE, **SHAPE)
    rows.bind(torch.full((blocks * rows.layout.block_bytes,), 0x7F, dtype=torch.uint8))
    return rows


def run(rows: Rows, request: str, block: int, tokens: int, start: int) -> None:
    """Compute tokens of one request in every layer, half of whose keys merge."""
    generator = torch.Generator().manual_seed(start)
    q, k, v = (torch.randn(tokens, HEADS, D, generator=generator) for _ in range(3))
    row = rows.row_of_block[[block]]
    bounds = torch.tensor([0, tokens], dtype=torch.int32)
    positions = torch.arange(start, start + tokens, dtype=torch.int32)
    for layer in range(LAYERS):
        params = AppendParams(q, k, v, bounds, row, positions, rotary_frequencies(D, 1e4, None), 0.0, 2.0**-7, 12)
        kernels.append(rows.state, layer, params)


def test_rows_lie_in_the_buffer_and_come_back() -> None:
    rows = make_rows()
    state = rows.state
    first = state.k_pages.untyped_storage().data_ptr()
    assert all(tensor.untyped_storage().data_ptr() == first for tensor in state.tensors())
    assert state.num_pages == rows.layout.usable(40) * rows.heads and state.num_pages < 40 * rows.heads
    rows.begin(Plan(begun=[("a", 1, 5), ("b", 2, 7)], tokens={"a": 20, "b": 3}))
    run(rows, "a", 5, 20, 0)
    run(rows, "b", 7, 3, 0)
    found = rows.take_lengths()
    assert {request: (life, known.tokens) for request, (life, known) in found.items()} == {"a": (1, 20), "b": (2, 3)}
    assert sum(known.pages[0] for _, known in found.values()) == state.num_pages - state.free_count()
    state.check_integrity()
    rows.begin(Plan(ended=["a", "never there"], begun=[("c", 3, 5)], tokens={"b": 1, "c": 2}))
    run(rows, "b", 7, 1, 3)
    run(rows, "c", 5, 2, 0)
    assert [known.tokens for _, known in rows.take_lengths().values()] == [4, 2]
    rows.begin(Plan(tokens={"b": 1}, report=False))
    run(rows, "b", 7, 1, 4)
    assert rows.take_lengths() == {}
    rows.begin(Plan(tokens={"b": 1}))
    run(rows, "b", 7, 1, 5)
    assert [known.tokens for _, known in rows.take_lengths().values()] == [6]
    rows.begin(Plan(ended=["b", "c"]))
    assert rows.take_lengths() == {} and rows.requests == 0
    assert state.free_count() == state.num_pages and set(rows.row_of_block.tolist()) == {-1}
    state.check_integrity()


def test_a_refused_request_writes_nothing_and_is_named_once() -> None:
    rows = make_rows()
    rows.begin(Plan(begun=[("a", 1, 5)], tokens={"a": 20}))
    run(rows, "a", 5, 20, 0)
    before = rows.state.free_count()
    for expected in ({5}, set()):
        rows.begin(Plan(refused=["a"], tokens={"a": 1}))
        run(rows, "a", 5, 1, 20)
        assert rows.take_failed() == expected
    assert rows.state.free_count() == before


def test_a_seam_that_is_gone_is_named() -> None:
    there = (Seam("json:loads", ("s", "object_hook")), Seam("pathlib:Path.open"), Seam("argparse:Namespace", ("any",)))
    assert missing(there) == []
    gone = (Seam("json:JSON.loads"), Seam("shutil:which", ("text",)), Seam("json.gone:loads"))
    found = missing(gone)
    assert (
        found[0] == "json:JSON.loads" and found[1] == "shutil:which takes no text" and "json.gone:loads (" in found[2]
    )
    assert len({seam.name for seam in SEAMS}) == len(SEAMS)


@pytest.mark.parametrize("seed", range(6))
def test_the_worst_case_of_a_model_that_evicts(seed: int) -> None:
    """Steps of any length, whose lengths are told up to two steps late, never hold more pages than were granted."""
    random = np.random.default_rng(seed)
    window = Window(int(random.integers(1, 60)), PAGE)
    grants, kept = Grants(6, window, 4.0, 64), np.zeros(6, dtype=int)
    known: list[Lengths | None] = [None]
    tokens = 0
    while tokens < 400:
        more = int(random.choice((1, 1, 1, random.integers(2, 100))))
        granted = grants.worst(tokens + more, known[-min(len(known), int(random.integers(1, 4)))])
        slots = int(window.beyond(tokens + more) - window.beyond(tokens))
        after = kept + random.integers(0, slots + 1, 6)
        held = pages(after) + 6 * int(window.held(tokens) + window.taken(tokens, more))
        assert held <= 6 * granted
        kept, tokens = after, tokens + more
        known.append(Lengths.of(tokens, kept, PAGE))
        assert grants.worst(tokens, known[-1]) * 6 >= pages(kept) + 6 * int(window.held(tokens))
    assert grants.worst(tokens, known[-1]) < grants.worst(tokens)


def test_kept_states_go_on_where_they_were() -> None:
    """A copy of a running request, the row of one that ended, and the last who continues from a dropped snapshot."""
    rows = make_rows(max_seqs=6)
    state = rows.state
    rows.begin(Plan(begun=[("a", 1, 5)], tokens={"a": 40}))
    run(rows, "a", 5, 40, 0)
    at_40 = rows.take_lengths()["a"][1]
    rows.begin(Plan(copied=[(1, "a")], tokens={"a": 1}))
    run(rows, "a", 5, 1, 40)
    at_41 = rows.take_lengths()["a"][1]
    state.check_integrity()
    begun = [("b", 2, 7), ("c", 3, 8), ("d", 4, 9)]
    resumed = {"b": (1, 40), "c": (2, 41), "d": (1, 40)}
    held = state.num_pages - state.free_count()
    rows.begin(Plan(kept=[(2, "a")], ended=["a"], begun=begun, resumed=resumed, dropped=[1], tokens={"b": 1, "c": 1}))
    assert rows.snapshots == 1 and rows.requests == 3
    assert 0 < state.num_pages - state.free_count() - held <= 2 * rows.heads  # "d" has the snapshot's own row
    run(rows, "b", 7, 1, 40)
    run(rows, "c", 8, 1, 41)
    found = rows.take_lengths()
    assert found["b"] == (2, at_41) and found["c"][1].tokens == 42  # b's token is the one that a had there
    at = rows.row_of_block[9]
    assert Lengths.of(40, state.lengths[at].flatten().numpy(), PAGE) == at_40
    state.check_integrity()
    rows.begin(Plan(ended=["b", "c", "d"], dropped=[2]))
    assert rows.snapshots == rows.requests == 0 and state.free_count() == state.num_pages
    state.check_integrity()


def test_prefixes_are_kept_where_prompts_part_and_end() -> None:
    prefixes = Prefixes(limit=4)
    system = list(range(100, 150))
    prefixes.begin("a", "", [*system, *range(40)])
    assert prefixes.chunk("a", 0, 200) == 90 and prefixes.chunk("a", 0, 16) == 16
    prefixes.begin("b", "", [*system, 77, *range(40)])
    prefixes.begin("other", "salt", [*system, *range(40)])
    assert prefixes.chunk("a", 0, 200) == 50 and prefixes.chunk("a", 50, 200) == 40
    assert prefixes.chunk("other", 0, 200) == 90
    assert prefixes.wanted("a", 49) is None
    node = prefixes.wanted("a", 50)
    snapshot = prefixes.add(node, None, ["block"])
    assert prefixes.match("b", 90) is snapshot and snapshot.tokens == 50 and prefixes.num_blocks == 1
    assert prefixes.match("b", 49) is None and prefixes.match("other", 90) is None
    assert prefixes.vacant("", system) is None  # it is there
    longer = prefixes.add(prefixes.vacant("", [*system, 77, *range(30)]), None, [])
    assert prefixes.match("b", 90) is longer and prefixes.oldest() is snapshot
    assert prefixes.oldest(spare=snapshot) is longer
    assert prefixes.remove(snapshot) == ["block"] and snapshot not in prefixes
    assert prefixes.take_dropped() == [snapshot.number] and prefixes.take_dropped() == []
    for request in ("a", "b", "other", "never there"):
        prefixes.end(request)
    assert prefixes.match("b", 90) is None and len(prefixes) == 1
