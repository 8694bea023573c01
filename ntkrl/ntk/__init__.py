"""Exact empirical kernels of language models and first-order predictions; no RL inside."""

from ntkrl.ntk.contexts import Contexts, every_position, last_positions
from ntkrl.ntk.kernel import Factored, Kernel
from ntkrl.ntk.make import kernel
from ntkrl.ntk.network import Head, Network
from ntkrl.ntk.parts import PARTS, by_layer, by_module
from ntkrl.ntk.predict import predict
from ntkrl.ntk.roads import ROADS, Estimate
from ntkrl.ntk.scores import score_gram
from ntkrl.ntk.spectrum import alignment, cka, eigenpairs, frobenius

__all__ = [
    "PARTS",
    "ROADS",
    "Contexts",
    "Estimate",
    "Factored",
    "Head",
    "Kernel",
    "Network",
    "alignment",
    "by_layer",
    "by_module",
    "cka",
    "eigenpairs",
    "every_position",
    "frobenius",
    "kernel",
    "last_positions",
    "predict",
    "score_gram",
]
