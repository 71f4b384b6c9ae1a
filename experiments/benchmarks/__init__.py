"""The parts of `experiments.bench_attention --suite=gpu`: clock, contenders, suite and report."""
