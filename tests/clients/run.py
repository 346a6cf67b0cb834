"""Clients that others wrote against ``dmc serve``, each in an environment of its own: a script, not part of the tests.

    python tests/clients/run.py                        # all of them; needs PyPI and the npm registry, some 20 minutes
    python tests/clients/run.py --only openai-python-2 guidellm
    python tests/clients/run.py --keep build/clients --table docs/clients.md

Every client runs unmodified, with its defaults where it has such, against a small random model on the loopback. A row
of the table says what was asked of it. The exit status is that of the worst client.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

from helpers.structured import make_model  # noqa: E402

TEMPLATE = (
    "{% if tools %}<s>tools:{% for t in tools %}{{ t.function.name }} {% endfor %}</s>{% endif %}"
    "{% for m in messages %}<s>{{ m.role }} {{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}</tool_call>{% endfor %}<|im_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


@dataclass(frozen=True)
class Client:
    """A client and what is run of it."""

    asked: str
    """What it does here, for the table."""
    packages: Sequence[str]
    """Pinned packages of PyPI, or of the npm registry for a program in JavaScript."""
    command: Sequence[str]
    """Command in its environment; ``{url}``, ``{model}`` (its directory), ``{name}`` and ``{out}`` are filled in."""
    expects: str = "all well"
    """Regular expression that must be found in what it prints."""
    no_deps: Sequence[str] = ()
    """Packages that are installed without what they ask for."""
    offline: bool = True
    """Set HF_HUB_OFFLINE. aiperf 0.13.0 takes a directory for a repository's name then."""


OPENAI = "models, completions, chats of several turns, streams, parse(), tools and back, errors, responses"
CLIENTS: dict[str, Client] = {
    f"openai-python-{version[0]}": Client(
        OPENAI, [f"openai=={version}", "pydantic"], ["python", "{here}/openai_python.py"]
    )
    for version in ("1.109.1", "2.30.0", "3.57.0")
}
CLIENTS |= {
    "openai-node": Client(OPENAI, ["openai@7.59.0", "zod@4"], ["node", "{here}/openai_node.mjs"]),
    "vercel-ai": Client(
        "generateText, streamText and a tool over /v1/responses, its default",
        ["ai@7.0.173", "@ai-sdk/openai@4.0.118", "zod@4"],
        ["node", "{here}/vercel_ai.mjs"],
    ),
    "openai-agents": Client(
        "an agent with a function over /v1/responses, its default",
        ["openai-agents==0.24.0"],
        ["python", "{here}/agents_sdk.py"],
    ),
    "litellm": Client(
        "completion, stream, context overflow", ["litellm==1.110.2"], ["python", "{here}/litellm_client.py"]
    ),
    "langchain": Client(
        "invoke, stream, structured output, bound tools",
        ["langchain-openai==1.7.4"],
        ["python", "{here}/langchain_client.py"],
    ),
    "guidellm": Client(
        "benchmark with its defaults, synthetic prompts",
        ["guidellm==0.8.1"],
        [
            *("guidellm", "run", "--backend", "kind=openai_http,target={url},model={name}"),
            *("--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=20"),
            *("--tokenizer", "kind=huggingface_auto,model={model}"),
            *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"),
        ],
        expects="(?i)benchmark",
    ),
    "aiperf": Client(
        "profile with its defaults, synthetic prompts, streams",
        ["aiperf==0.13.0"],
        [
            *("aiperf", "profile", "--model", "{name}", "--url", "{url}", "--endpoint-type", "chat", "--streaming"),
            *("--tokenizer", "{model}", "--request-count", "20", "--concurrency", "4"),
            *("--synthetic-input-tokens-mean", "32", "--output-tokens-mean", "16", "--artifact-dir", "{out}/aiperf"),
        ],
        expects="(?i)time to first token",
        offline=False,
    ),
    "lm-eval": Client(
        "a local task, by log-likelihood of token ids",
        ["lm-eval[api]==0.4.13", "transformers==5.23.0"],
        [
            *("lm_eval", "--model", "local-completions", "--tasks", "letters", "--include_path", "{out}/tasks"),
            "--model_args",
            "model={name},base_url={url}/v1/completions,tokenizer={model},num_concurrent=2,max_retries=1",
        ],
        expects=r"\|letters",
    ),
    "vllm-bench": Client(
        "`vllm bench serve` with random prompts",
        [
            *("torch==2.13.0", "transformers==5.24.0", "aiohttp", "cachetools", "cbor2", "cloudpickle", "einops"),
            *("fastapi", "llguidance", "msgspec", "numpy", "openai", "openai-harmony", "orjson"),
            *("partial-json-parser", "pillow", "prometheus-client", "psutil", "py-cpuinfo", "pybase64", "pyzmq"),
            *("requests", "tqdm", "uvicorn", "uvloop", "watchfiles", "xgrammar"),
        ],
        [
            *("vllm", "bench", "serve", "--base-url", "{url}", "--model", "{name}", "--tokenizer", "{model}"),
            *("--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "16"),
            *("--num-prompts", "20", "--max-concurrency", "4"),
        ],
        expects=r"Failed requests:\s+0",
        no_deps=["vllm==0.33.0"],
    ),
}


def environment(client: Client, folder: Path) -> dict[str, str]:
    """Variables of a new environment with the client's packages. Raises ``CalledProcessError``."""
    bin_folder = folder / "bin"
    if client.command[0] == "node":
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["npm", "install", "--no-fund", "--no-audit", *client.packages], cwd=folder, check=True, stdout=-3
        )
        bin_folder = folder
    elif not (folder / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(bin_folder / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *client.packages], check=True)
        if client.no_deps:
            subprocess.run([*pip, "--no-deps", *client.no_deps], check=True)
        (folder / "installed").touch()
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    keep |= {"HF_HUB_OFFLINE": "1"} if client.offline else {}
    return {**keep, "PATH": f"{bin_folder}{os.pathsep}{keep['PATH']}", "OMP_NUM_THREADS": "1"}


