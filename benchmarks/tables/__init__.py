"""Tables of what the algorithms do, each by one command: `python -m benchmarks.tables.label_skew` (or `.diloco`, `.attacks`).

Every finished run is a line of `--results`; a command that was interrupted goes on from there, and the table and its plot
are made anew from all lines that it needs. `--workers` runs are made at a time, of one thread each.
"""
