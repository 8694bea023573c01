"""Edits of a config.json, and the logits of both sides under them."""

import contextlib
import json
import os

import jax.numpy as jnp
import numpy as np
import torch
import transformers

import ntkrl
from ntkrl import models
from ntkrl.models.families import family_of
from tests.models.families import CASES, tokens_and_mask, torch_logits, torch_model

ABSENT = object()


def edited(raw, changes):
    """Return a config.json with changed entries; ABSENT removes one."""
    entries = {**raw, **changes}
    return {name: value for name, value in entries.items() if value is not ABSENT}


class Reference:
    """A case's model directory, its logits, and those of edited copies.

    logits: of transformers. parsed: our Config. tokens, mask: the input.
    """

    def __init__(self, case, directory, columns=9):
        self.directory = directory
        self.classes = [getattr(transformers, name) for name in CASES[case][:2]]
        model = torch_model(case, directory)
        self.raw = json.loads((directory / "config.json").read_text())
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self.tokens, self.mask = tokens_and_mask(29)
        if columns != self.tokens.shape[1]:
            self.tokens = np.random.default_rng(0).integers(2, 29, (1, columns))
            self.mask = np.ones((1, columns), bool)
        self.logits = torch_logits(model, self.tokens, self.mask)[0]
        self.parsed = self.parse(self.raw)
        self.ours = self.our_logits(directory)
        self.computed = {self.parsed: self.ours}

    def parse(self, raw):
        """Our reading of a config.json."""
        return family_of(raw, "config.json").parse(raw)

    def our_logits(self, directory):
        """Our logits of a model directory."""
        policy, params = ntkrl.load(directory, options=models.ModelOptions(remat="none"))
        features = policy.features(params, jnp.asarray(self.tokens), jnp.asarray(self.mask))
        return np.asarray(policy.head(params, features))

    def edit(self, directory, changes):
        """Return transformers' and our logits of an edited config.json.

        Weights stay where their shapes do; others are drawn.

        Raises:
          ValueError: our refusal.
          ReferenceError: transformers'.
        """
        directory.mkdir(exist_ok=True)
        raw = edited(self.raw, changes)
        parsed = self.parse(raw)
        weights = directory / "model.safetensors"
        weights.unlink(missing_ok=True)
        try:
            expected, same_shapes = self._theirs(directory, raw)
        except Exception as error:
            raise ReferenceError(f"transformers refuses {changes}: {error}") from error
        if not same_shapes:
            return expected, self.our_logits(directory)
        if parsed not in self.computed:  # a program is compiled for each
            self.computed[parsed] = self.our_logits(directory)
        return expected, self.computed[parsed]

    def _theirs(self, directory, raw):
        config_class, model_class = self.classes
        config = config_class.from_dict(raw)
        config._attn_implementation = config._experts_implementation = "eager"
        with torch.device("meta"):
            empty = model_class(config)
        shapes = {name: tensor.shape for name, tensor in empty.state_dict().items()}
        same_shapes = shapes == self.shapes
        if same_shapes:
            os.link(self.directory / "model.safetensors", directory / "model.safetensors")
        else:
            model = model_class(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(0, 0.3)
            with contextlib.suppress(OSError):
                model.save_pretrained(directory)
        (directory / "config.json").write_text(json.dumps(raw))
        options = {"attn_implementation": "eager", "experts_implementation": "eager"}
        model = model_class.from_pretrained(directory, dtype=torch.float32, **options).eval()
        return torch_logits(model, self.tokens, self.mask)[0], same_shapes

    def gap(self, a, b):
        """Return the largest difference on real tokens."""
        if a.shape != b.shape:
            return np.inf
        return np.abs(a - b)[self.mask].max()
