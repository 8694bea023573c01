"""The package of configs: `from ntkrl.configs import base` in a config file of any directory.

Its modules are the files of `configs/`, installed as `ntkrl/configs/`, or those of the checkout.
"""

from pathlib import Path

_HERE = Path(__file__)
_INSTALLED = _HERE.with_suffix("")

__path__ = [str(_INSTALLED if _INSTALLED.is_dir() else _HERE.parent.parent / "configs")]
