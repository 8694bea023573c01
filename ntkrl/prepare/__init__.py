"""Conversion of published data sets to the files that runs read: examples, preferences, prompts.

The output is a function of the inputs, the settings and the seeds; files are written atomically;
labels of an interrupted run are reused; rows left out are counted in summary.json. Nothing is
downloaded.
"""

from ntkrl.prepare.pipeline import PrepareSettings, prepare
