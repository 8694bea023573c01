"""Attribution of optimizer steps: ledgers, influence through later steps, weights of samples."""

from ntkrl.attribution.decomposition import COLUMNS, AttributionInputs, OptimizerStep, Terms
from ntkrl.attribution.entropy_budget import BudgetWeights, EntropyShares, budget_weights
from ntkrl.attribution.ledger import Account, Ledger, ledger_measures, split_kl
from ntkrl.attribution.linear_maps import MEASURES
from ntkrl.attribution.unrolled import FACTORS, Chain, Influence
