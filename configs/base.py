"""Every setting with its default; other configs change a few lines of this one.

Defaults are our choice unless a line says otherwise.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def stage(name, steps, parameters, **changes):
    """One row of the schedule: `parameters` is an ordered (pattern, learning rate or None) list."""
    row = ConfigDict(
        {
            "name": name,
            "steps": steps,  # rollout steps at most; None: epochs says how long
            "epochs": placeholder(float),  # passes over the prompts at most
            "parameters": parameters,
            "optimizer": "adam",  # or "adamw", "sgd", "adafactor", "muon"
            "optimizer_state": "reset",  # "keep": go on with the moments of the stage before
            "max_grad_norm": 1.0,
            "b1": 0.9,
            "b2": 0.999,
            "epsilon": 1e-8,
            "momentum": placeholder(float),  # None: 0 for sgd, 0.95 for muon
            "weight_decay": 0.0,
            # in its place by pattern: ((".*norm/.*|.*/bias", 0.0), (".*", 0.1)) spares both
            "decay": placeholder(tuple),
            "schedule": "constant",  # or "linear", "cosine": to final_fraction of the rates
            "warmup_steps": 0,  # optimizer steps
            "final_fraction": 0.0,
            # rollout steps w: stop when the last w gained no more than tolerance on the w before
            "plateau_window": placeholder(int),
            "plateau_tolerance": 0.0,  # mean reward
            "kl_budget": placeholder(float),  # nats per token: stop above
        },
        convert_dict=False,
    )
    row.lock().update(changes)
    return row


def get_config():
    """Return the defaults: RLOO on the built-in task, everything trained in one stage."""
    config = ConfigDict()
    config.name = "rl"  # how the run is called in figures; seeds of one name are averaged
    config.seed = 0
    config.run_dir = "runs/rl"
    config.method = "rl"  # "rl", "sft" or "reward" (a reward model from preferences)

    config.model = ConfigDict()
    # Hugging Face or PEFT directory, or a hub name (org/name); None makes a new model
    config.model.path = placeholder(str)
    config.model.architecture = "GPTNeoXForCausalLM"
    config.model.new = ConfigDict(
        {
            "hidden_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 384,
            "max_position_embeddings": 64,
            "rotary_pct": 0.25,
        }
    )
    config.model.dtype = "float32"  # masters: a learning rate of 1e-7 vanishes in bfloat16
    # None: dtype. float32 is multiplied in all its bits on every chip; bfloat16 is the fast way
    config.model.compute_dtype = placeholder(str)
    config.model.untie = False
    # what the backward pass makes again: "none"; "products", all of a layer but its products with
    # weights; "all", the whole layer, which needs least memory
    config.model.remat = "products"
    config.model.lora = ConfigDict({"rank": 0, "alpha": 16.0, "modules": "attention/.*"})  # 0: none
    # "pythia" or a .jinja file, given to the tokenizer with its special tokens; None: its own
    config.model.template = placeholder(str)
    # rows of the vocabulary; None: as stored, or the tokenizer's entries where a template adds some
    config.model.vocab_size = placeholder(int)
    # JSONL of prompts with completions, such as an evaluation's samples: the same network in
    # coordinates in which the features of their tokens vary in all directions
    config.model.whiten = placeholder(str)

    config.data = ConfigDict()
    # rows in TRL's forms: JSONL, .json, .parquet, a split of a saved or published data set (see
    # ntkrl/data/published.py), several by commas; None: the built-in expressions
    config.data.path = placeholder(str)
    # shares of the files in every batch, relative; None: each row of all files once an epoch
    config.data.weights = placeholder(tuple)
    config.data.eval_path = placeholder(str)  # None holds out a fraction of each file of path
    config.data.held_out = 0.1
    config.data.examples = 40_000  # supervised examples of the built-in task
    config.data.prompts_per_step = 16
    config.data.max_prompt_tokens = 512  # as in the paper's recipe
    # sft: short examples share rows of max_prompt_tokens + max_completion_tokens; the same loss
    config.data.packing = False

    config.rollout = ConfigDict()
    config.rollout.completions_per_prompt = 8  # TRL's num_generations
    config.rollout.max_completion_tokens = 512  # as in the paper's recipe
    config.rollout.temperature = 1.0
    # truncation; None: off. Ratios use the whole distribution, objective.correction the kept mass
    config.rollout.top_k = placeholder(int)
    config.rollout.top_p = placeholder(float)
    config.rollout.min_p = placeholder(float)
    config.rollout.stop = ()  # strings that end a completion
    config.rollout.cache_dtype = placeholder(str)  # of keys and values; None: the network's
    # sample from a copy of the params in compute_dtype, gathered over fsdp once per rollout, where
    # one fits; it stays split over tensor
    config.rollout.gather_params = False
    config.rollout.engine = placeholder(str)  # "FILE.py:make", see ntkrl/rollout/external.py

    config.reward = ConfigDict()
    # built-in names, "FILE.py:NAME", directories of reward models; several by commas
    config.reward.function = placeholder(str)
    config.reward.weights = placeholder(tuple)  # None: 1.0 each
    config.reward.timeout = 60.0  # seconds a call of a user's function may take
    config.reward.on_failure = placeholder(float)  # None: stop; else the reward of a failed call
    config.reward.normalisation = placeholder(str)  # rewards that `ntkrl evaluate` wrote
    config.reward.dtype = "float32"  # of reward models, whose heads are float32 always
    config.reward.batch_size = 16  # texts a reward model reads at a time
    # TRL's and open-r1's defaults, but for the lengths, which follow rollout's budget
    config.reward.options = ConfigDict(
        {
            "soft_overlong": {"max_completion_len": 512, "soft_punish_cache": 128},
            "cosine_length": {
                "min_value_wrong": -1.0,
                "max_value_wrong": -0.5,
                "min_value_correct": 0.5,
                "max_value_correct": 1.0,
                "max_len": 1000,
            },
            "repetition": {"ngram_size": 3, "max_penalty": -1.0},
        }
    )

    # λ of λ (r⁺ + r⁻)² beside the Bradley–Terry loss; 0.01 in the paper's recipe
    config.preference = ConfigDict({"centering_coefficient": 0.01})

    config.objective = ConfigDict()
    # a row that `ntkrl presets` prints with its formula; None below keeps the row's value
    config.objective.preset = "rloo"
    config.objective.advantage = placeholder(str)
    config.objective.pass_k = placeholder(int)
    config.objective.ratio_level = placeholder(str)
    config.objective.clip = placeholder(str)
    config.objective.clip_low = placeholder(float)
    config.objective.clip_high = placeholder(float)
    config.objective.dual_clip = placeholder(float)
    config.objective.aggregation = placeholder(str)
    config.objective.kl_estimator = placeholder(str)
    config.objective.kl_place = placeholder(str)
    config.objective.kl_coefficient = placeholder(float)
    config.objective.entropy_coefficient = placeholder(float)
    config.objective.covariance = placeholder(str)
    config.objective.covariance_fraction = placeholder(float)
    config.objective.covariance_range = placeholder(tuple)
    config.objective.covariance_penalty = placeholder(float)
    config.objective.correction = placeholder(str)
    config.objective.correction_level = placeholder(str)
    config.objective.correction_cap = placeholder(float)
    config.objective.overlong = placeholder(str)
    config.objective.group_filter = placeholder(str)
    config.objective.signs = placeholder(str)

    config.schedule = ConfigDict()
    config.schedule.minibatches = 1
    config.schedule.microbatches = 1  # parts of a minibatch whose gradients are added
    config.schedule.inner_epochs = 1
    config.schedule.chunk_tokens = 1024  # positions whose logits exist at a time on a device
    config.schedule.offload_optimizer = False  # moments wait in the host's memory between steps
    config.schedule.log_ratio_tolerance = 1e-3  # nats, sampler against trainer
    config.schedule.resample_rounds = 3  # where group_filter is "resample"
    config.schedule.on_no_signal = "skip"  # or "stop": a step with nothing to learn from
    # every so many rollout steps: reference ← α policy + (1 − α) reference, 0.6 being TRL's α;
    # with 1 step and α = 0.001 the reference is a moving average, written to export_reference/
    config.schedule.reference_sync_steps = placeholder(int)  # None: the starting model
    config.schedule.reference_mixup_alpha = 0.6

    config.stages = (stage("all", 100, ((".*", 1e-6),)),)  # TRL's rate

    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})

    config.checkpoint = ConfigDict()  # all of it may change when a run is resumed
    config.checkpoint.every_steps = 20
    config.checkpoint.keep = 2  # of the newest
    config.checkpoint.keep_best = placeholder(int)  # beside the newest; None: only these
    # such as "eval/reward": steps that did not measure it are not ranked; None: reward, loss (sft)
    # or accuracy (reward models)
    config.checkpoint.best_metric = placeholder(str)
    config.checkpoint.best_mode = placeholder(str)  # None: "min" for a loss, "max" for the rest
    config.checkpoint.failures = 3  # in a row, such as on a full disk; before that a run goes on

    config.eval = ConfigDict()
    config.eval.every_steps = 20  # None: no evaluation
    config.eval.prompts = 64
    config.eval.samples_per_prompt = 8
    config.eval.repeats = 1
    config.eval.success_threshold = 1.0
    config.eval.temperature = placeholder(float)  # None: rollout's; 0: greedy
    # .jsonl of an earlier evaluation on these prompts, such as the starting model's: win rate and
    # support against it; None: compare with nothing
    config.eval.base = placeholder(str)
    config.eval.name = placeholder(str)  # of what `ntkrl evaluate` writes; None: the model's

    config.probe = ConfigDict()
    config.probe.every_steps = 10  # None: no probe
    config.probe.prompts = 8
    config.probe.completions_per_prompt = 2
    # "own" sampled from the starting model, "other" the own ones of another prompt, "shuffled" the
    # own ones in random order; "reference", "rejected", "paraphrased" from columns of the prompts
    config.probe.families = ("own",)
    # what each sample, momentum and decay did to the probe tokens in one optimizer step; holds
    # several copies of the trained params beside training
    config.probe.ledger_every_steps = 50  # None: no ledger
    config.probe.ledger_by = "sample"  # or "group": the minibatch together, cheaper
    config.probe.ledger_groups = ((".*", "body"),)  # parts of the network in its role below W
    # exact kernels of some probe tokens: laziness, alignment with the start, tr G / tr R
    config.probe.kernel_every_steps = placeholder(int)  # None: none; one costs contexts × D passes
    config.probe.kernel_contexts = 8
    config.probe.kernel_layers = False  # shares of layers too
    config.probe.memory_gib = 2.0  # to read the probe set, and for the samples of a ledger

    # beside metrics.jsonl, which is always written; a run may be resumed with another choice
    config.logging = ConfigDict()
    config.logging.tensorboard = False  # event files in RUN/tensorboard; extra tensorboard
    config.logging.wandb = placeholder(str)  # project at Weights & Biases; extra wandb; None: off
    # "trl", "trl012" or "verl": both get the names a dashboard of theirs reads too; None: ours
    config.logging.aliases = placeholder(str)
    return config
