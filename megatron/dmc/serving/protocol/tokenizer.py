"""Bodies of ``/tokenize`` and ``/detokenize``."""

from typing import Annotated, Any, ClassVar, Optional, Union

from pydantic import Discriminator, Tag

from megatron.dmc.serving.protocol import dialect
from megatron.dmc.serving.protocol.base import ModelField, TokenIds
from megatron.dmc.serving.protocol.chat import ChatFields


class TokenizeRequest(ModelField):
    """Body of ``POST /tokenize`` for a text."""

    prompt: str
    """Text to tokenize."""
    add_special_tokens: Optional[bool] = True
    """Let the tokenizer add special tokens such as BOS."""
    return_token_strs: Optional[bool] = False
    """Return the text of every token, too."""


class TokenizeChatRequest(ModelField, ChatFields):
    """Body of ``POST /tokenize`` for the messages of a chat."""

    unsupported: ClassVar = dialect.TOKENIZE_CHAT

    return_token_strs: Optional[bool] = False
    """Return the text of every token, too."""


def _tokenize_kind(body: Any) -> str:
    """Tag of the body's type, which is no name of a parameter: tags stand among these in pydantic's errors."""
    of_chat = isinstance(body, TokenizeChatRequest) or isinstance(body, dict) and "messages" in body
    return "<chat>" if of_chat else "<text>"


AnyTokenizeRequest = Annotated[
    Union[Annotated[TokenizeRequest, Tag("<text>")], Annotated[TokenizeChatRequest, Tag("<chat>")]],
    Discriminator(_tokenize_kind),
]


class DetokenizeRequest(ModelField):
    """Body of ``POST /detokenize``."""

    tokens: TokenIds
    """Token ids to decode."""

    def _sent_name(self, param: str) -> str:
        return "tokens" if param == "prompt" else param
