"""Compare this library's kernels with the best of other tools: `python -m tests.bench.ntk`.

Four comparisons on random GPT-NeoX models in float32, each method in a separate process, compiled
before timing; memory is the growth of the process during a call, result included:

    small      K of N = 4 last positions, T = 16, V = 4096, D = 128, 4 layers: factored, written
               out, and by each peer (all NTK-vector products, Jacobian rows extrapolated)
    large      factored at V = 50304, D = 512, 8 layers, four last positions, T = 16
    vocabulary factored at V = 512 and V = 50304, all else as in small
    scores     Gram matrix of ∇ log π of 16 × 32 tokens, against stacked gradients

`--only=small,scores` selects, `--json=FILE` writes the rows, `--algorithms` times each on small.
`--model=DIR` times the steps of `ntkrl kernel` on twelve prompts (`--limit=N`) of a model instead,
beside the floor: the arithmetic of each step at the rate of this machine's products.
"""

import argparse
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ntkrl
from ntkrl import data, models, ntk, probe
from ntkrl.evaluation.kernel_run import product_rate
from tests.bench import measure, peers

SMALL = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "rotary_pct": 0.25,
}
LARGE = {
    **SMALL,
    "vocab_size": 50304,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
}
CONTEXTS, LENGTH = 4, 16
MODEL_GIB = 3.0
SEQUENCES, COMPLETION = 16, 32
MINUTES = 20 * 60
PROMPTS = """The capital of France is
Name three birds, separated by commas.
The opposite of hot is
Two plus two equals
Write one sentence about the sea.
My favourite colour is
List four fruits, separated by commas.
The sun rises in the
Once upon a time there was a
Water boils at a temperature of
The largest planet is called
A good reason to read books is"""


def ours(
    form: str,
    config: dict[str, Any],
    algorithm: str = "auto",
    repeats: int = 5,
    memory_gib: float = 8.0,
) -> dict[str, Any]:
    """Time a form of the kernel of last positions; `form` is "factored" or "dense"."""
    peer, _ = _models(config)
    tokens_NT = peers.random_tokens(CONTEXTS, LENGTH, peer.vocab)
    where = ntk.last_positions(jnp.asarray(tokens_NT))

    def make() -> ntk.Kernel:
        return ntk.kernel(
            peer.policy, peer.params, where, algorithm=algorithm, memory_gib=memory_gib
        )

    def call() -> Any:
        kernel = make()
        result = ntk.factored(kernel) if form == "factored" else kernel.dense()
        return jax.block_until_ready(result)

    note = str(make().estimate())
    return {**_measured(call, repeats), "note": note}


def peer_kernel(tool: str, way: str, config: dict[str, Any], chunk: int) -> dict[str, Any]:
    """Time a peer's full kernel; Jacobian rows are run in part and extrapolated."""
    peer = _models(config)[0 if tool == "jax" else 1]
    tokens_NT = peers.random_tokens(CONTEXTS, LENGTH, peer.vocab)
    if way == "products":
        peers.products(peer, tokens_NT, chunk, 2 * chunk)
        return _measured(lambda: peers.products(peer, tokens_NT, chunk), 1, warm=False)
    with measure.peak_memory() as peak:
        timed = peers.time_rows(peer, tokens_NT, chunk, blocks=2)
    note = f"extrapolated from {timed['units']} of {timed['whole_units']} blocks"
    return {"seconds": timed["whole_seconds"], "MiB": round(peak.mib), "note": note}


def our_scores(config: dict[str, Any], chunk: int | None, repeats: int = 3) -> dict[str, Any]:
    """Time the Gram matrix of the score functions of completion tokens."""
    peer, _ = _models(config)
    tokens_NT = peers.random_tokens(SEQUENCES, COMPLETION + 1, peer.vocab)
    where = ntk.every_position(jnp.asarray(tokens_NT[:, :-1]))
    targets = tokens_NT[:, 1:].ravel()

    def call() -> Any:
        gram = ntk.score_gram(peer.policy, peer.params, where, targets, chunk=chunk)
        return jax.block_until_ready(gram)

    return _measured(call, repeats)


def peer_scores(tool: str, config: dict[str, Any], repeats: int = 3) -> dict[str, Any]:
    """Time a peer's stacked gradients and their Gram matrix."""
    peer = _models(config)[0 if tool == "jax" else 1]
    tokens_NT = peers.random_tokens(SEQUENCES, COMPLETION + 1, peer.vocab)
    return _measured(lambda: peers.score_gram(peer, tokens_NT, COMPLETION), repeats)


def agreement(config: dict[str, Any]) -> dict[str, Any]:
    """Compare our dense blocks with a peer's on some columns, and the score Gram matrices."""
    peer, _ = _models(config)
    tokens_NT = peers.random_tokens(CONTEXTS, LENGTH, peer.vocab)
    kernel = ntk.kernel(peer.policy, peer.params, ntk.last_positions(jnp.asarray(tokens_NT)))
    theirs = peers.products(peer, tokens_NT, 16, 16)
    dense = np.asarray(kernel.dense(columns=list(range(16))))
    factored = ntk.factored(kernel)
    weight = np.asarray(factored.weight)
    written = np.einsum("vd,oude,we->ouvw", weight, factored.body, weight[:16])
    written += np.asarray(factored.head)[..., None, None] * np.eye(len(weight))[:, :16]
    scale = np.abs(theirs).max()
    errors = (np.abs(kernel_form - theirs).max() / scale for kernel_form in (dense, written))
    return dict(zip(("dense", "factored"), map(float, errors), strict=True))


