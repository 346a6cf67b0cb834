"""The error of a request that the engine cannot take."""

from typing import Optional


class InvalidRequest(ValueError):
    """A request that is wrong and will be wrong the next time; the message names the value and the fix.

    Args:
        message: what is wrong, for the user.
        param: name of the parameter at fault as in :class:`SamplingParams`, or ``prompt``.
        code: OpenAI's error code, such as ``context_length_exceeded``.
    """

    def __init__(self, message: str, param: Optional[str] = None, code: Optional[str] = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code
