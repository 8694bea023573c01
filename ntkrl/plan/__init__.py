"""What a run takes on a machine, before there is one: memory, arithmetic, traffic, time at best.

Every program of a run is compiled by the machine's own compiler for described devices. Times are
roofs: the most of compute at the published bfloat16 rate, of memory traffic and of what comes in
over all links at once. No program is faster; one that waits, or uses some links only, is slower.
"""

from ntkrl.plan.command import PlanSettings, plan, read_options
from ntkrl.plan.table import write_table

__all__ = ["PlanSettings", "plan", "read_options", "write_table"]
