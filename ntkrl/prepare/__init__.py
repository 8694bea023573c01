"""Published data sets into the files that runs read: examples, preferences, prompts.

Promises: what is written is a function of the inputs, the settings and the seeds, and each file is
written whole; labels of a run that was cut off are not computed again; what was left out is
counted in summary.json. Nothing is downloaded.
"""

from ntkrl.prepare.command import PrepareSettings, prepare

__all__ = ["PrepareSettings", "prepare"]