def run(name: str, client: Client, folder: Path, url: str, model: Path, out: Path) -> tuple[bool, float, str]:
    """(well, seconds, what it printed) of one client."""
    try:
        variables = environment(client, folder)
    except subprocess.CalledProcessError as error:
        return False, 0.0, f"installing failed: {error}"
    variables |= {
        "BASE_URL": f"{url}/v1",
        "MODEL": "small",
        "OPENAI_API_KEY": "none",
        "NODE_PATH": f"{folder}/node_modules",
    }
    fills = {"url": url, "model": str(model), "name": "small", "out": str(out), "here": str(HERE)}
    command = [part.format(**fills) for part in client.command]
    if command[0] == "node":  # modules are looked for beside the program
        shutil.copy(command[1], folder / Path(command[1]).name)
        command[1] = str(folder / Path(command[1]).name)
    begin = time.monotonic()
    try:
        done = subprocess.run(command, env=variables, cwd=out, text=True, capture_output=True, timeout=600)
    except subprocess.TimeoutExpired as error:
        return False, time.monotonic() - begin, f"still running after 600 s: {error.stdout}"
    said = done.stdout + done.stderr
    well = done.returncode == 0 and re.search(client.expects, said) is not None
    return well, time.monotonic() - begin, said


def serve(model: Path, log: Path) -> tuple[subprocess.Popen, str]:
    """A server on a free port, and its address."""
    command = [sys.executable, "-m", "megatron.dmc.cli", "serve", str(model), "--load-format", "dummy", "--port", "0"]
    command += ["--served-model-name", "small", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=log.open("w"), stderr=subprocess.STDOUT)
    for _ in range(600):
        found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        if found:
            return server, found.group()
        if server.poll() is not None:
            break
        time.sleep(0.2)
    server.kill()
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


def task(folder: Path) -> None:
    """A multiple-choice task of a few lines for lm-eval."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"question": f"the {letter}", "choices": ["ab", "the", "name"], "answer": i % 3}
        for i, letter in enumerate("abcdef")
    ]
    (folder / "letters.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "letters.yaml").write_text(
        f"task: letters\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/letters.jsonl\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list:\n  - metric: acc\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=CLIENTS, metavar="NAME", help=f"clients to run: {', '.join(CLIENTS)}"
    )
    parser.add_argument("--keep", type=Path, help="folder that the environments are made in and stay in")
    parser.add_argument("--table", type=Path, help="Markdown file that the table is written to")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        model = Path(make_model(out / "model", template=TEMPLATE))
        task(out / "tasks")
        server, url = serve(model, out / "server.log")
        rows, bad = [], 0
        try:
            for name in args.only or CLIENTS:
                client = CLIENTS[name]
                well, seconds, said = run(name, client, (args.keep or out / "env").absolute() / name, url, model, out)
                bad += not well
                print(f"{'ok    ' if well else 'FAILED'} {name} ({seconds:.0f} s)", flush=True)
                if not well:
                    print("\n".join(f"    {line}" for line in said.splitlines()[-40:]), flush=True)
                versions = ", ".join(p for p in (*client.no_deps, *client.packages) if re.search(r"\d", p))
                rows.append(f"| {name} | {versions} | {client.asked} | {'yes' if well else '**no**'} |")
        finally:
            server.terminate()
            server.wait(60)
        traceback = "Traceback" in (out / "server.log").read_text()
        logged = "yes" if traceback else "none"
        print(f"{len(rows) - bad} of {len(rows)} clients; tracebacks in the server's log: {logged}")
        if args.table:
            head = "| client | version | asked | well |\n|---|---|---|---|\n"
            args.table.write_text(head + "\n".join(rows) + "\n")
    return int(bad > 0 or traceback)


if __name__ == "__main__":
    raise SystemExit(main())
