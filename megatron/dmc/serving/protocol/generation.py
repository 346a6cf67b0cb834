"""Bodies of ``/v1/completions``, the parameters it shares with chats, and the sampling parameters they ask for."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Optional, Union

from pydantic import Discriminator, Field, Tag

from megatron.dmc.inference import InvalidRequest, SamplingParams
from megatron.dmc.serving.errors import invalid, of_invalid_request
from megatron.dmc.serving.protocol import dialect
from megatron.dmc.serving.protocol.base import Int, ModelField, RequestModel, TokenIds
from megatron.dmc.serving.protocol.structured import StructuredFields


def _prompt_kind(value: Any) -> Optional[str]:
    """Tag of the one type that a prompt is checked against; that of a list follows from its first element."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    return "texts" if isinstance(first, str) else "lists of tokens" if isinstance(first, list) else "tokens"


Prompt = Annotated[
    Union[
        Annotated[str, Tag("text")],
        Annotated[list[str], Field(fail_fast=True), Tag("texts")],
        Annotated[TokenIds, Tag("tokens")],
        Annotated[list[TokenIds], Field(fail_fast=True), Tag("lists of tokens")],
    ],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_type",
        custom_error_message="Input should be a text, a list of texts, token ids, or a list of lists of token ids",
    ),
]


class StreamOptions(RequestModel):
    """Options of a streamed response."""

    unsupported: ClassVar = dialect.STREAM_OPTIONS

    include_usage: Optional[bool] = False
    """Send a last chunk with the usage; all other chunks have `usage: null`."""
    continuous_usage_stats: Optional[bool] = False
    """Send the usage so far with every chunk, too."""
    include_cache: Optional[bool] = False
    """Add a `dmc` object to every chunk: the tokens of the completion and its KV slots by layer and KV head."""

    @property
    def asks_for_nothing(self) -> bool:
        """Whether the options are those of a stream without any."""
        return not (self.include_usage or self.continuous_usage_stats or self.include_cache)


