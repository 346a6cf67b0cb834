"""OpenAI's response objects from the engine's outputs: whole responses, and chunks of a stream."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional, Union

from megatron.dmc.inference import Completion, Logprobs, RequestOutput, StepOutput
from megatron.dmc.inference.cache import CacheUse
from megatron.dmc.serving.errors import APIError
from megatron.dmc.serving.event_stream import encode, frame
from megatron.dmc.serving.prompts import Prompts, token_strings
from megatron.dmc.serving.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from megatron.dmc.serving.tool_messages import ToolMessages, tool_messages

LOWEST = -9999.0
"""Log-probability that stands for -inf, which JSON does not have."""


def new_id(chat: bool) -> str:
    return f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"


def _finite(value: float) -> float:
    return max(value, LOWEST) if math.isfinite(value) else LOWEST


@dataclass
class UsageCount:
    """Sum of what the completions of one response took."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    states: int = 0
    """Token states over all layers and heads: the slots that an uncompressed cache would take."""
    slots: int = 0
    cache_tokens: int = 0
    """Tokens whose keys and values these slots hold."""
    cache_bytes: int = 0

    def finished(self, usage: Optional[CacheUse]) -> None:
        """Add the cache usage of a completion that has ended."""
        if usage is not None:
            self.states += usage.tokens * usage.heads
            self.slots += usage.total_slots
            self.cache_tokens += usage.tokens
            self.cache_bytes += usage.total_slots * usage.slot_bytes

    def tokens(self) -> dict[str, Any]:
        """The ``usage`` object of a stream that goes on: what is known before its completions have ended."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def body(self) -> dict[str, Any]:
        """The ``usage`` object."""
        ratio = self.states / self.slots if self.slots else 1.0
        return {
            **self.tokens(),
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "dmc": {
                "slots": self.slots,
                "compression_ratio": ratio,
                "bytes_per_token": self.cache_bytes / max(1, self.cache_tokens),
            },
        }


def usage_of(results: Iterable[RequestOutput]) -> UsageCount:
    """Usage of whole results."""
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
    prompts: Prompts,
    ids: Sequence[int],
    found: Sequence[Optional[Logprobs]],
    offsets: Sequence[int],
    as_ids: bool = False,
) -> dict[str, Any]:
    """The ``logprobs`` object of a completion.

    Args:
        ids: tokens of the text.
        found: log-probabilities of these; None for the first token of a prompt, which nothing predicts.
        offsets: of the tokens in the text, in characters.
        as_ids: name tokens as ``token_id:123``.
    """
    strings = token_strings(prompts, ids, as_ids)
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
    return {"tokens": strings, "token_logprobs": values, "top_logprobs": top, "text_offset": list(offsets)}


def chat_logprobs(prompts: Prompts, found: Sequence[Logprobs], as_ids: bool = False) -> dict[str, Any]:
    """The ``logprobs`` object of a chat completion."""

    def one(token: int, value: float) -> dict[str, Any]:
        name, data = token_strings(prompts, [token], as_ids)[0], prompts.token_bytes(token)
        return {"token": name, "logprob": _finite(value), "bytes": None if data is None else list(data)}

    content = [
        one(entry.token, entry.logprob) | {"top_logprobs": [one(*pair) for pair in entry.top]} for entry in found
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(prompts: Prompts, ids: Sequence[int], found: Sequence[Logprobs]) -> list[Optional[dict[str, Any]]]:
    """The ``prompt_logprobs`` list of vLLM: None for the first token of the prompt, then by token id the
    log-probability, rank and text of the most likely tokens and of the prompt's own.
    """
    rows: list[Optional[dict[str, Any]]] = [None] if ids else []
    for entry in found:
        ranked = {token: (value, rank) for rank, (token, value) in enumerate(entry.top, start=1)}
        ranked.setdefault(entry.token, (entry.logprob, entry.rank))
        rows.append(
            {
                str(token): {"logprob": _finite(value), "rank": rank, "decoded_token": prompts.piece(token)}
                for token, (value, rank) in ranked.items()
            }
        )
    return rows


# ------------------------------------------------------------------------------------------------------------ choices


@dataclass
class _Piece:
    """Part of a completion (or all of it) with its tokens and log-probabilities, for one choice."""

    text: str = ""
    ids: Sequence[int] = ()
    logprobs: Sequence[Optional[Logprobs]] = ()
    offsets: Sequence[int] = ()
    """Offsets of the tokens in the choice's text, where log-probabilities were asked for."""

    def __add__(self, other: _Piece) -> _Piece:
        return _Piece(
            self.text + other.text,
            [*self.ids, *other.ids],
            [*self.logprobs, *other.logprobs],
            [*self.offsets, *other.offsets],
        )


