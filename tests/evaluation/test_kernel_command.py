"""`ntkrl kernel` from the command line: its files, compared with ntk itself; mistakes."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import data, models, ntk
from ntkrl.evaluation import kernel_command
from ntkrl.main import main
from tests.oracles import part_kernel, role_jacobians
from tests.toys import torch_neox, toy_params, toy_policy

PROMPTS = ("24=", "7+1", "(3*2-15")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny GPT-NeoX written by transformers, with the built-in task's tokenizer."""
    place = tmp_path_factory.mktemp("plain")
    torch_neox(place, vocab_size=18)
    data.save_tokenizer(place)
    return place


@pytest.fixture
def prompts(tmp_path):
    """A text file of three prompts and a blank line."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS) + "\n")
    return path


def run(model, prompts, out, *more):
    """Run the command and return kernel.npz."""
    assert main(["kernel", str(model), f"--prompts={prompts}", f"--out={out}", *more]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["kernel.npz", "kernel.png"]
    assert (out / "kernel.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "kernel.png").stat().st_size > 20_000
    return dict(np.load(out / "kernel.npz", allow_pickle=False))


@pytest.fixture
def loaded_once(monkeypatch):
    """Give the command and the test one policy object, so that they share compiled programs."""
    load = functools.cache(models.load)
    monkeypatch.setattr(models, "load", load)
    return load


def test_arrays_are_those_of_ntk(model, prompts, tmp_path, capsys, loaded_once):
    """story: the last positions of three prompts; every array against a direct call."""
    result = run(model, prompts, tmp_path / "out", "--eigenpairs=4")
    assert tuple(result["texts"]) == PROMPTS and tuple(result["endings"]) == ("=", "1", "5")
    np.testing.assert_array_equal(result["tokens"][0], [1, 1, 1, 1, 4, 6, 17])  # padded on the left
    assert result["mask"].sum() == 13 and list(result["rows"]) == [0, 1, 2]
    assert list(result["positions"]) == [6, 6, 6]

    policy, params = loaded_once(str(model), jnp.float32)
    contexts = ntk.last_positions(jnp.asarray(result["tokens"]), jnp.asarray(result["mask"]))
    kernel = ntk.kernel(policy, params, contexts)
    expected = {"head": kernel.head}
    expected |= {f"trace_{part}": kernel.trace(part) for part in ("head", "body", "full")}
    expected |= {f"frobenius_{p}": ntk.frobenius(kernel, p) for p in ("head", "body", "full")}
    expected |= {f"eigenvalues_{p}": ntk.eigenpairs(kernel, 4, p)[0] for p in ("body", "full")}
    for name, values in expected.items():
        np.testing.assert_allclose(result[name], values, rtol=1e-4, atol=1e-3, err_msg=name)
    norms = np.sqrt(np.diagonal(kernel.head))
    np.testing.assert_allclose(result["cosines"], kernel.head / np.outer(norms, norms), atol=1e-5)
    values = np.linalg.eigvalsh(kernel.head)[::-1]
    np.testing.assert_allclose(result["eigenvalues_head"], values, rtol=1e-4)
    trace, full = np.asarray(kernel.trace("head")), np.asarray(kernel.trace("full"))
    off = ~np.eye(3, dtype=bool)
    shares = [trace.trace() / full.trace(), trace[off].sum() / full[off].sum()]
    np.testing.assert_allclose(result["share_head"], shares, rtol=1e-4)
    np.testing.assert_allclose(result["share_head"] + result["share_body"], 1.0, atol=1e-5)

    text = capsys.readouterr().out
    assert "prompts: 3 of 3" in text and "contexts: 3 of 3" in text
    assert "features: " in text and "traces of body: " in text and "FLOPs" in text
    assert "head, R" in text and "cosines of the features" in text


def tied_head(params, phi):
    """Read the embedding."""
    return jnp.einsum("...d,vd->...v", phi, params["embed"])


def test_an_interrupted_command_leaves_what_it_computed(model, prompts, tmp_path, monkeypatch):
    """story: the search for eigenvalues fails; traces and norms are in the file, and readable."""

    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(ntk, "eigenpairs", fail)
    out = tmp_path / "out"
    settings = kernel_command.KernelSettings(str(model), str(prompts), str(out))
    with pytest.raises(KeyboardInterrupt):
        kernel_command.compute_kernels(settings)
    known = set(np.load(out / "kernel.npz"))
    assert {"tokens", "texts", "head", "trace_full", "share_body", "frobenius_full"} <= known
    assert not any(name.startswith("eigenvalues_full") for name in known)
    chosen = run(model, prompts, out, "--measures=traces")  # replaces the file
    assert "trace_full" in chosen and "frobenius_full" not in chosen


def test_a_tied_model_in_float64(model, tmp_path, capsys, monkeypatch):
    """oracle: some positions of chats, a toy in the model's place; V Jacobian rows a context."""
    toy = toy_policy(18)
    policy = dataclasses.replace(toy, head=tied_head, head_weight="embed", tied=True)

    def load(path, dtype):
        params = toy_params(policy, dtype=dtype)
        return policy, {name: params[name] for name in ("embed", "mix")}

    monkeypatch.setattr(models, "load", load)
    chats = tmp_path / "model"
    shutil.copytree(model, chats)
    settings = json.loads((chats / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    (chats / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("1", "23*4", "9")]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--positions=all", "--max_contexts=3", "--limit=2", "--dtype=float64"]
    result = run(chats, prompts, tmp_path / "out", *words)
    assert not jax.config.jax_enable_x64 and result["head"].dtype == np.float64
    assert list(result["texts"]) == ["1=", "23*4="]
    # of the seven contexts the first, the fourth and the last
    np.testing.assert_array_equal(result["rows"], [0, 1, 1])
    np.testing.assert_array_equal(result["positions"], [3, 1, 4])
    assert list(result["endings"]) == ["1", "3", "="]
    text = capsys.readouterr().out
    assert "prompts: 2 of 3" in text and "contexts: 3 of 7" in text

    with jax.enable_x64(True):
        places = (result["positions"], result["rows"], jnp.asarray(result["mask"]))
        contexts = ntk.Contexts(jnp.asarray(result["tokens"]), *places)
        params = load(None, jnp.float64)[1]
        jacobians = role_jacobians(policy.features, policy.head, params, contexts)
    for part in ("head", "body", "cross", "full"):
        dense = part_kernel(part, jacobians, jacobians, "embed")
        np.testing.assert_allclose(result[f"trace_{part}"], np.einsum("ouvv->ou", dense), rtol=1e-9)
        assert result[f"frobenius_{part}"] == pytest.approx(np.linalg.norm(dense), rel=1e-9)
        if part in ("body", "full"):
            values = np.linalg.eigvalsh(dense.transpose(0, 2, 1, 3).reshape(54, 54))[::-1][:8]
            np.testing.assert_allclose(result[f"eigenvalues_{part}"], values, rtol=1e-8)
    shares = sum(result[f"share_{part}"] for part in ("head", "body", "cross"))
    np.testing.assert_allclose(shares, 1.0, rtol=1e-9)


def test_every_option_arrives(monkeypatch):
    """by hand: words become settings of their types."""
    calls = []
    monkeypatch.setattr(kernel_command, "compute_kernels", calls.append)
    words = ["--prompts=p", "--out=o", "--positions=all", "--eigenpairs=3", "--max_contexts=4"]
    words += ["--dtype=bfloat16", "--memory_gib=0.5", "--limit=6", "--layers"]
    words += ["--measures=head,norms"]
    assert main(["kernel", "m", *words]) == main(["kernel", "m", "--prompts=p"]) == 0
    first = kernel_command.KernelSettings(
        "m", "p", "o", "all", 3, 4, "bfloat16", 0.5, 6, True, ("head", "norms")
    )
    assert calls == [first, kernel_command.KernelSettings("m", "p")]


MISTAKES = {
    "unknown option": (
        ["--postions=all"],
        "--postions=all is not an option of kernel; did you mean '--positions'? Allowed",
    ),
    "no prompts": ([], "--prompts=FILE is missing"),
    "missing file": (["--prompts=nowhere.txt"], "nowhere.txt: no such file"),
    "no model": (["--prompts=x", "second"], "kernel takes one model, not 2 ("),
    "eigenpairs": (["--eigenpairs=0"], "--eigenpairs must be at least 1, not 0"),
    "too many eigenpairs": (["--eigenpairs=54"], "eigenpairs must be in [1, 54) for these"),
    "limit": (["--limit=2.5"], "--limit must be a whole number, not '2.5'"),
    "memory": (["--memory_gib=lots"], "--memory_gib must be a number, not 'lots'"),
    "no memory": (["--memory_gib=nan"], "--memory_gib must be a positive number, not nan"),
    "dtype": (["--dtype=float16"], "float32 or float64 or bfloat16, not 'float16'"),
    "positions": (["--positions=first"], "--positions must be last or all, not 'first'"),
    "measures": (
        ["--measures=head,norm"],
        "--measures are some of head,traces,norms,eigenvalues, not 'head,norm'",
    ),
    "switch": (["--layers=1"], "--layers: it takes no value, not '1'"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_one_sentence(model, prompts, tmp_path, capsys, mistake):
    """law: exit status 2, the cause and the allowed values, no traceback."""
    words, message = mistake
    if words and not words[0].startswith("--prompts"):
        words = [f"--prompts={prompts}", *words]
    out = tmp_path / "out"
    assert main(["kernel", str(model), f"--out={out}", *words]) == 2
    text = capsys.readouterr().err
    assert message in text and "Traceback" not in text and text.count("\n") == 1
    assert not (out / "kernel.npz").exists()


def test_files_that_do_not_fit(model, prompts, tmp_path, capsys):
    """law: a prompt that is too long, no tokenizer, a tokenizer too large, a file for --out."""
    long = tmp_path / "long.txt"
    long.write_text("1\n" + "2" * 65 + "\n")
    bare, small = tmp_path / "bare", tmp_path / "small"
    torch_neox(bare, vocab_size=18)
    torch_neox(small, vocab_size=17)
    data.save_tokenizer(small)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    capsys.readouterr()
    for words, message in (
        ([model, f"--prompts={long}"], "long.txt:2: 65 tokens"),
        ([bare, f"--prompts={prompts}"], "has no tokenizer; expected tokenizer.json"),
        ([small, f"--prompts={prompts}"], "has 18 entries, the model's vocabulary 17"),
        ([model, f"--prompts={empty}"], "the file is empty. Expected one prompt per line"),
        (
            [tmp_path / "no", f"--prompts={prompts}"],
            "is not a directory; give a Hugging Face",
        ),
        (
            [model, f"--prompts={prompts}", f"--out={long}"],
            "is a file; give a directory that you may write to (--out)",
        ),
    ):
        arguments = [f"--out={tmp_path / 'out'}", *map(str, words)]
        assert main(["kernel", *arguments]) == 2
        text = capsys.readouterr().err
        assert message in text and "Traceback" not in text and text.count("\n") == 1
        assert not (tmp_path / "out").exists()
