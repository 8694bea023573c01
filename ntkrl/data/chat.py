"""Chat templates: by name or from a file, and the texts they write of conversations.

A row may have TRL's columns `tools` (a list of JSON schemas, or its JSON text) and
`chat_template_kwargs` (variables of the template, such as Qwen 3's `enable_thinking`).
"""

import dataclasses
import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

MARKER = "ntkrl"  # stands for an assistant's answer


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template.

    text: jinja2, as in transformers' `chat_template`.
    tokens: special tokens to add to the tokenizer, in this order.
    """

    text: str
    tokens: tuple[str, ...] = ()


# The format of princeton-pli/what-makes-good-rm for Pythia, without line breaks and without a
# start token. It writes a system message as an assistant's; this one rejects it.
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
    """Return a template by name ("pythia"), or from a path that ends in `.jinja`.

    Raises:
      ValueError: an unknown name, or a file that cannot be read.
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
    """Set a tokenizer's chat template and add its special tokens; return how many were new."""
    tokenizer.chat_template = template.text
    return tokenizer.add_special_tokens({"additional_special_tokens": list(template.tokens)})


def template_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of a template that rejects a conversation."""
    # jinja2 comes with transformers' chat templates, its only use
    from jinja2 import TemplateError

    return TemplateError, ValueError, TypeError


def template_options(columns: Mapping[str, Sequence[Any]], row: int) -> dict[str, Any]:
    """Return the template's keyword arguments of one row, from the columns that it has.

    Raises:
      ValueError: values of another form.
    """
    tools, variables = (
        columns[name][row] if name in columns else None
        for name in ("tools", "chat_template_kwargs")
    )
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"'tools' is not JSON: {error}") from error
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"'tools' is {type(tools).__name__}; expected a list of JSON schemas")
    if variables is not None and not isinstance(variables, dict):
        kind = type(variables).__name__
        raise ValueError(f"'chat_template_kwargs' is {kind}; expected an object")
    # an empty list would make some templates announce tools
    return {**({"tools": tools} if tools else {}), **(variables or {})}


def render_prompt(tokenizer: Any, messages: Sequence[Any], options: Mapping[str, Any]) -> str:
    """Return a conversation up to the start of the assistant's answer.

    Messages that end with the assistant's are continued: no end of turn, no new turn.

    Args:
      tokenizer: with a chat template.
      messages: at least one.
      options: from `template_options`.

    Raises:
      Exception: one of `template_errors`.
    """
    _check_options(tokenizer, options)
    continued = messages[-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(
        list(messages),
        add_generation_prompt=not continued,
        continue_final_message=continued,
        tokenize=False,
        **options,
    )


def render_conversation(tokenizer: Any, messages: Sequence[Any], options: Mapping[str, Any]) -> str:
    """Return a complete conversation; arguments and errors as `render_prompt`."""
    _check_options(tokenizer, options)
    return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)


def turn_end_id(tokenizer: Any) -> int | None:
    """Return the special token that the chat template writes after an assistant's answer.

    None without a template, or with one that writes none or rejects a plain question and answer.
    """
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": MARKER}, {"role": "assistant", "content": MARKER}]
    try:
        tail = render_conversation(tokenizer, turns, {}).rpartition(MARKER)[2].strip()
    except template_errors():
        return None
    added = tokenizer.added_tokens_decoder
    special = {added[token_id].content: token_id for token_id in added if added[token_id].special}
    starts = [content for content in special if tail.startswith(content)]
    return special[max(starts, key=len)] if starts else None


def end_ids(tokenizer: Any, generation: Collection[int], stops: Sequence[str]) -> tuple[int, ...]:
    """Return the tokens that end a completion.

    The end token of the tokenizer, the end of a turn in its chat template, those of the model's
    generation settings, and stop strings that are one special token.

    Args:
      tokenizer: from `load_tokenizer`.
      generation: token ids, from `models.generation_end_ids`.
      stops: stop strings.
    """
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    ids = [tokenizer.eos_token_id, turn_end_id(tokenizer), *generation]
    ids += [added[stop] for stop in stops if stop in added]
    return tuple(dict.fromkeys(each for each in ids if each is not None))


def _check_options(tokenizer: Any, options: Mapping[str, Any]) -> None:
    if not options:
        return
    reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"tools"}
    wrong = sorted(reserved & set(options))
    if wrong:
        raise ValueError(
            f"'chat_template_kwargs' sets {', '.join(wrong)}; expected variables of the template"
        )
