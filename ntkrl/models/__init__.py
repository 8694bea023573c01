"""Networks: Hugging Face directories → (Policy, params) and back. The only room that imports flax.

A family file reads its config.json into `decoder.Config` and lists its tensor names; `policy` turns
the modules into pure functions. Other rooms see nested dicts of arrays.
"""

from ntkrl.models.hf_export import check_target
from ntkrl.models.hf_files import HUB_NAME, generation_end_ids, local_directory, read_config
from ntkrl.models.layers import REMAT
from ntkrl.models.lora import CONFIG_FILE as ADAPTER_CONFIG
from ntkrl.models.lora import Lora, is_adapter
from ntkrl.models.model_card import Training
from ntkrl.models.policy import ModelOptions, build, describe, resized, untied
from ntkrl.models.pretrained import (
    check,
    export,
    export_adapter,
    load,
    stored_tensors,
    tokenizer_directory,
)
from ntkrl.models.scorers import (
    NewHead,
    check_scorer,
    describe_scorer,
    export_scorer,
    load_scorer,
    write_new_scorer,
)
from ntkrl.models.settings import ModelSettings
from ntkrl.models.whitening import whitened
