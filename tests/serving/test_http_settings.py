"""HTTPS, web pages of other origins, and a proxy that strips a prefix, each with a client of the kind that needs it."""

from __future__ import annotations

import json
import logging
import shutil
import ssl
import subprocess
from pathlib import Path

import httpx2
import openai
import pytest
from helpers.engines import Model
from helpers.serving import COMPLETIONS, GREEDY, Running

from megatron.dmc.serving.http_config import HTTPConfig

BODY = {"model": "m", "prompt": "ab"} | GREEDY


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(certificate, key) of this host, signed by itself."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl on PATH")
    directory = tmp_path_factory.mktemp("certificate")
    found = directory / "cert.pem", directory / "key.pem"
    new = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*new.split(), "-out", found[0], "-keyout", found[1]], check=True, capture_output=True)
    return found


def client_of(server: Running, context: ssl.SSLContext) -> openai.OpenAI:
    """OpenAI's client over HTTPS."""
    url = f"https://127.0.0.1:{server.port}/v1"
    return openai.OpenAI(
        base_url=url, api_key="none", max_retries=0, http_client=openai.DefaultHttpxClient(verify=context)
    )


def test_https(model: Model, certificate: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    """Answers and streams over TLS; a client that does not know the certificate, and one without TLS, get nothing and
    disturb nobody.
    """
    cert, key = certificate
    http = HTTPConfig(ssl_certfile=cert, ssl_keyfile=key)
    http.check()
    with caplog.at_level(logging.INFO, "megatron.dmc"), Running(model.path, http=http) as server:
        known = client_of(server, ssl.create_default_context(cafile=cert))
        text = known.completions.create(**BODY).choices[0].text
        assert "".join(chunk.choices[0].text for chunk in known.completions.create(**BODY, stream=True)) == text
        with pytest.raises(openai.APIConnectionError):
            client_of(server, ssl.create_default_context()).completions.create(**BODY)
        with pytest.raises((OSError, httpx2.HTTPError)):
            server.ask(COMPLETIONS, BODY)
        assert known.completions.create(**BODY).choices[0].text == text
        server.settle()
    assert f"on https://127.0.0.1:{server.port}" in caplog.text


def test_certificates_of_clients(model: Model, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    http = HTTPConfig(ssl_certfile=cert, ssl_keyfile=key, ssl_ca_certs=cert, ssl_cert_reqs=ssl.CERT_REQUIRED)
    http.check()
    with Running(model.path, http=http) as server:
        context = ssl.create_default_context(cafile=cert)
        with pytest.raises(openai.APIConnectionError):
            client_of(server, context).models.list()
        context.load_cert_chain(cert, key)
        assert [card.id for card in client_of(server, context).models.list()] == ["m"]


def test_an_encrypted_key_is_refused(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    """By name, and without asking the terminal for its password."""
    cert, key = certificate
    encrypt = ["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:x", "-out", tmp_path / "key.pem"]
    subprocess.run(encrypt, check=True, capture_output=True)
    with pytest.raises(ValueError, match=f"the certificate cannot be loaded from {cert}, {tmp_path}/key.pem"):
        HTTPConfig(ssl_certfile=cert, ssl_keyfile=tmp_path / "key.pem").check()


def test_pages_of_other_origins(model: Model) -> None:
    """A browser asks for leave without a key, and shows a page the answers, errors too; other origins get no leave."""
    ours, theirs = "https://example.org", "https://example.com"
    leave = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    key = {"Authorization": "Bearer sk-1"}
    with Running(model.path, keys=("sk-1",), http=HTTPConfig(allowed_origins=[ours])) as server:
        status, headers, _ = server.ask(COMPLETIONS, headers={"Origin": ours} | leave, method="OPTIONS")
        assert status == 200 and headers["access-control-allow-origin"] == ours
        assert "POST" in headers["access-control-allow-methods"]
        assert {"authorization", "content-type"} <= set(headers["access-control-allow-headers"].lower().split(","))
        for sent, expected in ((key, 200), ({}, 401)):
            status, headers, _ = server.ask(COMPLETIONS, BODY, headers={"Origin": ours} | sent)
            assert status == expected and headers["access-control-allow-origin"] == ours
            assert "x-request-id" in headers and headers["access-control-expose-headers"] == "x-request-id"
        status, headers, _ = server.ask(COMPLETIONS, headers={"Origin": theirs} | leave, method="OPTIONS")
        assert status == 400 and "access-control-allow-origin" not in headers
        assert "access-control-allow-origin" not in server.ask(COMPLETIONS, BODY, headers={"Origin": theirs} | key)[1]
    with Running(model.path) as server:
        status, headers, _ = server.ask(COMPLETIONS, headers={"Origin": ours} | leave, method="OPTIONS")
        assert status == 405 and "access-control-allow-origin" not in headers


def test_behind_a_proxy_that_strips_a_prefix(model: Model) -> None:
    """Paths come without the prefix; the schema names it, and keys, open paths and metrics know nothing of it."""
    key = {"Authorization": "Bearer sk-1"}
    with Running(model.path, keys=("sk-1",), http=HTTPConfig(root_path="/llm")) as server:
        assert server.ask("/health")[0] == 200
        assert server.ask("/v1/models/", headers=key)[0] == 200
        assert server.ask(COMPLETIONS, BODY)[0] == 401
        assert server.ask(COMPLETIONS, BODY, headers=key)[0] == 200
        for path in ("/llm/health", "/llm/v1/models"):  # a proxy that does not strip it
            assert server.ask(path)[0] == 401 and server.ask(path, headers=key)[0] == 404
        schema = json.loads(server.ask("/openapi.json", headers=key)[2])
        assert schema["servers"] == [{"url": "/llm"}] and COMPLETIONS in schema["paths"]
        found = server.ask("/metrics", headers=key)[2]
        assert f'handler="{COMPLETIONS}"' in found and "/llm" not in found
