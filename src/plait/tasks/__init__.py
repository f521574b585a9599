"""What is asked of a model, and how its answers are judged: data, splits, prompts, labels, metrics.

    schema      the kinds of tasks, frozen               loading    load_task, load_tasks
    rows        files and Hub data sets → rows           templates  Jinja2 in a sandbox
    examples    rows → prompts and answers               overlap    splits that share examples
    encoding    prompts and answers → tokens             metrics    answers → numbers
    checking    what `plait tasks check` shows         harness  tasks of lm-eval

Knows nothing of adapters or merging. Nothing is imported here, so that a task file is read without torch.
"""
