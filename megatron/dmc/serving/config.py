"""Settings of the server, of batch jobs and of the load generator."""

import argparse
import json
import math
import os
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

from megatron.dmc.flags import number

KEY_VARIABLE = "DMC_API_KEY"
METRICS = ("ttft", "tpot", "itl", "e2el")
"""Times of a request: to the first token, per output token, between tokens, end to end."""


class _ToolFlags:
    """Check of the flags of tool calls, which the server and batch jobs share."""

    tool_call_parser: Optional[str]
    enable_auto_tool_choice: bool

    def auto_tool_call_parser(self) -> Optional[str]:
        """Parser for ``tool_choice: auto``; None without it. Raises ``ValueError`` for one flag without the other."""
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            raise ValueError("--enable-auto-tool-choice needs --tool-call-parser")
        return self.tool_call_parser if self.enable_auto_tool_choice else None


@dataclass(frozen=True)
class ServerConfig(_ToolFlags):
    """Model, address and limits of ``dmc serve``."""

    model: str = field(metadata={"flags": ("model",), "metavar": "MODEL"})
    """Hugging Face directory, plain, quantized or exported from a retrofit; or GGUF file."""
    tokenizer: Optional[str] = field(default=None, metadata={"metavar": "DIR"})
    """Directory of the tokenizer. Default: the model's."""
    served_model_name: list[str] = field(default_factory=list, metadata={"nargs": "+", "metavar": "NAME"})
    """Model names that clients may ask for; the first is in the responses. Default: MODEL as it is given."""
    chat_template: Optional[str] = field(default=None, metadata={"metavar": "FILE"})
    """File of the chat template, or the template itself. Default: the tokenizer's."""
    generation_config: str = field(default="auto", metadata={"metavar": "SOURCE"})
    """Source of the sampling parameters of requests that do not give them. auto: the model's generation_config.json,
    where there is one; vllm: OpenAI's defaults; or a directory that has the file. max_new_tokens in it bounds every
    request."""
    override_generation_config: dict = field(default_factory=dict, metadata={"metavar": "JSON"})
    """Values that replace those of --generation-config, as JSON such as {"temperature": 0.6}. Default: none."""
    trust_request_chat_template: bool = field(default=False, metadata={"action": "store_true"})
    """Take the chat templates that requests bring along (chat_template). Default: refuse them."""
    enable_auto_tool_choice: bool = field(default=False, metadata={"action": "store_true"})
    """Let the model decide whether it calls tools (tool_choice auto); needs --tool-call-parser. Default: refuse it."""
    tool_call_parser: Optional[Literal["hermes", "llama3_json", "mistral"]] = None
    """Format in which the model writes tool calls: hermes (Hermes 2 Pro, Qwen 2.5 and 3), llama3_json, mistral.
    Default: none."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 listens on all."""
    port: int = 8000
    """TCP port to listen on; 0 takes a free one, which the log names."""
    api_key: list[str] = field(default_factory=list, metadata={"action": "append", "metavar": "KEY"})
    """Key that clients must send; may be given several times. Other users of the machine see it in ps: use
    --api-key-file or the variable DMC_API_KEY."""
    api_key_file: Optional[Path] = field(default=None, metadata={"metavar": "FILE"})
    """File with one API key per line."""
    max_num_queued_requests: int = field(default=1024, metadata={"type": number(int, 1), "metavar": "N"})
    """Completions that may wait for a place in the cache; further requests get status 503."""
    max_num_queued_tokens: Optional[int] = field(default=None, metadata={"type": number(int, 1), "metavar": "N"})
    """Prompt tokens of the waiting completions; further requests get status 503. Default: no bound."""
    max_body_bytes: Optional[int] = field(default=None, metadata={"type": number(int, 1), "metavar": "N"})
    """Bytes of the largest request body. Default: 1 MiB and 32 bytes per token of the context length."""
    shutdown_timeout: float = field(
        default=30.0, metadata={"type": number(float, 0, finite=True), "metavar": "SECONDS"}
    )
    """Seconds for running requests to finish after SIGTERM."""
    open_tokenizer: bool = field(default=False, metadata={"action": "store_true"})
    """Answer /tokenize and /detokenize without an API key, as vLLM does and `vllm bench serve` expects."""
    metrics_prefix: Literal["dmc", "vllm"] = "dmc"
    """Prefix of the names of Prometheus metrics; vllm suits dashboards made for vLLM."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity of log lines."""
    disable_access_log: bool = field(default=False, metadata={"action": "store_true"})
    """Write no log line for each request."""

    def keys(self) -> list[str]:
        """API keys from the flag, the file and the environment. Raises ``ValueError`` that does not show them."""
        found = [("--api-key", key) for key in self.api_key]
        if self.api_key_file is not None:
            source = f"--api-key-file {self.api_key_file}"
            found += [(source, key) for key in _read_keys(self.api_key_file)]
        if KEY_VARIABLE in os.environ:
            found.append((KEY_VARIABLE, os.environ[KEY_VARIABLE].strip()))
        allowed = set(string.ascii_letters + string.digits + string.punctuation)
        for source, key in found:
            if not key or not set(key) <= allowed:
                raise ValueError(f"{source}: a key is empty, or has a space or a character that is not ASCII")
        return [key for _, key in found]


