"""Data: prompt files, tokenizers, batches, their order, and a built-in task.

Every invalid row of a file is reported before training starts; nothing is truncated, added or
downloaded silently; the batch at a position is a pure function of the position.
"""

from ntkrl.data.arithmetic_task import (
    characters,
    expression_prompts,
    save_tokenizer,
    solutions,
    supervised_set,
    targets,
)
from ntkrl.data.batches import (
    packed_batches,
    pad_rows,
    prompt_batch,
    supervised_batch,
    widened,
)
from ntkrl.data.chat import (
    apply_template,
    end_ids,
    read_template,
    render_conversations,
    render_prompts,
    turn_end_id,
)
from ntkrl.data.order import epoch_at, hold_out, rows_at, spread, take, weighted_rows_at
from ntkrl.data.prompts import PromptSet, join, read_prompts, read_set, validate_rows
from ntkrl.data.published import Rows, files_of, import_pyarrow, read_rows
from ntkrl.data.row_files import RowFile, row_file
from ntkrl.data.settings import DataSettings, split_names
from ntkrl.data.tokenizer_files import needed_rows
from ntkrl.data.tokens import (
    decode_completions,
    encode_completions,
    encode_plain,
    encode_prompts,
    encode_texts,
    load_tokenizer,
    stop_finder,
)
