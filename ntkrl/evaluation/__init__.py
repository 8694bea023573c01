"""Metrics over sampled completions, their comparison with a base policy, and kernels of prompts."""

from ntkrl.evaluation import commands, kernel_command, push
from ntkrl.evaluation.comparison import mean_interval, powers
from ntkrl.evaluation.sampling import evaluate_policy, make_evaluation_sampler, prompts_together