@dataclass
class _ChoicePieces:
    """Maker of the pieces of one choice, in their order: the prompt, for ``echo``, and parts of the completion."""

    prompts: Prompts
    body: CompletionRequest

    def __post_init__(self) -> None:
        skip = self.body.skip_special_tokens is not False
        self.offsets = self.prompts.offsets(skip) if self.body.logprobs is not None else None

    def echo(
        self, prompt: Union[str, Sequence[int]], ids: Sequence[int], found: Optional[Sequence[Logprobs]]
    ) -> _Piece:
        """The prompt as it was given, its tokens, and their log-probabilities but for the first."""
        prompts = self.prompts
        text = prompt if isinstance(prompt, str) else prompts.decode(ids) if prompts.tokenizer is not None else ""
        offsets = self.offsets.of_prompt(text, ids, prompts.special_ids) if self.offsets is not None else ()
        return _Piece(text, ids, [None, *(found or ())], offsets)

    def part(self, text: str, ids: Sequence[int], found: Sequence[Logprobs]) -> _Piece:
        """The next tokens of the completion."""
        return _Piece(text, ids, found, self.offsets.of_completion(ids) if self.offsets is not None else ())


def _completion_choice(
    body: CompletionRequest, prompts: Prompts, index: int, piece: _Piece, output: Union[Completion, StepOutput]
) -> dict[str, Any]:
    logprobs = None
    if body.logprobs is not None:
        as_ids = bool(body.return_tokens_as_token_ids)
        logprobs = completion_logprobs(prompts, piece.ids, piece.logprobs, piece.offsets, as_ids)
    return {"index": index, "text": piece.text, "logprobs": logprobs, **_end(output)}


def _chat_choice(
    body: ChatCompletionRequest,
    prompts: Prompts,
    index: int,
    content: dict[str, Any],
    output: Union[Completion, StepOutput],
) -> dict[str, Any]:
    """``content``: the message, or the delta of a stream."""
    logprobs = None
    if body.logprobs:
        logprobs = chat_logprobs(prompts, output.logprobs or (), body.return_tokens_as_token_ids)
    return {"index": index, **content, "logprobs": logprobs, **_end(output)}


def _end(output: Union[Completion, StepOutput]) -> dict[str, Any]:
    return {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}


# ---------------------------------------------------------------------------------------------------- whole responses


def response(
    body: GenerationRequest,
    results: Sequence[RequestOutput],
    model: str,
    prompts: Prompts,
    response_id: Optional[str] = None,
) -> dict[str, Any]:
    """A ``text_completion`` or ``chat.completion`` object.

    Args:
        results: of the body's prompts, in their order, without errors.
        response_id: None makes a new one.
    """
    chat = isinstance(body, ChatCompletionRequest)
    response_id = response_id or new_id(chat)
    if chat:
        choices = _chat_choices(body, results[0], prompts, response_id)
    else:
        choices = _completion_choices(body, results, prompts)
    if body.return_token_ids:
        completions = ((result, completion) for result in results for completion in result.outputs)
        for choice, (result, completion) in zip(choices, completions):
            choice |= {"token_ids": completion.token_ids, "prompt_token_ids": list(result.prompt_token_ids)}
    whole = {
        "id": response_id,
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": usage_of(results).body(),
    }
    if chat and body.prompt_logprobs is not None:
        result = results[0]
        whole["prompt_logprobs"] = prompt_logprobs(prompts, result.prompt_token_ids, result.prompt_logprobs or ())
    return whole


