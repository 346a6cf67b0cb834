"""Chat templates in a process of their own, which can be given up: a template may loop or make gigabytes of text.

A template is a program of whoever made the model, or of a client where ``--trust-request-chat-template`` says so. Jinja
has no bound on time or memory, and Python cannot stop a thread. The process renders one chat at a time with
transformers' own ``apply_chat_template``, without torch and without the model's tokenizer.
"""

import functools
import json
import resource
import socket
import subprocess
import sys
import threading
import time
from typing import Any, Optional

SECONDS = 5.0
"""Time for one chat."""
START_SECONDS = 120.0
"""Time for the process to start, which imports transformers."""
MEMORY_BYTES = 1 << 30
"""Address space of the process beyond what it has at its start."""


class TemplateProcess:
    """Process that renders chats. It is started when it is needed, and again after one that was given up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._socket: Optional[socket.socket] = None

    def render(self, messages: list[Any], arguments: dict[str, Any], most: int) -> str:
        """Text of a chat.

        Args:
            messages: the chat, as JSON allows it.
            arguments: further ones of ``apply_chat_template``, with ``chat_template``.
            most: characters of the longest text.

        Raises:
            ValueError: what the template says about the messages, or that it takes too much time or memory.
        """
        request = json.dumps([messages, arguments, most]).encode() + b"\n"
        with self._lock:
            self._start()
            try:
                reply = json.loads(self._exchange(request, SECONDS))
            except TimeoutError:
                self._give_up()
                raise ValueError(f"it does not end within {SECONDS:g} s") from None
            except (OSError, EOFError, ValueError):
                self._give_up()
                raise ValueError("the process that renders it has ended") from None
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply["text"]

    def start(self) -> None:
        """Start the process, so that the first chat does not wait for it."""
        with self._lock:
            self._start()

    def close(self) -> None:
        """End the process, also while it renders."""
        if self._process is not None:
            self._process.kill()

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._give_up()
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", __name__]
            # In a session of its own: a Ctrl+C at the terminal is for the server, which has requests to finish.
            self._process = subprocess.Popen(command, stdin=theirs, stdout=theirs, start_new_session=True)
        self._socket = ours
        try:
            self._exchange(b"", START_SECONDS)
        except (OSError, EOFError):
            self._give_up()
            raise ValueError("the process that renders it does not start") from None

    def _exchange(self, request: bytes, seconds: float) -> bytes:
        """Send a request and receive the line that answers it. Raises ``TimeoutError`` and ``EOFError``."""
        assert self._socket is not None
        deadline, parts = time.monotonic() + seconds, []
        self._socket.settimeout(seconds)
        self._socket.sendall(request)
        while not parts or not parts[-1].endswith(b"\n"):
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            parts.append(self._socket.recv(1 << 20))
            if not parts[-1]:
                raise EOFError
        return b"".join(parts)

    def _give_up(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None


@functools.cache
def shared() -> TemplateProcess:
    """The one of this process; it ends with it."""
    return TemplateProcess()


def bounded(tokenizer: Any, most: int) -> Any:
    """Let the chats of a tokenizer be rendered by the shared process. Returns the tokenizer.

    Args:
        tokenizer: of transformers; one with an ``apply_chat_template`` of its own class is left alone.
        most: characters of the longest text.
    """
    from transformers import PreTrainedTokenizerBase

    original = getattr(type(tokenizer), "apply_chat_template", None)
    if original is not PreTrainedTokenizerBase.apply_chat_template:
        return tokenizer

    @functools.wraps(tokenizer.apply_chat_template)
    def apply_chat_template(conversation: list[Any], **arguments: Any) -> str:
        if arguments.get("chat_template") is None:
            arguments["chat_template"] = tokenizer.get_chat_template(tools=arguments.get("tools"))
        return shared().render(conversation, {**tokenizer.special_tokens_map, **arguments}, most)

    tokenizer.apply_chat_template = apply_chat_template
    return tokenizer


def _serve() -> None:
    """Render chats, one JSON line each, until the other side is gone."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    blank = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    lines = socket.socket(fileno=0).makefile("rwb")
    sizes = open("/proc/self/statm").read().split() if sys.platform == "linux" else ["0"]
    most_memory = int(sizes[0]) * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most_memory, most_memory))
    lines.write(b"{}\n")
    lines.flush()
    while line := lines.readline():
        messages, arguments, most = json.loads(line)
        lines.write(json.dumps(_reply(blank, messages, arguments, most)).encode() + b"\n")
        lines.flush()


def _reply(blank: Any, messages: list[Any], arguments: dict[str, Any], most: int) -> dict[str, str]:
    try:
        text = blank.apply_chat_template(messages, **arguments)
    except MemoryError:
        return {"error": f"it takes more than {MEMORY_BYTES >> 20} MiB"}
    except Exception as error:  # templates raise what they like
        return {"error": f"{error}"}
    return {"text": text} if len(text) <= most else {"error": f"it makes more than {most} characters"}


if __name__ == "__main__":
    _serve()
