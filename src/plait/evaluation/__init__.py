"""What a merge kept: base, single adapters and merges on the same examples, and what follows from their answers.

likelihood, generation, heads   a model and tokens → answers      answering   which of them a task needs
harness     the same, by lm-eval's evaluator
subsets     a fixed sample of a split                             scores      answers, kept by content hash
recovery    answers → recovery and intervals                      candidates  what is put on the base, and its hash
pipeline    the way from a request to an `Evaluation`             comparison  many merges, one leaderboard
record      the `Evaluation`, as JSON                             workspace   where results go
"""
