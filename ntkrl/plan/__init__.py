"""Memory, FLOPs, traffic and time of a run on a machine that need not exist.

Every program of a run is compiled by the machine's compiler for abstract devices. Its time is the
sum over kernels of an overhead and the longest of arithmetic and memory traffic, each at a fraction
of the chip's published rate, and of collectives that are waited for; see `measure.predict`.
"""

from ntkrl.plan.planner import PlanSettings, plan, read_options, write_table
