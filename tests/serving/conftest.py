"""Server that the tests of HTTP share: one for each file, settled after each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers.engines import Model
from helpers.serving import Running, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("server") / "m")


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Running]:
    with Running(model.path) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test on the shared server all pages are free and nobody waits."""
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").settle()
