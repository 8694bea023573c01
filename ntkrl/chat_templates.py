"""Rendering of chat templates from model directories, which nobody has read, in a worker process.

They are programs: jinja's sandbox keeps them from files and from Python's internals, but not from
endless loops or texts of gigabytes. The process has limits of time and memory, and calls the same
function of transformers as a tokenizer does. It starts without JAX.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ntkrl import workers
from ntkrl.json_values import from_json, to_json

SECONDS = 20.0
"""Time limit of ROWS conversations."""
ROWS = 64
START_SECONDS = 120.0
"""Seconds that the import of transformers may take."""
MEMORY = 1 << 30
"""Bytes that rendering may allocate."""
CHARACTERS, GROWTH = 1_000_000, 16
"""Characters that a template may write of any conversation, and per character of one."""


Template = str | Mapping[str, str]
"""A tokenizer's `chat_template` in transformers: jinja2, or several by name."""


class Conversation(NamedTuple):
    """Input of a template.

    messages: at least one.
    options: further keyword arguments of transformers' `apply_chat_template`.
    """

    messages: Sequence[Any]
    options: Mapping[str, Any]


class TemplateLimitError(ValueError):
    """A template takes too long, or too much memory."""


def import_transformers() -> None:
    """Import transformers without its notice that PyTorch is missing, which is not needed here."""
    variable = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        import transformers  # noqa: F401
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


class _Renderer:
    """The process, which starts with the first request and lasts as long as this one."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.worker: workers.Worker | None = None

    def request(self, content: bytes) -> bytes:
        """Return the answer to a request; raise WorkerError after which the next one starts."""
        with self.lock:
            if self.worker is None or not self.worker.running:
                self.worker = workers.Worker(__name__)
                self.worker.request(b"", START_SECONDS)
            return self.worker.request(content, SECONDS)


_RENDERER = _Renderer()


def render(
    template: Template, variables: Mapping[str, Any], conversations: Sequence[Conversation]
) -> Iterator[str | ValueError]:
    """Yield the text that a template writes of each conversation, or why it writes none.

    Args:
      template: of a tokenizer, see `Template`.
      variables: of the template, such as `eos_token`; a conversation's options replace them.
      conversations: any number.

    Raises:
      TemplateLimitError: the limits were exceeded; the message continues a sentence.
    """
    for first in range(0, len(conversations), ROWS):
        rows = conversations[first : first + ROWS]
        encoded = [_encode(row.messages, {**variables, **row.options}) for row in rows]
        valid = [row for row in encoded if not isinstance(row, ValueError)]
        try:
            answers = iter(json.loads(_RENDERER.request(json.dumps([template, valid]).encode())))
        except workers.WorkerTimeoutError as error:
            raise TemplateLimitError(
                f"takes more than {SECONDS:g} s for {len(rows)} rows"
            ) from error
        except workers.WorkerError as error:
            raise TemplateLimitError(f"cannot be rendered: its process {error}") from error
        for row in encoded:
            text, problem = ("", str(row)) if isinstance(row, ValueError) else next(answers)
            yield text if problem is None else ValueError(problem)


def _encode(messages: Sequence[Any], options: Mapping[str, Any]) -> Any:
    try:
        return to_json([list(messages), dict(options)])
    except (TypeError, RecursionError) as error:
        return ValueError(f"{error}; use text, numbers, lists and objects")


def open_service(arguments: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
    """Return an empty description and the function that renders (see `workers.Worker`)."""
    import_transformers()
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    # no vocabulary and no special tokens: the run sends those as variables
    tokenizer = PreTrainedTokenizerBase()
    workers.limit_memory(MEMORY)

    def render_all(request: bytes) -> bytes:
        tokenizer.chat_template, rows = json.loads(request)
        return json.dumps([_render(tokenizer, from_json(row)) for row in rows]).encode()

    return b"", render_all


def _render(tokenizer: Any, row: Any) -> tuple[str, str | None]:
    """Return a text and None, or "" and the problem."""
    messages, options = row
    limit = CHARACTERS + GROWTH * len(json.dumps(to_json(row)))
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except MemoryError:
        return "", f"it needs more than {MEMORY >> 20} MiB of memory"
    except Exception as error:
        name = type(error).__name__
        return "", str(error) if name == "TemplateError" else f"{name}: {error}"
    if len(text) > limit:
        return "", f"it writes {len(text)} characters, and {limit} are allowed"
    return text, None
