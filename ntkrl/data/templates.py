"""Chat templates that a tokenizer can be given, with the special tokens they need."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template.

    text: jinja2, as in transformers' `chat_template`.
    tokens: special tokens to be added to the tokenizer, in this order.
    """

    text: str
    tokens: tuple[str, ...] = ()


# The format of princeton-pli/what-makes-good-rm for Pythia, without line breaks and without a token
# at the start. There a system message is written as an assistant's; here it is refused.
PYTHIA = Template(
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('roles are user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    ("<|user|>", "<|assistant|>"),
)

TEMPLATES = {"pythia": PYTHIA}


def read_template(name: str) -> Template:
    """Return a template by name, or from a file.

    Args:
      name: "pythia", or a path that ends in `.jinja`.

    Raises:
      ValueError: neither of the two, or a file that cannot be read.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not name.endswith(".jinja"):
        raise ValueError(
            f"model.template {name!r} is unknown; give {', '.join(TEMPLATES)} or a .jinja file."
        )
    try:
        return Template(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"model.template {name} cannot be read: {error}.") from error


def apply_template(tokenizer: Any, template: Template) -> int:
    """Give a tokenizer a template and its special tokens.

    Returns:
      How many tokens were new to the tokenizer.
    """
    tokenizer.chat_template = template.text
    return tokenizer.add_special_tokens({"additional_special_tokens": list(template.tokens)})
