"""Chat templates: where one comes from, what it may be given, and whether it walks over the parts of a message."""

import functools
import inspect
import re
from pathlib import Path
from typing import Any

import jinja2
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Variables that transformers' ``apply_chat_template`` gives every template itself (5.23)."""


def load_chat_template(source: str) -> str:
    """Template in a file, or ``source`` itself where it is one. Raises ``ValueError`` when it is neither."""
    path = Path(source)
    try:
        is_file = path.is_file()
    except OSError:  # a name that is too long
        is_file = False
    if is_file:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--chat-template {source} cannot be read: {error}") from None
    elif "{{" in source or "{%" in source:
        text = source
    else:
        raise ValueError(f"--chat-template {source} is neither a file nor a Jinja template")
    try:
        _parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"--chat-template: line {error.lineno}: {error.message}") from None
    return text


def reserved_variables(tokenizer: Any) -> frozenset[str]:
    """Names that ``chat_template_kwargs`` may not hold: the arguments of the tokenizer's ``apply_chat_template``, which
    would change how the template is applied, and what it gives the template itself."""
    return TEMPLATE_VARIABLES | set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"kwargs"}


def _parse(template: str) -> jinja2.nodes.Template:
    # transformers has a block of its own, which leaves no trace in the text.
    plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)
    return ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)


@functools.lru_cache(maxsize=8)
def wants_parts(template: str) -> tuple[bool, bool]:
    """(takes lists, takes texts): whether a template walks over the parts of a message's ``content``, and whether
    it also takes one that is a text.

    A template that does neither knows texts only. vLLM tells by the same signs (``chat_template_content_format`` auto,
    0.33): a loop over ``message.content``, or over a variable that was set to it.
    """
    try:
        tree = _parse(template)
    except (jinja2.TemplateSyntaxError, RecursionError):
        return False, True
    content: set[str] = set()  # names of variables that hold the content
    for node in tree.find_all(jinja2.nodes.Assign):
        if isinstance(node.target, jinja2.nodes.Name) and _is_content(node.node, content):
            content.add(node.target.name)
    walks = any(_is_content(loop.iter, content) for loop in tree.find_all(jinja2.nodes.For))
    tests = {test.name for test in tree.find_all(jinja2.nodes.Test)}
    return walks, not walks or bool(tests & {"string", "iterable", "sequence", "mapping"})


def _is_content(node: jinja2.nodes.Node, names: set[str]) -> bool:
    """Whether an expression is a message's content, filtered or not."""
    if isinstance(node, jinja2.nodes.Filter) and node.node is not None:
        return _is_content(node.node, names)
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, jinja2.nodes.Getitem):
        return isinstance(node.arg, jinja2.nodes.Const) and node.arg.value == "content"
    return isinstance(node, jinja2.nodes.Name) and node.name in names