class SamplingFields(ModelField, StructuredFields):
    """Parameters that completions and chat completions share."""

    unsupported: ClassVar = dialect.GENERATION

    n: Optional[Int] = None
    """Number of completions for each prompt, 1 to 128, default 1."""
    temperature: Optional[float] = None
    """Softmax temperature, default 1; 0 means greedy decoding, and top_p, top_k, min_p and seed are ignored."""
    top_p: Optional[float] = None
    """Total probability of the most likely tokens to sample from, above 0 and at most 1, default 1."""
    seed: Optional[Int] = None
    """Seed of the sampler, -1 for none: one seed samples the same tokens; completion i of a prompt uses seed + i."""
    stop: Union[str, list[str], None] = None
    """String or strings that end the completion, which stops before the first of them."""
    presence_penalty: Optional[float] = None
    """Number from -2 to 2 that is subtracted from the logit of every token of the completion so far, default 0."""
    frequency_penalty: Optional[float] = None
    """Number from -2 to 2 that is subtracted from a token's logit for each time it was generated, default 0."""
    logit_bias: Optional[dict[str, float]] = None
    """Map of token ids to numbers from -100 to 100 that are added to their logits."""
    stream: Optional[bool] = None
    """Send the completion as server-sent events while it is generated."""
    stream_options: Optional[StreamOptions] = None
    """Options of a streamed response; only allowed with `stream: true`."""
    user: Optional[str] = None
    """Name of the end user, which is accepted and ignored."""
    metadata: Optional[dict[str, str]] = None
    """Notes of the client, which are accepted and ignored."""
    safety_identifier: Optional[str] = None
    """Name of the end user for abuse detection, which is accepted and ignored."""
    prompt_cache_key: Optional[str] = None
    """Hint for a router of requests, which is accepted and ignored: the prefix cache finds every shared prefix."""
    request_id: Optional[str] = None
    """Name of the request at the client, which is accepted and ignored."""
    session_id: Optional[str] = None
    """Name of the conversation at the client, which is accepted and ignored."""
    top_k: Optional[Int] = None
    """Number of most likely tokens to sample from; 0 or -1, the default, means all."""
    min_p: Optional[float] = None
    """Least probability of a token to sample, as a fraction of the most likely token's, 0 to 1, default 0."""
    repetition_penalty: Optional[float] = None
    """Factor above 0 that lowers the logits of tokens in the prompt or the completion; 1, the default, means none."""
    min_tokens: Optional[Int] = None
    """Number of tokens to generate before an end-of-sequence or stop token may be sampled, default 0."""
    stop_token_ids: Optional[TokenIds] = None
    """Token ids that end the completion."""
    bad_words: Optional[list[str]] = None
    """Words that the completion does not hold."""
    allowed_token_ids: Optional[TokenIds] = None
    """Token ids of which the completion consists."""
    prompt_logprobs: Optional[Int] = None
    """Number of most likely tokens at every token of the prompt to return log-probabilities of; not in streams."""
    truncate_prompt_tokens: Optional[Int] = None
    """Number of tokens of the prompt to keep; -1 keeps as many as `max_tokens` leaves room for."""
    truncation_side: Optional[Literal["left", "right"]] = None
    """Side on which `truncate_prompt_tokens` drops tokens: left, the default, keeps the last ones."""
    cache_salt: Optional[str] = Field(None, max_length=1024)
    """Secret of the client: only requests with the same one share cached prefixes. At most 1,024 characters."""
    ignore_eos: Optional[bool] = None
    """Continue after the end-of-sequence token."""
    skip_special_tokens: Optional[bool] = None
    """Leave special tokens out of the text, default true."""
    include_stop_str_in_output: Optional[bool] = None
    """Keep the stop string at the end of the text."""
    return_tokens_as_token_ids: Optional[bool] = False
    """Name the tokens of log-probabilities `token_id:123` instead of by their text."""
    return_token_ids: Optional[bool] = False
    """Add `token_ids` and `prompt_token_ids` to the choices."""

    def sampling_params(self, defaults: Mapping[str, Any] = MappingProxyType({})) -> SamplingParams:
        """Sampling parameters of the request.

        Args:
            defaults: values of those that it does not give; ``max_tokens`` is a bound.

        Raises:
            APIError: a wrong value, by the name under which the client sent it.
        """
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens not in range(1, 2**63):
            if self.truncate_prompt_tokens != -1:
                message = f"truncate_prompt_tokens is {self.truncate_prompt_tokens}; it must be -1 or at least 1"
                raise invalid(message, "truncate_prompt_tokens")
        if self.prompt_logprobs is not None and self.stream:
            raise invalid("prompt_logprobs is not supported in streams; leave out stream", "prompt_logprobs")
        if not (self.stream or self.stream_options is None or self.stream_options.asks_for_nothing):
            raise invalid("stream_options may only be given with stream: true", "stream_options")
        names = (field.name for field in dataclasses.fields(SamplingParams))
        given = {name: value for name, value in defaults.items() if name != "max_tokens"}
        given |= {name: value for name in names if (value := getattr(self, name, None)) is not None}
        given.pop("structured_outputs", None)  # a mapping here
        given |= self._derived_params()
        if self.stop == "":
            del given["stop"]
        if (bound := defaults.get("max_tokens")) is not None:
            asked = given["max_tokens"]
            given["max_tokens"] = bound if asked is None else min(asked, bound)
        if self.logit_bias is not None:
            given["logit_bias"] = _token_ids(self.logit_bias)
        try:
            return SamplingParams(**given, structured_outputs=self.constraint())
        except InvalidRequest as error:
            raise self.as_sent(of_invalid_request(error)) from None

    def _derived_params(self) -> dict[str, Any]:
        """Sampling parameters whose name or meaning differs from the request's."""
        raise NotImplementedError


def _token_ids(logit_bias: Mapping[str, float]) -> dict[int, float]:
    """Bias by token id; keys of JSON are strings. Raises :class:`APIError` for a key that is no token id."""
    for key in logit_bias:
        if not (key.isascii() and key.isdigit() and len(key) < 16):
            raise invalid(f"logit_bias has the key {key[:40]!r}; keys must be token ids", "logit_bias")
    return {int(key): value for key, value in logit_bias.items()}


class CompletionRequest(SamplingFields):
    """Body of ``POST /v1/completions``."""

    null_is_a_value: ClassVar = frozenset({"max_tokens"})

    prompt: Prompt
    """Text, list of texts, token ids of one prompt, or list of such lists."""
    max_tokens: Optional[Int] = 16
    """Most tokens to generate; 0 only prefills the prompt, for `echo`; null means up to the context length."""
    logprobs: Optional[Int] = None
    """Number of most likely tokens, 0 to 100, to return log-probabilities of, besides the sampled token's."""
    echo: Optional[bool] = None
    """Return the prompt before the completion, with its log-probabilities if `logprobs` is set."""
    add_special_tokens: Optional[bool] = True
    """Let the tokenizer add special tokens such as BOS to a text prompt."""

    def _derived_params(self) -> dict[str, Any]:
        prompt_logprobs = self.logprobs if self.echo and self.prompt_logprobs is None else self.prompt_logprobs
        return {"max_tokens": self.max_tokens, "prompt_logprobs": prompt_logprobs}

    def _sent_name(self, param: str) -> str:
        if param in ("n", "max_tokens") and param not in self.model_fields_set:
            return "prompt"  # too long, or too many, for the default
        return "logprobs" if param == "prompt_logprobs" and self.prompt_logprobs is None else param

    @property
    def prompts(self) -> list[Union[str, list[int]]]:
        """Prompts of the request, one or many, as a list."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]
