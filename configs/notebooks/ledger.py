"""The ledger of an optimizer step: which part, and which sample, changed which token.

Command: marimo edit configs/notebooks/ledger.py, or python configs/notebooks/ledger.py
Hardware: two CPU cores, about two minutes; then the run is read from runs/notebooks/.
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")


@app.cell
def _():
    import numpy as np

    import ntkrl

    return np, ntkrl


@app.cell
def _(ntkrl):
    base = ntkrl.train(config="quickstart/base", steps=300, run_dir="runs/notebooks/base")
    # A run with a ledger every ten steps. `ntkrl.open_run("runs/rl")` opens one of yours.
    run = ntkrl.train(
        base.directory / "export",
        rewards="expressions",
        learning_rate=3e-4,
        steps=20,
        run_dir="runs/notebooks/ledger",
        config={
            "data.max_prompt_tokens": 8,
            "rollout.max_completion_tokens": 12,
            "probe.ledger_every_steps": 10,
        },
    )
    ledger = run.ledger(20)
    return (ledger,)


@app.cell
def _(ledger):
    # The parts of Δ log π add up to what was measured. Positive raises the log-probability.
    for _part, _values in ledger.parts["log_prob"].items():
        print(f"{_part:12} {_values.mean():+.2e}")
    _actual = ledger.actual["log_prob"]
    print(f"{'actual':12} {_actual.mean():+.2e} nats, mean over {_actual.size} probe tokens")
    return


@app.cell
def _(ledger, np):
    # The token that changed most, and the samples that moved it most.
    token = int(np.abs(ledger.actual["log_prob"]).argmax())
    names = [(c.prompt, text) for c in ledger.texts.completions for text in c.tokens]
    print(f"{names[token]}: {ledger.actual['log_prob'][token]:+.4f} nats")
    for _place in np.argsort(-np.abs(ledger.influence[token]))[:5]:
        _sample = ledger.samples[_place]
        print(
            f"  {ledger.influence[token, _place]:+.5f} by {_sample.prompt}{_sample.completion} "
            f"(advantage {_sample.advantage:+.2f})"
        )
    return


@app.cell
def _(ledger, np):
    # Which samples moved the probe completions as a set: Σ over tokens, [samples, completions].
    table = ledger.texts.sums(ledger.influence).T
    for _place in np.argsort(-np.abs(table).sum(axis=1))[:5]:
        _sample = ledger.samples[_place]
        print(
            f"{np.abs(table[_place]).sum():.4f} nats moved by "
            f"{_sample.prompt}{_sample.completion} (advantage {_sample.advantage:+.2f})"
        )
    return


if __name__ == "__main__":
    app.run()
