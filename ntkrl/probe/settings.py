"""Settings of the probe set and of its measurements: the config's probe section."""

import dataclasses

FAMILY_COLUMNS = {
    "reference": ("completion", "chosen"),
    "rejected": ("rejected",),
    "paraphrased": ("paraphrased",),
}
"""Families of completions that come with the prompts, and their columns."""
SAMPLED_FAMILIES = ("own", "other", "shuffled")
FAMILIES = (*SAMPLED_FAMILIES, *FAMILY_COLUMNS)
LEDGER_BY = ("group", "sample")
CADENCES = ("every_steps", "ledger_every_steps", "kernel_every_steps")


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """The probe set and how often it is measured.

    every_steps: rollout steps between probes, or None for none.
    prompts: held-out prompts (at most).
    completions_per_prompt: completions of each, sampled from the initial model.
    families: of completions, see training/probe_set.py; measures are of the first.
    ledger_every_steps: rollout steps between ledgers of the last optimizer step, or None for none.
    ledger_by: "sample", or "group" for the minibatch together (see attribution.Ledger).
    ledger_groups: `(pattern, name)` over parameters that change the features.
    kernel_every_steps: rollout steps between exact kernels of some probe tokens, or None for none.
    kernel_contexts: number of tokens, ≥ 2; each costs D backward passes.
    kernel_layers: True to report shares of layers, each at the cost of another body kernel.
    memory_gib: what reading the probe set and the samples' contributions may use (GiB).
    """

    every_steps: int | None
    prompts: int
    completions_per_prompt: int
    families: tuple[str, ...]
    ledger_every_steps: int | None
    ledger_by: str
    ledger_groups: tuple[tuple[str, str], ...]
    kernel_every_steps: int | None
    kernel_contexts: int
    kernel_layers: bool
    memory_gib: float

    @property
    def enabled(self) -> bool:
        """True if any of the cadences is set."""
        return any(getattr(self, name) is not None for name in CADENCES)

    @property
    def completions(self) -> int:
        """Completions in the probe set, at most: of all families and prompts together."""
        sampled = [name in SAMPLED_FAMILIES for name in self.families]
        return self.prompts * sum(self.completions_per_prompt if drawn else 1 for drawn in sampled)

    def __post_init__(self):
        problems, known = [], [name for name in self.families if name in FAMILIES]
        if not known or len(set(known)) < len(self.families):
            problems.append(
                f"families must be different ones of {', '.join(FAMILIES)}, not "
                f"{', '.join(map(str, self.families)) or 'none'}"
            )
        if self.ledger_by not in LEDGER_BY:
            problems.append(
                f"ledger_by must be one of {', '.join(LEDGER_BY)}, not {self.ledger_by!r}"
            )
        if not self.memory_gib > 0:
            problems.append(f"memory_gib must be > 0, not {self.memory_gib}")
        if self.kernel_contexts < 2:
            problems.append(f"kernel_contexts must be ≥ 2, not {self.kernel_contexts}")
        for name in CADENCES:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                problems.append(f"{name} must be ≥ 1 or None, not {getattr(self, name)}")
        if problems:
            raise ValueError("; ".join(problems) + ".")
