"""OpenAI's response objects from what the engine gives: whole answers and chunks of a stream."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, Union

from megatron.dmc.inference import Completion, Logprobs, RequestOutput, StepOutput
from megatron.dmc.inference.cache import CacheUse
from megatron.dmc.serving.prompts import Prompts, token_strings
from megatron.dmc.serving.protocol import ChatCompletionRequest, CompletionRequest

LOWEST = -9999.0
"""JSON has no -inf."""
Given = Union[str, Sequence[int]]


def new_id(chat: bool) -> str:
    return f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"


def _finite(value: float) -> float:
    return max(value, LOWEST) if math.isfinite(value) else LOWEST


@dataclass
class UsageCount:
    """Adds up what the answers of one response took."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    states: int = 0
    """Token states, over all layers and heads: what an uncompressed cache has a slot each for."""
    slots: int = 0

    def finished(self, use: Optional[CacheUse]) -> None:
        if use is not None:
            self.states += use.tokens * use.heads
            self.slots += use.total_slots

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "dmc": {"slots": self.slots, "compression_ratio": self.states / self.slots if self.slots else 1.0},
        }


def usage_of(results: Iterable[RequestOutput]) -> UsageCount:
    count = UsageCount()
    for result in results:
        count.prompt_tokens += len(result.prompt_token_ids)
        count.cached_tokens += result.num_cached_tokens
        for completion in result.outputs:
            count.completion_tokens += len(completion.token_ids)
            count.finished(completion.cache)
    return count


# ------------------------------------------------------------------------------------------------- log-probabilities


