"""The package from Python: runs, evaluations, kernels and steps of runs as calls.

`ntkrl` has these names too; the command line does not import this room.
"""

from ntkrl.api.front import evaluate, kernels, train
from ntkrl.api.saved_run import TrainingRun, open_run
from ntkrl.api.steps import Steps

Run = TrainingRun