def _read_keys(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--api-key-file {path} cannot be read: {type(error).__name__}") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ValueError(f"--api-key-file {path} holds no key; the server would be open to all")
    return keys


def shard(text: str) -> tuple[int, int]:
    """Parse ``i/n``: lines i, i + n, i + 2n, ... of the input, counted from 0."""
    index, slash, count = text.partition("/")
    if not slash or not index.isdecimal() or not count.isdecimal() or not int(index) < int(count):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of 0/n, 1/n ... (n-1)/n")
    return int(index), int(count)


@dataclass(frozen=True)
class BatchConfig(_ToolFlags):
    """Files and model of ``dmc batch``."""

    input_file: str = field(metadata={"flags": ("-i", "--input-file"), "metavar": "FILE"})
    """JSONL file of requests, plain or gzip."""
    output_file: str = field(metadata={"flags": ("-o", "--output-file"), "metavar": "FILE"})
    """JSONL file of responses; lines that it has already are not run again."""
    model: str = field(metadata={"metavar": "DIR"})
    """Hugging Face directory, plain, quantized or exported from a retrofit; or GGUF file."""
    served_model_name: Optional[str] = field(default=None, metadata={"metavar": "NAME"})
    """Model name in requests and responses. Default: --model as it is given."""
    chat_template: Optional[str] = field(default=None, metadata={"metavar": "FILE"})
    """File of the chat template, or the template itself. Default: the tokenizer's."""
    generation_config: str = field(default="auto", metadata={"metavar": "SOURCE"})
    """Source of the sampling parameters of lines that do not give them. auto: the model's generation_config.json,
    where there is one; vllm: OpenAI's defaults; or a directory that has the file. max_new_tokens in it bounds every
    line."""
    override_generation_config: dict = field(default_factory=dict, metadata={"metavar": "JSON"})
    """Values that replace those of --generation-config, as JSON such as {"temperature": 0.6}. Default: none."""
    enable_auto_tool_choice: bool = field(default=False, metadata={"action": "store_true"})
    """Let the model decide whether it calls tools (tool_choice auto); needs --tool-call-parser. Default: refuse it."""
    tool_call_parser: Optional[Literal["hermes", "llama3_json", "mistral"]] = None
    """Format in which the model writes tool calls: hermes (Hermes 2 Pro, Qwen 2.5 and 3), llama3_json, mistral.
    Default: none."""
    tokenizer: Optional[str] = field(default=None, metadata={"metavar": "DIR"})
    """Directory of the tokenizer. Default: the model's."""
    shard: tuple[int, int] = field(default=(0, 1), metadata={"type": shard, "metavar": "I/N"})
    """Part of the input to run: every N-th line, from line I, counted from 0. Each shard has an output file of its own.
    Default: 0/1, all lines."""
    seed: int = 0
    """Seed of lines without one, together with their custom_id: a line samples the same tokens in every run."""
    shutdown_timeout: float = field(default=0.0, metadata={"metavar": "SECONDS"})
    """Seconds for running requests to finish after SIGTERM or SIGUSR1; the next run does the rest."""
    disable_tqdm: bool = field(default=False, metadata={"action": "store_true"})
    """Show no progress bar."""


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _percentiles(text: str) -> list[float]:
    values = [float(part) for part in _parts(text)]
    if not all(0 <= value <= 100 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} has a number that is not within 0 and 100")
    return values


def _metrics(text: str) -> list[str]:
    if wrong := [name for name in _parts(text) if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(METRICS)}")
    return _parts(text)


def _bound(text: str) -> tuple[str, float]:
    name, colon, value = text.partition(":")
    try:
        if not colon or name not in ("ttft", "tpot", "e2el") or float(value) < 0:
            raise ValueError
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not such as ttft:100, tpot:20 or e2el:3000 (ms)") from None


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key.strip(), value.strip()


@dataclass(frozen=True)
class BenchServeConfig:
    """Server, requests and figures of ``dmc bench serve``. Names are those of ``vllm bench serve``."""

    base_url: Optional[str] = field(default=None, metadata={"group": "server", "metavar": "URL"})
    """URL of the server. Default: http://HOST:PORT."""
    host: str = "127.0.0.1"
    """Host of the server, where --base-url is not given."""
    port: int = 8000
    """Port of the server, where --base-url is not given."""
    backend: Literal["openai", "openai-chat"] = "openai"
    """API to load: openai for completions, openai-chat for chat completions."""
    endpoint: Optional[str] = field(default=None, metadata={"metavar": "PATH"})
    """Path of the requests. Default: /v1/completions or /v1/chat/completions, by --backend."""
    model: Optional[str] = field(default=None, metadata={"metavar": "NAME"})
    """Model name in the requests. Default: the first that the server lists."""
    header: list[tuple[str, str]] = field(
        default_factory=list, metadata={"type": _pair, "nargs": "+", "metavar": "KEY=VALUE"}
    )
    """Headers of every request. An API key is taken from the variable OPENAI_API_KEY."""
    insecure: bool = field(default=False, metadata={"action": "store_true"})
    """Do not check the server's certificate."""
    ready_check_timeout_sec: float = field(default=0.0, metadata={"type": number(float, 0), "metavar": "SECONDS"})
    """Seconds to wait until the server lists its models; 0 does not wait."""

    dataset_name: Literal["random", "custom"] = field(default="random", metadata={"group": "requests"})
    """Source of the prompts: random tokens, or custom: the prompts of --dataset-path."""
    dataset_path: Optional[str] = field(default=None, metadata={"metavar": "FILE"})
    """JSONL file of prompts, {"prompt": text or token ids} in each line."""
    tokenizer: Optional[str] = field(default=None, metadata={"metavar": "DIR"})
    """Directory of the tokenizer that random prompts are made with. Default: the server's /tokenize."""
    num_prompts: int = field(default=1000, metadata={"type": number(int, 1)})
    """Number of requests."""
    input_len: int = field(default=1024, metadata={"type": number(int, 1)})
    """Tokens per random prompt."""
    output_len: int = field(default=128, metadata={"type": number(int, 1)})
    """Tokens per completion: max_tokens of the requests."""
    random_range_ratio: float = field(default=0.0, metadata={"metavar": "R"})
    """Spread of random lengths, which lie in N (1 - R) to N (1 + R)."""
    ignore_eos: bool = field(default=False, metadata={"action": "store_true"})
    """Ask for completions of exactly --output-len tokens, whatever the end-of-sequence token says."""
    extra_body: dict = field(default_factory=dict, metadata={"metavar": "JSON"})
    """Further parameters of every request, as a JSON object."""
    seed: int = 0
    """Seed of the random prompts and of the arrival times."""
    temperature: Optional[float] = None
    """Sampling temperature of every request. Default: the server's."""
    top_p: Optional[float] = None
    """Nucleus sampling probability of every request. Default: the server's."""
    top_k: Optional[int] = None
    """Number of most likely tokens to sample from in every request. Default: the server's."""
    min_p: Optional[float] = None
    """Least probability of a token, relative to the most likely one's, in every request. Default: the server's."""
    presence_penalty: Optional[float] = None
    """Presence penalty of every request. Default: the server's."""
    frequency_penalty: Optional[float] = None
    """Frequency penalty of every request. Default: the server's."""
    repetition_penalty: Optional[float] = None
    """Repetition penalty of every request. Default: the server's."""

    request_rate: float = field(
        default=math.inf, metadata={"group": "traffic", "type": number(float, 0, above=True), "metavar": "RPS"}
    )
    """Requests per second that arrive, whatever the server does (open loop). Default: all at once."""
    burstiness: float = field(default=1.0, metadata={"type": number(float, 0, above=True)})
    """Shape of the gamma distribution of arrival gaps: 1 is a Poisson process, less is burstier, more is steadier."""
    max_concurrency: Optional[int] = field(default=None, metadata={"type": number(int, 1), "metavar": "N"})
    """Requests that may run at a time (closed loop). Default: no bound."""
    num_warmups: int = field(default=0, metadata={"type": number(int, 0)})
    """Requests to send before the measurement."""

    percentile_metrics: list[str] = field(
        default_factory=lambda: ["ttft", "tpot", "itl", "e2el"],
        metadata={"group": "result", "nargs": None, "type": _metrics, "metavar": "NAME,..."},
    )
    """Times to print percentiles of: ttft (to the first token), tpot (per output token), itl (between tokens), e2el (of
    the whole request). Default: all four."""
    metric_percentiles: list[float] = field(
        default_factory=lambda: [99.0], metadata={"nargs": None, "type": _percentiles, "metavar": "P,..."}
    )
    """Percentiles to print. Default: 99."""
    goodput: list[tuple[str, float]] = field(
        default_factory=list, metadata={"type": _bound, "nargs": "+", "metavar": "KEY:MS"}
    )
    """Bounds in milliseconds that a good request keeps, such as ttft:100 tpot:20, to count good requests per second."""
    save_result: bool = field(default=False, metadata={"action": "store_true"})
    """Write the figures to a JSON file."""
    save_detailed: bool = field(default=False, metadata={"action": "store_true"})
    """Write the times of every request, too."""
    append_result: bool = field(default=False, metadata={"action": "store_true"})
    """Append the figures to the file as a line of JSON."""
    result_dir: Optional[Path] = field(default=None, metadata={"metavar": "DIR"})
    """Directory of the file. Default: the current directory."""
    result_filename: Optional[str] = field(default=None, metadata={"metavar": "NAME"})
    """Name of the file. Default: {label}-{rate}qps-{model}-{time}.json."""
    label: Optional[str] = None
    """Name of the measurement in the file. Default: the backend."""
    metadata: list[tuple[str, str]] = field(
        default_factory=list, metadata={"type": _pair, "nargs": "+", "metavar": "KEY=VALUE"}
    )
    """Further entries of the file."""
    disable_tqdm: bool = field(default=False, metadata={"action": "store_true"})
    """Show no progress bar."""

    def check(self) -> None:
        """Raise ``ValueError`` for settings that do not go together."""
        if self.dataset_name == "custom" and self.dataset_path is None:
            raise ValueError("--dataset-name custom needs --dataset-path FILE")
        if not isinstance(self.extra_body, dict):
            raise ValueError(f"--extra-body is {json.dumps(self.extra_body)[:100]}; it must be a JSON object")
