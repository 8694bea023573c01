"""Memory, FLOPs, traffic and roofline time of a run on a machine that need not exist.

Every program of a run is compiled by the machine's compiler for abstract devices. Times are lower
bounds: the maximum of compute at the published bfloat16 rate, memory traffic, and bytes received
over all links at once.
"""

from ntkrl.plan.planner import PlanSettings, plan, read_options, write_table
