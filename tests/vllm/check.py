"""Runs in an environment with vLLM, by run.py beside it: check.py JOB.json. Every engine lives in this process, so its
scheduler, its pages and its accounts can be looked at after every step. Prints one line of JSON for each case.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
from pathlib import Path

import over_http
import torch

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def make_engine(case: dict):
    from vllm import LLM

    return LLM(
        case["model"],
        skip_tokenizer_init=True,
        dtype="float32",
        disable_log_stats=True,
        **{"enforce_eager": True} | case["engine"],
    ).llm_engine


class Books:
    """What scheduler and worker of an engine say of the cache, and whether it agrees."""

    def __init__(self, engine) -> None:
        from megatron.dmc.vllm.model import POOL

        self.scheduler = engine.engine_core.engine_core.scheduler
        (self.manager,) = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        pool = engine.vllm_config.compilation_config.static_forward_context.get(POOL)
        self.rows = pool.rows if pool else None
        """None where the worker is a process of its own."""
        self.unreported = 0
        """Steps without a report of lengths."""

    def check(self) -> None:
        self.unreported += not self.manager._reports
        if self.rows is None:
            return
        state, manager = self.rows.state, self.manager
        state.check_integrity()
        granted = sum(len(blocks) for blocks in manager.req_to_blocks.values())
        kept = manager.prefixes.num_blocks if manager.prefixes else 0
        assert kept <= manager.usable - granted, (kept, granted, manager.usable)
        free = manager.block_pool.get_num_free_blocks()
        assert granted + free == manager.usable, (granted, free, manager.usable)
        taken = state.num_pages - state.free_count()
        for name, life in manager.lives.items():
            held = len(manager.req_to_blocks[name])
            assert life.refused or manager.grants.worst(life.enough, life.known) <= held, (name, life, held)
        # Rows that ended hold their pages until the next step begins.
        dropped = set(self.rows._snapshots) - set(manager.prefixes._snapshots if manager.prefixes else ())
        ended = [row.index for name, row in self.rows._rows.items() if name not in manager.lives]
        ended += [self.rows._snapshots[snapshot] for snapshot in dropped]
        waiting = int(state.held_pages(torch.tensor(ended, dtype=torch.long)).used.sum())
        assert taken - waiting <= (granted + kept) * self.rows.heads, (taken, waiting, granted, kept)

    def check_empty(self) -> None:
        self.check()
        assert not self.manager.lives and not any(self.manager.req_to_blocks.values())
        if self.rows is not None:
            assert self.rows.requests == 0 and self.rows.state.free_count() == self.rows.state.num_pages
        assert self.manager.block_pool.get_num_free_blocks() == self.manager.usable
        assert not self.manager.prefixes and (self.rows is None or self.rows.snapshots == 0)


def run(engine, case: dict, books: Books | None) -> dict:
    """All requests of a case, some of which are aborted on the way."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    waiting = [dict(request, id=str(i)) for i, request in enumerate(case["requests"])]
    by_id, results, tokens = {r["id"]: r for r in waiting}, {}, {r["id"]: {} for r in waiting}
    chance, steps, cached, running = random.Random(7), 0, 0, set()
    limit = 40 * sum(len(r["prompt"]) + r["max_tokens"] for r in waiting)
    while waiting or running:
        while waiting and len(running) < case["at_once"]:
            request = waiting.pop(0)
            # vLLM takes temperature 0 for one completion only; of one candidate any temperature takes the same.
            greedy = {"temperature": 0} if request["n"] == 1 else {"temperature": 1, "top_k": 1, "n": request["n"]}
            params = SamplingParams(**greedy, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False)
            lora = LoRARequest("adapter", 1, request["lora"]) if "lora" in request else None
            prompt = {"prompt_token_ids": request["prompt"]}
            engine.add_request(request["id"], prompt, params, lora_request=lora)
            running.add(request["id"])
        for output in engine.step():
            for one in output.outputs:
                tokens[output.request_id][one.index] = list(one.token_ids)
            if output.finished:
                running.discard(output.request_id)
                cached += output.num_cached_tokens or 0
                results[output.request_id] = {one.finish_reason for one in output.outputs}
        steps += 1
        assert steps < limit, f"no end after {steps} steps; {len(running)} requests run"
        for name in [name for name in running if by_id[name].get("abort") and chance.random() < 0.1]:
            engine.abort_request([name])
            running.discard(name)
            results[name] = {"abort"}
        if books:
            books.check()
    if books and books.manager.prefixes is not None:
        books.manager.forget()
    engine.step()  # tells the worker what ended
    wrong, lost = [], []
    for name, request in by_id.items():
        reasons, expected = results.get(name, set()), request["expected"]
        # Every token takes a slot in every head of a model that never merges; the last one is not computed.
        computed = len(request["prompt"]) + request["max_tokens"] - 1
        too_long = case.get("never_merges") and books.manager.grants.worst(computed) > books.manager.usable
        fits = "error" if too_long else "length"
        if not (reasons == {fits} or (request.get("abort") and reasons <= {"abort", fits})):
            lost.append((name, sorted(map(str, reasons)), fits))
        for got in tokens[name].values():
            whole = reasons == {"length"}
            if (got != expected) if whole else (got != expected[: len(got)]):
                wrong.append(name)
        if reasons == {"length"} and len(tokens[name]) != request["n"]:
            lost.append((name, "completions", len(tokens[name])))
    errors = sum("error" in reasons for reasons in results.values())
    return {"steps": steps, "wrong": wrong, "lost": lost, "errors": errors, "cached": cached}


def check(case: dict) -> dict:
    began, engine = time.time(), make_engine(case)
    books = Books(engine) if case["compressed"] else None
    preempted = 0
    scheduler = engine.engine_core.engine_core.scheduler
    preempt = scheduler._preempt_request

    def counted(*args, **named):
        nonlocal preempted
        preempted += 1
        return preempt(*args, **named)

    scheduler._preempt_request = counted
    outcome = run(engine, case, books)
    if books:
        books.check_empty()
        outcome |= {"usable": books.manager.usable, "unreported": books.unreported}
    outcome |= {"preempted": preempted, "requests": len(case["requests"]), "seconds": round(time.time() - began)}
    engine.engine_core.shutdown()
    return outcome


def main() -> int:
    failed = False
    for case in json.loads(Path(sys.argv[1]).read_text()):
        from vllm.distributed import cleanup_dist_env_and_memory

        try:
            outcome = over_http.check(case) if case.get("http") else check(case)
        except Exception as error:  # the other cases run all the same
            import traceback

            traceback.print_exc()
            outcome = {"raised": f"{type(error).__name__}: {error}"}
        refused = case.get("refused")
        if refused:
            right = refused in outcome.get("raised", "")
        else:
            right = "raised" not in outcome and not outcome["wrong"] and not outcome["lost"]
            right = right and all(outcome[name] >= least for name, least in case.get("at_least", {}).items())
        failed |= not right
        print("CASE", json.dumps({"case": case["name"], "right": right, **outcome}), flush=True)
        gc.collect()
        cleanup_dist_env_and_memory()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
