"""Reports: run directories written line by line, and read back as figures, tables and a page.

Promise: a report is built from run directories alone, without an accelerator, during the run or
after a crash; missing parts are named in words; equal directories give equal bytes.

May import numpy, matplotlib, jinja2, the loggers' packages, the standard library and
`ntkrl.intervals`: never jax.
"""

from ntkrl.report.comparisons import comparison_table as comparison_table
from ntkrl.report.figures import FIGURES as FIGURES
from ntkrl.report.kernel_figure import format_kernel as format_kernel
from ntkrl.report.kernel_figure import write_kernel as write_kernel
from ntkrl.report.loggers import LoggingSettings as LoggingSettings
from ntkrl.report.loggers import check_loggers as check_loggers
from ntkrl.report.loggers import open_loggers as open_loggers
from ntkrl.report.metric_names import ALIASES as ALIASES
from ntkrl.report.metric_names import GLOSSARY as GLOSSARY
from ntkrl.report.metric_names import format_glossary as format_glossary
from ntkrl.report.metric_names import is_known as is_known
from ntkrl.report.metric_names import training_timings as training_timings
from ntkrl.report.metrics_writer import MetricsWriter as MetricsWriter
from ntkrl.report.metrics_writer import NoWriter as NoWriter
from ntkrl.report.metrics_writer import mark_finished as mark_finished
from ntkrl.report.page import document as document
from ntkrl.report.page import figure_section as figure_section
from ntkrl.report.page import folded_text as folded_text
from ntkrl.report.page import group_section as group_section
from ntkrl.report.page import heading as heading
from ntkrl.report.page import section as section
from ntkrl.report.page import table_section as table_section
from ntkrl.report.page import write_report as write_report
from ntkrl.report.plotting import MARKERS as MARKERS
from ntkrl.report.plotting import PALETTE as PALETTE
from ntkrl.report.plotting import figure_bytes as figure_bytes
from ntkrl.report.plotting import panels as panels
from ntkrl.report.records import read_arrays as read_arrays
from ntkrl.report.records import step_files as step_files
from ntkrl.report.runs import Run as Run
from ntkrl.report.runs import read_run as read_run
from ntkrl.report.runs import series as series
from ntkrl.report.tables import Table as Table
from ntkrl.report.tables import format_table as format_table
from ntkrl.report.terminal import format_text as format_text
