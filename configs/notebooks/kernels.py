"""Exact neural tangent kernels of your model on your texts.

Command: marimo edit configs/notebooks/kernels.py, or python configs/notebooks/kernels.py
Hardware: two CPU cores, about a minute; larger models take longer, see `ntkrl.kernels`.
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")


@app.cell
def _():
    import marimo as mo
    import numpy as np

    import ntkrl

    return mo, np, ntkrl


@app.cell
def _(ntkrl):
    # A small model. Put the directory of yours, or a name of the Hub, in its place.
    base = ntkrl.train(config="quickstart/base", steps=300, run_dir="runs/notebooks/base")
    model = base.directory / "export"
    texts = ["12=", "24=", "24=3*", "24=3*8", "36=4*9", "36=30+"]
    return model, texts


@app.cell
def _(model, ntkrl, texts):
    # K(o, u) = R + G: the head's part is ⟨φ(o), φ(u)⟩ I, the body's is exact too.
    arrays = ntkrl.kernels(model, texts, layers=True)
    return (arrays,)


@app.cell
def _(arrays, np):
    for _part in ("head", "body"):
        _same, _other = arrays[f"share_{_part}"]
        print(f"{_part}: {_same:.2f} of tr K in a context, {_other:.2f} between two")
    for _name, _trace in zip(arrays["layers"], arrays["trace_layers"], strict=True):
        print(f"  {_name}: {np.trace(_trace) / np.trace(arrays['trace_full']):.2f}")
    print("cosines of features:")
    print(np.round(arrays["cosines"], 2))
    return


@app.cell
def _(arrays, mo):
    # The figure of `ntkrl kernel`.
    from pathlib import Path

    from ntkrl import report

    picture = Path("runs/notebooks/kernel.png")
    report.write_kernel(picture, arrays)
    mo.image(picture)
    return


if __name__ == "__main__":
    app.run()
