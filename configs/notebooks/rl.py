"""RL and classifier-first RL of a small model with your own reward, side by side.

Command: marimo edit configs/notebooks/rl.py, or python configs/notebooks/rl.py without a browser
Hardware: two CPU cores, about three minutes; then the runs are read from runs/notebooks/.
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")


@app.cell
def _():
    import marimo as mo
    import matplotlib.figure

    import ntkrl

    return matplotlib, mo, ntkrl


@app.cell
def _(ntkrl):
    # A model that writes arithmetic, mostly wrong. Put the directory of yours in its place.
    base = ntkrl.train(config="quickstart/base", steps=300, run_dir="runs/notebooks/base")
    model = base.directory / "export"
    return (model,)


@app.cell
def _():
    # Rows of your own: every key but "prompt" is an argument of the reward function.
    rows = [{"prompt": f"{number}=", "target": number} for number in range(10, 50)]

    def score(completions, target, **kwargs):
        """1 for a sum of two or more numbers that equals the target."""
        parts = [text.split("+") for text in completions]
        return [
            float(len(p) > 1 and all(map(str.isdecimal, p)) and sum(map(int, p)) == wanted)
            for p, wanted in zip(parts, target, strict=True)
        ]

    return rows, score


@app.cell
def _(model, ntkrl, rows, score):
    changes = {
        "data.max_prompt_tokens": 8,
        "rollout.max_completion_tokens": 12,
        "eval.every_steps": 10,
        "probe.every_steps": 10,
        "probe.ledger_every_steps": 20,
    }
    runs = {
        method: ntkrl.train(
            model,
            rows,
            score,
            method,
            learning_rate=3e-4,
            steps=40,
            run_dir=f"runs/notebooks/{method}",
            config=changes,
        )
        for method in ("rl", "cfrl")
    }
    for _run in runs.values():
        print(_run)
    return (runs,)


@app.cell
def _(matplotlib, mo, runs):
    # Columns of metrics.jsonl; a metric that is measured now and then is NaN in between.
    figure = matplotlib.figure.Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for _axis, _name in zip(axes, ("reward", "probe/entropy"), strict=True):
        for _method, _run in runs.items():
            _rows = zip(_run.metrics["step"], _run.metrics[_name], strict=True)
            _points = [(step, value) for step, value in _rows if value == value]
            _axis.plot(*zip(*_points, strict=True), label=_method, marker=".")
        _axis.set_ylabel(_name)
    axes[0].legend()
    axes[1].set_xlabel("optimizer steps")
    mo.as_html(figure)
    return


@app.cell
def _(runs):
    # All metrics as a page, with the predictions by the kernels and the ledgers.
    page = runs["cfrl"].report()
    print(f"page: {page}")
    return


if __name__ == "__main__":
    app.run()
