"""Settings of the server's connections: limits, TLS, proxies and browsers. Names are uvicorn's and vLLM's."""

import json
import resource
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from megatron.dmc.flags import number

RESERVED_FILES = 640
"""Descriptors that are kept free of connections: those accepted in one turn of the event loop, files, pipes."""


def _texts(text: str) -> list[str]:
    """Parse a JSON list of strings, as vLLM takes it, or strings with commas between them."""
    found = json.loads(text) if text.lstrip().startswith("[") else [part.strip() for part in text.split(",")]
    if not all(isinstance(part, str) and part for part in found):
        raise ValueError(f"{text!r} is no list of strings")
    return found


LIST = {"nargs": None, "type": _texts, "metavar": "LIST"}
_SECONDS = {"type": number(float, 0, above=True, finite=True), "metavar": "SECONDS"}


@dataclass(frozen=True)
class HTTPConfig:
    """Connections of ``dmc serve``."""

    max_connections: int = field(default=4096, metadata={"type": number(int, 1), "metavar": "N"})
    """Connections at a time; requests on further ones get status 503. Lowered to what the process may open."""
    timeout_keep_alive: float = field(default=5.0, metadata=_SECONDS)
    """Seconds after a response until an idle connection is closed."""
    timeout_header: float = field(default=10.0, metadata=_SECONDS)
    """Seconds for the headers of a request; later ones get status 408."""
    timeout_body: float = field(default=20.0, metadata=_SECONDS)
    """Seconds for the body of a request, and one more for every 16 KiB of it; later ones get status 408."""
    root_path: str = field(default="", metadata={"metavar": "PATH"})
    """Prefix of all paths that a proxy strips, such as /llm."""
    forwarded_allow_ips: list[str] = field(default_factory=list, metadata=LIST)
    """Addresses or networks of proxies whose X-Forwarded-For and X-Forwarded-Proto are believed, with commas between
    them. Default: none."""
    ssl_keyfile: Optional[Path] = field(default=None, metadata={"metavar": "FILE"})
    """Private key of --ssl-certfile, where that does not hold it."""
    ssl_certfile: Optional[Path] = field(default=None, metadata={"metavar": "FILE"})
    """Certificate for HTTPS, with its chain."""
    ssl_ca_certs: Optional[Path] = field(default=None, metadata={"metavar": "FILE"})
    """Certificates of the authorities that sign the certificates of clients."""
    ssl_cert_reqs: int = field(default=0, metadata={"choices": [0, 1, 2], "type": int})
    """Certificate of a client: 0 is not asked for, 1 is optional, 2 is required."""
    allowed_origins: list[str] = field(default_factory=list, metadata=LIST)
    """Origins of web pages that may call the server, such as ["https://example.org"] or ["*"]. Default: none."""
    allowed_methods: list[str] = field(default_factory=lambda: ["*"], metadata=LIST)
    """Methods that web pages may use. Default: all."""
    allowed_headers: list[str] = field(default_factory=lambda: ["*"], metadata=LIST)
    """Headers that web pages may send. Default: all."""
    allow_credentials: bool = field(default=False, metadata={"action": "store_true"})
    """Let web pages send cookies and other credentials of the browser."""

    def check(self) -> None:
        """Raise ``ValueError`` for settings that do not go together, or a certificate that cannot be loaded."""
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ValueError(f"--root-path is {self.root_path!r}; it must begin with / and not end with it")
        if self.ssl_certfile is None:
            if self.ssl_keyfile or self.ssl_ca_certs or self.ssl_cert_reqs:
                raise ValueError("--ssl-keyfile, --ssl-ca-certs and --ssl-cert-reqs need --ssl-certfile")
            return
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # The empty password: OpenSSL would ask a terminal for that of an encrypted key.
            context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile, password="")
            if self.ssl_ca_certs:
                context.load_verify_locations(self.ssl_ca_certs)
        except OSError as error:  # ssl.SSLError is one
            files = ", ".join(str(file) for file in (self.ssl_certfile, self.ssl_keyfile, self.ssl_ca_certs) if file)
            raise ValueError(f"the certificate cannot be loaded from {files}: {error.strerror or error}") from None

    def raise_file_limit(self) -> int:
        """Raise the process's limit of open files as far as needed. Returns the connections that fit below it."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = self.max_connections + RESERVED_FILES
        if soft != resource.RLIM_INFINITY and soft < wanted:
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        room = self.max_connections if soft == resource.RLIM_INFINITY else soft - RESERVED_FILES
        if room < 1:
            raise ValueError(f"the process may open {soft} files; at least {RESERVED_FILES + 1} are needed (ulimit -n)")
        return min(self.max_connections, room)
