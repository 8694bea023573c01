"""The step ledger: per-sample, momentum and decay contributions to one optimizer step."""

from ntkrl.attribution.ledger import BY, Ledger, ledger_measures, split_term

__all__ = ["BY", "Ledger", "ledger_measures", "split_term"]
