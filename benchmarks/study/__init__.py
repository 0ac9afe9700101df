"""The paper's comparison in miniature, on tasks whose exact update can be computed: ``python -m benchmarks.study``."""
