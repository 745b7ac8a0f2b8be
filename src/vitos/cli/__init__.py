"""The command line. Each verb reads its options, calls the library and prints.

- `main.py`: the verbs `train`, `eval`, `ask`, `serve`, `demo` and `doctor`, and the entry point `main`.
- `data.py`, `eval.py`, `recipes.py`: the verbs below `vitos data`, `vitos bench` and `vitos recipes`.
- `run.py`: the work of `vitos train`, from a recipe to a trained, evaluated and reported model.
- `launch.py`: several processes on one machine. `screen.py`: the console, progress bars, missing extras.

Modules that load PyTorch are imported inside the verbs, so that `vitos --help` is fast.
"""