def _completion_choices(
    body: CompletionRequest, results: Sequence[RequestOutput], prompts: Prompts
) -> list[dict[str, Any]]:
    choices: list[dict[str, Any]] = []
    for prompt, result in zip(body.prompts, results):
        for completion in result.outputs:
            pieces = _ChoicePieces(prompts, body)
            ids, found = result.prompt_token_ids, result.prompt_logprobs
            before = pieces.echo(prompt, ids, found) if body.echo else _Piece()
            piece = before + pieces.part(completion.text, completion.token_ids, completion.logprobs or ())
            choice = _completion_choice(body, prompts, len(choices), piece, completion)
            if body.prompt_logprobs is not None:
                choice["prompt_logprobs"] = prompt_logprobs(prompts, ids, found or ())
            choices.append(choice)
    return choices


def _chat_choices(
    body: ChatCompletionRequest, result: RequestOutput, prompts: Prompts, response_id: str
) -> list[dict[str, Any]]:
    choices = []
    for completion in result.outputs:
        tools = tool_messages(body, prompts.settings.tool_call_parser, response_id, completion.index)
        plain = {"role": "assistant", "content": completion.text, "refusal": None}
        message = plain if tools is None else tools.message(completion.text)
        choice = _chat_choice(body, prompts, completion.index, {"message": message}, completion)
        if tools is not None:
            choice["finish_reason"] = tools.finish_reason(completion.finish_reason)
        choices.append(choice)
    return choices


# ------------------------------------------------------------------------------------------------- chunks of a stream


