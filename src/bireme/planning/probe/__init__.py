"""Measures this machine, through the ranks, collectives and reader that inference uses.

The one home of such measuring: what it finds is a `Cluster`, and who needs it reads that.
"""
