"""What is asked of a model, and how its answers are judged: data, splits, prompts, labels, metrics.

    schema      what all kinds share         kinds      one file per kind, lm-eval's tasks too
    asking      how a model is asked         inputs     one example: named inputs, target
    loading     load_task, load_tasks        rows       files and Hub data sets → rows
    examples    rows → examples              templates  Jinja2 in a sandbox
    encoding    prompts, answers → tokens    overlap    splits that share examples
    answers     answers, sums over them      metrics    answers → numbers, by name
    checking    what `plait tasks check` shows

Independent of adapters or merging. Nothing is imported here, so that a task file is read without torch.
"""
