"""The step ledger: per-sample, momentum and decay contributions to one optimizer step."""

from ntkrl.attribution.accounts import COLUMNS, Gradients, Terms
from ntkrl.attribution.contributions import MEASURES
from ntkrl.attribution.ledger import BY, Ledger, OptimizerStep, ledger_measures, split_term

__all__ = [
    "BY",
    "COLUMNS",
    "MEASURES",
    "Gradients",
    "Ledger",
    "OptimizerStep",
    "Terms",
    "ledger_measures",
    "split_term",
]
