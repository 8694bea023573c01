"""Chat templates: by name or from a file, and the texts they write of conversations.

A row may have TRL's columns `tools` (a list of JSON schemas, or its JSON text) and
`chat_template_kwargs` (variables of the template, such as Qwen 3's `enable_thinking`).
"""

import dataclasses
import inspect
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ntkrl import chat_templates, json_files
from ntkrl.messages import listed

MARKER = "ntkrl"  # stands for an assistant's answer


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template.

    text: jinja2, as in transformers' `chat_template`.
    tokens: special tokens to add to the tokenizer, in this order.
    source: its name or file.
    """

    text: str
    tokens: tuple[str, ...] = ()
    source: str = ""


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
    "pythia",
)
TEMPLATES = {"pythia": PYTHIA}
_SOURCES: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
"""Tokenizers whose template is from `apply_template`, and its source."""


class RejectedError(ValueError):
    """A chat template rejects conversations."""


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
        return Template(Path(name).read_text(encoding="utf-8"), source=name)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"model.template {name} cannot be read: {error}.") from error


def apply_template(tokenizer: Any, template: Template) -> int:
    """Set a tokenizer's chat template and add its special tokens; return how many were new."""
    tokenizer.chat_template = template.text
    _SOURCES[tokenizer] = template.source
    return tokenizer.add_special_tokens({"additional_special_tokens": list(template.tokens)})


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
            tools = json_files.parse_json(tools)
        except ValueError as error:
            raise ValueError(f"'tools' is not JSON: {error}") from error
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"'tools' is {type(tools).__name__}; expected a list of JSON schemas")
    if variables is not None and not isinstance(variables, dict):
        kind = type(variables).__name__
        raise ValueError(f"'chat_template_kwargs' is {kind}; expected an object")
    # an empty list would make some templates announce tools
    return {**({"tools": tools} if tools else {}), **(variables or {})}


def render_prompts(
    tokenizer: Any,
    conversations: Sequence[Sequence[Any]],
    columns: Mapping[str, Sequence[Any]],
    source: str,
) -> list[str]:
    """Return conversations up to the start of the assistant's answer.

    Messages that end with the assistant's are continued: no end of turn, no new turn.

    Args:
      tokenizer: with a chat template.
      conversations: lists of at least one message.
      columns: of the rows, for `template_options`.
      source: of the conversations, for messages.

    Raises:
      ValueError: rows that the template rejects, all of them in one message, or a template that
        exceeds the limits of `ntkrl.chat_templates`.
    """

    def options(messages: Sequence[Any]) -> dict[str, bool]:
        continued = messages[-1]["role"] == "assistant"
        return {"add_generation_prompt": not continued, "continue_final_message": continued}

    return _render(tokenizer, conversations, columns, source, options)


def render_conversations(
    tokenizer: Any,
    conversations: Sequence[Sequence[Any]],
    columns: Mapping[str, Sequence[Any]],
    source: str,
) -> list[str]:
    """Return complete conversations; arguments and errors as `render_prompts`."""
    return _render(tokenizer, conversations, columns, source, lambda messages: {})


def _render(
    tokenizer: Any,
    conversations: Sequence[Sequence[Any]],
    columns: Mapping[str, Sequence[Any]],
    source: str,
    mode: Callable[[Sequence[Any]], dict[str, bool]],
) -> list[str]:
    requests: list[chat_templates.Conversation] = []
    problems: dict[int, Exception] = {}
    for row, messages in enumerate(conversations):
        try:
            options = template_options(columns, row)
            _check_options(tokenizer, options)
            requests.append(chat_templates.Conversation(messages, mode(messages) | options))
        except (ValueError, TypeError, LookupError) as error:
            problems[row] = error
    template, place = tokenizer.chat_template, _place(tokenizer)
    texts: list[str] = []
    results: Iterator[str | Exception]
    try:
        if template in [known.text for known in TEMPLATES.values()]:
            results = (_render_here(tokenizer, request) for request in requests)
        else:
            variables = tokenizer.special_tokens_map
            results = chat_templates.render(template, variables, requests)
        for row in range(len(conversations)):
            result = problems[row] if row in problems else next(results)
            if isinstance(result, Exception):
                problems[row] = result
            else:
                texts.append(result)
    except chat_templates.TemplateLimitError as error:
        raise ValueError(f"{source}: the chat template of {place} {error}.") from error
    if problems:
        message = rejected_rows(f"{source}: the chat template rejects", conversations, problems)
        raise RejectedError(f"{message}\nThe template is that of {place}.")
    return texts


def _render_here(tokenizer: Any, conversation: chat_templates.Conversation) -> str | Exception:
    """Render by a template of this module, without another process."""
    messages, options = list(conversation.messages), conversation.options
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:
        return error


def rejected_rows(message: str, items: Sequence[Any], problems: Mapping[int, Exception]) -> str:
    """Return `message`, the number of rows with problems, and each of them with its item."""
    rows = [f"row {row}, {items[row]!r:.60}: {problems[row]}" for row in sorted(problems)]
    return f"{message} {len(rows)} rows{listed(rows)}"


def _place(tokenizer: Any) -> str:
    """Return the name or file of a tokenizer's chat template."""
    if tokenizer in _SOURCES:
        return f"model.template {_SOURCES[tokenizer]}"
    directory = Path(tokenizer.name_or_path)
    names = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
    files = [directory / name for name in names if (directory / name).is_file()]
    return str(files[0] if files else directory)


def turn_end_id(tokenizer: Any) -> int | None:
    """Return the special token that the chat template writes after an assistant's answer.

    None without a template, or with one that writes none or rejects a plain question and answer.

    Raises:
      ValueError: the template exceeds the limits of `ntkrl.chat_templates`.
    """
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": MARKER}, {"role": "assistant", "content": MARKER}]
    try:
        (text,) = render_conversations(tokenizer, [turns], {}, "a question and its answer")
    except RejectedError:
        return None
    tail = text.rpartition(MARKER)[2].strip()
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