@dataclass
class Chunks:
    """Chunks of one streamed response. Completions of prompt p have the indices p n ... (p + 1) n - 1."""

    END: ClassVar = "data: [DONE]\n\n"

    request: GenerationRequest
    prompts: Prompts
    ids: Sequence[Sequence[int]]
    """Token ids of each prompt."""
    model: str
    name: str
    usage: UsageCount = field(default_factory=UsageCount)

    def __post_init__(self) -> None:
        self.chat = isinstance(self.request, ChatCompletionRequest)
        options = self.request.stream_options
        self.with_usage = options is not None and options.include_usage
        self.with_usage_so_far = options is not None and options.continuous_usage_stats
        self.with_cache = options is not None and options.include_cache
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        self.head: dict[str, Any] = {"id": self.name, "object": kind, "created": int(time.time()), "model": self.model}
        if self.with_usage:
            self.head["usage"] = None
        self.usage.prompt_tokens = sum(map(len, self.ids))
        self.pieces: dict[int, _ChoicePieces] = {}
        """Makers of the pieces of the choices that have begun."""
        self.tools: dict[int, Optional[ToolMessages]] = {}
        """Readers of the tool calls of the choices that have begun; None for those that have none."""
        self.told: set[int] = set()
        """Choices that have given their prompt's token ids."""
        self.frames: dict[int, tuple[str, str]] = {}
        """Choice index -> beginning and end of its event frames, where the next chunks differ in their text alone."""

    def first(self) -> list[dict[str, Any]]:
        """Chunks before any token: the role, in a chat."""
        if not self.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        choice = {"delta": delta, "logprobs": None, "finish_reason": None}
        return [self._chunk({"index": i, **choice}) for i in range(self.request.n or 1)]

    def of(self, prompt: int, output: StepOutput) -> list[dict[str, Any]]:
        """The chunks of one output of prompt number ``prompt``: one, or with tool calls several."""
        index = prompt * (self.request.n or 1) + output.index
        self.usage.completion_tokens += len(output.tokens)
        if output.finished:
            self.usage.finished(output.cache)
            if output.index == 0:
                self.usage.cached_tokens += output.num_cached_tokens
        earlier: list[dict[str, Any]] = []
        if self.chat:
            *earlier, choice = self._chat(index, output)
        else:
            choice = self._completion(prompt, index, output)
        if self.request.return_token_ids:
            choice["token_ids"] = list(output.tokens)
            if index not in self.told:
                self.told.add(index)
                choice["prompt_token_ids"] = list(self.ids[prompt])
        chunk = self._chunk(choice)
        if index not in self.frames and self._varies_in_text(index):
            self.frames[index] = self._around_text(choice)
        if self.with_cache and output.cache is not None and not output.finished:
            cache = output.cache
            ratio = cache.compression_ratio
            chunk["dmc"] = {"index": index, "tokens": cache.tokens, "slots": cache.slots, "compression_ratio": ratio}
        return [*map(self._chunk, earlier), chunk]

    def text_frame(self, prompt: int, output: StepOutput) -> Optional[str]:
        """Frame of an output in the middle of a choice without log-probabilities and the like; None for others."""
        around = self.frames.get(prompt * (self.request.n or 1) + output.index)
        if around is None or output.finish_reason is not None or output.cache is not None:
            return None
        self.usage.completion_tokens += len(output.tokens)
        return f"{around[0]}{encode(output.text)}{around[1]}"

    def _varies_in_text(self, index: int) -> bool:
        """Whether the chunks of choice ``index``, between its first and its last, differ in their text alone."""
        more = self.with_usage_so_far or self.request.return_token_ids
        if isinstance(self.request, ChatCompletionRequest):
            return not (more or self.request.logprobs or self.tools[index])
        return not more and self.request.logprobs is None and index in self.pieces

    def _around_text(self, choice: dict[str, Any]) -> tuple[str, str]:
        """The frame of a chunk of this choice, cut at its text."""
        name, mark = "delta" if self.chat else "text", "\0text\0"
        bare = {**choice, name: {"content": mark} if self.chat else mark, "finish_reason": None, "stop_reason": None}
        before, _, after = frame(self._chunk(bare)).partition(encode(mark))
        return before, after

    def _chat(self, index: int, output: StepOutput) -> list[dict[str, Any]]:
        """Choices of one output of a chat, the last of which has all but the deltas of the others."""
        if index not in self.tools:
            parser = self.prompts.settings.tool_call_parser
            self.tools[index] = tool_messages(self.request, parser, self.name, index)
        tools = self.tools[index]
        deltas = [{"content": output.text}] if tools is None else tools.deltas(output.text, output.finished)
        *earlier, last = deltas
        choice = _chat_choice(self.request, self.prompts, index, {"delta": last}, output)
        if tools is not None:
            choice["finish_reason"] = tools.finish_reason(output.finish_reason)
        bare = {"index": index, "logprobs": None, "finish_reason": None}
        return [*({**bare, "delta": delta} for delta in earlier), choice]

    def last(self) -> list[dict[str, Any]]:
        """Chunks after the last token: the usage, when asked for."""
        return [{**self.head, "choices": [], "usage": self.usage.body()}] if self.with_usage else []

    def failed(self, error: APIError) -> list[dict[str, Any]]:
        """What tells of a failure after the first token."""
        return [error.body()]

    def event_name(self, chunk: dict[str, Any]) -> str:
        """Chunks are events without a name."""
        return ""

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self.head, "choices": [choice]}
        if self.with_usage_so_far:
            chunk["usage"] = self.usage.tokens()
        return chunk

    def _completion(self, prompt: int, index: int, output: StepOutput) -> dict[str, Any]:
        body = self.request
        assert isinstance(body, CompletionRequest)
        before = _Piece()
        if index not in self.pieces and (output.tokens or output.finished):
            self.pieces[index] = _ChoicePieces(self.prompts, body)
            if body.echo:
                ids = self.ids[prompt]
                before = self.pieces[index].echo(body.prompts[prompt], ids, output.prompt_logprobs)
        pieces = self.pieces.get(index) or _ChoicePieces(self.prompts, body)
        piece = before + pieces.part(output.text, output.tokens, output.logprobs)
        return _completion_choice(body, self.prompts, index, piece, output)
