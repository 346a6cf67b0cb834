"""Route of the web application that bounds a request's elements before its types are checked."""

import gc
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from megatron.dmc.serving.errors import APIError
from megatron.dmc.serving.limits import check


class BoundedRoute(APIRoute):
    """Endpoint whose JSON body is checked by :func:`limits.check` before FastAPI validates it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler

        async def bounded(request: Request) -> Response:
            await request.body()
            gc.disable()  # collecting again and again what is being made takes twice as long as making it
            try:
                # Kept in the request, so that FastAPI does not decode it again.
                check(await request.json(), request.app.state.max_model_len)
            except (ValueError, RecursionError):
                pass  # not JSON: FastAPI answers it
            except APIError:
                request._json = None  # freed before the next collection looks at it
                raise
            finally:
                gc.enable()
            return await handler(request)

        return bounded
