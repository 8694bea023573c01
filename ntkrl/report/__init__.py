"""Reports: run directories written line by line, and read back as figures, tables and a page.

Promise: a report is built from run directories alone, without an accelerator, during the run or
after a crash; missing parts are named in words; equal directories give equal bytes.

May import numpy, matplotlib, jinja2, the loggers' packages, the standard library, and
`ntkrl.intervals`, `ntkrl.durable_files`, `ntkrl.json_files` and `ntkrl.messages`: never jax.
"""

from ntkrl.report.comparisons import comparison_table
from ntkrl.report.explanation import Explanation, Place, explain, find_ledger
from ntkrl.report.figures import FIGURES
from ntkrl.report.kernel_figure import format_kernel, write_kernel
from ntkrl.report.line_record import (
    FINISHED_FILE,
    LineRecord,
    changed_files,
    count_objects,
    file_sizes,
    finished_problems,
    mark_finished,
    restore_lines,
)
from ntkrl.report.loggers import LoggingSettings, check_loggers, open_loggers
from ntkrl.report.metric_names import (
    ALIASES,
    GLOSSARY,
    format_glossary,
    is_known,
    training_timings,
)
from ntkrl.report.metrics_writer import MetricsWriter, NoWriter
from ntkrl.report.page import (
    document,
    figure_section,
    folded_text,
    group_section,
    heading,
    save_page,
    section,
    table_section,
    write_report,
)
from ntkrl.report.plotting import MARKERS, PALETTE, figure_bytes, panels
from ntkrl.report.records import StepLedger, read_arrays, step_files
from ntkrl.report.rollouts_records import StepRollouts, encode_rollouts
from ntkrl.report.rollouts_writer import RolloutsWriter, shorten_rollouts
from ntkrl.report.runs import Run, read_metrics, read_run, series
from ntkrl.report.tables import Table, format_table
from ntkrl.report.terminal import encodable, format_text
