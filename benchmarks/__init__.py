"""The performance budget, measured: ``python -m benchmarks`` (or ``make bench``).

Every figure is taken against the bare client, in blocks whose order is random, and judged by its upper 95 % bound.
Provider and gate are real servers in other processes, so that the CPU time of a measuring process is the client's own.
"""
