"""Config files: Python files of users, and the packaged ones by name (`rl`, `paper/cfrl`)."""

import inspect
import sys
import traceback
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ntkrl import configs, user_files
from ntkrl.messages import did_you_mean

OTHER_FORMATS = {".yaml", ".yml", ".toml", ".json", ".jsonl", ".ini", ".cfg"}


def packaged_configs() -> dict[str, Path]:
    """Return the config files of `ntkrl.configs` by name."""
    root = Path(configs.__path__[0])
    return {
        path.relative_to(root).with_suffix("").as_posix(): path
        for path in sorted(root.rglob("*.py"))
        if "\ndef get_config(" in path.read_text(encoding="utf-8")
    }


def find_config(name: str) -> Path:
    """Return the path of a config file, or of the packaged config of a name.

    Args:
      name: path, which wins if the file exists, or name of a packaged config.

    Raises:
      ValueError: no such file and no such name, or a file that is not Python.
    """
    path = Path(name)
    if path.suffix.lower() in OTHER_FORMATS:
        raise ValueError(
            f"--config={name}: configs are Python files, not {path.suffix[1:].upper()}. Take a "
            "packaged one and set values on the command line, for example --config=rl "
            "--model=DIR --config.rollout.temperature=0.9, or write a .py file with get_config() "
            "that starts from one (from ntkrl.configs import rl)."
        )
    if path.is_file():
        return path
    packaged = packaged_configs()
    if name in packaged:
        return packaged[name]
    known = f"packaged configs are {', '.join(packaged)}"
    stem = name.removesuffix(".py").removeprefix("./").removeprefix("configs/")
    if stem in packaged:
        hint = f"; did you mean --config={stem}, which is packaged?"
    elif Path(f"{name}.py").is_file():
        hint = f"; did you mean --config={name}.py?"
    else:
        hint = did_you_mean(stem, packaged)
    kind = "a directory" if path.is_dir() else "no such file"
    raise ValueError(
        f"--config={name}: {kind}{hint or '.'} Files are relative to {Path.cwd()}; {known}."
    )


def load_config(text: str) -> ConfigDict:
    """Return the config of `NAME` or `NAME:ARGUMENT`, locked.

    Args:
      text: see `find_config`; the argument is passed to the file's `get_config`.

    Raises:
      ValueError: no such config, or an error in its file, with the line.
    """
    name, *argument = text.split(":", 1)
    path = find_config(name)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # users' configs may import modules beside them
    config = _result(path, argument)
    if isinstance(config, dict):
        config = ConfigDict(config)
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"{path}: get_config returned {type(config).__name__}; expected a ConfigDict, such as "
            "that of base.get_config() with some values changed."
        )
    return config.lock()


def _result(path: Path, argument: list[str]) -> Any:
    """Execute a config file and return the result of its get_config."""
    try:
        module = user_files.execute(path)
        if not hasattr(module, "get_config"):
            raise ValueError("it has no function get_config(), which returns the config.")
        if argument and not inspect.signature(module.get_config).parameters:
            raise ValueError(f"it has no variants; leave out ':{argument[0]}'.")
        return module.get_config(*argument)
    except SyntaxError as error:
        raise ValueError(f"{path} is not valid Python: {error}.") from error
    except ModuleNotFoundError as error:
        hint = "; packaged configs are imported by `from ntkrl.configs import base`"
        hint = hint if (error.name or "").split(".")[0] == "configs" else ""
        raise ValueError(f"{path}: {error.msg}{hint}.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)
        ]
        at = f", line {lines[-1]}" if lines else ""
        text = " ".join(str(error.args[0] if error.args else error).split())
        raise ValueError(f"{path}{at}: {type(error).__name__}: {text}") from error
