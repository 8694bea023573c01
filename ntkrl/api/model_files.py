"""The model of a call as files: runs start from a directory, so that they can be resumed."""

import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ntkrl import models, runtime, trees
from ntkrl.messages import path_text, quoted
from ntkrl.numerics import GIB
from ntkrl.types import Params, Policy

FORMS = (
    "a directory of Hugging Face files, a hub name such as 'EleutherAI/pythia-160m', a GGUF file, "
    "or the (policy, params) of ntkrl.load"
)
COMPARED_GIB = 4.0
"""Params above this size are exported without reading their source to compare them."""


def read_model(model: Any) -> str | tuple[Policy, Params]:
    """Return the path or name of a model, or its policy and params.

    Args:
      model: of the caller.

    Raises:
      ValueError: of another type, or a network that has no files for a run to start from.
    """
    if isinstance(model, str | os.PathLike):
        return path_text(model, "model", FORMS)
    pair = isinstance(model, list | tuple) and len(model) == 2
    if not pair or not isinstance(model[0], Policy):
        raise ValueError(f"model is {_description(model)}; pass {FORMS}.")
    policy, params = model
    _check_params(policy, params)
    if policy.config is None or policy.source is None:
        raise ValueError(
            "the model's policy was not loaded from files, so that it has no tokenizer; write it "
            "with ntkrl.export(DIR, policy, params, source=TOKENIZER_DIR), and pass DIR."
        )
    if policy.config.adapters is not None or policy.rebuild is None:
        raise ValueError(
            "the model's policy has adapters or whitened features, which a run adds itself: pass "
            "the directory, and config={'model.lora.rank': …} or {'model.whiten': …}."
        )
    return policy, params


def _description(model: Any) -> str:
    """Return a value that is no model in words."""
    if isinstance(model, Policy):
        return "a policy without params"
    if isinstance(model, list | tuple) and len(model) == 2 and isinstance(model[1], Policy):
        return "(params, policy), in the wrong order"
    if hasattr(model, "save_pretrained"):
        return f"a {type(model).__name__} object, whose save_pretrained(DIR) writes a directory"
    return f"{quoted(model)} ({type(model).__name__})"


def _check_params(policy: Policy, params: Any) -> None:
    """Refuse params that the policy cannot read.

    Raises:
      ValueError: missing or misshapen ones.
    """
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    try:
        jax.eval_shape(lambda tokens: policy.head(params, policy.features(params, tokens)), token)
    except Exception as error:  # any, since a network of any family reads them
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the params do not fit the policy ({type(error).__name__}: {reason:.120}); pass the "
            "two that one call of ntkrl.load returned."
        ) from error


def export_start(policy: Policy, params: Params, run_dir: str) -> str:
    """Return the directory of a model: its source if that holds these params, or an export.

    Args:
      policy, params: of `read_model`.
      run_dir: the export is `start-DIGEST` there; other params have another digest, so that a
        resumed run refuses them.
    """
    if _unchanged(policy, params):
        return policy.source or ""
    directory = Path(run_dir) / f"start-{_digest(policy, params)}"
    # as process 0 sees it: all processes take part in an export, or none
    exists = runtime.allgather_object("the model's files", directory.exists())[0]
    if not exists:
        models.export(directory, policy, params)
        runtime.allgather_object("the model's files, written")
    return str(directory)


def _unchanged(policy: Policy, params: Params) -> bool:
    """Return whether the files of a policy hold these params; False above COMPARED_GIB."""
    leaves = trees.named_leaves(params)
    if sum(leaf.nbytes for leaf in leaves.values()) > COMPARED_GIB * GIB:
        return False
    assert policy.source is not None  # as `read_model` checks
    _, params_of_files = models.load(policy.source, jax.tree.leaves(params)[0].dtype)
    stored = trees.named_leaves(params_of_files)
    return stored.keys() == leaves.keys() and all(
        leaf.shape == stored[name].shape and bool(jnp.array_equal(leaf, stored[name]))
        for name, leaf in leaves.items()
    )


def _digest(policy: Policy, params: Params) -> str:
    """Return the first digits of the SHA-256 of the params; raise ValueError if not finite."""
    wrong = trees.not_finite(params)
    if wrong:
        raise ValueError(f"the model's params hold NaN or infinity in {', '.join(wrong[:10])}.")
    sha = hashlib.sha256()
    for name, tensor in sorted(models.stored_tensors(policy, params).items()):
        sha.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.tobytes())
    return sha.hexdigest()[:12]