def completion_logprobs(
    prompts: Prompts, ids: Sequence[int], found: Sequence[Optional[Logprobs]], offset: int = 0, as_ids: bool = False
) -> dict[str, Any]:
    """Of the older API. ``found``: None for the first token of a prompt, which nothing predicts."""
    strings, offsets = token_strings(prompts, ids, as_ids), []
    for piece in prompts.pieces(ids):
        offsets.append(offset)
        offset += len(piece)
    top: list[Optional[dict[str, float]]] = []
    for string, entry in zip(strings, found):
        if entry is None:
            top.append(None)
            continue
        names = token_strings(prompts, [token for token, _ in entry.top], as_ids)
        row: dict[str, float] = {}
        for name, (_, value) in zip(names, entry.top):
            row.setdefault(name, _finite(value))  # tokens may share a text: the most likely one counts
        row.setdefault(string, _finite(entry.logprob))
        top.append(row)
    values = [None if entry is None else _finite(entry.logprob) for entry in found]
    return {"tokens": strings, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


def chat_logprobs(prompts: Prompts, found: Sequence[Logprobs], as_ids: bool = False) -> dict[str, Any]:
    def one(token: int, value: float) -> dict[str, Any]:
        text = prompts.piece(token)
        name = token_strings(prompts, [token], as_ids)[0]
        return {"token": name, "logprob": _finite(value), "bytes": None if "\ufffd" in text else list(text.encode())}

    content = [
        one(entry.token, entry.logprob) | {"top_logprobs": [one(*pair) for pair in entry.top]} for entry in found
    ]
    return {"content": content, "refusal": None}


# ------------------------------------------------------------------------------------------------------ whole answers


def completion_body(
    request: CompletionRequest,
    results: Sequence[RequestOutput],
    model: str,
    prompts: Prompts,
    name: Optional[str] = None,
) -> dict[str, Any]:
    """``text_completion``. ``results``: of the request's prompts, in their order, without errors."""
    choices = []
    for given, result in zip(request.prompts, results):
        for completion in result.outputs:
            echo = _Echo(request, prompts, given, result.prompt_token_ids, result.prompt_logprobs)
            logprobs = None
            if request.logprobs is not None:
                ids, found = [*echo.ids, *completion.token_ids], [*echo.found, *(completion.logprobs or ())]
                logprobs = completion_logprobs(prompts, ids, found, as_ids=request.return_tokens_as_token_ids)
            choice = {
                "index": len(choices),
                "text": echo.text + completion.text,
                "logprobs": logprobs,
                **_end(completion),
            }
            choices.append(choice | _ids(request, completion, result.prompt_token_ids))
    head = {"id": name or new_id(False), "object": "text_completion", "created": int(time.time()), "model": model}
    return {**head, "choices": choices, "usage": usage_of(results).body()}


class _Echo:
    """What ``echo`` puts before an answer."""

    def __init__(
        self,
        request: CompletionRequest,
        prompts: Prompts,
        given: Given,
        ids: Sequence[int],
        found: Optional[Sequence[Logprobs]],
    ) -> None:
        self.ids: Sequence[int] = ()
        self.found: Sequence[Optional[Logprobs]] = ()
        self.text = ""
        if request.echo:
            self.ids, self.found = ids, [None, *(found or ())]
            self.text = (
                given if isinstance(given, str) else prompts.decode(ids) if prompts.tokenizer is not None else ""
            )


def _end(completion: Union[Completion, StepOutput]) -> dict[str, Any]:
    return {"finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}


def _ids(
    request: Union[CompletionRequest, ChatCompletionRequest], completion: Completion, prompt: Sequence[int]
) -> dict[str, Any]:
    return {"token_ids": completion.token_ids, "prompt_token_ids": list(prompt)} if request.return_token_ids else {}


def chat_body(
    request: ChatCompletionRequest, result: RequestOutput, model: str, prompts: Prompts, name: Optional[str] = None
) -> dict[str, Any]:
    """``chat.completion``"""
    choices = []
    for completion in result.outputs:
        logprobs = None
        if request.logprobs:
            logprobs = chat_logprobs(prompts, completion.logprobs or (), request.return_tokens_as_token_ids)
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        choice = {"index": completion.index, "message": message, "logprobs": logprobs, **_end(completion)}
        choices.append(choice | _ids(request, completion, result.prompt_token_ids))
    head = {"id": name or new_id(True), "object": "chat.completion", "created": int(time.time()), "model": model}
    return {**head, "choices": choices, "usage": usage_of([result]).body()}


# ------------------------------------------------------------------------------------------------- chunks of a stream


@dataclass
class Chunks:
    """Turns outputs into the chunks of one streamed response.

    ``ids``: token ids of each prompt. The answers of prompt p have the indices p n ... (p + 1) n - 1.
    """

    request: Union[CompletionRequest, ChatCompletionRequest]
    prompts: Prompts
    ids: Sequence[Sequence[int]]
    model: str
    name: str
    usage: UsageCount = field(default_factory=UsageCount)

    def __post_init__(self) -> None:
        self.chat = isinstance(self.request, ChatCompletionRequest)
        options = self.request.stream_options
        self.with_usage = options is not None and options.include_usage
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        self.head: dict[str, Any] = {"id": self.name, "object": kind, "created": int(time.time()), "model": self.model}
        if self.with_usage:
            self.head["usage"] = None
        self.usage.prompt_tokens = sum(map(len, self.ids))
        self.offsets: dict[int, int] = {}
        self.told: set[int] = set()

    def first(self) -> list[dict[str, Any]]:
        """Before any token: who speaks, in a chat."""
        if not self.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        choice = {"delta": delta, "logprobs": None, "finish_reason": None}
        return [self._chunk({"index": i, **choice}) for i in range(self.request.n or 1)]

    def of(self, prompt: int, output: StepOutput, use: Optional[CacheUse] = None) -> dict[str, Any]:
        """``use``: what the running answer has in the cache, for those who asked for it."""
        index = prompt * (self.request.n or 1) + output.index
        self.usage.completion_tokens += len(output.tokens)
        if output.finished:
            self.usage.finished(output.cache)
            if output.index == 0:
                self.usage.cached_tokens += output.num_cached_tokens
        choice = self._chat(index, output) if self.chat else self._completion(prompt, index, output)
        if self.request.return_token_ids:
            choice["token_ids"] = list(output.tokens)
            if index not in self.told:
                self.told.add(index)
                choice["prompt_token_ids"] = list(self.ids[prompt])
        chunk = self._chunk(choice)
        if use is not None:
            chunk["dmc"] = {
                "index": index,
                "tokens": use.tokens,
                "slots": use.slots,
                "compression_ratio": use.compression_ratio,
            }
        return chunk

    def last(self) -> list[dict[str, Any]]:
        return [{**self.head, "choices": [], "usage": self.usage.body()}] if self.with_usage else []

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self.head, "choices": [choice]}

    def _chat(self, index: int, output: StepOutput) -> dict[str, Any]:
        logprobs = None
        if self.request.logprobs:
            logprobs = chat_logprobs(self.prompts, output.logprobs, self.request.return_tokens_as_token_ids)
        return {"index": index, "delta": {"content": output.text}, "logprobs": logprobs, **_end(output)}

    def _completion(self, prompt: int, index: int, output: StepOutput) -> dict[str, Any]:
        request, text, ids, found = self.request, output.text, list(output.tokens), list(output.logprobs)
        assert isinstance(request, CompletionRequest)
        if request.echo and index not in self.offsets and (output.tokens or output.finished):
            echo = _Echo(request, self.prompts, request.prompts[prompt], self.ids[prompt], output.prompt_logprobs)
            text, ids, found = echo.text + text, [*echo.ids, *ids], [*echo.found, *found]
        logprobs, offset = None, self.offsets.get(index, 0)
        if request.logprobs is not None:
            logprobs = completion_logprobs(self.prompts, ids, found, offset, request.return_tokens_as_token_ids)
            offset += sum(map(len, self.prompts.pieces(ids)))
        if ids or output.finished:
            self.offsets[index] = offset
        return {"index": index, "text": text, "logprobs": logprobs, **_end(output)}
