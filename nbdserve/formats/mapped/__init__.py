"""The engine that qcow and qcow2 share: guest clusters mapped through two levels of tables.

Both formats map guest clusters to host clusters through an L1 and many L2
tables, and differ in how an entry is spelled and in how free space is kept.
Here is everything else: the tables in memory, the allocation of clusters, the
order in which things become durable, and reading, writing and discarding on top.
"""
