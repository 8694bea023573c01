"""The package from Python: runs, evaluations, kernels and steps of runs as calls.

`ntkrl` offers these names itself; the command line does without this room.
"""

from ntkrl.api.front import evaluate, kernels, train
from ntkrl.api.saved_run import TrainingRun, open_run
from ntkrl.api.steps import Steps

Run = TrainingRun
