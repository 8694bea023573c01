"""Reports: run directories written line by line, and read back as figures, tables and a page.

Promise: a report is built from run directories alone, without an accelerator, during the run or
after a crash; missing parts are named in words; equal directories give equal bytes.

May import numpy, matplotlib, jinja2, the loggers' packages, the standard library and
`ntkrl.intervals`: never jax.
"""

from ntkrl.report.figures import FIGURES as FIGURES
from ntkrl.report.glossary import format_glossary as format_glossary
from ntkrl.report.kernels import format_kernel as format_kernel
from ntkrl.report.kernels import write_kernel as write_kernel
from ntkrl.report.loggers import LoggingSettings as LoggingSettings
from ntkrl.report.loggers import check_loggers as check_loggers
from ntkrl.report.loggers import open_loggers as open_loggers
from ntkrl.report.names import ALIASES as ALIASES
from ntkrl.report.names import GLOSSARY as GLOSSARY
from ntkrl.report.names import is_known as is_known
from ntkrl.report.page import document as document
from ntkrl.report.page import saved as saved
from ntkrl.report.page import write_report as write_report
from ntkrl.report.plotting import MARKERS as MARKERS
from ntkrl.report.plotting import PALETTE as PALETTE
from ntkrl.report.plotting import panels as panels
from ntkrl.report.probes import read_arrays as read_arrays
from ntkrl.report.probes import step_files as step_files
from ntkrl.report.runs import Run as Run
from ntkrl.report.runs import read_run as read_run
from ntkrl.report.runs import series as series
from ntkrl.report.table import format_table as format_table
from ntkrl.report.text import format_text as format_text
from ntkrl.report.writers import MetricsWriter as MetricsWriter
from ntkrl.report.writers import NoWriter as NoWriter
from ntkrl.report.writers import mark_finished as mark_finished
