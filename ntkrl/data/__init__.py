"""Prompts in, token arrays out: files, tokenizer, batch order, and a built-in task.

Promises: every wrong row of a file is named before training starts; nothing is cut, added or
downloaded silently; the batch at a position is a pure function of the position. Imports only
`ntkrl.types` from this package.
"""

from ntkrl.data.batches import prompt_batch, supervised_batch, widened
from ntkrl.data.expressions import (
    characters,
    save_tokenizer,
    solutions,
    supervised_set,
    targets,
)
from ntkrl.data.expressions import prompt_set as expression_prompts
from ntkrl.data.order import epoch_at, hold_out, rows_at, spread, take, weighted_rows_at
from ntkrl.data.packing import packed_batches
from ntkrl.data.prompts import PromptSet, checked, join, read_prompts, read_set
from ntkrl.data.published import Rows, files_of, needed_arrow, read_rows
from ntkrl.data.settings import DataSettings, split_names
from ntkrl.data.templates import apply_template, read_template
from ntkrl.data.tokens import (
    decode_completions,
    encode_completions,
    encode_prompts,
    load_tokenizer,
    stop_finder,
)

__all__ = [
    "DataSettings",
    "PromptSet",
    "Rows",
    "apply_template",
    "characters",
    "checked",
    "decode_completions",
    "encode_completions",
    "encode_prompts",
    "epoch_at",
    "expression_prompts",
    "files_of",
    "hold_out",
    "join",
    "load_tokenizer",
    "needed_arrow",
    "packed_batches",
    "prompt_batch",
    "read_prompts",
    "read_rows",
    "read_set",
    "read_template",
    "rows_at",
    "save_tokenizer",
    "split_names",
    "spread",
    "stop_finder",
    "supervised_batch",
    "solutions",
    "supervised_set",
    "take",
    "targets",
    "weighted_rows_at",
    "widened",
]
