"""Rows of a vocabulary that is sharded over a process group: collectives, agreement of the ranks, losses."""
