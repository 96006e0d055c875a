"""Distillation on the server: what the ensemble knows goes back into the small model's adapter.

`distilling` is the method alone, with plain arguments; `student` holds the small model in torch,
`large` asks the large one, `kept` keeps its answers on disk. `__main__` is one run of it: from a
job's last version to its next epoch. Needs the extra `distil`; knows no device and no private row.
"""
