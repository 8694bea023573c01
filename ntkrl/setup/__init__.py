"""Load a run's model, prompts and rewards from its settings, checked before anything is traced."""

from ntkrl.setup.adapters import describe_adapters
from ntkrl.setup.inputs import NO_INPUTS, Inputs
from ntkrl.setup.prompt_warnings import warn_of_prompts
from ntkrl.setup.rewards import Samples, is_python_function, load_rewards
from ntkrl.setup.run_setup import Prompts, RunSetup, set_up
from ntkrl.setup.starting_model import (
    StartingModel,
    check_vocabulary,
    choose_rollout_mesh,
    decoding_work,
    load_starting_model,
    training_facts,
)
