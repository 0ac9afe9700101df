"""Speed and memory against what people use now: ``python -m benchmarks.run``; README.md says what each figure is."""

THREADS = 2  # of every contender
