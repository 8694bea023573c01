"""Exact empirical kernels of language models and first-order predictions; no RL inside."""

from ntkrl.ntk.contexts import Contexts
from ntkrl.ntk.kernel import Kernel, kernel
from ntkrl.ntk.predict import predict

__all__ = ["Contexts", "Kernel", "kernel", "predict"]
