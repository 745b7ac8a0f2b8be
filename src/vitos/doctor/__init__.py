"""`vitos doctor`: a check of this machine, and an estimate of the memory and time of a recipe.

Read in this order:

1. `machine.py`: the checks of this machine (versions, devices, extras, disk).
2. `recipe.py`: the estimate of a recipe on a number of devices, with remedies.
3. `estimate.py`: the formulas for memory and time. `shapes.py`: the sizes of a model from its configuration.
   `devices.py`: memory and speed of known devices.

`tests/doctor/test_estimate.py` compares the memory with measured peaks of small models. It was not compared on GPUs.
"""