def model_steps(model: str, limit: int) -> list[dict[str, Any]]:
    """Time the steps of the kernel of a model directory on prompts; compilation included."""
    policy, params = ntkrl.load(model)
    tokenizer = data.load_tokenizer(models.tokenizer_directory(model))
    encoded = [tokenizer.encode(text) for text in PROMPTS.split("\n")[:limit]]
    batch = data.prompt_batch(
        encoded, range(len(encoded)), tokenizer.pad_token_id, max(map(len, encoded))
    )
    where = ntk.last_positions(batch.tokens, batch.mask)
    plan = probe.plan_kernel(policy, params, where, layers=True, memory_gib=MODEL_GIB)
    arrays: dict[str, Any] = {}
    rows = []
    with measure.peak_memory() as peak:
        for step in probe.kernel_steps(plan):
            floor, start = step.flops / product_rate(jnp.dtype("float32")), time.monotonic()
            arrays |= probe.on_host(step.run(arrays))
            seconds = time.monotonic() - start
            print(f"  {step.name}: {seconds:.1f} s, floor {floor:.1f} s", flush=True)
            rows.append({"method": step.name, "seconds": seconds, "floor": floor})
    total = {name: sum(row[name] for row in rows) for name in ("seconds", "floor")}
    return [*rows, {"method": "all", **total, "MiB": round(peak.mib)}]


def _models(config: dict[str, Any]) -> tuple[peers.Jax, peers.Torch]:
    with tempfile.TemporaryDirectory() as directory:
        return peers.models(directory, **config)


def _measured(call: Any, repeats: int, warm: bool = True) -> dict[str, Any]:
    if warm:
        call()
    with measure.peak_memory() as peak:
        first = measure.median_seconds(call, 1)
    seconds = measure.median_seconds(call, repeats) if repeats > 1 else first
    return {"seconds": seconds, "MiB": round(peak.mib)}


def small(algorithms: bool) -> list[tuple[str, str, dict[str, Any]]]:
    """Return the methods of the first comparison: label, function, arguments."""
    methods = [
        ("ours, factored (s, M)", "ours", {"form": "factored"}),
        ("ours, factored, memory_gib=0.04", "ours", {"form": "factored", "memory_gib": 0.04}),
        ("ours, factored, memory_gib=0.02", "ours", {"form": "factored", "memory_gib": 0.02}),
        ("ours, V×V written out", "ours", {"form": "dense", "repeats": 3}),
        (
            "JAX, NTK-vector products",
            "peer_kernel",
            {"tool": "jax", "way": "products", "chunk": 16},
        ),
        ("JAX, V Jacobian rows", "peer_kernel", {"tool": "jax", "way": "rows", "chunk": 64}),
        (
            "torch.func, NTK-vector products",
            "peer_kernel",
            {"tool": "torch", "way": "products", "chunk": 16},
        ),
        ("torch.func, jacrev", "peer_kernel", {"tool": "torch", "way": "rows", "chunk": 64}),
    ]
    if algorithms:
        for algorithm in ntk.ALGORITHMS:
            arguments = {"form": "factored", "algorithm": algorithm, "repeats": 1}
            methods.append((f"ours, factored, algorithm {algorithm}", "ours", arguments))
    return [(what, name, {**arguments, "config": SMALL}) for what, name, arguments in methods]


def questions(algorithms: bool) -> dict[str, list[tuple[str, str, dict[str, Any]]]]:
    """Return the methods of every comparison."""
    return {
        "small": small(algorithms),
        "large": [("ours, factored", "ours", {"form": "factored", "config": LARGE, "repeats": 1})],
        "vocabulary": [
            (
                f"ours, factored, V = {vocab}",
                "ours",
                {"form": "factored", "config": {**SMALL, "vocab_size": vocab}},
            )
            for vocab in (512, 50304)
        ],
        "scores": [
            ("ours, score_gram", "our_scores", {"config": SMALL, "chunk": None}),
            ("ours, chunk=256", "our_scores", {"config": SMALL, "chunk": 256}),
            ("ours, chunk=64", "our_scores", {"config": SMALL, "chunk": 64}),
            ("JAX, stacked gradients", "peer_scores", {"config": SMALL, "tool": "jax"}),
            ("torch.func, stacked gradients", "peer_scores", {"config": SMALL, "tool": "torch"}),
        ],
    }


def main() -> None:
    """Run the selected comparisons and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="small,large,vocabulary,scores")
    parser.add_argument("--json")
    parser.add_argument("--algorithms", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int, default=12)
    options = parser.parse_args()
    if options.model is not None:
        rows = model_steps(options.model, options.limit)
        print(f"\n{measure.table(rows, ('method', 'seconds', 'floor', 'MiB'))}\n")
        if options.json is not None:
            measure.write_json(options.json, rows)
        return
    asked, known = options.only.split(","), questions(options.algorithms)
    if not set(asked) <= set(known):
        parser.error(f"--only takes {', '.join(known)}, separated by commas")
    errors = measure.run_isolated("tests.bench.ntk:agreement", {"config": SMALL}, MINUTES)
    print(f"largest difference from NTK-vector products in JAX, relative: {errors}", flush=True)
    kept = []
    for question in asked:
        rows = []
        for what, name, arguments in known[question]:
            result = measure.run_isolated(f"tests.bench.ntk:{name}", arguments, MINUTES)
            rows.append({"question": question, "method": what, **result})
            print(f"  {what}: {result}", flush=True)
        print(f"\n{measure.table(rows, ('method', 'seconds', 'MiB', 'note', 'failed'))}\n")
        kept += rows
    if options.json is not None:
        measure.write_json(options.json, kept)


if __name__ == "__main__":
    main()
