"""Lets people look at the record of a training run in a browser, label its rollouts, and repair its probes: ``probescore review``.

Rows of the record are read once, into an index on this machine, from which every page reads the rows that it shows. Labels go the other
way: they are appended to the record, durably, and the index reads them from there as it reads everything else.
"""
