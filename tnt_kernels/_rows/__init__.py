"""What whole and sharded vocabularies have in common: checks, operators' schemas, rows in memory."""
