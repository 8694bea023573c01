"""Defaults of every setting; the other configs change a few lines.

Defaults are our choice unless a comment names a source.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def stage(name, steps, parameters, **changes):
    """Return a stage; `parameters` is an ordered list of (pattern, learning rate or None)."""
    row = ConfigDict(
        {
            "name": name,  # in metrics and messages
            "steps": steps,  # rollout steps at most; None: limited by epochs
            "epochs": placeholder(float),  # passes over the prompts at most
            # rows of pattern and learning rate, None for frozen; the first match wins
            "parameters": parameters,
            "optimizer": "adam",  # or "adamw", "sgd", "adafactor", "muon"
            "optimizer_state": "reset",  # "keep": start from the moments of the stage before
            "max_grad_norm": 1.0,  # gradients are clipped at this global norm; None: not clipped
            "b1": 0.9,  # decay of Adam's first moment
            "b2": 0.999,  # decay of its second moment
            "epsilon": 1e-8,  # added to the root of the second moment
            "momentum": placeholder(float),  # of sgd and muon; None: 0 for sgd, 0.95 for muon
            "weight_decay": 0.0,  # decoupled, of all trained parameters
            # replaces weight_decay, by pattern: ((".*norm/.*|.*/bias", 0.0), (".*", 0.1))
            "decay": placeholder(tuple),
            "schedule": "constant",  # or "linear", "cosine": down to final_fraction of the rates
            "warmup_steps": 0,  # optimizer steps
            "final_fraction": 0.0,  # of the rates at the end of a linear or cosine schedule
            # w rollout steps: stop when the last w gained at most plateau_tolerance on the w before
            "plateau_window": placeholder(int),
            "plateau_tolerance": 0.0,  # gain in mean reward that does not count
            "kl_budget": placeholder(float),  # nats per token: stop when a step's kl exceeds it
        },
        convert_dict=False,
    )
    row.lock().update(changes)
    return row


def get_config():
    """Return the defaults: RLOO on the built-in task, one stage that trains all parameters."""
    config = ConfigDict()
    config.name = "rl"  # label in figures and tables, which average over seeds of one name
    config.seed = 0  # of sampling, batch order and new parameters
    config.run_dir = "runs/rl"  # directory that the run writes; the same command resumes it
    config.method = "rl"  # "rl", "sft" or "reward" (a reward model from preferences)

    config.model = ConfigDict()
    # Hugging Face or PEFT directory, hub name (org/name), GGUF file; None: a new one, of model.new
    config.model.path = placeholder(str)
    config.model.architecture = "GPTNeoXForCausalLM"  # of a new model
    # fields of config.json of a new model
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
    config.model.dtype = "float32"  # of master weights: a rate of 1e-7 vanishes in bfloat16
    # of the network; None: dtype. float32 is multiplied in full precision; bfloat16 is faster
    config.model.compute_dtype = placeholder(str)
    config.model.untie = False  # a tied head becomes a separate copy of the embedding
    # recomputed by the backward pass: "none"; "products", everything of a layer but its products
    # with weights; "all", the complete layer, which needs least memory
    config.model.remat = "products"
    # a stage's pattern that matches adapters (".*") trains them alone; one that matches none
    # ("head/.*") trains the base, and then no adapter/ is written
    config.model.lora = ConfigDict(
        {
            "rank": 0,  # of the adapters; 0: none
            "alpha": 16.0,  # updates are scaled by alpha / rank
            "modules": "attention/.*",  # pattern of the modules that get an adapter
        }
    )
    # chat template: "pythia" or a .jinja file, with its special tokens; None: the tokenizer's
    config.model.template = placeholder(str)
    # rows of the vocabulary; None: as stored, or the tokenizer's size if a template adds tokens
    config.model.vocab_size = placeholder(int)
    # JSONL of prompts with completions, such as an evaluation's samples: represent the same
    # function in coordinates in which the features of their tokens vary in all directions
    config.model.whiten = placeholder(str)
    # "all", or "mean": shrink the direction of the mean feature to the size of the others
    config.model.whiten_directions = "all"

    config.data = ConfigDict()
    # rows in TRL's formats: JSONL, .json, .parquet, or a split of a saved or published data set;
    # several, separated by commas; None: the built-in expressions
    config.data.path = placeholder(str)
    # relative shares of the files in every batch; None: each row of each file once an epoch
    config.data.weights = placeholder(tuple)
    config.data.eval_path = placeholder(str)  # held-out prompts; None: a fraction of path
    config.data.held_out = 0.1  # fraction held out for evaluations and probes, without eval_path
    config.data.examples = 40_000  # supervised examples of the built-in task
    config.data.prompts_per_step = 16  # prompts (examples, pairs) of a rollout step
    config.data.max_prompt_tokens = 512  # of a prompt at most; as in the paper's recipe
    # sft: short examples share rows of max_prompt_tokens + max_completion_tokens; the same loss
    config.data.packing = False

    config.rollout = ConfigDict()
    config.rollout.completions_per_prompt = 8  # sampled together; TRL's num_generations
    config.rollout.max_completion_tokens = 512  # their budget; as in the paper's recipe
    config.rollout.temperature = 1.0  # of sampling, above 0
    # truncation; None: off. Ratios use the full distribution, objective.correction the kept mass
    config.rollout.top_k = placeholder(int)
    config.rollout.top_p = placeholder(float)  # nucleus: the most probable tokens of this mass
    config.rollout.min_p = placeholder(float)  # tokens of at least this share of the largest π
    config.rollout.stop = ()  # strings that end a completion; special tokens may be among them
    config.rollout.cache_dtype = placeholder(str)  # of keys and values; None: the network's
    # parts of the devices that sample: data × tensor; -1 for all others. None and None: chosen from
    # the size of the params, see ntkrl/rollout/rollout_mesh.py
    config.rollout.mesh = ConfigDict({"data": placeholder(int), "tensor": placeholder(int)})
    # sample by the update's own forward pass, which costs a pass over complete rows per token:
    # log-probs of sampler and trainer are then equal in bits
    config.rollout.exact = False
    config.rollout.engine = placeholder(str)  # "FILE.py:make", see ntkrl/rollout/external.py

    config.reward = ConfigDict()
    # built-in names, "FILE.py:NAME", reward model directories; several, separated by commas
    config.reward.function = placeholder(str)
    config.reward.weights = placeholder(tuple)  # of the functions, in order; None: 1.0 each
    config.reward.timeout = 60.0  # seconds allowed for a call of a user's function
    config.reward.on_failure = placeholder(float)  # reward of a failed call; None: stop the run
    config.reward.normalisation = placeholder(str)  # a file of rewards written by `ntkrl evaluate`
    config.reward.dtype = "float32"  # of reward models; their heads are always float32
    config.reward.batch_size = 16  # texts per forward pass of a reward model
    # TRL's and open-r1's defaults, except for lengths that are None, which follow
    # rollout.max_completion_tokens
    config.reward.options = ConfigDict(
        {
            "soft_overlong": {
                "max_completion_len": placeholder(int),  # tokens; None: the budget
                # its last tokens; None: 128, or half of a budget below 256
                "soft_punish_cache": placeholder(int),
            },
            "cosine_length": {
                "min_value_wrong": -1.0,
                "max_value_wrong": -0.5,
                "min_value_correct": 0.5,
                "max_value_correct": 1.0,
                "max_tokens": placeholder(int),  # None: the budget, unless max_len is set
                "max_len": placeholder(int),  # characters, instead of tokens; open-r1: 1000
            },
            # limit of a row, and the reward of rows that exceed it or fail
            "math_verify": {"row_seconds": 5.0, "default": 0.0},
            "repetition": {"ngram_size": 3, "max_penalty": -1.0},
        }
    )

    # λ of the term λ (r⁺ + r⁻)² added to the Bradley–Terry loss; 0.01 in the paper's recipe
    config.preference = ConfigDict({"centering_coefficient": 0.01})

    config.objective = ConfigDict()
    # `ntkrl presets` prints each with its formula; None below keeps the preset's value
    config.objective.preset = "rloo"
    # "none", "batch_mean", "leave_one_out", "group_mean", "group_normalised", "batch_scaled",
    # "max_likelihood", "pass_at_k", "reward_to_go"
    config.objective.advantage = placeholder(str)
    config.objective.pass_k = placeholder(int)  # k of advantage "pass_at_k"
    # of π/π_old: "token", "sequence" (the product), "sequence_mean" (its 1/length-th power), "none"
    config.objective.ratio_level = placeholder(str)
    config.objective.clip = placeholder(str)  # "min" (as PPO), "detach" (as CISPO), "none"
    config.objective.clip_low = placeholder(float)  # ratios are clipped below 1 - clip_low
    config.objective.clip_high = placeholder(float)  # ratios are clipped above 1 + clip_high
    config.objective.dual_clip = placeholder(float)  # bound on ratios of negative advantages
    # of token losses: "token_mean", "sequence_mean", "sequence_sum", "constant"
    config.objective.aggregation = placeholder(str)
    config.objective.kl_estimator = placeholder(str)  # "k1", "k2", "k3", "full" (over tokens)
    config.objective.kl_place = placeholder(str)  # "reward", "loss", "off"
    config.objective.kl_coefficient = placeholder(float)  # β of the KL to the reference policy
    config.objective.entropy_coefficient = placeholder(float)  # of an entropy bonus
    # treatment of the tokens that reduce entropy most: "off", "clip", "kl"
    config.objective.covariance = placeholder(str)
    config.objective.covariance_fraction = placeholder(float)  # share of tokens treated
    config.objective.covariance_range = placeholder(tuple)  # covariances that "clip" picks from
    config.objective.covariance_penalty = placeholder(float)  # coefficient under "kl"
    # of sampler and trainer, by π_old/μ: "off", "truncate", "mask"
    config.objective.correction = placeholder(str)
    config.objective.correction_level = placeholder(str)  # "token", "sequence"
    config.objective.correction_cap = placeholder(float)  # largest weight
    config.objective.overlong = placeholder(str)  # completions cut by the budget: "keep", "mask"
    config.objective.group_filter = placeholder(str)  # equal rewards: "off", "drop", "resample"
    # of the advantages to learn from: "both", "positive", "negative"
    config.objective.signs = placeholder(str)
    # nats that the entropy may fall in a step by prediction; weights of samples keep to it
    config.objective.entropy_budget = placeholder(float)

    config.schedule = ConfigDict()
    config.schedule.minibatches = 1  # equal parts of a rollout, one optimizer step each
    # gradient accumulation: parts of a minibatch; None: the fewest that fit the devices' memory
    config.schedule.microbatches = placeholder(int)
    config.schedule.inner_epochs = 1  # passes over a rollout
    config.schedule.chunk_tokens = 1024  # positions per device whose logits are in memory at a time
    config.schedule.offload_optimizer = False  # keep moments in host memory between steps
    # nats, largest difference of sampler and trainer; None: by the dtypes of network and cache
    config.schedule.log_ratio_tolerance = placeholder(float)
    config.schedule.resample_rounds = 3  # most further batches, if group_filter is "resample"
    config.schedule.on_no_signal = "skip"  # or "stop": for a step without any training signal
    # interval in rollout steps of reference ← α policy + (1 − α) reference; 0.6 is TRL's α.
    # With 1 step and α = 0.001 the reference is a moving average, written to export_reference/
    config.schedule.reference_sync_steps = placeholder(int)  # None: the starting model
    config.schedule.reference_mixup_alpha = 0.6  # α of that update

    config.stages = (stage("all", 100, ((".*", 1e-6),)),)  # see stages[i]; the rate is TRL's

    config.mesh = ConfigDict(
        {
            "data": -1,  # parts of the devices that copy the parameters; -1: all other devices
            "fsdp": 1,  # parts that share them, and the rows of a batch; -1: all other devices
            "tensor": 1,  # parts that divide each layer's products; -1: all other devices
        }
    )

    config.checkpoint = ConfigDict()  # may change when a run is resumed
    config.checkpoint.every_steps = 20  # rollout steps between checkpoints; one at the end too
    config.checkpoint.keep = 2  # newest checkpoints kept
    config.checkpoint.keep_best = placeholder(int)  # best ones kept in addition; None: none
    # such as "eval/reward"; steps without it are not ranked. None: reward, loss (sft) or accuracy
    # (reward models)
    config.checkpoint.best_metric = placeholder(str)
    # "min" or "max"; None: "min" for a loss, "max" otherwise
    config.checkpoint.best_mode = placeholder(str)
    config.checkpoint.failures = 3  # failed saves in a row that stop a run, as on a full disk

    config.eval = ConfigDict()
    # rollout steps between evaluations; None: no evaluation, while probes and ledgers stay
    config.eval.every_steps = 20
    config.eval.prompts = 64  # held-out prompts at most
    config.eval.samples_per_prompt = 8  # k of pass@k and of the distinct counts
    # independent samplings; the noise of the mean reward is its standard deviation over them, or
    # of a single one is computed from the spread of each prompt's samples
    config.eval.repeats = 1
    config.eval.success_threshold = 1.0  # a completion of at least this reward counts as solved
    config.eval.temperature = placeholder(float)  # of evaluations; None: rollout's; 0: greedy
    # .jsonl of an earlier evaluation on the same prompts, such as the starting model's, for win
    # rate and support; None: no comparison
    config.eval.base = placeholder(str)
    config.eval.name = placeholder(str)  # of the files `ntkrl evaluate` writes; None: the model's

    config.probe = ConfigDict()
    config.probe.every_steps = 10  # rollout steps between probes; None: no probe
    config.probe.prompts = 8  # held-out prompts of the probe set
    config.probe.completions_per_prompt = 2  # of each family
    # completions: "own" sampled from the starting model, "other" those of another prompt,
    # "shuffled" in random token order; "reference", "rejected", "paraphrased" from columns
    config.probe.families = ("own",)
    # contributions of each sample, momentum and decay to the change of the probe tokens in one
    # optimizer step; needs memory for several copies of the trained params
    config.probe.ledger_every_steps = 50  # None: no ledger
    config.probe.ledger_by = "sample"  # or "group": the minibatch as a single source, cheaper
    config.probe.ledger_groups = ((".*", "body"),)  # parameter groups of the body
    # exact kernels of some probe tokens: change since the start, alignment with it, tr G / tr R
    config.probe.kernel_every_steps = placeholder(int)  # None: no kernel; costs contexts × D passes
    config.probe.kernel_contexts = 8  # probe tokens of a kernel
    config.probe.kernel_layers = False  # shares of each layer too
    config.probe.memory_gib = 2.0  # for the probe set, and for the samples of a ledger

    # in addition to metrics.jsonl; may change when a run is resumed
    config.logging = ConfigDict()
    # RUN/rollouts: the completions of training, compressed. At this size, or 4000 steps, only every
    # second step is kept, then every fourth, and so on, of earlier and of later ones; steps with a
    # ledger stay longest. None: no completions are kept
    config.logging.rollouts_mib = 256.0
    config.logging.tensorboard = False  # event files in RUN/tensorboard; extra tensorboard
    config.logging.wandb = placeholder(str)  # Weights & Biases project; extra wandb; None: off
    config.logging.trackio = placeholder(str)  # project in trackio's local files; extra trackio
    # "trl", "trl012" or "verl": these also get that library's metric names; None: ours alone
    config.logging.aliases = placeholder(str)
    return config
